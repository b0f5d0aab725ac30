"""The examples run, and show what they say they show."""

import os
from pathlib import Path
import re
import runpy
import subprocess
import sys

from flax import nnx
from helpers import scripts
import numpy as np
import optax
import pytest

import optaccum
from optaccum.testing import check_step

pytestmark = pytest.mark.slow

for requirement in ("flax", "matplotlib", "rich", "sklearn"):
    pytest.importorskip(requirement)

REPOSITORY = Path(__file__).parents[1]
DIGITS = REPOSITORY / "examples" / "digits.py"
FULL_BATCH = "full batch"
MICROBATCHES = ("accumulate(k, adamw)", "the same, ragged")
TRAP = "chain(accumulate(k), adamw)"


@pytest.fixture(scope="module")
def digits():
    return scripts.load(DIGITS)


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    return tmp_path_factory.mktemp("digits") / "losses.png"


@pytest.fixture(scope="module")
def printed(figure):
    """What a short run prints; it is run once for all tests, as a reader would run it."""
    done = subprocess.run(
        [sys.executable, DIGITS, "--steps", "3", "--every-k", "8", "--output", figure],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"},
        encoding="utf-8",
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def table(printed):
    """The printed table: {name: (loss, accuracy, largest difference, temporaries)}."""
    row = r"(?m)^ *(\S.*?)  +([\d.]+) +([\d.]+)% +(\S+) +([\d.]+) ([kM]?B)"
    units = {"B": 1.0, "kB": 1e3, "MB": 1e6}
    return {
        name: (float(loss), float(accuracy), float(difference), float(size) * units[unit])
        for name, loss, accuracy, difference, size, unit in re.findall(row, printed)
    }


def test_digits_prints_a_row_per_way(table):
    assert tuple(table) == (FULL_BATCH, *MICROBATCHES, TRAP)


@pytest.mark.parametrize("way", MICROBATCHES)
def test_digits_microbatches_train_like_the_full_batch(table, way):
    loss, _, difference, _ = table[way]
    assert difference < 1e-5
    assert loss == pytest.approx(table[FULL_BATCH][0], abs=1e-5)


def test_digits_chained_adamw_does_not(table):
    loss, _, difference, _ = table[TRAP]
    assert difference > 1e-3
    assert loss != pytest.approx(table[FULL_BATCH][0], abs=1e-2)


@pytest.mark.parametrize("way", MICROBATCHES)
def test_digits_microbatches_need_less_memory(table, way):
    assert table[way][3] < table[FULL_BATCH][3] / 2


def test_digits_writes_the_figure(printed, figure):
    assert str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


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
