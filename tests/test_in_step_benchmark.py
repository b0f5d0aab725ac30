"""The benchmark of accumulating in one step runs, and what it compares is the same training."""

from helpers.benchmarks import quick_run
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.contenders has options of optax 0.2.7")

from benchmarks import in_step

pytestmark = pytest.mark.slow

CONTENDERS = {
    "full batch",
    "optax.microbatch",
    "hand-written scan",
    "optaccum.value_and_grad",
    "optaccum.apply_gradients",
}


@pytest.mark.slow
def test_quick_run_finds_every_contender_equal_to_the_full_batch():
    result, printed = quick_run("in_step", "--every-k", "4")
    assert (result["benchmark"], result["reference"]) == ("in_step", "full batch")
    rows = {row["name"]: row for row in result["contenders"]}
    assert {name: row["agrees"] for name, row in rows.items()} == dict.fromkeys(CONTENDERS, True)
    assert result["left_out"] == {}
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
    assert max(len(line) for line in printed.splitlines()) <= 120
    assert all(name in printed for name in CONTENDERS)
    (tables,) = in_step.tables(result).values()
    assert [len(table.rows) for table in tables] == [len(CONTENDERS), 2, len(CONTENDERS) - 1]
