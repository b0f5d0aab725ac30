"""A task, its check, its times and the batches that fit, for all that train a transformer."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, transformer
from benchmarks.contender import Contender
from benchmarks.contenders import FULL_BATCH
from benchmarks.inners import INNERS
from benchmarks.programs import Window, largest_error

# AdamW divides by sqrt(v) + eps, so a small `eps` turns the rounding of a small gradient into a
# step of full size, and hides whether the gradients were summed or averaged. This one's is larger
# than the gradients: a step is nearly linear in them.
INNER = INNERS["adamw"]
DEFAULTS = {  # quick, CPU, GPU or TPU
    "parameters": ("100k", "10m", "350m"),
    "dtype": ("float32", "float32", "bfloat16"),
    "microbatch": (1, 1, 4),
    "sequence": (16, 64, 1024),
    "rounds": (3, 15, 15),
}


def add_arguments(parser: argparse.ArgumentParser, every_k: int) -> None:
    """Adds the arguments that describe the task."""
    add, at_least = parser.add_argument, harness.at_least
    add("--parameters", choices=transformer.PRESETS, help="the model")
    add("--every-k", type=at_least(2), default=every_k, help=f"microbatches per window ({every_k})")
    add("--microbatch", type=at_least(1), help="sequences in each microbatch, on each device")
    add("--sequence", type=at_least(1), help="tokens in each sequence")


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and the batches that it is trained on."""

    config: transformer.Config
    params: Any
    every_k: int
    microbatch: int
    sequence: int
    devices: Sequence[Any] | None = None

    @classmethod
    def of(cls, args: argparse.Namespace, devices: Any = None, **changes: Any) -> "Task":
        """Returns the task that a command line describes."""
        config = dataclasses.replace(transformer.PRESETS[args.parameters], **changes)
        params = transformer.make_params(config)
        return cls(config, params, args.every_k, args.microbatch, args.sequence, devices)

    @property
    def rows(self) -> int:
        """Sequences in a microbatch, on all devices."""
        return self.microbatch * len(self.devices or [None])

    def compile(self, contender: Contender, rows: int | None = None, **options: Any) -> Window:
        """Returns the programs of a contender; `rows` of each call, or those of the task."""
        rows = rows or self.rows * (self.every_k if len(contender.steps) == 1 else 1)
        batch = transformer.batch_shapes(rows, self.sequence)
        model, several = transformer.Model(self.config), self.devices is not None
        options |= {"model": model, "weighted": several, "devices": self.devices}
        return Window(contender, self.params, batch, **options)

    def batches(self, window: Window) -> list[Any]:
        """Returns the batches of each call of a window."""
        shape = self.every_k, self.rows, self.sequence
        batches = transformer.make_window(self.config, *shape, ragged=self.devices is not None)
        if len(window.contender.steps) == 1:
            batches = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)]
        return [window.put(batch) for batch in batches]

    def figures(self) -> dict[str, Any]:
        """Returns the sizes of the task, ready for JSON."""
        leaves = jax.tree.leaves(self.params)
        return {
            "parameters": sum(leaf.size for leaf in leaves),
            "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
            "leaves": len(leaves),
            "dtype": jnp.dtype(self.config.dtype).name,
            **{name: getattr(self, name) for name in ("every_k", "microbatch", "sequence")},
        }


def device_memory(name: str) -> int | None:
    """Returns an entry of the device's own account, if it keeps one."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


def tolerance(config: transformer.Config) -> float:
    """Returns by which part of itself rounding changes a step.

    A leaf's gradient has passed about 16 roundings in each block. They are independent, so it is
    off by their unit times the square root of their number, and so is the step.
    """
    unit = float(jnp.finfo(config.dtype).eps)
    if jax.default_backend() != "cpu":
        unit = max(unit, 2.0**-10)  # accelerators multiply float32 with fewer bits (TF32)
    return unit * np.sqrt(16 * config.layers)


def compare(
    task: Task,
    windows: dict[str, Window],
    rounds: int,
    units: Mapping[str, str],
    room: float | None = None,
) -> dict[str, Any]:
    """Checks contenders against the full batch, lets them take turns, and returns their figures.

    Args:
        task: a model and its batches.
        windows: the programs of each contender, by name.
        rounds: timed rounds.
        units: for each ratio of times, the contender whose time is 1. The last of them is the one
            to check against where the full batch does not run.
        room: the memory; a full batch that needs more does not run.
    """
    too_large = room and windows[FULL_BATCH].peak_bytes > room
    ready = {name: x for name, x in windows.items() if name != FULL_BATCH or not too_large}
    batches = {name: task.batches(window) for name, window in ready.items()}
    trained = {
        name: window.train(task.params, batches[name])
        for name, window in harness.progress(ready.items(), "Checking")
    }
    reference = FULL_BATCH if FULL_BATCH in ready else list(units.values())[-1]
    tokens, allowed = task.rows * task.every_k * task.sequence, tolerance(task.config)
    for window in ready.values():
        window.start(task.params)
    turns = {name: functools.partial(one.run, batches[name]) for name, one in ready.items()}
    seconds = harness.take_turns(turns, rounds)

    def figures(name):
        row = {"name": name, "agrees": None, "error": None}
        row |= {"window_ms": None, "tokens_per_second": None}
        if name in ready:
            error = largest_error(trained[name], trained[reference], task.params, allowed)
            row |= {"agrees": error <= 1, "error": error}
            row["window_ms"] = harness.quartiles(np.multiply(seconds[name], 1e3))
            row["tokens_per_second"] = harness.quartiles(np.divide(tokens, seconds[name]))
        sizes = {x: getattr(windows[name], x) for x in ("peak_bytes", "temporary_bytes")}
        times = {ratio: harness.ratios(seconds, name, unit) for ratio, unit in units.items()}
        return row | times | sizes

    return {
        **task.figures(),
        "rounds": rounds,
        "reference": reference,
        "contenders": [figures(name) for name in windows],
    }


def largest_batch(
    peak_of: Callable[[int], int], start: int, budget: float, doublings: int
) -> tuple[int, bool]:
    """Returns the largest power of two that fits, or 0, and whether the search was cut short."""
    peak_of = functools.cache(peak_of)
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


def setting(result: Mapping[str, Any], several: str = "a window") -> str:
    """Returns what was trained."""
    count = result.get("every_k") or result["num_microbatches"]
    devices = f" x {result['devices']}" if "devices" in result else ""
    return (
        f"Transformer of {result['parameters'] / 1e6:,.1f} M parameters, "
        f"{result.get('dtype', 'float32')}, {several} of {count}{devices} x {result['microbatch']} "
        f"sequences of {result['sequence']} tokens."
    )
