"""Train a transformer with each way of accumulating: tokens per second, peak memory, batch size.

A step is a whole one: forward, backward, accumulate and AdamW, compiled ahead of time with the
parameters and the optimizer's state donated. Every contender starts from the same parameters and
sees the same tokens, and after two windows has to agree with plain AdamW on the full batch. Then
all take turns, one window each in a round. Batches have to fit into 1.25 times the peak memory of
`optaccum.apply_gradients`.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from benchmarks import contenders, harness, training
from benchmarks.contenders import APPLY_GRADIENTS, FULL_BATCH, HAND_WRITTEN, MULTI_STEPS
from benchmarks.tables import Table, fitting, name_of, rows_of, where
from benchmarks.training import OPTIONS

NAMES = (
    *(FULL_BATCH, MULTI_STEPS, contenders.UPDATE, APPLY_GRADIENTS, contenders.RELEASE),
    *(contenders.TRAIN_STATE, contenders.NNX_OPTIMIZER, contenders.FLAX_OPTIMIZER),
    *(HAND_WRITTEN, contenders.NOT_ZEROING),
)
UNITS = {"time_to_multi_steps": MULTI_STEPS, "time_to_hand_written": HAND_WRITTEN}


def measure(args: Any) -> Iterator[harness.Result]:
    task = training.Task.of(args)
    windows, result = training.compare(task, NAMES, UNITS, args)
    peaks = {name: window.peak_bytes for name, window in windows.items()}
    budget = 1.25 * peaks[APPLY_GRADIENTS]
    # A release does all that a hold does, and more: it alone says what fits.
    last = {
        name: dataclasses.replace(window.contender, steps=window.contender.steps[-1:])
        for name, window in windows.items()
    }
    del windows  # a GPU tries out kernels when it compiles, and needs room for them
    result |= {"budget_bytes": round(budget), "largest": []}
    yield result
    for name, contender in harness.progress(last.items(), "Compiling larger batches"):
        size, capped = training.largest_batch(
            lambda rows, one=contender: task.compile(one, rows, optimized=False).peak_bytes,
            task.rows * (args.every_k if name == FULL_BATCH else 1),
            *(peaks[name], budget, 1 if args.quick else 6),
        )
        result["largest"].append({"name": name, "microbatch": size, "capped": capped})
        yield result


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns speed, peak memory and the largest batch."""
    fits = {row["name"]: row for row in result["largest"]}

    def largest(row):
        return fitting(fits[row["name"]], "microbatch") if row["name"] in fits else "-"

    columns = {
        "contender": name_of,
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "time, to MultiSteps": ("time_to_multi_steps",),
        "to the hand-written loop": ("time_to_hand_written",),
        "peak": ("peak_bytes", "{:,.0f} MB", 1e6),
        f"largest microbatch in {result['budget_bytes'] / 1e6:,.0f} MB": largest,
        "agrees": ("agrees",),
    }
    notes = [f"{training.setting(result)} {where(result)}"]
    rows = rows_of(result["contenders"], columns)
    return {"train_step": [Table(rows, "A whole training step", notes)]}


if __name__ == "__main__":
    harness.main("train_step", __doc__, OPTIONS, measure, tables)
