"""Train data-parallel with each way of accumulating: what devices send each other, and the time.

Devices share the rows of every microbatch; parameters and AdamW's moments are replicated. Rows have
different numbers of tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import sys
from typing import Any

import jax

from benchmarks import contenders, hlo, training
from benchmarks.contenders import (
    ADAPTERS,
    APPLY_GRADIENTS,
    BY_HAND,
    CALLS_DEFERRED,
    FULL_BATCH,
    IN_STEP_DEFERRED,
    MULTI_STEPS,
    VALUE_AND_GRAD,
)
from benchmarks.programs import Window
from benchmarks.tables import Result, left_out, name_of, rows_of, table

NAMES = (
    *(FULL_BATCH, MULTI_STEPS, APPLY_GRADIENTS, CALLS_DEFERRED, contenders.CALLS_EXPLICIT),
    *(VALUE_AND_GRAD, IN_STEP_DEFERRED, contenders.IN_STEP_EXPLICIT, BY_HAND),
)
# With --quick, on a CPU, elsewhere.
SIZES = (
    training.Sizes("100k", "float32", 4, 1, 16, 2),
    training.Sizes("3m", "float32", 16, 1, 32, 15),
    training.Sizes("110m", "float32", 16, 1, 1024, 15),
)


def traffic(programs: list[Any], every_k: int) -> dict[str, list[Any]]:
    """Returns the collectives of a window, and of a microbatch that does not release it.

    There is one compiled program for each call: with a microbatch, or with the whole batch.
    """
    found = {program: hlo.collectives(program.as_text()) for program in dict.fromkeys(programs)}
    calls = [[one for one in found[program] if not one.conditional] for program in programs]
    window = [one for call in calls[:-1] for one in call] + found[programs[-1]]
    if len(programs) > 1:
        return {"window": summed(window), "hold": summed(calls[0])}
    # The scan of a whole batch has a trip for each microbatch, or some for the layers of each.
    hold = [one for one in window if one.trips % every_k == 0]
    hold = [dataclasses.replace(one, trips=one.trips // every_k) for one in hold]
    return {"window": summed(window), "hold": summed(hold)}


def summed(found: Iterable[hlo.Collective]) -> list[dict[str, Any]]:
    """Returns how many times collectives of each kind, size and group run, the largest first."""
    times = Counter()
    for one in found:
        times[one.bytes, one.kind, one.group or 0] += one.trips
    runs = sorted(times.items(), reverse=True)
    names = "bytes", "kind", "group", "times"
    return [dict(zip(names, (*key, count), strict=True)) for key, count in runs]


def total(found: list[dict[str, Any]]) -> int:
    """Returns the bytes of all collectives in a list of {kind, bytes, times}."""
    return sum(one["bytes"] * one["times"] for one in found)


def measure(scale: int) -> Iterator[Result]:
    if jax.device_count() < 2:
        sys.exit(f"needs at least 2 devices, found {jax.device_count()}; JAX_PLATFORMS=cpu has 8")
    sizes = SIZES[scale]
    # Under explicit sharding only gradients of parameters in products stay unreduced.
    task = training.make_task(sizes, jax.devices(), one_hot=True, tied=False)
    task = dataclasses.replace(task, optimized=scale > 0)
    units = {"time_to_multi_steps": MULTI_STEPS, "time_to_hand_written": BY_HAND}
    windows, result = training.compare(sizes, task, NAMES, units)
    result |= {"devices": jax.device_count(), "by_every_k": []}
    for row in result["contenders"]:
        row |= traffic(windows[row["name"]].programs, task.every_k)
        row["hold"] = None if row["name"] == FULL_BATCH else row["hold"]
    yield result
    ways = MULTI_STEPS, CALLS_DEFERRED, IN_STEP_DEFERRED
    for name, every_k in itertools.product(ways, (4, 16, 64) if scale else (16,)):
        longer = dataclasses.replace(task, every_k=every_k, optimized=False)
        window = Window(ADAPTERS[name](training.INNER, every_k), longer)
        size = total(traffic(window.programs, every_k)["window"])
        result["by_every_k"].append({"name": name, "every_k": every_k, "bytes": size})
        yield result


def tables(result: Result) -> dict[str, str]:
    size = result["parameter_bytes"]
    columns = {
        "contender": name_of,
        "all-reduces per window": lambda row: sent(row["window"], size),
        "in a hold": lambda row: sent(row["hold"], size),
        "window ms": ("window_ms", "{:,.0f}"),
        "to MultiSteps": ("time_to_multi_steps",),
        "to hand-written": ("time_to_hand_written",),
        "agrees": ("agrees",),
    }
    lengths = [
        {"contender": name} | {f"k = {row['every_k']}": f"{row['bytes'] / size:.2f}" for row in of}
        for name, of in itertools.groupby(result["by_every_k"], key=lambda row: row["name"])
    ]
    notes = *left_out(result), training.setting(result)
    found = table(rows_of(result["contenders"], columns), *notes)
    return {"collectives": f"{found}\n\n{table(lengths)}" if lengths else found}


def sent(found: list[dict[str, Any]] | None, parameter_bytes: int) -> str:
    """Returns how often collectives run, times their mean size in P; small ones apart, in bytes."""
    if not found:
        return "-" if found is None else "none"
    cells = []
    for kind in dict.fromkeys(one["kind"] for one in found):
        ours = [one for one in found if one["kind"] == kind]
        large = [one for one in ours if one["bytes"] >= 1e-3 * parameter_bytes]
        small = [one for one in ours if one not in large]
        name = "" if kind == "all-reduce" else f"{kind} "  # which the heading says
        for group, unit, size in ((large, parameter_bytes, "{:.2f}"), (small, 1, "{:.0f} B")):
            if times := sum(one["times"] for one in group):
                cells.append(f"{name}{times} x {size.format(total(group) / times / unit)}")
    return " + ".join(cells)
