"""Measure what accumulating gradients costs on the optimizer's side, contender by contender.

There is no model: the gradients lie ready, and a window is its k steps of accumulation and the
one step of the inner optimizer. Every contender is first checked against one optimizer step per
window on the mean gradient. Then all take turns, two windows each in a round: one at full speed,
one that waits before its release and after it, for holds and releases apart. Kernels that measure
the bandwidth take turns with them, and wait as seldom.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, floor, harness
from benchmarks.contenders import APPLY_GRADIENTS, HAND_WRITTEN, MULTI_STEPS, NOT_ZEROING
from benchmarks.inners import INNERS
from benchmarks.programs import Window, check, make_trees, nbytes
from benchmarks.tables import (
    AGREES,
    NOT_EQUIVALENT,
    Table,
    left_out,
    median,
    name_of,
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


def matrices(count: int, leaves: int, megabytes: float) -> list[dict[str, jax.Array]]:
    """Returns trees of square matrices, their sides multiples of 8."""
    side = max(8, 8 * round((megabytes * 1e6 / 4 / leaves) ** 0.5 / 8))
    return make_trees(count, leaves, (side, side))


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
    found: Any = {f"{part}_ms": harness.quartiles(1e3 * times[part]) for part in PARTS}
    for name, ones in units.items():
        ratios = {part: harness.quartiles(times[part] / ones[part]) for part in PARTS}
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
    turns = floor.kernels(grads, jax.tree.map(jnp.copy, windows[APPLY_GRADIENTS].carry))
    for name, window in windows.items():
        turns[name] = functools.partial(window.run, grads)
        turns[f"{name}, in two"] = functools.partial(in_two, window, grads)
    jax.block_until_ready([window.carry for window in windows.values()])
    seconds, times = harness.take_turns(turns, args.rounds, "Timing windows"), {}
    for name in windows:  # for the holds of a round, their mean
        holds, release = seconds[f"{name}, in two"].T
        times[name] = {"window": seconds[name], "hold": holds / (every_k - 1), "release": release}
    del turns, windows, window

    size, moved = nbytes(params), floor.streams(tx, params)
    least = floor.floors(seconds, len(grads), moved, every_k)
    units = {"floor": least} | {name: times[unit] for name, unit in UNITS.items()}
    measure_compilation(APPLY_GRADIENTS, inner, every_k, params, 1)  # wakes the compiler
    for name, row in harness.progress(rows.items(), f"{inner}: compiling"):
        row |= measure_compilation(name, inner, every_k, params, 1 if args.quick else 3)
        row |= figures(times[name], units)
    bounds = {"bandwidth_bound": INNERS[inner].bandwidth_bound, "streams": moved}
    bounds |= floor.figures(seconds, len(grads), size) | figures(least, {})
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
    run = main_run(result)
    ratios = [
        {
            "contender": name_of(row),
            "window, to the floor": median(row["ratio_to_floor"]["window"]),
            "to MultiSteps": median(row["ratio_to_multi_steps"]["window"]),
            "to the hand-written loop": median(row["ratio_to_hand_written"]["window"]),
            "to no zeroing": median(row["ratio_to_hand_written_no_zeroing"]["window"]),
            **compilation(row),
            "agrees": AGREES[row["agrees"]],
        }
        for row in run["contenders"]
    ]
    size = f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters in {result['leaves']} leaves"
    note = f"{run['inner']}, k = {result['every_k']}, {size}. {where(result)}"
    named = {"overhead": [Table(ratios, "A window", [NOT_EQUIVALENT, *left_out(run), note])]}
    lengths = result["compilation_of_apply_gradients"]
    rows = [{"k": f"{row['every_k']:,}"} | compilation(row) for row in lengths]
    title = "optaccum.apply_gradients by length of the window"
    named |= {"compilation": [Table(rows, title, [where(result)])]} if rows else {}

    times, notes = [], [NOT_EQUIVALENT]
    for run in result["runs"]:
        least, size = run["floor"], f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters"
        for row in [{"name": "floor"} | least, *run["contenders"]]:
            to_floor = row.get("ratio_to_floor", {})
            cells = {f"{part} ms": three_digits(row[f"{part}_ms"]) for part in PARTS}
            cells |= {f"{part}, to floor": median(to_floor.get(part)) for part in PARTS}
            cells["agrees"] = AGREES[row.get("agrees")]
            times.append({"inner": run["inner"], "contender": name_of(row)} | cells)
        rates = (f"{median(q, '{:,.0f}', 1e9)} GB/s ({x})" for x, q in least["bandwidth"].items())
        bound = "" if least["bandwidth_bound"] else ", which is not what bounds it"
        passing = f"a call that only passes all arrays through {three_digits(least['dispatch_ms'])}"
        notes.append(f"{run['inner']}: {size}; bandwidth {', '.join(rates)}{bound}; {passing} ms.")
    setting = f"k = {result['every_k']}, {result['leaves']} leaves, {result['rounds']} rounds."
    notes.append(f"{setting} {where(result)}")
    return named | {"overhead_times": [Table(times, "Times", notes)]}


def compilation(row: dict[str, Any]) -> dict[str, str]:
    seconds = f"{row['compile_s']:.1f} s"
    return {"temporaries": f"{row['temporaries']:.1f}", "trace and compile": seconds}


def main_run(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the run that stands for all: AdamW's, or else the first."""
    return next((run for run in result["runs"] if run["inner"] == "adamw"), result["runs"][0])


if __name__ == "__main__":
    harness.main("overhead", __doc__, OPTIONS, measure, tables)
