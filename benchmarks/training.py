"""Train a transformer with each way of accumulating: time, memory and the largest batch.

A step is a whole one: forward, backward, accumulate and AdamW, compiled ahead of time with the
parameters and the optimizer's state donated. All contenders start from the same parameters, see the
same tokens, and after two windows have to agree with AdamW on the full batch. Then they take turns.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, programs, transformer
from benchmarks.contender import INNERS
from benchmarks.contenders import (
    ADAPTERS,
    APPLY_GRADIENTS,
    FULL_BATCH,
    HAND_WRITTEN,
    MICROBATCH,
    MULTI_STEPS,
    SCAN,
    VALUE_AND_GRAD,
)
from benchmarks.programs import Task, Window, largest_batch, take_turns
from benchmarks.tables import (
    Result,
    fitting,
    left_out,
    name_of,
    quartiles,
    ratios,
    rows_of,
    table,
    where,
)

# AdamW divides by sqrt(v) + eps, so a small `eps` turns the rounding of a small gradient into a
# step of full size, and hides whether the gradients were summed or averaged. This one's is larger
# than the gradients: a step is nearly linear in them.
INNER = INNERS["adamw"]
CALLS = (
    *(FULL_BATCH, MULTI_STEPS, contenders.UPDATE, APPLY_GRADIENTS, contenders.RELEASE),
    *(contenders.TRAIN_STATE, contenders.NNX_OPTIMIZER, contenders.FLAX_OPTIMIZER),
    *(HAND_WRITTEN, contenders.NOT_ZEROING),
)
IN_STEP = FULL_BATCH, MICROBATCH, SCAN, VALUE_AND_GRAD, APPLY_GRADIENTS
DRIFT_MICROBATCHES = 1024


class Sizes(NamedTuple):
    preset: str
    dtype: str
    every_k: int
    microbatch: int  # sequences, on each device
    sequence: int
    rounds: int


# With --quick, on a CPU, elsewhere.
SIZES = (
    Sizes("100k", "float32", 4, 1, 16, 2),
    Sizes("10m", "float32", 8, 1, 64, 15),
    Sizes("350m", "bfloat16", 8, 1, 1024, 15),
)


def make_task(sizes: Sizes, devices: Sequence[Any] | None = None, **model: Any) -> Task:
    """Returns what is trained; devices have rows with different numbers of tokens, which count."""
    config = dataclasses.replace(transformer.PRESETS[sizes.preset], dtype=sizes.dtype, **model)
    rows, several = sizes.microbatch * len(devices or [None]), devices is not None
    batches = transformer.make_window(config, sizes.every_k, rows, sizes.sequence, several)
    # A leaf's gradient has passed about 16 roundings in each block. They are independent, so it is
    # off by their unit times the square root of their number, and so is the step.
    unit = float(jnp.finfo(config.dtype).eps)
    if jax.default_backend() != "cpu":
        unit = max(unit, 2.0**-10)  # accelerators multiply float32 with fewer bits (TF32)
    tolerance = unit * np.sqrt(16 * config.layers)
    given = {"model": config, "devices": devices, "weighted": several}
    params = transformer.make_params(config)
    return Task(params, batches, sizes.every_k, INNER, tolerance, **given)


def compare(
    sizes: Sizes, task: Task, names: Sequence[str], units: Mapping[str, str]
) -> tuple[dict[str, Window], Result]:
    """Compiles contenders, checks them against the full batch, and lets them take turns."""
    found, missing = contenders.make(names, INNER, task.every_k)
    windows, rows = programs.check(found, task)
    seconds = take_turns({name: window.run for name, window in windows.items()}, sizes.rounds)
    tokens = task.every_k * task.microbatches[0]["mask"].size
    for name, row in rows.items():
        row["window_ms"] = quartiles(1e3 * seconds[name])
        row["tokens_per_second"] = quartiles(tokens / seconds[name])
        row |= ratios(seconds, name, units)
    told = sizes._asdict() | {"parameter_bytes": task.size, "reference": FULL_BATCH}
    told["parameters"] = sum(x.size for x in jax.tree.leaves(task.params))
    return windows, told | {"contenders": list(rows.values()), "left_out": missing}


def train_step(scale: int) -> Iterator[Result]:
    """Yields the figures of a call for each microbatch, and the largest that fit.

    They have to fit into 1.25 times the peak memory of `optaccum.apply_gradients`.
    """
    sizes = SIZES[scale]
    task = dataclasses.replace(make_task(sizes), optimized=scale > 0)
    units = {"time_to_multi_steps": MULTI_STEPS, "time_to_hand_written": HAND_WRITTEN}
    windows, result = compare(sizes, task, CALLS, units)
    budget = 1.25 * windows[APPLY_GRADIENTS].peak_bytes
    # A release does all that a hold does, and more: it alone says what fits.
    last = {name: one.contender.steps[-1:] for name, one in windows.items()}
    peaks = {name: one.peak_bytes for name, one in windows.items()}
    del windows  # a GPU tries out kernels when it compiles, and needs room for them
    result |= {"budget_bytes": round(budget), "largest": []}
    yield result
    task = dataclasses.replace(task, optimized=False)
    for name, steps in programs.progress(last.items(), "Compiling larger batches"):
        one = dataclasses.replace(ADAPTERS[name](INNER, task.every_k), steps=steps)
        peak_of = lambda rows, one=one: Window(one, task, rows).peak_bytes  # noqa: E731
        start = sizes.microbatch * (task.every_k if name == FULL_BATCH else 1)
        given = start, peaks[name], budget, 6 if scale else 0
        size, capped = largest_batch(peak_of, *given)
        result["largest"].append({"name": name, "microbatch": size, "capped": capped})
        yield result


def in_step(scale: int) -> Iterator[Result]:
    """Yields the figures of one call for the whole batch, and the largest that fit.

    They have to fit into 1.25 times the peak memory of `optaccum.value_and_grad`.
    """
    sizes = SIZES[scale]
    task = dataclasses.replace(make_task(sizes), optimized=scale > 0)
    units = {"time_to_full_batch": FULL_BATCH, "time_to_microbatch": MICROBATCH}
    units |= {"time_to_hand_written": SCAN}
    windows, result = compare(sizes, task, IN_STEP, units)
    turns = {x: functools.partial(Window, one.contender, task) for x, one in windows.items()}
    compiling = take_turns(turns, 5 if scale else 1, warmup=0)
    for row in result["contenders"]:
        row |= ratios(compiling, row["name"], {"compile_to_hand_written": SCAN})
    peaks = {name: one.peak_bytes for name, one in windows.items()}
    budget = 1.25 * peaks[VALUE_AND_GRAD]
    del windows, turns
    result |= {"budget_bytes": round(budget), "largest": [], "drift": drift()}
    yield result
    for name in FULL_BATCH, VALUE_AND_GRAD:

        def peak_of(rows, name=name):
            every_k = max(rows // sizes.microbatch, 1)
            longer = dataclasses.replace(task, every_k=every_k, optimized=False)
            return Window(ADAPTERS[name](INNER, every_k), longer, rows).peak_bytes

        given = sizes.every_k * sizes.microbatch, peaks[name], budget, 6 if scale else 1
        size, capped = largest_batch(peak_of, *given)
        row = {"name": name, "microbatch": None if name == FULL_BATCH else sizes.microbatch}
        result["largest"].append(row | {"batch": size, "capped": capped})
        yield result


def drift() -> list[dict[str, Any]]:
    """Returns how far each gradient of a bfloat16 model is from the mean of its microbatches'.

    A microbatch is one row, and its row is its gradient: all error comes from accumulating.
    """
    noise = np.random.default_rng(0).normal(size=(DRIFT_MICROBATCHES, 64))
    rows = jnp.asarray(0.01 * (1 + 0.1 * noise), jnp.bfloat16)
    exact = np.asarray(rows, np.float64).mean(axis=0)
    loss_fn = lambda params, batch: jnp.mean(batch @ params)  # noqa: E731
    found = []
    for name in IN_STEP[:-1]:
        contender = ADAPTERS[name](INNER, DRIFT_MICROBATCHES)
        step = jax.jit(functools.partial(contender.differentiate, loss_fn, None))
        _, grads = step(jnp.zeros(64, jnp.bfloat16), rows)
        error = np.max(np.abs(np.asarray(grads, np.float64) / exact - 1))
        found.append({"name": name, "relative_error": float(error)})
    return found


def train_step_tables(result: Result) -> dict[str, str]:
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
    return {"train_step": table(rows_of(result["contenders"], columns), setting(result))}


def in_step_tables(result: Result) -> dict[str, str]:
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
    found = [table(rows_of(result["contenders"], steps))]
    found += [table(rows_of(result["largest"], largest))] if result["largest"] else []
    notes = *left_out(result), setting(result, "a batch")
    return {"in_step": "\n\n".join([*found, table(rows_of(result["drift"], drifts), *notes)])}


def setting(result: Mapping[str, Any], several: str = "a window") -> str:
    """Returns what was trained, and on what."""
    count = result.get("every_k") or result["num_microbatches"]
    devices = f" x {result['devices']}" if "devices" in result else ""
    return (
        f"Transformer of {result['parameters'] / 1e6:,.1f} M parameters, "
        f"{result.get('dtype', 'float32')}, {several} of {count}{devices} x {result['microbatch']} "
        f"sequences of {result['sequence']} tokens. {where(dict(result))}"
    )
