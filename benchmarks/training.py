"""Train a transformer with each way of accumulating: time and memory.

A step is a whole one: forward, backward, accumulate and AdamW, compiled ahead of time with the
parameters and the optimizer's state donated. All contenders start from the same parameters, see the
same tokens, and after two windows have to agree with AdamW on the full batch. Then they take turns.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, programs, transformer
from benchmarks.contenders import FULL_BATCH, MICROBATCH, MULTI_STEPS
from benchmarks.programs import Task, take_turns
from benchmarks.tables import Result, ratios, rows_of, table, where

NAMES = (
    *(FULL_BATCH, contenders.APPLY_GRADIENTS, contenders.RELEASE, contenders.UPDATE),
    *(MULTI_STEPS, contenders.HAND_WRITTEN, contenders.VALUE_AND_GRAD, MICROBATCH),
    contenders.SCAN,
)


class Sizes(NamedTuple):
    preset: str
    dtype: str
    every_k: int
    sequence: int
    rounds: int


# With --quick, on a CPU, elsewhere.
SIZES = (
    Sizes("100k", "float32", 4, 16, 2),
    Sizes("10m", "float32", 8, 64, 15),
    Sizes("350m", "bfloat16", 8, 1024, 15),
)


def make_task(sizes: Sizes) -> Task:
    config = dataclasses.replace(transformer.PRESETS[sizes.preset], dtype=sizes.dtype)
    batches = transformer.make_window(config, sizes.every_k, 1, sizes.sequence)
    # A leaf's gradient has passed about 16 roundings in each block. They are independent, so it is
    # off by their unit times the square root of their number, and so is the step.
    unit = float(jnp.finfo(config.dtype).eps)
    if jax.default_backend() != "cpu":
        unit = max(unit, 2.0**-10)  # accelerators multiply float32 with fewer bits (TF32)
    tolerance = unit * np.sqrt(16 * config.layers)
    params = transformer.make_params(config)
    return Task(params, batches, sizes.every_k, tolerance=tolerance, loss_fn=config.mean_loss)


def measure(scale: int) -> Result:
    sizes = SIZES[scale]
    task = make_task(sizes)
    found, _ = contenders.make(NAMES, task.inner, task.every_k)
    windows, rows = programs.check(found, task)
    seconds = take_turns({name: window.run for name, window in windows.items()}, sizes.rounds)
    units = {"time_to_multi_steps": MULTI_STEPS, "time_to_microbatch": MICROBATCH}
    contending = [row | ratios(seconds, name, units) for name, row in rows.items()]
    count = sum(x.size for x in jax.tree.leaves(task.params))
    return {"parameters": count, "contenders": contending} | sizes._asdict()


def tables(result: Result) -> dict[str, str]:
    columns: dict[str, Any] = {
        "contender": ("name",),
        "time, to MultiSteps": ("time_to_multi_steps",),
        "to optax.microbatch": ("time_to_microbatch",),
        "peak": ("peak_bytes", "{:,.0f} MB", 1e6),
        "agrees": ("agrees",),
    }
    note = (
        f"Transformer of {result['parameters'] / 1e6:,.1f} M parameters, {result['dtype']}, a "
        f"window of {result['every_k']} sequences of {result['sequence']} tokens. {where(result)}"
    )
    return {"train_step": table(rows_of(result["contenders"], columns), note)}
