"""Accumulate inside one step: time, temporaries and compile time beside a scan written by hand.

A step gets the whole batch: forward, backward, accumulate and AdamW in one program, compiled ahead
of time with the parameters and the optimizer's state donated; `apply_gradients` is called for each
microbatch. All start from the same parameters, see the same tokens, and after two steps
have to agree with AdamW on the full batch. Then they take turns.
"""

import argparse
from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, harness, training
from benchmarks.contenders import APPLY_GRADIENTS, FULL_BATCH, MICROBATCH, SCAN, VALUE_AND_GRAD
from benchmarks.tables import AGREES, Table, median, where

NAMES = FULL_BATCH, MICROBATCH, SCAN, VALUE_AND_GRAD, APPLY_GRADIENTS
DRIFT_MICROBATCHES = 1024


def drift() -> list[dict[str, Any]]:
    """Returns how far each gradient of a bfloat16 model is from the mean of its microbatches'.

    A microbatch is one row, and its row is its gradient: all error is that of accumulating.
    """
    found, _ = contenders.make(NAMES[:-1], training.INNER, DRIFT_MICROBATCHES)
    noise = np.random.default_rng(0).normal(size=(DRIFT_MICROBATCHES, 64))
    rows = jnp.asarray(0.01 * (1 + 0.1 * noise), jnp.bfloat16)
    exact = np.asarray(rows, np.float64).mean(axis=0)

    def error(contender):
        step = contender.differentiate(lambda params, batch: jnp.mean(batch @ params), None)
        _, grads = jax.jit(step)(jnp.zeros(64, jnp.bfloat16), rows)
        return float(np.max(np.abs(np.asarray(grads, np.float64) / exact - 1)))

    return [{"name": name, "relative_error": error(one)} for name, one in found.items()]


def measure(args: argparse.Namespace) -> Iterator[harness.Result]:
    """Yields every figure of the benchmark, ready for JSON."""
    task = training.Task.of(args, dtype=jnp.dtype(args.dtype))
    found, left_out = contenders.make(NAMES, training.INNER, args.every_k)
    compiling: dict[str, list[float]] = {name: [] for name in found}
    windows, names = {}, list(found)
    for turn in harness.progress(range(1 if args.quick else 5), "Compiling"):
        for name in names[turn:] + names[:turn]:
            windows[name] = task.compile(found[name], optimized=not args.quick)
            compiling[name].append(windows[name].trace_s + windows[name].compile_s)
    units = {
        "time_to_full_batch": FULL_BATCH,
        "time_to_microbatch": MICROBATCH,
        "time_to_hand_written": SCAN,
    }
    budget = args.budget * 1e6 if args.budget else 1.25 * windows[VALUE_AND_GRAD].peak_bytes
    room = training.device_memory("bytes_limit")
    result = training.compare(task, windows, args.rounds, units, room)
    del windows  # a GPU tries out kernels when it compiles, and needs room for them
    for row in result["contenders"]:
        row["compile_to_hand_written"] = harness.ratios(compiling, row["name"], SCAN)
    result |= {
        **{"preset": args.parameters, "num_microbatches": args.every_k, "left_out": left_out},
        **{"budget_bytes": round(budget), "largest": [], "drift": drift()},
    }
    yield result
    for name in harness.progress((FULL_BATCH, VALUE_AND_GRAD), "Compiling larger batches"):

        def peak_of(rows, name=name):
            longer = dataclasses.replace(task, every_k=max(rows // args.microbatch, 1))
            contender = contenders.ADAPTERS[name](training.INNER, longer.every_k)
            return longer.compile(contender, rows, optimized=False).peak_bytes

        batch = args.every_k * args.microbatch
        size, capped = training.largest_batch(peak_of, batch, budget, 1 if args.quick else 6)
        microbatch = None if name == FULL_BATCH else args.microbatch
        result["largest"].append(
            {"name": name, "microbatch": microbatch, "batch": size, "capped": capped}
        )
        yield result


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns what each contender's step costs, the largest batch that fits, and the drift."""
    steps = [
        {
            "contender": row["name"],
            "time to scan": median(row["time_to_hand_written"]),
            "to optax": median(row["time_to_microbatch"]),
            "to full batch": median(row["time_to_full_batch"]),
            "compile to scan": median(row["compile_to_hand_written"]),
            "temp. MB": f"{row['temporary_bytes'] / 1e6:,.1f}",
            "peak MB": f"{row['peak_bytes'] / 1e6:,.1f}",
            "agrees": AGREES[row["agrees"]],
        }
        for row in result["contenders"]
    ]
    largest = [
        {
            "contender": row["name"],
            "sequences per microbatch": str(row["microbatch"] or "all"),
            f"batch that fits {result['budget_bytes'] / 1e6:,.0f} MB": (
                f"{'at least ' if row['capped'] else ''}{row['batch']:,}"
            ),
        }
        for row in result["largest"]
    ]
    drifts = [
        {"contender": row["name"], "largest relative error": f"{row['relative_error']:.1e}"}
        for row in result["drift"]
    ]
    left_out = [f"Left out: {name}, for {why}." for name, why in result.get("left_out", {}).items()]
    notes = [*left_out, f"{training.setting(result, 'a batch')} {where(result)}"]
    named = {
        "A step": steps,
        "The largest batch": largest,
        f"A bfloat16 gradient over {DRIFT_MICROBATCHES:,} microbatches": drifts,
    }
    found = [Table(rows, title) for title, rows in named.items() if rows]
    return {"in_step": [*found[:-1], dataclasses.replace(found[-1], notes=notes)]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, with defaults for the device."""
    parser = harness.make_parser("in_step", __doc__)
    training.add_arguments(parser, 8)
    add = parser.add_argument
    add("--dtype", choices=("float32", "bfloat16"), help="what the model computes in")
    add("--budget", type=harness.at_least(1.0), metavar="MB", help="memory for the largest batch")
    return harness.parse_args(parser, training.DEFAULTS, argv)


def main() -> None:
    """Runs the benchmark."""
    harness.run("in_step", parse_args(), measure, tables)


if __name__ == "__main__":
    main()
