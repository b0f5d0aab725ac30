"""The benchmark of losses that compare rows runs, and finds which contenders are exact."""

from helpers.benchmarks import quick_run
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.contenders has options of optax 0.2.7")

from benchmarks import coupled

pytestmark = pytest.mark.slow


def test_quick_run_finds_what_is_exact():
    result, _ = quick_run("coupled", "--num-microbatches", "4")
    rows = {(row["model"], row["name"]): row for row in result["models"]}
    for model in ("mlp", "transformer"):
        naive, ours = rows[model, coupled.VALUE_AND_GRAD], rows[model, coupled.OURS]
        assert naive["gradient_error"] > 0.05
        assert ours["gradient_error"] < 1e-5
        assert ours["temporary_bytes"] <= 1.05 * rows[model, coupled.REMAT]["temporary_bytes"]
    drift = {row["name"]: row["relative_error"] for row in result["drift"]}
    assert drift[coupled.OURS] < 0.005 < 0.01 < drift[coupled.REMAT]
    found, drifts = coupled.tables(result)["coupled"]
    assert len(found.rows) == len(rows) == 2 * (len(drifts.rows) + 2)
