"""Measure what accumulating gradients costs on the optimizer's side, contender by contender.

There is no model: the gradients lie ready, and a window is its k steps of accumulation and the
one step of the inner optimizer. Contenders take turns with kernels that measure the bandwidth. At
that bandwidth the floor is 3 streams as large as the parameters for a hold; 5 for a release, and 2
for each parameter-sized array of the inner state.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import contenders
from benchmarks.contender import INNERS
from benchmarks.contenders import APPLY_GRADIENTS, HAND_WRITTEN, MULTI_STEPS, NOT_ZEROING
from benchmarks.programs import Task, Window, check, make_trees, nbytes, time_parts
from benchmarks.tables import (
    NOT_EQUIVALENT,
    Result,
    left_out,
    median,
    name_of,
    quartiles,
    rows_of,
    table,
    three_digits,
    where,
)

NAMES = (
    *(APPLY_GRADIENTS, contenders.RELEASE, contenders.UPDATE, MULTI_STEPS, contenders.AGGREGATING),
    *(contenders.APPLY_EVERY, HAND_WRITTEN, NOT_ZEROING, contenders.KERAS),
)
# Keras corrects Adam's bias by a difference of numbers near 1.
TOLERANCE = 1e-3
PARTS = ("window", "hold", "release")
# every_k, megabytes of float32 parameters, leaves, rounds: with --quick, on a CPU, elsewhere. The
# states of all contenders lie side by side, about 40 times as large as the parameters.
SIZES = (4, 0.1, 4, 2), (8, 25.0, 24, 15), (8, 1000.0, 24, 15)
# Muon multiplies matrices on every microbatch if the inner optimizer is masked, not skipped.
SMALLER = {"muon": 16}
UNITS = {"multi_steps": MULTI_STEPS, "hand_written": HAND_WRITTEN}
UNITS |= {"hand_written_no_zeroing": NOT_ZEROING}
STREAMS = {"triad": 3, "copy": 2}  # that a kernel reads or writes
COMPILATION = {
    "temporaries": ("temporaries", "{:.1f}"),
    "trace and compile": ("compile_s", "{:.1f} s"),
}


def matrices(count: int, leaves: int, megabytes: float) -> list[dict[str, jax.Array]]:
    """Returns trees of square matrices, their sides multiples of 8."""
    side = max(8, 8 * round((megabytes * 1e6 / 4 / leaves) ** 0.5 / 8))
    return make_trees(count, leaves, (side, side))


def kernels(microbatches: list[Any], carry: Any) -> dict[str, Callable[[], Any]]:
    """Returns the kernels by name; a call runs one for each microbatch, in place.

    The triad `sum + g -> sum` finds the caches as warm as a hold does, and writes only arrays that
    it has read. A copy is timed for comparison: a CPU fetches its target first, a third more than
    the two streams that count. A dispatch gives back all of `carry`, and computes one scalar.
    """

    def repeated(kernel, state):
        # A copy goes into a donated argument, which has to be kept for that.
        step = jax.jit(kernel, donate_argnums=0, keep_unused=True)

        def run():
            nonlocal state
            for grads in microbatches:
                state = step(state, grads)
            return state

        return run

    sums, others = (optax.tree.zeros_like(microbatches[0]) for _ in range(2))
    dispatch = repeated(lambda state, _: (state[0], state[1] + 1), (carry, jnp.zeros([])))
    copy = repeated(lambda _, grads: jax.tree.map(jnp.copy, grads), others)
    return {"triad": repeated(optax.tree.add, sums), "copy": copy, "dispatch": dispatch}


def floors(seconds: Any, passes: int, moved: dict[str, float], every_k: int) -> dict[str, Any]:
    """Returns the least seconds of a hold, a release and a window, round by round.

    Each kernel made `passes` over the parameters; `moved` has the streams of a hold and a release.
    """
    per_stream = np.array(seconds["triad"]) / (passes * STREAMS["triad"])
    least = {name: number * per_stream for name, number in moved.items()}
    return least | {"window": (every_k - 1) * least["hold"] + least["release"]}


def figures(times: Any, units: Any) -> dict[str, Any]:
    """Returns the times of windows, holds and releases, by round, and their ratios to others."""
    found: Any = {f"{part}_ms": quartiles(1e3 * times[part]) for part in PARTS}
    for name, ones in units.items():
        found[f"ratio_to_{name}"] = {x: quartiles(times[x] / ones[x]) for x in PARTS}
    return found


def measure_inner(inner: str, scale: int) -> Result:
    """Returns every figure of the run with one inner optimizer."""
    every_k, megabytes, leaves, rounds = SIZES[scale]
    tx = INNERS[inner].transformation
    params, *grads = matrices(1 + every_k, leaves, megabytes / SMALLER.get(inner, 1))
    task = Task(params, grads, every_k, INNERS[inner], TOLERANCE, optimized=scale > 0)
    found, missing = contenders.make(NAMES, task.inner, every_k)
    windows, rows = check(found, task)
    beside = kernels(grads, jax.tree.map(jnp.copy, windows[APPLY_GRADIENTS].carry))
    seconds = time_parts(windows, rounds, beside)
    del windows, beside

    moved = {"hold": 3, "release": 5 + 2 * nbytes(jax.eval_shape(tx.init, params)) / task.size}
    least = floors(seconds, every_k, moved, every_k)
    units = {"floor": least} | {name: seconds[unit] for name, unit in UNITS.items()}
    for name, row in rows.items():
        row |= figures(seconds[name], units) | {"compile_s": row["trace_s"] + row["compile_s"]}
    rates = {name: every_k * number * task.size / seconds[name] for name, number in STREAMS.items()}
    bounds = {
        "bandwidth_bound": task.inner.bandwidth_bound,
        "bandwidth": {name: quartiles(rate) for name, rate in rates.items()},
        "streams": moved,
        "dispatch_ms": quartiles(seconds["dispatch"] * 1e3 / every_k),
        **figures(least, {}),
    }
    result = {"inner": inner, "parameter_bytes": task.size, "floor": bounds}
    return result | {"contenders": list(rows.values()), "left_out": missing}


def measure(scale: int) -> Iterator[Result]:
    # In TF32 the products of Muon would differ by more than the check allows.
    jax.config.update("jax_default_matmul_precision", "float32")
    every_k, megabytes, leaves, rounds = SIZES[scale]
    result: Result = {"every_k": every_k, "leaves": leaves, "rounds": rounds}
    result |= {"runs": [], "compilation_of_apply_gradients": []}
    for inner in INNERS:
        result["runs"].append(measure_inner(inner, scale))
        yield result
    (params,) = matrices(1, leaves, megabytes)
    for k in 2, 8, 64, 1024:
        task = Task(params, [params], k, INNERS["sgd"])
        window = Window(contenders.apply_gradients(task.inner, k), task)
        row = {"every_k": k, "compile_s": window.trace_s + window.compile_s}
        row["temporaries"] = window.temporary_bytes / task.size
        result["compilation_of_apply_gradients"].append(row)
        yield result


def tables(result: Result) -> dict[str, str]:
    """Returns ratios for AdamW, times of all inner optimizers, and what compiling takes."""

    def ratio(unit, part="window"):
        return lambda row: median(row.get(f"ratio_to_{unit}", {}).get(part))

    run = main_run(result)
    columns = {
        "contender": name_of,
        "window, to the floor": ratio("floor"),
        "to MultiSteps": ratio("multi_steps"),
        "to the hand-written loop": ratio("hand_written"),
        "to no zeroing": ratio("hand_written_no_zeroing"),
        **COMPILATION,
        "agrees": ("agrees",),
    }
    size = f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters in {result['leaves']} leaves"
    note = f"{run['inner']}, k = {result['every_k']}, {size}. {where(result)}"
    rows = rows_of(run["contenders"], columns)
    named = {"overhead": table(rows, NOT_EQUIVALENT, *left_out(run), note)}
    lengths = result["compilation_of_apply_gradients"]
    rows = rows_of(lengths, {"k": ("every_k", "{:,.0f}")} | COMPILATION)
    named |= {"compilation": table(rows, where(result))} if rows else {}

    columns = {"inner": ("inner",), "contender": name_of}
    columns |= {f"{part} ms": (f"{part}_ms", three_digits) for part in PARTS}
    columns |= {f"{part}, to floor": ratio("floor", part) for part in PARTS}
    columns |= {"agrees": ("agrees",)}
    rows, notes = [], [NOT_EQUIVALENT]
    for run in result["runs"]:
        least, size = run["floor"], f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters"
        found = [{"name": "floor"} | least, *run["contenders"]]
        rows += rows_of([row | {"inner": run["inner"]} for row in found], columns)
        rates = (f"{median(q, '{:,.0f}', 1e9)} GB/s ({x})" for x, q in least["bandwidth"].items())
        bound = "" if least["bandwidth_bound"] else ", which is not what bounds it"
        passing = f"a call that only passes all arrays through {three_digits(least['dispatch_ms'])}"
        notes.append(f"{run['inner']}: {size}; bandwidth {', '.join(rates)}{bound}; {passing} ms.")
    setting = f"k = {result['every_k']}, {result['leaves']} leaves, {result['rounds']} rounds."
    return named | {"overhead_times": table(rows, *notes, f"{setting} {where(result)}")}


def main_run(result: Result) -> Result:
    """Returns the run that stands for all: AdamW's, or else the first."""
    return next((run for run in result["runs"] if run["inner"] == "adamw"), result["runs"][0])
