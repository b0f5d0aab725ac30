"""The language model trains, is stopped and goes on, and weighs its microbatches rightly."""

import argparse
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

from helpers import scripts
import jax
import numpy as np
import pytest

from optaccum.testing import check_loss

pytestmark = pytest.mark.slow

for requirement in ("matplotlib", "rich"):
    pytest.importorskip(requirement)
nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("orbax.checkpoint")

REPOSITORY = Path(__file__).parents[1]
LM = REPOSITORY / "examples" / "lm.py"
SETTINGS = {"steps": 5, "every_k": 4, "batch_size": 2, "width": 32, "layers": 1}
LAST = SETTINGS["steps"] * SETTINGS["every_k"]
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
COMMAND = [sys.executable, "-W", "error", str(LM), *OPTIONS]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "COLUMNS": "100",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@pytest.fixture(scope="module", autouse=True)
def _runs_share_what_they_compile(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache"))
        )
        yield


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
    return folder, run(folder, "--output=lm.svg", "--save-every=7")


def run(folder, *options):
    """Returns what the program prints that runs to its end in `folder`."""
    done = subprocess.run(
        [*COMMAND, *options],
        cwd=folder,
        env=ENVIRONMENT,
        encoding="utf-8",
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_a_run_says_what_it_has_learnt(finished):
    folder, printed = finished
    (bits,) = re.findall(r"Held out: ([\d.]+) bits per byte", printed)
    assert 1 < float(bits) < 8  # 8 is not to know anything
    assert str(folder / "lm.svg") in printed
    assert "weight=tokens" in (folder / "lm.svg").read_text()


def test_a_run_keeps_two_checkpoints(lm, finished):
    numbers, _ = saved(lm, finished[0])
    assert numbers == [LAST // 7 * 7, LAST]


def test_weighted_microbatches_train_like_the_full_batch(finished):
    """And the mean of their means does not; a step moves a parameter by about 5e-3."""
    found = re.findall(r"(?m)^(full|weight|no).*: loss (\S+), .* within (\S+) of", finished[1])
    ways = {way: (float(loss), float(distance)) for way, loss, distance in found}
    assert list(ways) == ["full", "weight", "no"]
    assert ways["weight"][0] == pytest.approx(ways["full"][0], abs=2e-4)  # 4 decimals are printed
    assert ways["weight"][1] < 5e-5
    assert ways["no"][0] != pytest.approx(ways["full"][0], abs=1e-3)
    assert ways["no"][1] > 5e-3


def test_the_loss_counts_real_tokens(lm, rows):
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


def test_a_run_stopped_in_mid_window_ends_with_the_same_bits(lm, rows, tmp_path):
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
def test_a_signal_saves_and_exits_and_resume_goes_on(lm, finished, tmp_path, number, code):
    options = ["--save-every=7", "--compare-steps=0"]
    process = subprocess.Popen(
        [*COMMAND, *options],
        cwd=tmp_path,
        env=ENVIRONMENT,
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


def test_no_paragraph_is_both_held_out_and_trained_on(lm, rows):
    _, held_out = lm.read_paragraphs()
    assert min(len(rows), len(held_out)) > 100
    for row in (rows[0], held_out[0]):
        assert row.shape == (lm.LENGTH + 1,)
        assert row[0] == lm.END
    assert not {row.tobytes() for row in rows} & {row.tobytes() for row in held_out}


def test_rows_are_the_text(lm, rows):
    row = next(row for row in rows if row[-1] == lm.PADDING)
    length = int((row != lm.PADDING).sum())
    assert row[length - 1] == lm.END
    assert bytes(row[1 : length - 1].tolist()).decode() in "\n\n".join(lm.topics.values())


def test_a_window_holds_distinct_paragraphs_sorted_by_length(lm, rows, tmp_path):
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
def test_what_cannot_work_is_refused(tmp_path, lm, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    assert refusal(lm, monkeypatch, capsys, option, *([value] if value else [])) == option
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_overwritten_nor_resumed_as_another(finished, lm, monkeypatch, capsys):
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


def test_the_noise_is_measured_while_the_window_grows(tmp_path):
    printed = run(tmp_path, "--noise", "--output=noise.svg", "--steps=6")
    assert re.search(r"Noise scale: [\d,]+ bytes\. A step had [\d,]+\.", printed)
    assert "noise scale" in (tmp_path / "noise.svg").read_text()
    assert "compare" not in printed.lower()


def test_windows_double_until_they_are_full():
    lengths = scripts.load(LM.with_name("lm_noise.py")).window_length
    assert [int(lengths(step, 8, 8)) for step in range(8)] == [2, 2, 4, 4, 8, 8, 8, 8]
    assert [int(lengths(step, 6, 4)) for step in range(4)] == [2, 4, 6, 6]
    assert [int(lengths(step, 1, 2)) for step in range(2)] == [1, 1]
