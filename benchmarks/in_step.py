"""Accumulate inside one step: time, temporaries and compile time beside a scan written by hand.

A step gets the whole batch: forward, backward, accumulate and AdamW in one program, compiled ahead
of time with the parameters and the optimizer's state donated; `apply_gradients` is called for each
microbatch. All start from the same parameters, see the same tokens, and after two steps
have to agree with AdamW on the full batch. Then they take turns. Batches have to fit into 1.25
times the peak memory of `optaccum.value_and_grad`.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, harness, training
from benchmarks.contenders import APPLY_GRADIENTS, FULL_BATCH, MICROBATCH, SCAN, VALUE_AND_GRAD
from benchmarks.tables import Table, fitting, left_out, name_of, rows_of, where
from benchmarks.training import OPTIONS

NAMES = FULL_BATCH, MICROBATCH, SCAN, VALUE_AND_GRAD, APPLY_GRADIENTS
UNITS = {"time_to_full_batch": FULL_BATCH, "time_to_microbatch": MICROBATCH}
UNITS |= {"time_to_hand_written": SCAN}
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
        loss_fn = lambda params, batch: jnp.mean(batch @ params)  # noqa: E731
        step = jax.jit(functools.partial(contender.differentiate, loss_fn, None))
        _, grads = step(jnp.zeros(64, jnp.bfloat16), rows)
        return float(np.max(np.abs(np.asarray(grads, np.float64) / exact - 1)))

    return [{"name": name, "relative_error": error(one)} for name, one in found.items()]


def measure(args: Any) -> Iterator[harness.Result]:
    task = training.Task.of(args)
    windows, result = training.compare(task, NAMES, UNITS, args, 1 if args.quick else 5)
    peaks = {name: window.peak_bytes for name, window in windows.items()}
    budget = 1.25 * peaks[VALUE_AND_GRAD]
    del windows  # a GPU tries out kernels when it compiles, and needs room for them
    compile_s = {row["name"]: row["compile_s"] for row in result["contenders"]}
    for row in result["contenders"]:
        row["compile_to_hand_written"] = harness.ratios(compile_s, row["name"], SCAN)
    result |= {"budget_bytes": round(budget), "largest": [], "drift": drift()}
    yield result
    for name in harness.progress((FULL_BATCH, VALUE_AND_GRAD), "Compiling larger batches"):

        def peak_of(rows, name=name):
            longer = dataclasses.replace(task, every_k=max(rows // args.microbatch, 1))
            contender = contenders.ADAPTERS[name](training.INNER, longer.every_k)
            return longer.compile(contender, rows, optimized=False).peak_bytes

        sizes = args.every_k * args.microbatch, peaks[name], budget, 1 if args.quick else 6
        size, capped = training.largest_batch(peak_of, *sizes)
        row = {"name": name, "microbatch": None if name == FULL_BATCH else args.microbatch}
        result["largest"].append(row | {"batch": size, "capped": capped})
        yield result


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns what each contender's step costs, the largest batch that fits, and the drift."""
    steps = {
        "contender": name_of,
        "time to scan": ("time_to_hand_written",),
        "to optax": ("time_to_microbatch",),
        "to full batch": ("time_to_full_batch",),
        "compile to scan": ("compile_to_hand_written",),
        "temp. MB": ("temporary_bytes", "{:,.1f}", 1e6),
        "peak MB": ("peak_bytes", "{:,.1f}", 1e6),
        "agrees": ("agrees",),
    }
    heading = f"batch that fits {result['budget_bytes'] / 1e6:,.0f} MB"
    largest = {
        "contender": name_of,
        "sequences per microbatch": lambda row: str(row["microbatch"] or "all"),
        heading: functools.partial(fitting, name="batch"),
    }
    drifts = {"contender": name_of, "largest relative error": ("relative_error", "{:.1e}")}
    notes = [*left_out(result), f"{training.setting(result, 'a batch')} {where(result)}"]
    title = f"A bfloat16 gradient over {DRIFT_MICROBATCHES:,} microbatches"
    found = [
        Table(rows_of(result["contenders"], steps), "A step"),
        Table(rows_of(result["largest"], largest), "The largest batch"),
        Table(rows_of(result["drift"], drifts), title, notes),
    ]
    return {"in_step": [table for table in found if table.rows]}


if __name__ == "__main__":
    harness.main("in_step", __doc__, OPTIONS, measure, tables)
