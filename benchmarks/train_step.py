"""Train a transformer with each way of accumulating: tokens per second, peak memory, batch size.

A step is a whole one: forward, backward, accumulate and AdamW, compiled ahead of time with the
parameters and the optimizer's state donated. Every contender starts from the same parameters and
sees the same tokens, and after two windows has to agree with plain AdamW on the full batch. Then
all take turns, one window each a round. `--output` writes the tables as JSON::

    benchmark, date, device, versions      as of every benchmark
    preset, parameters, leaves, dtype      the model, and what it computes in
    every_k, microbatch, sequence, rounds  sizes of a window: sequences a microbatch, tokens each
    reference                              the contender that the others have to agree with
    contenders: a list, and for each
        name, agrees                       what it is, and whether it agrees (null: it did not run)
        error                              its largest error, 1 being what rounding explains
        tokens_per_second                  {q1, median, q3}, null if it did not run, as the next two
        time_to_multi_steps                window time in that of optax.MultiSteps {q1, median, q3}
        time_to_hand_written               the same in that of the hand-written loop
        peak_bytes                         of its hungriest program, as compiled: arguments +
                                           outputs - aliased + temporaries
        device_peak_bytes                  what the device saw while it ran alone; null where the
                                           device does not say, or saw more before
    budget_bytes                           the memory that the next table is about
    largest: a list, and for each
        name, microbatch                   the largest power of two of sequences that fits, or 0
        effective_batch                    sequences that one AdamW step then sees
        capped                             whether the search ended before the budget did
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table

from benchmarks import harness, transformer
from benchmarks.trainers import (
    APPLY_GRADIENTS,
    FULL_BATCH,
    HAND_WRITTEN,
    MULTI_STEPS,
    WINDOWS,
    Trainer,
    device_memory,
    largest_error,
    make_contenders,
    train_alone,
)

TIMED = (
    *("agrees", "error", "tokens_per_second"),
    *("time_to_multi_steps", "time_to_hand_written", "device_peak_bytes"),
)
DEFAULTS = {  # quick, CPU, GPU
    "parameters": ("100k", "10m", "350m"),
    "dtype": ("float32", "float32", "bfloat16"),
    "microbatch": (1, 1, 4),
    "sequence": (16, 64, 1024),
    "rounds": (3, 15, 15),
}


def largest_batch(
    peak_of: Callable[[int], int], start: int, budget: float, doublings: int
) -> tuple[int, bool]:
    """Returns the largest power of two that fits, or 0, and whether the search was cut short."""
    batch = 1 << (start.bit_length() - 1)
    if peak_of(batch) > budget:
        while batch and peak_of(batch) > budget:
            batch //= 2
        return batch, False
    for _ in range(doublings):
        if peak_of(2 * batch) > budget:
            return batch, False
        batch *= 2
    return batch, True


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns every figure of the benchmark, ready for JSON."""
    preset = transformer.PRESETS[args.parameters]
    config = dataclasses.replace(preset, sequence=args.sequence, dtype=jnp.dtype(args.dtype))
    graph, params = transformer.build(config)
    batch = args.every_k * args.microbatch
    shape = (args.every_k, args.microbatch, args.sequence + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocabulary)

    def compiled(contender, batch, optimized):
        return Trainer(contender, graph, params, (batch, args.sequence), optimized)

    contenders = {contender.name: contender for contender in make_contenders(args.every_k)}
    trainers = [
        compiled(contender, batch if name == FULL_BATCH else args.microbatch, not args.quick)
        for name, contender in harness.progress(contenders.items(), "Compiling")
    ]
    peaks = {trainer.name: trainer.peak_bytes for trainer in trainers}
    room = args.budget * 1e6 if args.budget else device_memory("bytes_limit")
    if room and peaks[FULL_BATCH] > room:
        del trainers[0]
    windows = {name: list(tokens) for name in contenders}
    windows[FULL_BATCH] = [tokens.reshape(batch, -1)]

    # The device's peak never falls: the hungriest comes last, so that each can be seen to raise it.
    alone = {
        trainer.name: train_alone(trainer, params, windows[trainer.name])
        for trainer in harness.progress(
            sorted(trainers, key=lambda trainer: trainer.peak_bytes), "Checking"
        )
    }
    reference = FULL_BATCH if FULL_BATCH in alone else HAND_WRITTEN
    errors = {
        name: largest_error(trained, alone[reference][0], params, config)
        for name, (trained, _) in alone.items()
    }

    for trainer in trainers:
        trainer.start(params)
    turns = {
        trainer.name: functools.partial(trainer.run_window, windows[trainer.name])
        for trainer in trainers
    }
    seconds = harness.take_turns(turns, args.rounds)

    def figures(name):
        row = dict.fromkeys(TIMED) | {"name": name, "peak_bytes": peaks[name]}
        if name in seconds:
            speed = harness.quartiles(np.divide(batch * args.sequence, seconds[name]))
            times = (harness.ratios(seconds, name, unit) for unit in (MULTI_STEPS, HAND_WRITTEN))
            measured = errors[name] <= 1, errors[name], speed, *times, alone[name][1]
            row |= zip(TIMED, measured, strict=True)
        return row

    budget = args.budget * 1e6 if args.budget else 1.25 * peaks[APPLY_GRADIENTS]
    del trainers, turns  # a GPU tries out kernels when it compiles, and needs room for them

    def fitting(name):
        @functools.cache
        def peak_of(size):
            if size == (batch if name == FULL_BATCH else args.microbatch):
                return peaks[name]
            # A release does all that a hold does, and more: it alone says what fits.
            release = dataclasses.replace(contenders[name], applies=contenders[name].applies[-1:])
            return compiled(release, size, False).peak_bytes

        size, capped = largest_batch(peak_of, args.microbatch, budget, 1 if args.quick else 6)
        effective = size if name == FULL_BATCH else size * args.every_k
        return {"name": name, "microbatch": size, "effective_batch": effective, "capped": capped}

    largest = [fitting(name) for name in harness.progress(contenders, "Compiling larger batches")]
    sizes = "every_k", "microbatch", "sequence", "rounds"
    return {
        **harness.origin("train_step"),
        "preset": args.parameters,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "leaves": len(jax.tree.leaves(params)),
        "dtype": args.dtype,
        **{name: getattr(args, name) for name in sizes},
        "reference": reference,
        "contenders": [figures(name) for name in contenders],
        "budget_bytes": round(budget),
        "largest": largest,
    }


def print_tables(result: dict[str, Any]) -> None:
    """Prints the figures as two tables that fit into 100 columns."""

    def column(heading):
        return Column(heading, justify="right")

    def cell(value, digits=2):
        return "-" if value is None else f"{value:,.{digits}f}"

    window = f"{result['every_k']} x {result['microbatch']} sequences of {result['sequence']}"
    table = Table(
        Column("contender", no_wrap=True),
        *map(column, ("tokens/s", "time to\nMulti-\nSteps", "time to\nhand-\nwritten")),
        *map(column, ("peak MB\ncompiled", "peak MB\ndevice", "error", "agrees")),
        title=f"{result['parameters'] / 1e6:,.1f} M parameters, {result['dtype']}, a window of "
        f"{window} tokens,\non {result['device']}",
        caption="Ratios, medians over the rounds of this run, are what counts. Error: to the "
        f"{result['reference']}\nafter {WINDOWS} windows, 1 being what rounding explains.",
        box=box.SIMPLE_HEAD,
    )
    for row in result["contenders"]:
        timed = row["tokens_per_second"] is not None
        names = "tokens_per_second", "time_to_multi_steps", "time_to_hand_written"
        medians = [row[name]["median"] if timed else None for name in names]
        megabytes = [row[name] and row[name] / 1e6 for name in ("peak_bytes", "device_peak_bytes")]
        agrees = {None: "no room", True: "yes", False: "[bold red]NO"}[row["agrees"]]
        cells = cell(medians[0], 0), *map(cell, medians[1:]), *(cell(x, 1) for x in megabytes)
        table.add_row(row["name"], *cells, cell(row["error"]), agrees)
    fits = Table(
        Column("contender", no_wrap=True),
        *map(column, ("largest microbatch", "effective batch")),
        title=f"Sequences that fit into {result['budget_bytes'] / 1e6:,.1f} MB",
        caption=f"Powers of two, compiled and not run. Accumulated: times\n{result['every_k']}, "
        "or as large as you like with more microbatches.",
        box=box.SIMPLE_HEAD,
    )
    for row in result["largest"]:
        least = "at least " if row["capped"] else ""
        sizes = [f"{least}{row[name]}" for name in ("microbatch", "effective_batch")]
        fits.add_row(row["name"], *(sizes if row["microbatch"] else ("none", "-")))
    Console(width=None if sys.stdout.isatty() else 100).print(table, fits)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, what it leaves open filled in for the device."""
    parser = harness.make_parser("train_step", (__doc__ or "").split("\n\n")[0])
    add, at_least = parser.add_argument, harness.at_least
    add("--parameters", choices=transformer.PRESETS, help="the model (10m; GPU: 350m)")
    add("--dtype", choices=("float32", "bfloat16"), help="what the model computes in (GPU: bf16)")
    add("--every-k", type=at_least(2), default=8, help="microbatches a window (8)")
    add("--microbatch", type=at_least(1), help="sequences a microbatch (1; GPU: 4)")
    add("--sequence", type=at_least(1), help="tokens a sequence (64; GPU: 1024)")
    add(
        "--budget",
        type=at_least(1.0),
        metavar="MB",
        help="memory to fit in; a full batch that "
        "does not is not run (1.25 times optaccum.apply_gradients; all is run)",
    )
    return harness.parse_args(parser, DEFAULTS, argv)


def main() -> None:
    """Runs the benchmark."""
    harness.run(parse_args(), measure, print_tables)


if __name__ == "__main__":
    main()
