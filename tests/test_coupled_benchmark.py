"""The benchmark of losses that compare rows runs, and finds which contenders are exact."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.inners has options of optax 0.2.7")

from benchmarks import coupled

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def test_quick_run_finds_what_is_exact(tmp_path):
    output = tmp_path / "coupled.json"
    options = ["--quick", "--num-microbatches", "4", "--output", str(output)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.coupled", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(output.read_text())
    rows = {(row["model"], row["name"]): row for row in result["models"]}
    for model in coupled.MODELS:
        naive, ours = rows[model, coupled.VALUE_AND_GRAD], rows[model, coupled.OURS]
        assert naive["gradient_error"] > 0.05
        assert ours["gradient_error"] < 1e-5
        assert ours["temporary_bytes"] <= 1.05 * rows[model, coupled.REMAT]["temporary_bytes"]
    (table,) = coupled.tables(result)["coupled"]
    assert len(table.rows) == len(rows)
