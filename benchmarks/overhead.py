"""Measure what accumulating gradients costs on the optimizer's side, contender by contender.

There is no model: the gradients lie ready, and a window is its k steps of accumulation and the
one step of the inner optimizer. Contenders take turns with a kernel that measures the bandwidth.
At that bandwidth the floor is 3 streams as large as the parameters for a hold; 5 for a release, and
2 for each parameter-sized array of the inner state.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks import contenders
from benchmarks.contender import INNERS
from benchmarks.programs import Task, check, make_trees, nbytes, time_parts
from benchmarks.tables import Result, quartiles, rows_of, table, three_digits, where

NAMES = (
    *(contenders.APPLY_GRADIENTS, contenders.RELEASE, contenders.UPDATE),
    *(contenders.MULTI_STEPS, contenders.HAND_WRITTEN, contenders.KERAS),
)
PARTS = ("window", "hold", "release")
# every_k, megabytes of float32 parameters, leaves, rounds: with --quick, on a CPU, elsewhere. The
# states of all contenders lie side by side, about 25 times as large as the parameters.
SIZES = (4, 0.1, 4, 2), (8, 25.0, 24, 15), (8, 1000.0, 24, 15)
# Muon multiplies matrices on every microbatch if the inner optimizer is masked, not skipped.
SMALLER = {"muon": 16}
TRIAD = 3  # streams of `sum + g -> sum`


def triad(microbatches: list[Any]) -> Callable[[], Any]:
    """Returns a kernel that adds each microbatch to a sum in place, with caches as in a hold."""
    add, sums = jax.jit(optax.tree.add, donate_argnums=0), optax.tree.zeros_like(microbatches[0])

    def run():
        nonlocal sums
        for grads in microbatches:
            sums = add(sums, grads)
        return sums

    return run


def floors(seconds: Any, every_k: int, release: float) -> dict[str, Any]:
    """Returns the least seconds of each part round by round, from those of the triad."""
    stream = seconds / (every_k * TRIAD)
    window = (every_k - 1) * TRIAD + release
    return {"window": window * stream, "hold": TRIAD * stream, "release": release * stream}


def measure_inner(inner: str, scale: int) -> tuple[list[Result], dict[str, str]]:
    """Returns the rows of one inner optimizer, and who is left out."""
    every_k, megabytes, leaves, rounds = SIZES[scale]
    side = (megabytes * 1e6 / 4 / leaves / SMALLER.get(inner, 1)) ** 0.5
    shape = (max(8, 8 * round(side / 8)),) * 2
    params, *grads = make_trees(1 + every_k, leaves, shape)
    task = Task(params, grads, every_k, INNERS[inner])
    found, missing = contenders.make(NAMES, task.inner, every_k)
    windows, rows = check(found, task)
    seconds = time_parts(windows, rounds, {"triad": triad(grads)})
    moments = jax.eval_shape(task.inner.transformation.init, params)
    streams = 5 + 2 * nbytes(moments) / task.size
    least = floors(seconds.pop("triad"), every_k, streams)
    named: Any = {"floor": {"name": "floor", "streams": streams}} | rows
    for name, row in named.items():
        times = seconds.get(name, least)
        row |= {"inner": inner, "parameter_bytes": task.size}
        row |= {f"{part}_ms": quartiles(1e3 * times[part]) for part in PARTS}
        row["time_to_floor"] = quartiles(times["window"] / least["window"])
    return list(named.values()), missing


def measure(scale: int) -> Result:
    # In TF32 the products of Muon would differ by more than the check allows.
    jax.config.update("jax_default_matmul_precision", "float32")
    every_k, _, leaves, rounds = SIZES[scale]
    result: Result = {"every_k": every_k, "leaves": leaves, "rounds": rounds, "contenders": []}
    for inner in INNERS:
        rows, result["left_out"] = measure_inner(inner, scale)
        result["contenders"] += rows
    return result


def tables(result: Result) -> dict[str, str]:
    columns = {
        "inner": ("inner",),
        "contender": ("name",),
        **{f"{part} ms": (f"{part}_ms", three_digits) for part in PARTS},
        "window, to the floor": ("time_to_floor",),
        "temporaries, P": ("temporaries", "{:.1f}"),
        "agrees": ("agrees",),
    }
    sizes = {row["inner"]: f"{row['parameter_bytes'] / 1e6:.3g}" for row in result["contenders"]}
    parameters = ", ".join(f"{inner} {size} MB" for inner, size in sizes.items())
    setting = f"Parameters: {parameters}, in {result['leaves']} leaves. k = {result['every_k']}."
    missing = [f"Left out: {name}, for {why}." for name, why in result["left_out"].items()]
    rows = rows_of(result["contenders"], columns)
    return {"overhead": table(rows, *missing, f"{setting} {where(result)}")}
