"""Measure what accumulating gradients costs on the optimizer's side, contender by contender.

There is no model: the gradients lie ready, and a window is its k steps of accumulation and the
one step of the inner optimizer. Every contender is first checked against one optimizer step per
window on the mean gradient. Then all take turns, two windows each in a round: one at full speed,
one that waits before its release and after it, for holds and releases apart. Kernels that measure
the bandwidth take turns with them. At that bandwidth the floor is 3 streams as large as the
parameters for a hold; 5 for a release, and 2 for each parameter-sized array of the inner state.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import contenders, harness
from benchmarks.contenders import APPLY_GRADIENTS, HAND_WRITTEN, INNERS, MULTI_STEPS, NOT_ZEROING
from benchmarks.harness import quartiles
from benchmarks.programs import Window, check, make_trees, nbytes
from benchmarks.tables import (
    NOT_EQUIVALENT,
    Table,
    left_out,
    median,
    name_of,
    rows_of,
    three_digits,
    where,
)

NAMES = (
    *(APPLY_GRADIENTS, contenders.RELEASE, contenders.UPDATE, MULTI_STEPS, contenders.AGGREGATING),
    *(contenders.APPLY_EVERY, HAND_WRITTEN, NOT_ZEROING, contenders.KERAS),
)
MAX_DISTINCT_MICROBATCHES = 8
TOLERANCE = 1e-3  # Keras corrects Adam's bias by a difference of numbers near 1
PARTS = ("window", "hold", "release")
OPTIONS = {
    "every_k": ("microbatches per window", 2, 8, 8, 8),
    # Of parameters. The states of all contenders lie side by side, about 40 times as large.
    "megabytes": ("of float32 parameters", 0.001, 0.1, 25.0, 1000.0),
    "leaves": ("leaves of the parameters", 1, 4, 24, 24),
    "rounds": ("timed rounds", 1, 3, 15, 15),
}
# Muon multiplies matrices on every microbatch where the inner optimizer is masked, not skipped.
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

    The bandwidth is that of the triad `sum + g -> sum`, with the gradients of a window in turn: the
    caches are as warm as a hold finds them, and it writes only arrays that it has read. A copy is
    timed for comparison: a CPU fetches its target first, a third more than the two streams that
    count. The dispatch is that of calls that give back all of `carry`, and compute one scalar.
    """

    def repeated(kernel, state):
        # Kept though it is not used, a donated argument still is where a copy goes.
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

    A call of a kernel, whose seconds are given by name and round, makes `passes` over the
    parameters; `moved` has the streams of a hold and of a release.
    """
    per_stream = np.array(seconds["triad"]) / (passes * STREAMS["triad"])
    least = {name: number * per_stream for name, number in moved.items()}
    return least | {"window": (every_k - 1) * least["hold"] + least["release"]}


def measure_compilation(name: str, inner: str, every_k: int, params: Any, repeats: int) -> Any:
    """Returns the time to trace and compile a window's programs, and their temporaries."""
    seconds, temporaries = [], 0.0
    for _ in range(repeats):
        jax.clear_caches()
        window = Window(contenders.ADAPTERS[name](INNERS[inner], every_k), params, params)
        seconds.append(window.trace_s + window.compile_s)
        temporaries = window.temporary_bytes / nbytes(params)
    return {"compile_s": float(np.median(seconds)), "temporaries": temporaries}


def in_two(window: Window, microbatches: list[Any]) -> Iterator[Any]:
    yield window.hold(microbatches)
    yield window.call(len(window.programs) - 1, microbatches)


def figures(times: Any, units: Any) -> dict[str, Any]:
    """Returns the times of windows, holds and releases, by round, and their ratios to others."""
    found: Any = {f"{part}_ms": quartiles(1e3 * times[part]) for part in PARTS}
    for name, ones in units.items():
        ratios = {part: quartiles(times[part] / ones[part]) for part in PARTS}
        found[f"ratio_to_{name}"] = ratios
    return found


def measure_inner(args: Any, inner: str) -> dict[str, Any]:
    """Returns every figure of the run with one inner optimizer, ready for JSON."""
    every_k, tx = args.every_k, INNERS[inner].transformation
    count = 1 + min(every_k, MAX_DISTINCT_MICROBATCHES)
    trees = matrices(count, args.leaves, args.megabytes / SMALLER.get(inner, 1))
    found, missing = contenders.make(NAMES, INNERS[inner], every_k)
    windows, rows = check(found, tx, every_k, trees, TOLERANCE)
    params, *grads = (windows[APPLY_GRADIENTS].put(tree) for tree in trees)
    turns = kernels(grads, jax.tree.map(jnp.copy, windows[APPLY_GRADIENTS].carry))
    for name, window in windows.items():
        turns[name] = functools.partial(window.run, grads)
        turns[f"{name}, in two"] = functools.partial(in_two, window, grads)
    jax.block_until_ready([window.carry for window in windows.values()])
    seconds, times = harness.take_turns(turns, args.rounds, "Timing windows"), {}
    for name in windows:  # for the holds of a round, their mean
        holds, release = seconds[f"{name}, in two"].T
        times[name] = {"window": seconds[name], "hold": holds / (every_k - 1), "release": release}
    del turns, windows, window

    size, passes = nbytes(params), len(grads)
    moved = {"hold": 3, "release": 5 + 2 * nbytes(jax.eval_shape(tx.init, params)) / size}
    least = floors(seconds, passes, moved, every_k)
    units = {"floor": least} | {name: times[unit] for name, unit in UNITS.items()}
    measure_compilation(APPLY_GRADIENTS, inner, every_k, params, 1)  # wakes the compiler
    for name, row in harness.progress(rows.items(), f"{inner}: compiling"):
        row |= measure_compilation(name, inner, every_k, params, 1 if args.quick else 3)
        row |= figures(times[name], units)
    rates = {name: passes * number * size / seconds[name] for name, number in STREAMS.items()}
    bounds = {
        "bandwidth_bound": INNERS[inner].bandwidth_bound,
        "bandwidth": {name: quartiles(rate) for name, rate in rates.items()},
        "streams": moved,
        "dispatch_ms": quartiles(seconds["dispatch"] * 1e3 / passes),
        **figures(least, {}),
    }
    result = {"inner": inner, "parameter_bytes": size, "floor": bounds}
    return result | {"contenders": list(rows.values()), "left_out": missing}


def measure(args: Any) -> Iterator[harness.Result]:
    # In TF32 the products of Muon would differ by more than the check allows.
    jax.config.update("jax_default_matmul_precision", "float32")
    result: Any = {name: getattr(args, name) for name in ("every_k", "leaves", "rounds")}
    result |= {"runs": [], "compilation_of_apply_gradients": []}
    for inner in INNERS:
        result["runs"].append(measure_inner(args, inner))
        yield result
    (params,), repeats = matrices(1, args.leaves, args.megabytes), 1 if args.quick else 3
    for k in harness.progress((2, 8, 64, 1024), "Compiling at k = 2 to 1024"):
        row = {"every_k": k} | measure_compilation(APPLY_GRADIENTS, "sgd", k, params, repeats)
        result["compilation_of_apply_gradients"].append(row)
        yield result


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
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
    named = {"overhead": [Table(rows, "A window", [NOT_EQUIVALENT, *left_out(run), note])]}
    lengths = result["compilation_of_apply_gradients"]
    rows = rows_of(lengths, {"k": ("every_k", "{:,.0f}")} | COMPILATION)
    title = "optaccum.apply_gradients by length of the window"
    named |= {"compilation": [Table(rows, title, [where(result)])]} if rows else {}

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
    notes.append(f"{setting} {where(result)}")
    return named | {"overhead_times": [Table(rows, "Times", notes)]}


def main_run(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the run that stands for all: AdamW's, or else the first."""
    return next((run for run in result["runs"] if run["inner"] == "adamw"), result["runs"][0])


if __name__ == "__main__":
    harness.main("overhead", __doc__, OPTIONS, measure, tables)
