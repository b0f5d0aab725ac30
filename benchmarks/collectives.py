"""Train data-parallel with each way of accumulating: what devices send each other, and the time.

Devices share the rows of every microbatch; parameters and AdamW's moments are replicated. Rows have
different numbers of tokens, and after two windows all contenders have to agree with AdamW on the
full batch. Then they take turns. Collectives are counted in the compiled programs: those of a scan
as often as it has trips, and those of a branch in the last call of a window, which releases it.
"""

import argparse
import collections
from collections.abc import Iterator
import dataclasses
import itertools
import os
from typing import Any

import jax

from benchmarks import contenders, harness, hlo, training
from benchmarks.contenders import APPLY_GRADIENTS, FULL_BATCH, MULTI_STEPS, VALUE_AND_GRAD
from benchmarks.parallel import (
    BY_HAND,
    CALLS_DEFERRED,
    CALLS_EXPLICIT,
    IN_STEP_DEFERRED,
    IN_STEP_EXPLICIT,
)
from benchmarks.tables import AGREES, Table, median, where

CPU_DEVICES = 8
CPU_FLAG = "xla_force_host_platform_device_count"
NAMES = (
    FULL_BATCH,
    MULTI_STEPS,
    APPLY_GRADIENTS,
    CALLS_DEFERRED,
    CALLS_EXPLICIT,
    VALUE_AND_GRAD,
    IN_STEP_DEFERRED,
    IN_STEP_EXPLICIT,
    BY_HAND,
)
GROWING = (MULTI_STEPS, CALLS_DEFERRED, IN_STEP_DEFERRED)
DEFAULTS = {  # quick, CPU, GPU or TPU
    "parameters": ("100k", "3m", "110m"),
    "microbatch": (1, 1, 4),
    "sequence": (16, 32, 1024),
    "rounds": (3, 15, 15),
}


def traffic(programs: list[Any], every_k: int) -> tuple[list[Any], list[Any] | None]:
    """Returns the collectives of a window, and those of a microbatch that does not release it.

    Args:
        programs: one compiled program for each call: with a microbatch, or with the whole batch.
        every_k: microbatches of the window.
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


def measure(args: argparse.Namespace) -> Iterator[harness.Result]:
    """Yields every figure of the benchmark, ready for JSON."""
    # Under explicit sharding gradients stay unreduced where parameters stand in products.
    task = training.Task.of(args, jax.devices(), one_hot=True, tied=False)
    found, left_out = contenders.make(NAMES, training.INNER, args.every_k)
    windows = {
        name: task.compile(found[name], optimized=not args.quick)
        for name in harness.progress(found, "Compiling")
    }
    units = {"time_to_multi_steps": MULTI_STEPS, "time_to_hand_written": BY_HAND}
    result = training.compare(task, windows, args.rounds, units)
    result |= {"devices": jax.device_count(), "preset": args.parameters, "left_out": left_out}
    result["by_every_k"] = []
    for row in result["contenders"]:
        row["window"], hold = traffic(windows[row["name"]].programs, args.every_k)
        row["hold"] = None if row["name"] == FULL_BATCH else hold
    yield result
    lengths = [(name, every_k) for name in GROWING for every_k in (4, 16, 64)]
    for name, every_k in harness.progress(lengths, "Compiling windows of 4 to 64"):
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
    rows = [
        {
            "contender": row["name"],
            "all-reduces per window": sent(row["window"], size),
            "in a hold": sent(row["hold"], size),
            "window ms": median(row["window_ms"], "{:,.0f}"),
            "to MultiSteps": median(row["time_to_multi_steps"]),
            "to hand-written": median(row["time_to_hand_written"]),
            "agrees": AGREES[row["agrees"]],
        }
        for row in result["contenders"]
    ]
    lengths = [
        {"contender": name} | {f"k = {row['every_k']}": f"{row['bytes'] / size:.2f}" for row in of}
        for name, of in itertools.groupby(result["by_every_k"], key=lambda row: row["name"])
    ]
    left_out = [f"Left out: {name}, for {why}." for name, why in result["left_out"].items()]
    notes = [*left_out, f"{training.setting(result)} {where(result)}"]
    several = (
        [Table(lengths, "Parameter sizes that a device reduces per window")] if lengths else []
    )
    return {"collectives": [Table(rows, "A window", notes), *several]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, with defaults for the device."""
    parser = harness.make_parser("collectives", __doc__)
    training.add_arguments(parser, 16)
    args = harness.parse_args(parser, DEFAULTS, argv)
    if jax.device_count() < 2:
        found = f"{jax.device_count()} {jax.devices()[0].device_kind}"
        parser.error(
            f"needs at least 2 devices, found {found}; with JAX_PLATFORMS=cpu, and without "
            f"--{CPU_FLAG} in XLA_FLAGS, a CPU becomes {CPU_DEVICES}"
        )
    return args


def make_cpu_devices() -> None:
    """Makes several devices of a CPU, unless the user has said how many."""
    told = CPU_FLAG in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    if not told:
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def main() -> None:
    """Runs the benchmark."""
    make_cpu_devices()  # before anything asks for one
    harness.run("collectives", parse_args(), measure, tables)


if __name__ == "__main__":
    main()
