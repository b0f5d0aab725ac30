"""The benchmark of accumulating in one step runs, and what it compares is the same training."""

import json
import pathlib
import subprocess
import sys

import optax
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.inners has options of optax 0.2.7")

from benchmarks import in_step

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
HAS_MICROBATCH = hasattr(optax, "microbatch")
CONTENDERS = {
    "full batch",
    *(["optax.microbatch"] if HAS_MICROBATCH else []),
    "hand-written scan",
    "optaccum.value_and_grad",
    "optaccum.apply_gradients",
}


@pytest.mark.slow
def test_quick_run_finds_every_contender_equal_to_the_full_batch(tmp_path):
    output = tmp_path / "in_step.json"
    options = ["--quick", "--every-k", "4", "--output", str(output)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.in_step", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(output.read_text())
    assert (result["benchmark"], result["reference"]) == ("in_step", "full batch")
    rows = {row["name"]: row for row in result["contenders"]}
    assert {name: row["agrees"] for name, row in rows.items()} == dict.fromkeys(CONTENDERS, True)
    assert set(result["left_out"]) == (set() if HAS_MICROBATCH else {"optax.microbatch"})
    assert rows["hand-written scan"]["time_to_hand_written"]["median"] == 1
    assert rows["full batch"]["time_to_full_batch"]["median"] == 1
    ours, by_hand = rows["optaccum.value_and_grad"], rows["hand-written scan"]
    # Scalars, and the few hundred bytes that XLA aligns them to.
    assert ours["temporary_bytes"] <= by_hand["temporary_bytes"] + 4096
    assert by_hand["temporary_bytes"] < rows["full batch"]["temporary_bytes"]
    full, accumulated = result["largest"]
    assert accumulated["batch"] > full["batch"] >= 1
    drift = {row["name"]: row["relative_error"] for row in result["drift"]}
    assert drift.keys() == CONTENDERS - {"optaccum.apply_gradients"}
    assert drift["optaccum.value_and_grad"] < 0.01 < 0.1 < drift["hand-written scan"]
    assert max(len(line) for line in process.stdout.splitlines()) <= 120
    assert all(name in process.stdout for name in CONTENDERS)
    assert ("Left out" in process.stdout) != HAS_MICROBATCH
    (tables,) = in_step.tables(result).values()
    assert [len(table.rows) for table in tables] == [len(CONTENDERS), 2, len(CONTENDERS) - 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--every-k", "1"), "must be at least 2"),
        (("--microbatch", "0"), "must be at least 1"),
        (("--budget", "nan"), "must be at least 1.0"),
        (("--output", "no/such/folder.json"), "not a file in an existing folder"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        in_step.parse_args(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
