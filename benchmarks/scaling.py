"""Measure how the cost of accumulating gradients grows, one variable at a time.

`parameters`: the time of a hold and of a release. `leaves`: the time to trace, to compile and to
dispatch one step, at few parameters. `every_k`: the time of a hold, for which the length of the
window must not matter. `dtype`: time and bytes in float32 and bfloat16.
"""

import dataclasses
from typing import Any

import numpy as np
import optax

from benchmarks import contenders
from benchmarks.contender import INNERS
from benchmarks.contenders import APPLY_GRADIENTS, MULTI_STEPS, UPDATE
from benchmarks.programs import Task, check, make_trees, nbytes, time_parts
from benchmarks.tables import Result, quartiles, rows_of, table, three_digits, where

# A small step would drown in the rounding of bfloat16 parameters.
INNER = dataclasses.replace(INNERS["adamw"], transformation=optax.adamw(0.1, eps=0.1))
# One that sums in float32 is off by rounding alone, one in bfloat16 by up to 2^-8 per addition.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
BOTH = APPLY_GRADIENTS, MULTI_STEPS
ROUNDS = 2, 5, 5
# For each sweep its contenders, the values of its variable and what else is set, with --quick, on a
# CPU, elsewhere. The contenders and the check need 84 bytes for each parameter.
SWEEPS: dict[str, tuple[Any, Any, Any]] = {
    "parameters": (
        BOTH,
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
TIMES = {"hold ms": ("hold_ms", three_digits), "release ms": ("release_ms", three_digits)}
SHOWN: Any = {  # in the table of each sweep
    "parameters": TIMES | {"temporaries, P": ("temporaries",)},
    "leaves": {
        "trace s": ("trace_s",),
        "compile s": ("compile_s",),
        "dispatch ms": ("dispatch_ms",),
    },
    "every_k": TIMES | {"mean ms": ("microbatch_ms", three_digits)},
    "dtype": TIMES
    | {
        "params MB": ("parameter_bytes", "{:.0f}", 1e6),
        "state MB": ("state_bytes", "{:.0f}", 1e6),
        "temporaries, P": ("temporaries",),
    },
}


def measure_point(names: Any, sweep: str, rounds: int, sizes: dict[str, Any]) -> list[Result]:
    """Returns a row of figures for each contender at one value of the variable of a sweep."""
    sizes = {"leaves": 16, "every_k": 4, "dtype": "float32"} | sizes
    leaves, every_k, dtype = sizes["leaves"], sizes["every_k"], sizes["dtype"]
    shape = (int(sizes["parameters"]) // leaves,)
    params, *grads = make_trees(1 + min(every_k, 2), leaves, shape, dtype)
    task = Task(params, grads, every_k, INNER, TOLERANCE[dtype])
    windows, rows = check(contenders.make(names, INNER, every_k)[0], task)
    seconds = time_parts(windows, rounds)
    for name, row in rows.items():
        row |= {sweep: sizes[sweep], "parameter_bytes": task.size, "hold_ms": None}
        row |= {"state_bytes": nbytes(windows[name].carry) - task.size}
        row |= {f"{part}_ms": quartiles(1e3 * times) for part, times in seconds[name].items()}
    return list(rows.values())


def measure(scale: int) -> Result:
    sweeps: dict[str, Any] = {}
    for name, (names, values, others) in SWEEPS.items():
        sweeps[name] = []
        for value in np.array(values[scale]).tolist():
            sizes = others[scale] | {name: value}
            sweeps[name] += measure_point(names, name, ROUNDS[scale], sizes)
    return {"rounds": ROUNDS[scale], "sweeps": sweeps}


def tables(result: Result) -> dict[str, str]:
    named = {}
    for sweep, found in result["sweeps"].items():
        variable = "k" if sweep == "every_k" else sweep
        columns = {variable: (sweep, "{:,.0f}"), "contender": ("name",)} | SHOWN[sweep]
        rows = rows_of(found, columns | {"agrees": ("agrees",)})
        named[sweep] = table(rows, where(result))
    return named
