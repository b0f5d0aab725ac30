"""The scaling benchmark runs, compares only what agrees, and fits the slopes that it prints."""

import dataclasses

from helpers.benchmarks import quick_run
import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.contenders has options of optax 0.2.7")

from benchmarks import contenders, programs, scaling

pytestmark = pytest.mark.slow

CONTENDERS = ["optaccum.apply_gradients", "optax.MultiSteps"]


@pytest.mark.slow
def test_quick_run_agrees_everywhere_and_writes_every_figure():
    result, printed = quick_run("scaling")
    assert max(map(len, printed.splitlines())) <= 120
    assert result["benchmark"] == "scaling"
    assert {"date", "device", "versions", "rounds"} <= result.keys()
    sweeps = result["sweeps"]
    assert list(sweeps) == ["parameters", "leaves", "every_k", "dtype"]
    for sweep, figures in sweeps.items():
        for row in figures["rows"]:
            assert row["agrees"] is (None if row["name"] == "AdamW alone" else True)
            assert row[sweep]
            assert (row["hold_ms"] is None) == (row.get("every_k") == 1)
            for name in ("release_ms", "microbatch_ms", "dispatch_ms"):
                assert 0 < row[name]["q1"] <= row[name]["median"] <= row[name]["q3"]
    names = {sweep: [r["name"] for r in figures["rows"]] for sweep, figures in sweeps.items()}
    assert names["every_k"] == CONTENDERS * 3
    assert set(names["parameters"]) == {*CONTENDERS, "AdamW alone"}
    assert set(names["leaves"]) == {*CONTENDERS, "optaccum, drop-in update"}
    # Parameters and Adam's moments halve; the accumulator stays float32.
    wide, _, narrow, _ = sweeps["dtype"]["rows"]
    size = wide["parameter_bytes"]
    assert narrow["parameter_bytes"] == size // 2
    assert wide["state_bytes"] - narrow["state_bytes"] == pytest.approx(size, abs=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_contender_that_releases_the_sum_does_not_agree(dtype):
    honest = contenders.apply_gradients(scaling.INNER, 4)

    def sums(part, grads, weight):
        return honest.steps[0].apply(part, jax.tree.map(lambda g: 4 * g, grads), weight)

    wrong = dataclasses.replace(honest, steps=(contenders.Step(sums),) * 4)
    given = {"parameters": 4096, "leaves": 2, "every_k": 4, "dtype": dtype}
    rows = scaling.measure_point({"honest": honest, "sums": wrong}, "dtype", 1, given)
    assert [row["agrees"] for row in rows] == [True, False]


def test_nan_does_not_agree():
    one, zero = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    assert programs.largest_error(one, one, zero, 1e-3) <= 1
    assert not programs.largest_error({"w": jnp.array([1.0, jnp.nan])}, one, zero, 1e-3) <= 1


def test_slopes_are_powers():
    rows = [
        {"name": "linear", "parameters": n, "hold_ms": {"median": 3.0 * n}, "release_ms": None}
        | ({"release_ms": {"median": 5.0}} if n < 1000 else {"release_ms": {"median": 50.0}})
        for n in (1, 10, 100, 1000)
    ]
    hold, release = scaling.slopes("parameters", rows)
    assert hold["quantity"] == "hold_ms"
    assert hold["slope"] == pytest.approx(1)
    assert hold["slope_of_largest"] == pytest.approx(1)
    assert release["slope"] == pytest.approx(0.3)
    assert release["slope_of_largest"] == pytest.approx(0.5)
