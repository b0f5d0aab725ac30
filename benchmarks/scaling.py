"""Measure how the cost of accumulating gradients grows, one variable at a time.

`parameters`: the time of a hold and of a release. `leaves`: the time to trace, to compile and to
dispatch one step, at few parameters. `every_k`: the time of a hold, for which the length of the
window must not matter. `dtype`: time and bytes in float32 and bfloat16.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np
import optax

from benchmarks import contenders
from benchmarks.contender import INNERS, Contender
from benchmarks.contenders import ALONE, APPLY_GRADIENTS, MULTI_STEPS, UPDATE
from benchmarks.programs import Task, check, make_trees, nbytes, time_parts
from benchmarks.tables import Result, middle, quartiles, rows_of, table, where

# A small `eps` would hide the scale of the gradients from Adam, and a sum from a mean; and a small
# step would drown in the rounding of bfloat16 parameters.
INNER = dataclasses.replace(INNERS["adamw"], transformation=optax.adamw(0.1, eps=0.1))
# One that sums in float32 is off by rounding alone, one in bfloat16 by up to 2^-8 per addition.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
BOTH = APPLY_GRADIENTS, MULTI_STEPS
ROUNDS = 2, 5, 5
# For each sweep its contenders, the values of its variable and what else is set, with --quick, on a
# CPU, elsewhere. The contenders and the check need 84 bytes for each parameter.
SWEEPS: dict[str, tuple[Any, Any, Any]] = {
    "parameters": (
        (*BOTH, ALONE),
        ((10**4, 10**5), np.logspace(6, 8, 5).round(), np.logspace(6, 9, 7).round()),
        ({"every_k": 2, "leaves": 2}, {"every_k": 2}, {"every_k": 2}),
    ),
    "leaves": (
        (APPLY_GRADIENTS, UPDATE, MULTI_STEPS),
        ((2, 4), (10, 32, 100, 316, 1000), (10, 32, 100, 316, 1000, 5000)),
        ({"parameters": 2000}, {"parameters": 10**4}, {"parameters": 10**4}),
    ),
    "every_k": (
        BOTH,
        ((1, 4), (1, 4, 16, 64, 256, 1024), (1, 4, 16, 64, 256, 1024)),
        ({"parameters": 10**5, "leaves": 2}, {"parameters": 250_000}, {"parameters": 10**7}),
    ),
    "dtype": (
        BOTH,
        (("float32", "bfloat16"),) * 3,
        ({"parameters": 10**5, "leaves": 2}, {"parameters": 10**7}, {"parameters": 10**8}),
    ),
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
    shape = (int(sizes["parameters"]) // leaves,)
    params, *grads = make_trees(1 + min(every_k, 2), leaves, shape, dtype)
    task = Task(params, grads, every_k, INNER, TOLERANCE[dtype])
    windows, rows = check(found, task)
    seconds = time_parts(windows, rounds)
    for name, row in rows.items():
        times = seconds[name]
        row |= {sweep: sizes[sweep], "parameter_bytes": task.size, "hold_ms": None}
        row |= {"agrees": row["agrees"] if row["equivalent"] else None}
        row |= {"state_bytes": nbytes(windows[name].carry) - task.size}
        row |= {f"{part}_ms": quartiles(1e3 * values) for part, values in times.items()}
        row["compilation_ms_a_leaf"] = 1e3 * (row["trace_s"] + row["compile_s"]) / leaves
        row["dispatch_us_a_leaf"] = quartiles(1e6 * times["dispatch"] / leaves)
    return list(rows.values())


def measure(scale: int) -> Iterator[Result]:
    sweeps: dict[str, Any] = {}
    for name, (names, values, others) in SWEEPS.items():
        rows = []
        for value in np.array(values[scale]).tolist():
            sizes = others[scale] | {name: value}
            found, _ = contenders.make(names, INNER, sizes.get("every_k", 4))
            rows += measure_point(found, name, ROUNDS[scale], sizes)
            sweeps[name] = {**others[scale], "rows": rows, "slopes": slopes(name, rows)}
            yield {"rounds": ROUNDS[scale], "sweeps": sweeps}


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


def tables(result: Result) -> dict[str, str]:
    """Returns the rows of each sweep, and all slopes."""
    named, fits = {}, []
    for sweep, found in result["sweeps"].items():
        variable = "k" if sweep == "every_k" else sweep
        columns = {variable: (sweep, "{:,.0f}"), "contender": ("name",)}
        for heading, figure in SHOWN[sweep].items():
            columns[heading] = (figure, digits, 1e6 if heading.endswith("MB") else 1)
        rows = rows_of(found["rows"], columns | {"agrees": ("agrees",)})
        named[sweep] = table(rows, where(result))
        for fit in found["slopes"]:
            quantity = fit["quantity"].replace("microbatch", "mean").rpartition("_")[0]
            fits.append(fit | {"figure": f"{quantity}, by {variable}"})
    columns = {"figure": ("figure",), "contender": ("name",), "slope": ("slope",)}
    rows = rows_of(fits, columns | {"largest three": ("slope_of_largest",)})
    return named | ({"slopes": table(rows, where(result))} if rows else {})
