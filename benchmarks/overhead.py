"""Measure what accumulating gradients costs on the optimizer's side, contender by contender.

There is no model: the gradients lie ready, and a window is its k steps of accumulation and the
one step of the inner optimizer. Every contender is first checked against one optimizer step per
window on the mean gradient. Then all take turns, two windows each in a round: one at full speed,
one that waits before its release and after it, for holds and releases apart. Kernels that measure
the bandwidth take turns with them, and wait as seldom. Absolute times are noise: the medians of
the ratios, taken round by round, are what counts.
"""

import argparse
from collections.abc import Iterator
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, floor, harness
from benchmarks.inners import INNERS
from benchmarks.programs import Window, full_batch, largest_error, nbytes
from benchmarks.tables import (
    AGREES,
    NOT_EQUIVALENT,
    Table,
    median,
    name_of,
    three_digits,
    where,
)

NAMES = (
    contenders.APPLY_GRADIENTS,
    contenders.RELEASE,
    contenders.UPDATE,
    contenders.MULTI_STEPS,
    contenders.AGGREGATING,
    contenders.APPLY_EVERY,
    contenders.HAND_WRITTEN,
    contenders.NOT_ZEROING,
    contenders.KERAS,
)
MAX_DISTINCT_MICROBATCHES = 8
TOLERANCE = 1e-3  # Keras corrects Adam's bias by a difference of numbers near 1
PARTS = ("window", "hold", "release")
# The states of all contenders lie side by side, about 40 times the parameters with AdamW. Muon
# multiplies matrices on every microbatch where the inner optimizer is masked, not skipped.
MEGABYTES = {  # quick, CPU, GPU or TPU
    "sgd": (0.1, 25.0, 1000.0),
    "adamw": (0.1, 25.0, 1000.0),
    "muon": (0.1, 1.6, 100.0),
}
DEFAULTS = {"leaves": (4, 24, 24), "rounds": (3, 15, 15)} | MEGABYTES
UNITS = {
    "multi_steps": contenders.MULTI_STEPS,
    "hand_written": contenders.HAND_WRITTEN,
    "hand_written_no_zeroing": contenders.NOT_ZEROING,
}


def make_tree(seed: int, leaves: int, megabytes: float) -> dict[str, jax.Array]:
    """Returns float32 square matrices of normal deviates, their sides multiples of 8."""
    side = max(8, 8 * round((megabytes * 1e6 / 4 / leaves) ** 0.5 / 8))
    keys = jax.random.split(jax.random.key(seed), leaves)
    return {f"layer_{i:03d}": jax.random.normal(key, (side, side)) for i, key in enumerate(keys)}


def measure_compilation(name: str, inner: str, every_k: int, params: Any, repeats: int) -> Any:
    """Returns the time to trace and compile a window's programs, and their temporaries."""
    seconds, temporaries = [], 0
    for _ in range(repeats):
        jax.clear_caches()
        window = Window(contenders.ADAPTERS[name](INNERS[inner], every_k), params, params)
        seconds.append(window.trace_s + window.compile_s)
        temporaries = window.temporary_bytes / nbytes(params)
    return {"compile_s": float(np.median(seconds)), "temporaries": temporaries}


def time_windows(
    windows: dict[str, Window], microbatches: list[Any], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Returns the seconds of each contender's windows, holds and releases, and of the kernels.

    All of them round by round; for the holds of a round, their mean.
    """
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in windows}

    def in_two(name):
        start = time.perf_counter()
        jax.block_until_ready(windows[name].hold(microbatches))
        middle = time.perf_counter()
        jax.block_until_ready(windows[name].release(microbatches))
        holds, release = middle - start, time.perf_counter() - middle
        parts[name].append((holds / (len(windows[name].programs) - 1), release))

    carried = jax.tree.map(jnp.copy, windows[contenders.APPLY_GRADIENTS].carry)
    turns = floor.kernels(microbatches, carried)
    for name, window in windows.items():
        turns[name] = functools.partial(window.run, microbatches)
        turns[f"{name}, in two"] = functools.partial(in_two, name)
    jax.block_until_ready(([window.carry for window in windows.values()], microbatches))
    seconds = harness.take_turns(turns, rounds, "Timing windows")
    return {
        name: {
            "window": seconds[name],
            "hold": [hold for hold, _ in by_round[-rounds:]],
            "release": [release for _, release in by_round[-rounds:]],
        }
        for name, by_round in parts.items()
    }, seconds


def measure_inner(args: argparse.Namespace, inner: str) -> dict[str, Any]:
    """Returns every figure of the run with one inner optimizer, ready for JSON."""
    every_k, tx = args.every_k, INNERS[inner].transformation
    params, *microbatches = (
        make_tree(seed, args.leaves, args.megabytes or getattr(args, inner))
        for seed in range(1 + min(every_k, MAX_DISTINCT_MICROBATCHES))
    )
    found, left_out = contenders.make(NAMES, INNERS[inner], every_k)
    windows, agrees, size = {}, {}, nbytes(params)
    for name, one in harness.progress(found.items(), f"{inner}: checking"):
        windows[name] = Window(one, params, params)
        expected = full_batch(one.reference or tx, every_k, params, microbatches)
        trained = windows[name].train(params, microbatches)
        agrees[name] = largest_error(trained, expected, params, TOLERANCE) <= 1
    for window in windows.values():
        window.start(params)
    seconds, kernel_seconds = time_windows(windows, microbatches, args.rounds)
    del windows

    moved = floor.streams(tx, params)
    least = floor.floors(kernel_seconds, len(microbatches), moved, every_k)
    units = {"floor": least} | {unit: seconds[name] for unit, name in UNITS.items()}

    def milliseconds(times):
        return {f"{x}_ms": harness.quartiles(np.multiply(times[x], 1e3)) for x in PARTS}

    def timing(times):
        return milliseconds(times) | {
            f"ratio_to_{name}": {x: harness.quartiles(np.divide(times[x], unit[x])) for x in PARTS}
            for name, unit in units.items()
        }

    measure_compilation(contenders.APPLY_GRADIENTS, inner, every_k, params, 1)  # wakes the compiler
    compilations = {
        name: measure_compilation(name, inner, every_k, params, 1 if args.quick else 3)
        for name in harness.progress(found, f"{inner}: compiling")
    }
    return {
        "inner": inner,
        "parameter_bytes": size,
        "floor": {
            "bandwidth_bound": INNERS[inner].bandwidth_bound,
            "streams": moved,
            **floor.figures(kernel_seconds, len(microbatches), size),
            **milliseconds(least),
        },
        "contenders": [
            {"name": name, "equivalent": contender.equivalent, "agrees": agrees[name]}
            | compilations[name]
            | timing(seconds[name])
            for name, contender in found.items()
        ],
        "left_out": [{"name": name, "why": why} for name, why in left_out.items()],
    }


def measure(args: argparse.Namespace) -> Iterator[harness.Result]:
    """Yields every figure of the benchmark, ready for JSON, inner optimizer by inner optimizer."""
    # In TF32 the products of Muon would differ by more than the check allows.
    jax.config.update("jax_default_matmul_precision", "float32")
    result = {name: getattr(args, name) for name in ("every_k", "leaves", "rounds")}
    result |= {"runs": [], "compilation_of_apply_gradients": []}
    inners = list(INNERS) if args.inner == "all" else [args.inner]
    for inner in inners:
        result["runs"].append(measure_inner(args, inner))
        yield result
    params = make_tree(0, args.leaves, args.megabytes or getattr(args, inners[0]))
    given = contenders.APPLY_GRADIENTS, inners[0]
    for k in harness.progress((2, 8, 64, 1024), "Compiling at k = 2 to 1024"):
        figures = measure_compilation(*given, k, params, 1 if args.quick else 3)
        result["compilation_of_apply_gradients"].append({"every_k": k} | figures)
        yield result


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns ratios for AdamW, times of all inner optimizers, and what compiling takes."""
    run = main_run(result)
    headings = dict(
        zip(
            ("floor", *UNITS),
            ("window, to the floor", "to MultiSteps", "to the hand-written loop", "to no zeroing"),
            strict=True,
        )
    )
    ratios = [
        {
            "contender": name_of(row),
            **{
                heading: median(row[f"ratio_to_{unit}"]["window"])
                for unit, heading in headings.items()
            },
            "temporaries": f"{row['temporaries']:.1f}",
            "trace and compile": f"{row['compile_s']:.1f} s",
            "agrees": AGREES[row["agrees"]],
        }
        for row in run["contenders"]
    ]
    leaves = f"in {result['leaves']} leaves"
    size = f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters {leaves}"
    note = f"{run['inner']}, k = {result['every_k']}, {size}. {where(result)}"
    left_out = [f"Left out: {x['name']}, for {x['why']}." for x in run.get("left_out", ())]
    named = {"overhead": [Table(ratios, "A window", [NOT_EQUIVALENT, *left_out, note])]}
    named["overhead_times"] = [_times(result)]
    compilations = [
        {
            "k": f"{row['every_k']:,}",
            "temporaries": f"{row['temporaries']:.1f}",
            "trace and compile": f"{row['compile_s']:.1f} s",
        }
        for row in result["compilation_of_apply_gradients"]
    ]
    title = "optaccum.apply_gradients by length of the window"
    if compilations:
        named["compilation"] = [Table(compilations, title, [where(result)])]
    return named


def main_run(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the run that stands for all: AdamW's, or else the first."""
    return next((run for run in result["runs"] if run["inner"] == "adamw"), result["runs"][0])


def _times(result: dict[str, Any]) -> Table:
    rows, notes = [], [NOT_EQUIVALENT]
    for run in result["runs"]:
        least, size = run["floor"], f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters"
        for row in [{"name": "floor"} | least, *run["contenders"]]:
            to_floor = row.get("ratio_to_floor", {})
            rows.append(
                {
                    "inner": run["inner"],
                    "contender": name_of(row),
                    **{f"{part} ms": three_digits(row[f"{part}_ms"]) for part in PARTS},
                    **{f"{part}, to floor": median(to_floor.get(part)) for part in PARTS},
                    "agrees": AGREES[row.get("agrees")],
                }
            )
        rates = (
            f"{q['median'] / 1e9:,.0f} GB/s ({name})" for name, q in least["bandwidth"].items()
        )
        bound = "" if least["bandwidth_bound"] else ", which is not what bounds it"
        passing = f"a call that only passes all arrays through {three_digits(least['dispatch_ms'])}"
        notes.append(f"{run['inner']}: {size}; bandwidth {', '.join(rates)}{bound}; {passing} ms.")
    setting = f"k = {result['every_k']}, {result['leaves']} leaves, {result['rounds']} rounds."
    return Table(rows, "Times", [*notes, f"{setting} {where(result)}"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, with defaults for the device."""
    parser = harness.make_parser("overhead", __doc__)
    add, at_least = parser.add_argument, harness.at_least
    add("--inner", choices=(*INNERS, "all"), default="all", help="inner optimizer (all)")
    add("--every-k", type=at_least(2), default=8, help="microbatches per window (8)")
    add(
        "--megabytes",
        type=at_least(0.001),
        help="float32 parameters (25 on a CPU, 1000 on a GPU or TPU; less for muon; quick: 0.1)",
    )
    add("--leaves", type=at_least(1), help="leaves of the parameters (24; quick: 4)")
    parser.set_defaults(**dict.fromkeys(MEGABYTES))
    return harness.parse_args(parser, DEFAULTS, argv)


def main() -> None:
    """Runs the benchmark."""
    harness.run("overhead", parse_args(), measure, tables)


if __name__ == "__main__":
    main()
