"""Train a transformer with each way of accumulating: tokens per second, peak memory, batch size.

A step is a whole one: forward, backward, accumulate and AdamW, compiled ahead of time with the
parameters and the optimizer's state donated. Every contender starts from the same parameters and
sees the same tokens, and after two windows has to agree with plain AdamW on the full batch. Then
all take turns, one window each in a round.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from benchmarks import contenders, harness, training
from benchmarks.contenders import APPLY_GRADIENTS, FULL_BATCH, HAND_WRITTEN, MULTI_STEPS
from benchmarks.tables import AGREES, Table, median, where

NAMES = (
    FULL_BATCH,
    MULTI_STEPS,
    contenders.UPDATE,
    APPLY_GRADIENTS,
    contenders.RELEASE,
    contenders.TRAIN_STATE,
    contenders.NNX_OPTIMIZER,
    contenders.FLAX_OPTIMIZER,
    HAND_WRITTEN,
    contenders.NOT_ZEROING,
)


def measure(args: argparse.Namespace) -> Iterator[harness.Result]:
    """Yields every figure of the benchmark, ready for JSON."""
    task = training.Task.of(args, dtype=jnp.dtype(args.dtype))
    found, _ = contenders.make(NAMES, training.INNER, args.every_k)
    windows = {
        name: task.compile(contender, optimized=not args.quick)
        for name, contender in harness.progress(found.items(), "Compiling")
    }
    room = args.budget * 1e6 if args.budget else training.device_memory("bytes_limit")
    units = {"time_to_multi_steps": MULTI_STEPS, "time_to_hand_written": HAND_WRITTEN}
    budget = args.budget * 1e6 if args.budget else 1.25 * windows[APPLY_GRADIENTS].peak_bytes
    result = training.compare(task, windows, args.rounds, units, room)
    result |= {"preset": args.parameters, "budget_bytes": round(budget), "largest": []}
    del windows  # a GPU tries out kernels when it compiles, and needs room for them
    yield result
    for name, contender in harness.progress(found.items(), "Compiling larger batches"):
        start, whole = task.rows, name == FULL_BATCH

        def peak_of(rows, contender=contender):
            # A release does all that a hold does, and more: it alone says what fits.
            return task.compile(contender, rows, optimized=False, only_last=True).peak_bytes

        size, capped = training.largest_batch(
            peak_of, start * args.every_k if whole else start, budget, 1 if args.quick else 6
        )
        effective = size if whole else size * args.every_k
        result["largest"].append(
            {"name": name, "microbatch": size, "effective_batch": effective, "capped": capped}
        )
        yield result


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns speed, peak memory and the largest batch."""
    fits = {row["name"]: row for row in result["largest"]}

    def largest(name):
        row = fits.get(name, {"microbatch": None, "capped": False})
        size = "-" if row["microbatch"] is None else f"{row['microbatch'] or 'none'}"
        return f"{'at least ' if row['capped'] else ''}{size}"

    rows = [
        {
            "contender": row["name"],
            "tokens/s": median(row["tokens_per_second"], "{:,.0f}"),
            "time, to MultiSteps": median(row["time_to_multi_steps"]),
            "to the hand-written loop": median(row["time_to_hand_written"]),
            "peak": f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"largest microbatch in {result['budget_bytes'] / 1e6:,.0f} MB": largest(row["name"]),
            "agrees": AGREES[row["agrees"]],
        }
        for row in result["contenders"]
    ]
    notes = [f"{training.setting(result)} {where(result)}"]
    return {"train_step": [Table(rows, "A whole training step", notes)]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, with defaults for the device."""
    parser = harness.make_parser("train_step", __doc__)
    training.add_arguments(parser, 8)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="what the model computes in"
    )
    parser.add_argument(
        "--budget",
        type=harness.at_least(1.0),
        metavar="MB",
        help="memory to fit in; a full batch that does not is not run "
        "(1.25 times optaccum.apply_gradients; all is run)",
    )
    return harness.parse_args(parser, training.DEFAULTS, argv)


def main() -> None:
    """Runs the benchmark."""
    harness.run("train_step", parse_args(), measure, tables)


if __name__ == "__main__":
    main()
