"""Measure how the cost of accumulating gradients grows, one variable at a time.

`parameters`: the time of a hold and of a release. `leaves`: the time to trace, to compile and to
dispatch one step, at few parameters. `every_k`: the time of a hold, for which the length of the
window must not matter. `dtype`: time and bytes in float32 and bfloat16. Every contender is first
checked, at every point, against the inner optimizer on the mean gradients of two windows.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import contenders, harness
from benchmarks.contenders import ALONE, APPLY_GRADIENTS, INNERS, MULTI_STEPS, UPDATE, Contender
from benchmarks.programs import Window, check, make_trees, nbytes
from benchmarks.tables import Table, middle, rows_of, where

# A small `eps` would hide the scale of the gradients from Adam, and a sum from a mean; and a small
# step would drown in the rounding of bfloat16 parameters.
INNER = dataclasses.replace(INNERS["adamw"], transformation=optax.adamw(0.1, eps=0.1))
# One that sums in float32 is off by rounding alone, one in bfloat16 by up to 2^-8 per addition.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
# The most that the contenders, their gradients and the check need at one time.
BYTES_PER_PARAMETER = 84
OPTIONS = {
    "leaves": ("the most leaves of a tree", 10, 4, 1000, 5000),
    "rounds": ("timed rounds", 1, 2, 5, 5),
}
TIMES = {"hold ms": "hold_ms", "release ms": "release_ms"}
SHOWN: Any = {  # in the table of each sweep
    "parameters": TIMES | {"temporaries": "temporaries"},
    "leaves": {
        "trace s": "trace_s",
        "compile s": "compile_s",
        "dispatch ms": "dispatch_ms",
        "trace, compile ms/leaf": "compilation_ms_a_leaf",
        "dispatch us/leaf": "dispatch_us_a_leaf",
    },
    "every_k": TIMES | {"mean ms": "microbatch_ms"},
    "dtype": TIMES
    | {"params MB": "parameter_bytes", "state MB": "state_bytes", "temps MB": "temporary_bytes"},
}
FITTED = {
    "parameters": ("hold_ms", "release_ms"),
    "leaves": ("trace_s", "compile_s", "dispatch_ms"),
    "every_k": ("hold_ms", "microbatch_ms"),
    "dtype": (),
}


def measure_point(
    found: Mapping[str, Contender], sweep: str, rounds: int, sizes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns a row of figures for each contender at one value of the variable of a sweep."""
    sizes = {"leaves": 16, "every_k": 4, "dtype": "float32"} | sizes
    leaves, every_k, dtype = sizes["leaves"], sizes["every_k"], sizes["dtype"]
    shape = (sizes["parameters"] // leaves,)
    trees = make_trees(1 + min(every_k, 2), leaves, shape, dtype)
    windows, rows = check(found, INNER.transformation, every_k, trees, TOLERANCE[dtype])
    turns, size = {}, nbytes(trees[0])
    for name, window in windows.items():
        row = rows[name] | {sweep: sizes[sweep], "parameter_bytes": size}
        row |= {"agrees": row["agrees"] if row["equivalent"] else None}
        row |= {"state_bytes": nbytes(window.carry) - size}
        row |= {x: getattr(window, x) for x in ("temporary_bytes", "trace_s", "compile_s")}
        row |= {"temporaries": window.temporary_bytes / size}
        row["compilation_ms_a_leaf"] = 1e3 * (window.trace_s + window.compile_s) / leaves
        rows[name], batches = row, [window.put(grads) for grads in trees[1:]]
        turns[name] = functools.partial(call_by_call, window, batches)
    del trees, windows, window, batches  # the largest trees need the memory
    seconds = harness.take_turns(turns, rounds, f"{sweep} = {sizes[sweep]}")
    for name, row in rows.items():
        dispatch, waiting = np.moveaxis(1e3 * seconds[name].reshape(rounds, -1, 2), -1, 0)
        ready = dispatch + waiting
        row["microbatch_ms"] = harness.quartiles(ready.mean(axis=1))
        row["hold_ms"] = harness.quartiles(ready[:, :-1]) if every_k > 1 else None
        row["release_ms"] = harness.quartiles(ready[:, -1])
        row["dispatch_ms"] = harness.quartiles(dispatch)
        row["dispatch_us_a_leaf"] = harness.quartiles(1e3 * dispatch / leaves)
    return list(rows.values())


def call_by_call(window: Window, microbatches: Sequence[Any]) -> Iterator[Any]:
    """Runs a window, and yields after each call when it has returned, and to wait for it."""
    for i in range(len(window.programs)):
        window.call(i, microbatches)
        yield None
        yield window.carry


def plan(args: Any) -> dict[str, tuple[Sequence[str], Any, dict[str, int]]]:
    """Returns the contenders, the values and the fixed sizes of each sweep on this device."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    parameters = ([1e4, 1e5], np.logspace(6, 8, 5), np.logspace(6, 9, 7))[args.scale]
    parameters = [round(x) for x in parameters if x * BYTES_PER_PARAMETER <= memory]
    leaves = [2, 4] if args.quick else [10, 32, 100, 316, 1000, 5000]
    ks = (1, 2, 4) if args.quick else (1, 4, 16, 64, 256, 1024)
    tree, small, medium = ((2000, 10**4, 10**4), (10**5, 250_000, 10**7), (10**5, 10**7, 10**8))[
        args.scale
    ]
    both, fixed = (APPLY_GRADIENTS, MULTI_STEPS), {"leaves": 2} if args.quick else {}
    few = [n for n in leaves if n <= args.leaves]
    return {
        "parameters": ((*both, ALONE), parameters, fixed | {"every_k": 2}),
        "leaves": ((APPLY_GRADIENTS, UPDATE, MULTI_STEPS), few, {"parameters": tree}),
        "every_k": (both, ks, fixed | {"parameters": small}),
        "dtype": (both, ("float32", "bfloat16"), fixed | {"parameters": medium}),
    }


def measure(args: Any) -> Iterator[harness.Result]:
    sweeps: dict[str, Any] = {}
    for name, (names, values, fixed) in plan(args).items():
        rows = []
        for value in values:
            sizes = fixed | {name: value}
            found, _ = contenders.make(names, INNER, sizes.get("every_k", 4))
            rows += measure_point(found, name, args.rounds, sizes)
            sweeps[name] = {**fixed, "rows": rows, "slopes": slopes(name, rows)}
            yield {"rounds": args.rounds, "sweeps": sweeps}


def slopes(sweep: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns how each contender's figures grow with the variable: as which power of it."""
    fits = []
    for quantity, name in itertools.product(FITTED[sweep], dict.fromkeys(r["name"] for r in rows)):
        of = [row for row in rows if row["name"] == name and row[quantity]]
        if len(of) < 2:
            continue
        x, y = np.log([(row[sweep], middle(row[quantity])) for row in of]).T
        fit = {"quantity": quantity, "name": name, "slope": np.polyfit(x, y, 1)[0].item()}
        fits.append(fit | {"slope_of_largest": np.polyfit(x[-3:], y[-3:], 1)[0].item()})
    return fits


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns the rows of each sweep, and all slopes."""
    named, fits, notes = {}, [], [where(result)]
    for sweep, found in result["sweeps"].items():
        variable = "k" if sweep == "every_k" else sweep
        columns = {variable: (sweep, "{:,.0f}"), "contender": ("name",)}
        for heading, figure in SHOWN[sweep].items():
            columns[heading] = (figure, digits, 1e6 if heading.endswith("MB") else 1)
        rows = rows_of(found["rows"], columns | {"agrees": ("agrees",)})
        named[sweep] = [Table(rows, f"By {variable}", notes)]
        for fit in found["slopes"]:
            quantity = fit["quantity"].replace("microbatch", "mean").rpartition("_")[0]
            fits.append(fit | {"figure": f"{quantity}, by {variable}"})
    columns = {"figure": ("figure",), "contender": ("name",), "slope": ("slope",)}
    rows = rows_of(fits, columns | {"largest three": ("slope_of_largest",)})
    return named | ({"slopes": [Table(rows, "Slopes, log-log", notes)]} if rows else {})


if __name__ == "__main__":
    harness.main("scaling", __doc__, OPTIONS, measure, tables)
