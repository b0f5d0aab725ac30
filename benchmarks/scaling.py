"""Measure how the cost of accumulating gradients grows, one variable at a time.

`parameters`: the time of a hold and of a release against the number of parameters, which is linear
where memory bandwidth is the limit. `leaves`: the time to trace, to compile and to dispatch one
step against the number of leaves, at few parameters. `every_k`: the time of a hold against the
length of the window, which must not matter. `dtype`: time and bytes in float32 and bfloat16.

Every contender is first checked, at every point, against the inner optimizer on the mean gradients
of two windows. Slopes are those of a line through the medians in log-log coordinates: 1 is linear,
0 is flat. On a CPU the smallest trees fit into the caches, which makes the slope over all points
too steep; on a GPU they are bound by the launch of kernels, which makes it too shallow. The slope
over the three largest points is free of both.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import time
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import contenders, harness
from benchmarks.contender import Contender
from benchmarks.contenders import ALONE, APPLY_GRADIENTS, MULTI_STEPS, UPDATE
from benchmarks.inners import INNERS
from benchmarks.programs import Window, full_batch, largest_error, nbytes
from benchmarks.tables import AGREES, Table, where

# A small `eps` would hide the scale of the gradients from Adam, and a sum from a mean; and a small
# step would drown in the rounding of bfloat16 parameters.
INNER = dataclasses.replace(INNERS["adamw"], transformation=optax.adamw(0.1, eps=0.1))
# One that sums in float32 is off by rounding alone, one in bfloat16 by up to 2^-8 per addition.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
# The most that the contenders, their gradients and the check need at one time.
BYTES_PER_PARAMETER = 80
# Columns of each sweep, those that are fitted, and their headings.
SHOWN = {
    "parameters": ("hold_ms", "release_ms", "temporaries"),
    "leaves": (
        *("trace_s", "compile_s", "dispatch_ms"),
        *("compilation_ms_a_leaf", "dispatch_us_a_leaf"),
    ),
    "every_k": ("hold_ms", "release_ms", "microbatch_ms"),
    "dtype": ("hold_ms", "release_ms", "parameter_bytes", "state_bytes", "temporary_bytes"),
}
FITTED = {
    "parameters": ("hold_ms", "release_ms"),
    "leaves": ("trace_s", "compile_s", "dispatch_ms"),
    "every_k": ("hold_ms", "microbatch_ms"),
    "dtype": (),
}
HEADINGS = {
    "name": "contender",
    "every_k": "k",
    "hold_ms": "hold ms",
    "release_ms": "release ms",
    "microbatch_ms": "mean ms",
    "trace_s": "trace s",
    "compile_s": "compile s",
    "dispatch_ms": "dispatch ms",
    "compilation_ms_a_leaf": "trace, compile ms/leaf",
    "dispatch_us_a_leaf": "dispatch us/leaf",
    "parameter_bytes": "params MB",
    "state_bytes": "state MB",
    "temporary_bytes": "temps MB",
    "slope_of_largest": "largest three",
}


def make_tree(seed: int, parameters: int, leaves: int, dtype: Any) -> dict[str, jax.Array]:
    """Returns vectors of normal deviates, equally long."""
    keys = jax.random.split(jax.random.key(seed), leaves)
    length = parameters // leaves
    return {f"leaf_{i:04d}": jax.random.normal(key, (length,), dtype) for i, key in enumerate(keys)}


def measure_point(
    found: Sequence[Contender],
    variable: str,
    rounds: int,
    *,
    parameters: int,
    leaves: int = 16,
    every_k: int = 4,
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Returns a row of figures for each contender at one value of the variable."""
    value = {"parameters": parameters, "leaves": leaves, "every_k": every_k, "dtype": dtype}
    params, *microbatches = (
        make_tree(seed, parameters, leaves, dtype) for seed in range(1 + min(every_k, 2))
    )
    expected = full_batch(INNER.transformation, every_k, params, microbatches)
    rows, turns, calls = [], {}, {}
    for contender in found:
        window = Window(contender, params, params)
        trained = window.train(params, microbatches)
        error = largest_error(trained, expected, params, TOLERANCE[dtype])
        window.start(params)
        rows.append(
            {
                "name": contender.name,
                variable: value[variable],
                "agrees": error <= 1 if contender.equivalent else None,
                "parameter_bytes": nbytes(params),
                "state_bytes": nbytes(window.carry) - nbytes(params),
                "temporary_bytes": window.temporary_bytes,
                "temporaries": window.temporary_bytes / nbytes(params),
                **{"trace_s": window.trace_s, "compile_s": window.compile_s},
                "compilation_ms_a_leaf": 1e3 * (window.trace_s + window.compile_s) / leaves,
            }
        )
        calls[contender.name] = []
        turns[contender.name] = timed_window(window, microbatches, calls[contender.name])
    del params, expected, trained, window  # the largest trees need the memory
    harness.take_turns(turns, rounds, f"{variable} = {value[variable]}")
    for row in rows:
        ready, dispatch = np.moveaxis(1e3 * np.array(calls[row["name"]][-rounds:]), -1, 0)
        row |= {
            "microbatch_ms": harness.quartiles(ready.mean(axis=1)),
            "hold_ms": harness.quartiles(ready[:, :-1]) if every_k > 1 else None,
            "release_ms": harness.quartiles(ready[:, -1]),
            "dispatch_ms": harness.quartiles(dispatch),
            "dispatch_us_a_leaf": harness.quartiles(1e3 * dispatch / leaves),
        }
    return rows


def timed_window(window: Window, microbatches: Sequence[Any], calls: list[Any]) -> Any:
    """Returns a function that runs a window and notes each call's seconds: ready, returned."""

    def run():
        seconds = []
        for i in range(len(window.programs)):
            start = time.perf_counter()
            window.call(i, microbatches[i % len(microbatches)])
            returned = time.perf_counter()
            jax.block_until_ready(window.carry)
            seconds.append((time.perf_counter() - start, returned - start))
        calls.append(seconds)

    return run


def plan(args: argparse.Namespace) -> dict[str, tuple[Sequence[str], Sequence[Any], dict]]:
    """Returns the contenders, the values and the fixed sizes of each sweep on this device."""
    large = jax.default_backend() != "cpu"
    sizes = 10 ** np.linspace(6, *((9, 7) if large else (8, 5)))
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    sizes = sizes[sizes * BYTES_PER_PARAMETER <= memory].round().astype(int).tolist()
    leaves, ks = [10, 32, 100, 316, 1000] + [5000] * (large or args.full), (1, 4, 16, 64, 256, 1024)
    small, medium = (10**7, 10**8) if large else (250_000, 10**7)
    fixed = {}
    if args.quick:
        sizes, leaves, ks, small, medium = [10**4, 10**5], [2, 4], (1, 2, 4), 10**4, 10**4
        fixed = {"leaves": 2}
    both, tree = (APPLY_GRADIENTS, MULTI_STEPS), {"parameters": 2000 if args.quick else 100_000}
    return {
        "parameters": ((*both, ALONE), sizes, {**fixed, "every_k": 2}),
        "leaves": ((APPLY_GRADIENTS, UPDATE, MULTI_STEPS), leaves, tree),
        "every_k": (both, ks, {**fixed, "parameters": small}),
        "dtype": (both, ("float32", "bfloat16"), {**fixed, "parameters": medium}),
    }


def measure(args: argparse.Namespace) -> Iterator[harness.Result]:
    """Yields every figure of the benchmark, ready for JSON, point by point."""
    sweeps: dict[str, Any] = {}
    for name, (names, values, fixed) in plan(args).items():
        if args.sweep not in (name, "all"):
            continue
        rows = []
        for value in values:
            given = fixed | {name: value}
            found, _ = contenders.make(names, INNER, given.get("every_k", 4))
            rows += measure_point(list(found.values()), name, args.rounds, **given)
            sweeps[name] = {**fixed, "rows": rows, "slopes": slopes(name, rows)}
            yield {"rounds": args.rounds, "sweeps": sweeps}


def slopes(sweep: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns how each contender's figures grow with the variable: as which power of it."""
    fits = []
    for quantity, name in itertools.product(FITTED[sweep], dict.fromkeys(r["name"] for r in rows)):
        points = [(r[sweep], r[quantity]) for r in rows if r["name"] == name and r[quantity]]
        if len(points) < 2:
            continue
        x, y = np.log([(x, y["median"] if isinstance(y, dict) else y) for x, y in points]).T
        fit = {"quantity": quantity, "name": name, "slope": np.polyfit(x, y, 1)[0].item()}
        fits.append(fit | {"slope_of_largest": np.polyfit(x[-3:], y[-3:], 1)[0].item()})
    return fits


def cell(key: str, value: Any) -> str:
    """Returns how a table shows a figure, by its name: medians, and bytes in MB."""
    if value is None or isinstance(value, bool):
        return AGREES[value]
    if isinstance(value, dict):
        value = value["median"]
    if key.endswith("bytes"):
        value = value / 1e6
    if not isinstance(value, float):
        return value if isinstance(value, str) else f"{value:,}"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns the rows of each sweep, and all slopes."""
    named, fits, notes = {}, [], [where(result)]
    for sweep, figures in result["sweeps"].items():
        variable = HEADINGS.get(sweep, sweep)
        keys = (sweep, "name", *SHOWN[sweep], "agrees")
        rows = [
            {HEADINGS.get(key, key): cell(key, row[key]) for key in keys} for row in figures["rows"]
        ]
        named[sweep] = [Table(rows, f"By {variable}", notes)]
        for fit in figures["slopes"]:
            figure = f"{HEADINGS[fit['quantity']].rpartition(' ')[0]}, by {variable}"
            powers = {
                HEADINGS.get(key, key): cell(key, fit[key]) for key in ("slope", "slope_of_largest")
            }
            fits.append({"figure": figure, "contender": fit["name"]} | powers)
    title = "Slopes, log-log"
    return named | ({"slopes": [Table(fits, title, notes)]} if fits else {})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, the rounds that it leaves open filled in."""
    parser = harness.make_parser("scaling", __doc__)
    parser.add_argument("--sweep", choices=(*SHOWN, "all"), default="all", help="which (all)")
    parser.add_argument("--full", action="store_true", help="on a CPU too, up to 5,000 leaves")
    return harness.parse_args(parser, {"rounds": (2, 5, 5)}, argv)


def main() -> None:
    """Runs the benchmark."""
    harness.run("scaling", parse_args(), measure, tables)


if __name__ == "__main__":
    main()
