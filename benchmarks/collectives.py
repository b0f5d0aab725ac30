"""Train data-parallel with each way of accumulating: what devices send each other, and the time.

Devices share the rows of every microbatch; parameters and AdamW's moments are replicated. Rows have
different numbers of tokens, and after two windows all contenders have to agree with AdamW on the
full batch. Then they take turns. Collectives are counted in the compiled programs: those of a scan
as often as it has trips, and those of a branch in the last call of a window, which releases it.
"""

import collections
from collections.abc import Iterator
import dataclasses
import itertools
import os
import sys
from typing import Any

import jax

from benchmarks import contenders, harness, hlo, training
from benchmarks.contenders import CALLS_DEFERRED, FULL_BATCH, IN_STEP_DEFERRED, MULTI_STEPS
from benchmarks.tables import Table, left_out, name_of, rows_of, where

CPU_DEVICES, CPU_FLAG = 8, "xla_force_host_platform_device_count"
NAMES = (
    *(FULL_BATCH, MULTI_STEPS, contenders.APPLY_GRADIENTS, CALLS_DEFERRED),
    *(contenders.CALLS_EXPLICIT, contenders.VALUE_AND_GRAD, IN_STEP_DEFERRED),
    *(contenders.IN_STEP_EXPLICIT, contenders.BY_HAND),
)
UNITS = {"time_to_multi_steps": MULTI_STEPS, "time_to_hand_written": contenders.BY_HAND}
OPTIONS = training.OPTIONS | {
    "parameters": ("the model", tuple(training.transformer.PRESETS), "100k", "3m", "110m"),
    "dtype": ("what it computes in", ("float32", "bfloat16"), *["float32"] * 3),
    "every_k": ("microbatches per window", 2, 4, 16, 16),
    "sequence": ("tokens in each sequence", 1, 16, 32, 1024),
}


def traffic(programs: list[Any], every_k: int) -> tuple[list[Any], list[Any] | None]:
    """Returns the collectives of a window, and those of a microbatch that does not release it.

    There is one compiled program for each call: with a microbatch, or with the whole batch.
    """
    found = {program: hlo.collectives(program.as_text()) for program in dict.fromkeys(programs)}
    calls = [[one for one in found[program] if not one.conditional] for program in programs]
    window = [one for call in calls[:-1] for one in call] + found[programs[-1]]
    if len(programs) > 1:
        return summed(window), summed(calls[0])
    # The scan of a whole batch has a trip for each microbatch, or some for the layers of each.
    trips = [one for one in window if one.trips % every_k == 0]
    return summed(window), summed(
        dataclasses.replace(one, trips=one.trips // every_k) for one in trips
    )


def summed(found: Any) -> list[dict[str, Any]]:
    """Returns how many times collectives of each kind and size run, the largest first."""
    times = collections.Counter()
    for one in found:
        times[one.bytes, one.kind] += one.trips
    return [
        {"kind": kind, "bytes": size, "times": count}
        for (size, kind), count in sorted(times.items(), reverse=True)
    ]


def total(found: list[dict[str, Any]]) -> int:
    """Returns the bytes of all collectives in a list of {kind, bytes, times}."""
    return sum(one["bytes"] * one["times"] for one in found)


def measure(args: Any) -> Iterator[harness.Result]:
    if jax.device_count() < 2:
        sys.exit(
            f"needs at least 2 devices, found {jax.device_count()} {jax.devices()[0].device_kind}; "
            f"with JAX_PLATFORMS=cpu, and without --{CPU_FLAG} in XLA_FLAGS, a CPU becomes "
            f"{CPU_DEVICES}"
        )
    # Under explicit sharding gradients stay unreduced where parameters stand in products.
    task = training.Task.of(args, jax.devices(), one_hot=True, tied=False)
    windows, result = training.compare(task, NAMES, UNITS, args)
    result |= {"devices": jax.device_count(), "by_every_k": []}
    for row in result["contenders"]:
        row["window"], hold = traffic(windows[row["name"]].programs, args.every_k)
        row["hold"] = None if row["name"] == FULL_BATCH else hold
    yield result
    ways, ks = (
        (MULTI_STEPS, CALLS_DEFERRED, IN_STEP_DEFERRED),
        (4, 16) if args.quick else (4, 16, 64),
    )
    for name, every_k in harness.progress(list(itertools.product(ways, ks)), "Longer windows"):
        longer = dataclasses.replace(task, every_k=every_k)
        contender = contenders.ADAPTERS[name](training.INNER, every_k)
        window, _ = traffic(longer.compile(contender, optimized=False).programs, every_k)
        result["by_every_k"].append({"name": name, "every_k": every_k, "bytes": total(window)})
        yield result


def sent(found: list[dict[str, Any]] | None, parameter_bytes: int) -> str:
    """Returns how often collectives run, times their mean size in that of the parameters.

    Those below a thousandth of it come apart, in bytes. An all-reduce goes without saying.
    """
    if not found:
        return "-" if found is None else "none"
    cells = []
    for kind in dict.fromkeys(one["kind"] for one in found):
        ours = [one for one in found if one["kind"] == kind]
        large = [one for one in ours if one["bytes"] >= 1e-3 * parameter_bytes]
        small = [one for one in ours if one not in large]
        name = "" if kind == "all-reduce" else f"{kind} "
        for group, unit, size in ((large, parameter_bytes, "{:.2f}"), (small, 1, "{:.0f} B")):
            if times := sum(one["times"] for one in group):
                cells.append(f"{name}{times} x {size.format(total(group) / times / unit)}")
    return " + ".join(cells)


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns what each contender's devices send, its time, and how that grows with k."""
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
    notes = [*left_out(result), f"{training.setting(result)} {where(result)}"]
    found = [
        Table(rows_of(result["contenders"], columns), "A window", notes),
        Table(lengths, "Parameter sizes that a device reduces per window"),
    ]
    return {"collectives": [table for table in found if table.rows]}


def make_cpu_devices() -> None:
    """Makes several devices of a CPU, unless the user has said how many."""
    if CPU_FLAG not in os.environ.get("XLA_FLAGS", "") and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


if __name__ == "__main__":
    make_cpu_devices()  # before anything asks for one
    harness.main("collectives", __doc__, OPTIONS, measure, tables)
