"""The examples run, and show what they say they show."""

import argparse
import re
import runpy
import signal
import subprocess
import sys
import time

from flax import nnx
from helpers import scripts
import jax
import numpy as np
import optax
import pytest

import optaccum
from optaccum.testing import check_loss, check_step

pytestmark = pytest.mark.slow

for requirement in ("flax", "matplotlib", "rich", "sklearn"):
    pytest.importorskip(requirement)
pytest.importorskip("orbax.checkpoint")

DIGITS = scripts.REPOSITORY / "examples" / "digits.py"
FULL_BATCH = "full batch"
MICROBATCHES = ("accumulate(k, adamw)", "the same, ragged")
TRAP = "chain(accumulate(k), adamw)"


@pytest.fixture(scope="module")
def digits():
    return scripts.load(DIGITS)


@pytest.fixture(scope="module")
def digits_figure(tmp_path_factory):
    return tmp_path_factory.mktemp("digits") / "losses.png"


@pytest.fixture(scope="module")
def digits_printed(digits_figure):
    """What a short run prints; it is run once for all tests, as a reader would run it."""
    printed = scripts.run(
        sys.executable, DIGITS, "--steps", "3", "--every-k", "8", "--output", digits_figure
    )
    return printed


@pytest.fixture(scope="module")
def digits_table(digits_printed):
    """The printed table: {name: (loss, accuracy, largest difference, temporaries)}."""
    row = r"(?m)^ *(\S.*?)  +([\d.]+) +([\d.]+)% +(\S+) +([\d.]+) ([kM]?B)"
    units = {"B": 1.0, "kB": 1e3, "MB": 1e6}
    return {
        name: (float(loss), float(accuracy), float(difference), float(size) * units[unit])
        for name, loss, accuracy, difference, size, unit in re.findall(row, digits_printed)
    }


def test_digits_prints_a_row_per_way(digits_table):
    assert tuple(digits_table) == (FULL_BATCH, *MICROBATCHES, TRAP)


@pytest.mark.parametrize("way", MICROBATCHES)
def test_digits_microbatches_train_like_the_full_batch(digits_table, way):
    loss, _, difference, _ = digits_table[way]
    assert difference < 1e-5
    assert loss == pytest.approx(digits_table[FULL_BATCH][0], abs=1e-5)


def test_digits_chained_adamw_does_not(digits_table):
    loss, _, difference, _ = digits_table[TRAP]
    assert difference > 1e-3
    assert loss != pytest.approx(digits_table[FULL_BATCH][0], abs=1e-2)


@pytest.mark.parametrize("way", MICROBATCHES)
def test_digits_microbatches_need_less_memory(digits_table, way):
    assert digits_table[way][3] < digits_table[FULL_BATCH][3] / 2


def test_digits_writes_the_figure(digits_printed, digits_figure):
    assert str(digits_figure) in digits_printed
    assert digits_figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("script", ["digits.py", "clip.py"])
def test_ctrl_c_leaves_no_traceback_and_no_figure(script, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sklearn.datasets.load_digits", stop)
    monkeypatch.setattr(sys, "argv", [script, "--output", str(tmp_path / "figure.png")])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(DIGITS.with_name(script)), run_name="__main__")
    assert exit_.value.code == 130
    assert not list(tmp_path.iterdir())


def steps_of(digits, transformation):
    """The example's own training step, in the form that a check takes."""

    def make_step(model, every_k):
        graph, params = nnx.split(model, nnx.Param)
        tx = transformation(every_k)
        train_step = digits.make_train_step(graph, tx)
        return (params, tx.init(params)), lambda state, rows: train_step(*state, *rows)[:2]

    return make_step


@pytest.mark.filterwarnings("ignore:`accumulate` stands in front:UserWarning")
@pytest.mark.parametrize(
    ("transformation", "kind"),
    [
        (lambda k: optaccum.accumulate(k, optax.adamw(1e-3)), None),
        (lambda k: optax.chain(optaccum.accumulate(k), optax.adamw(1e-3)), "optimizer"),
    ],
    ids=["accumulate", "trap"],
)
def test_digits_training_step_is_judged(digits, transformation, kind):
    random = np.random.default_rng(0)
    images = random.normal(size=(8, 8, 8)).astype(np.float32)
    batch = images, random.integers(0, 10, 8), np.array([1, 1, 1, 0, 1, 1, 0, 0], bool)
    model = digits.CNN(nnx.Rngs(0))
    report = check_step(steps_of(digits, transformation), model, batch, every_k=2)
    assert report.kind == kind, report


@pytest.mark.parametrize("every_k", [1, 2, 8, 128, 256])
def test_ragged_microbatches_hold_the_batch(digits, every_k):
    _, _, ragged, _ = digits.make_ways(every_k, steps=3)
    assert len(ragged.sizes) == every_k
    assert min(ragged.sizes) >= 1
    batch = np.arange(digits.BATCH_SIZE)
    cut = list(digits.cut_up(batch, batch, ragged.sizes))
    np.testing.assert_array_equal(np.concatenate([images[mask] for images, _, mask in cut]), batch)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--every-k", "-8"),
        ("--every-k", "3"),
        ("--output", "missing/losses.png"),
        ("--output", "losses.txt"),
    ],
)
def test_digits_refuses_what_cannot_work(tmp_path, digits, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["digits.py", option, value])
    with pytest.raises(SystemExit) as exit_:
        digits.parse_args()
    assert exit_.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The contrastive example: `microbatched` trains like the full batch, averaged gradients do not.

CLIP = scripts.REPOSITORY / "examples" / "clip.py"


@pytest.fixture(scope="module")
def clip_figure(tmp_path_factory):
    return tmp_path_factory.mktemp("clip") / "clip.png"


@pytest.fixture(scope="module")
def clip_table(clip_figure):
    """The printed table: {name: (reported loss, loss, largest difference, temporaries)}."""
    printed = scripts.run(sys.executable, CLIP, "--steps", "3", "--output", clip_figure)
    row = r"(?m)^ *(\S.*?)  +([\d.]+) +([\d.]+) +[\d.]+% +(\S+) +([\d.]+) MB"
    found = re.findall(row, printed)
    return {name: tuple(map(float, cells)) for name, *cells in found}


def test_clip_with_microbatched_trains_like_the_full_batch(clip_table):
    full, coupled, naive = clip_table.values()
    assert coupled[0] == pytest.approx(full[0], abs=1e-4)
    # Three steps of 3e-3, each divided by |g|, some of which are near zero.
    assert coupled[2] < 1e-3 < naive[2]
    assert abs(naive[0] - full[0]) > 1


def test_clip_with_microbatched_needs_less_memory(clip_table):
    assert clip_table["microbatched"][3] < 0.6 * clip_table["full batch"][3]


def test_clip_writes_the_figure(clip_table, clip_figure):
    assert clip_figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--microbatches", "3"),
        ("--output", "missing/clip.png"),
        ("--output", "clip.txt"),
    ],
)
def test_clip_refuses_what_cannot_work(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clip.py", option, value])
    with pytest.raises(SystemExit):
        scripts.load(CLIP).parse_args()
    assert f"argument {option}: " in capsys.readouterr().err


# The language model trains, is stopped and goes on, and weighs its microbatches rightly.

LM = scripts.REPOSITORY / "examples" / "lm.py"
SETTINGS = {"steps": 5, "every_k": 4, "batch_size": 2, "width": 32, "layers": 1}
LAST = SETTINGS["steps"] * SETTINGS["every_k"]
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
COMMAND = [sys.executable, "-W", "error", str(LM), *OPTIONS]


@pytest.fixture(scope="module")
def lm():
    return scripts.load(LM)


@pytest.fixture(scope="module")
def rows(lm):
    return lm.read_paragraphs()[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints and the figure of a run that nothing stopped, as `run`."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, "--output=lm.svg", "--save-every=7", "--compare-steps=30")


def run(folder, *options):
    """Returns what the program prints that runs to its end in `folder`."""
    printed = scripts.run(*COMMAND, *options, cwd=folder)
    return printed


def saved(lm, folder):
    """Returns the numbers of the checkpoints in `folder`, and the variables in the last one."""
    args = make_args(folder)
    model = lm.LanguageModel(args.width, args.layers, nnx.Rngs(1))
    like = nnx.state({"model": model, "optimizer": lm.make_optimizer(model, args)}), None
    with lm.open_checkpoints(args.checkpoints) as checkpoints:
        numbers = [checkpoint.step for checkpoint in checkpoints.checkpoints]
        return numbers, checkpoints.load(numbers[-1], like)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def make_args(folder, **settings):
    settings = {**SETTINGS, "noise": False, **settings}
    return argparse.Namespace(
        **settings,
        settings=settings,
        save_every=7,
        checkpoints=folder / "lm-checkpoints",
    )


def test_lm_says_what_it_has_learnt(finished):
    folder, printed = finished
    (bits,) = re.findall(r"Held out: ([\d.]+) bits per byte", printed)
    assert 1 < float(bits) < 8  # 8 is not to know anything
    assert str(folder / "lm.svg") in printed
    assert "weight=tokens" in (folder / "lm.svg").read_text()


def test_lm_keeps_two_checkpoints(lm, finished):
    numbers, _ = saved(lm, finished[0])
    assert numbers == [LAST // 7 * 7, LAST]


def test_lm_weighted_microbatches_train_like_the_full_batch(finished):
    """And the mean of their means does not; a step moves a parameter by about 5e-3."""
    found = re.findall(r"(?m)^(full|weight|no).*: loss (\S+), .* within (\S+) of", finished[1])
    ways = {way: (float(loss), float(distance)) for way, loss, distance in found}
    assert list(ways) == ["full", "weight", "no"]
    assert ways["weight"][0] == pytest.approx(ways["full"][0], abs=2e-4)  # 4 decimals are printed
    assert ways["weight"][1] < 5e-5
    assert ways["no"][0] != pytest.approx(ways["full"][0], abs=1e-3)
    assert ways["no"][1] > 5e-3


def test_lm_has_a_loss_that_counts_real_tokens(lm, rows):
    """A microbatch counts as the example says, and the check finds that by itself."""
    graph, params = nnx.split(lm.LanguageModel(32, 1, nnx.Rngs(0)), nnx.Param)

    def loss(params, rows):
        return lm.loss_fn(nnx.merge(graph, params), rows)

    options = {"has_aux": True, "num_microbatches": 4}
    batch = np.stack(sorted(rows[:8], key=lambda row: (row != lm.PADDING).sum()))
    report = check_loss(loss, params, batch, **options)
    assert report.kind == "weights"
    assert f"(rows[:, 1:] != {lm.PADDING}).sum()" in report.remedy
    assert check_loss(
        loss, params, batch, weight_fn=lambda params, rows: loss(params, rows)[1], **options
    ).exact


def train(lm, rows, args, stop_after=None):
    """Trains as the program does, but with a signal that comes just when it is wanted."""
    caught = []

    def read_microbatch(rows, number, args):
        if number + 1 == stop_after:
            caught.append(signal.SIGTERM)
        return original(rows, number, args)

    original = lm.read_microbatch
    model = lm.LanguageModel(args.width, args.layers, nnx.Rngs(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "read_microbatch", read_microbatch)
        lm.train(model, rows, args, caught)


def test_lm_stopped_in_mid_window_ends_with_the_same_bits(lm, rows, tmp_path):
    whole, parts = make_args(tmp_path / "whole"), make_args(tmp_path / "parts")
    train(lm, rows, whole)
    for stop_after in (5, 11):  # the first of a window and the third
        with pytest.raises(SystemExit) as exit_:
            train(lm, rows, parts, stop_after)
        assert exit_.value.code == 143
        numbers, _ = saved(lm, tmp_path / "parts")
        assert numbers[-1] == stop_after
    train(lm, rows, parts)
    expected, actual = saved(lm, tmp_path / "whole"), saved(lm, tmp_path / "parts")
    assert expected[0] == actual[0] == [14, LAST]
    assert_same(actual[1], expected[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_lm_saves_at_a_signal_and_goes_on(lm, finished, tmp_path, number, code):
    options = ["--save-every=7", "--compare-steps=0"]
    process = subprocess.Popen(
        [*COMMAND, *options],
        cwd=tmp_path,
        env=scripts.ENVIRONMENT,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        while process.poll() is None and not (tmp_path / "lm-checkpoints").exists():
            time.sleep(0.01)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, errors
    (done,) = re.findall(r"Saved after microbatch (\d+)", printed)
    assert saved(lm, tmp_path)[0][-1] == int(done) < LAST
    assert not (tmp_path / "lm.png").exists()
    if number == signal.SIGTERM:  # after which it goes on as above, within one process
        return
    run(tmp_path, *options, "--resume")
    assert_same(saved(lm, tmp_path)[1], saved(lm, finished[0])[1])


def test_lm_holds_no_paragraph_out_that_it_trains_on(lm, rows):
    _, held_out = lm.read_paragraphs()
    assert min(len(rows), len(held_out)) > 100
    for row in (rows[0], held_out[0]):
        assert row.shape == (lm.LENGTH + 1,)
        assert row[0] == lm.END
    assert not {row.tobytes() for row in rows} & {row.tobytes() for row in held_out}


def test_lm_reads_the_text(lm, rows):
    row = next(row for row in rows if row[-1] == lm.PADDING)
    length = int((row != lm.PADDING).sum())
    assert row[length - 1] == lm.END
    assert bytes(row[1 : length - 1].tolist()).decode() in "\n\n".join(lm.topics.values())


def test_lm_has_windows_of_distinct_paragraphs_sorted_by_length(lm, rows, tmp_path):
    args = make_args(tmp_path)
    numbers = range(SETTINGS["every_k"], 2 * SETTINGS["every_k"])
    window = np.concatenate([lm.read_microbatch(rows, number, args) for number in numbers])
    assert len({row.tobytes() for row in window}) == len(window) == 8
    lengths = (window != lm.PADDING).sum(axis=1)
    assert (np.diff(lengths) >= 0).all()
    assert lengths[-1] > lengths[0]
    np.testing.assert_array_equal(lm.read_microbatch(rows, 5, args), window[2:4])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--every-k", "-8"),
        ("--width", "48"),
        ("--compare-steps", "-1"),
        ("--save-every", "0"),
        ("--output", "missing/lm.png"),
        ("--output", "lm.txt"),
        ("--resume", None),
    ],
)
def test_lm_refuses_what_cannot_work(tmp_path, lm, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    assert refusal(lm, monkeypatch, capsys, option, *([value] if value else [])) == option
    assert not list(tmp_path.iterdir())


def test_lm_overwrites_no_run_and_resumes_no_other(finished, lm, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    assert refusal(lm, monkeypatch, capsys, *OPTIONS) == "--checkpoints"
    assert refusal(lm, monkeypatch, capsys, *OPTIONS, "--resume", "--width=64") == "--resume"


def refusal(lm, monkeypatch, capsys, *options):
    """Returns the option that a usage error names."""
    monkeypatch.setattr(sys, "argv", ["lm.py", *options])
    with pytest.raises(SystemExit) as exit_:
        lm.parse_args()
    assert exit_.value.code == 2
    (option,) = re.findall(r"error: argument (\S+): ", capsys.readouterr().err)
    return option


def test_lm_measures_the_noise_while_the_window_grows(tmp_path):
    printed = run(tmp_path, "--noise", "--output=noise.svg", "--steps=6")
    assert re.search(r"Noise scale: [\d,]+ bytes\. A step had [\d,]+\.", printed)
    assert "noise scale" in (tmp_path / "noise.svg").read_text()
    assert "compare" not in printed.lower()


def test_lm_noise_windows_double_until_they_are_full():
    lengths = scripts.load(LM.with_name("lm_noise.py")).window_length
    assert [int(lengths(step, 8, 8)) for step in range(8)] == [2, 2, 4, 4, 8, 8, 8, 8]
    assert [int(lengths(step, 6, 4)) for step in range(4)] == [2, 4, 6, 6]
    assert [int(lengths(step, 1, 2)) for step in range(2)] == [1, 1]
