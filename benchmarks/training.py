"""A task, its check, its times and the batches that fit, for all that train a transformer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, harness, transformer
from benchmarks.contenders import FULL_BATCH, INNERS, Contender
from benchmarks.programs import Window, largest_error, nbytes

# AdamW divides by sqrt(v) + eps, so a small `eps` turns the rounding of a small gradient into a
# step of full size, and hides whether the gradients were summed or averaged. This one's is larger
# than the gradients: a step is nearly linear in them.
INNER = INNERS["adamw"]
OPTIONS = {
    "parameters": ("the model", tuple(transformer.PRESETS), "100k", "10m", "350m"),
    "dtype": ("what it computes in", ("float32", "bfloat16"), "float32", "float32", "bfloat16"),
    "every_k": ("microbatches per window", 2, 4, 8, 8),
    "microbatch": ("sequences in each microbatch, on each device", 1, 1, 1, 4),
    "sequence": ("tokens in each sequence", 1, 16, 64, 1024),
    "rounds": ("timed rounds", 1, 3, 15, 15),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and the batches that it is trained on."""

    model: transformer.Model
    params: Any
    every_k: int
    microbatch: int
    sequence: int
    devices: Sequence[Any] | None = None

    @classmethod
    def of(cls, args: Any, devices: Any = None, **changes: Any) -> "Task":
        """Returns the task that a command line describes."""
        model = transformer.PRESETS[args.parameters]
        model = dataclasses.replace(model, dtype=jnp.dtype(args.dtype), **changes)
        params = transformer.make_params(model)
        return cls(model, params, args.every_k, args.microbatch, args.sequence, devices)

    @property
    def rows(self) -> int:
        """Sequences in a microbatch, on all devices."""
        return self.microbatch * len(self.devices or [None])

    def compile(self, contender: Contender, rows: int | None = None, **options: Any) -> Window:
        """Returns the programs of a contender; `rows` of each call, or those of the task."""
        rows = rows or self.rows * (self.every_k if len(contender.steps) == 1 else 1)
        batch = transformer.batch_shapes(rows, self.sequence)
        options = {"weighted": self.devices is not None, "devices": self.devices} | options
        return Window(contender, self.params, batch, model=self.model, **options)

    def batches(self, window: Window) -> list[Any]:
        """Returns the batches of each call of a window."""
        shape = self.every_k, self.rows, self.sequence
        batches = transformer.make_window(self.model, *shape, ragged=self.devices is not None)
        if len(window.contender.steps) == 1:
            batches = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)]
        return [window.put(batch) for batch in batches]


def tolerance(model: transformer.Model) -> float:
    """Returns by which part of itself rounding changes a step.

    A leaf's gradient has passed about 16 roundings in each block. They are independent, so it is
    off by their unit times the square root of their number, and so is the step.
    """
    unit = float(jnp.finfo(model.dtype).eps)
    if jax.default_backend() != "cpu":
        unit = max(unit, 2.0**-10)  # accelerators multiply float32 with fewer bits (TF32)
    return unit * np.sqrt(16 * model.layers)


def compare(
    task: Task, names: Iterable[str], units: Mapping[str, str], args: Any, compilations: int = 1
) -> tuple[dict[str, Window], harness.Result]:
    """Compiles contenders, checks them against the full batch, and lets them take turns.

    A full batch that needs more memory than there is does not run; then the last of `units` is
    checked against. These are the ratios of times, and the contender whose time is 1.
    """
    found, left_out = contenders.make(names, INNER, task.every_k)
    windows, names, compile_s = {}, list(found), {name: [] for name in found}
    for turn in harness.progress(range(compilations), "Compiling"):
        for name in names[turn:] + names[:turn]:
            window = windows[name] = task.compile(found[name], optimized=not args.quick)
            compile_s[name].append(window.trace_s + window.compile_s)
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    ready = {x: windows[x] for x in names if x != FULL_BATCH or windows[x].peak_bytes <= room}
    batches = {name: task.batches(window) for name, window in ready.items()}
    trained = {
        name: window.train(task.params, batches[name])
        for name, window in harness.progress(ready.items(), "Checking")
    }
    reference = FULL_BATCH if FULL_BATCH in ready else list(units.values())[-1]
    for window in ready.values():
        window.start(task.params)
    turns = {name: functools.partial(one.run, batches[name]) for name, one in ready.items()}
    seconds = harness.take_turns(turns, args.rounds)
    tokens, allowed = task.rows * task.every_k * task.sequence, tolerance(task.model)

    def figures(name):
        row = {"name": name, "compile_s": compile_s[name]}
        row |= {x: getattr(windows[name], x) for x in ("peak_bytes", "temporary_bytes")}
        row |= {ratio: harness.ratios(seconds, name, unit) for ratio, unit in units.items()}
        if name not in ready:
            return row | dict.fromkeys(("agrees", "error", "window_ms", "tokens_per_second"))
        error = largest_error(trained[name], trained[reference], task.params, allowed)
        row |= {"agrees": error <= 1, "error": error}
        row["window_ms"] = harness.quartiles(1e3 * seconds[name])
        return row | {"tokens_per_second": harness.quartiles(tokens / seconds[name])}

    leaves, told = jax.tree.leaves(task.params), {"preset": args.parameters, "dtype": args.dtype}
    told |= {name: getattr(args, name) for name in ("every_k", "microbatch", "sequence", "rounds")}
    told |= {"parameters": sum(x.size for x in leaves), "parameter_bytes": nbytes(leaves)}
    told |= {"reference": reference, "contenders": [figures(x) for x in names]}
    return windows, told | {"left_out": left_out}


def largest_batch(
    peak_of: Callable[[int], int], start: int, peak: int, budget: float, doublings: int
) -> tuple[int, bool]:
    """Returns the largest power of two that fits, or 0, and whether the search was cut short.

    It begins at `start`, which needs `peak` bytes.
    """
    batch = 1 << (start.bit_length() - 1)
    fits = functools.cache(lambda size: (peak if size == start else peak_of(size)) <= budget)
    if fits(batch):
        for _ in range(doublings):
            if not fits(2 * batch):
                return batch, False
            batch *= 2
        return batch, True
    while batch and not fits(batch):
        batch //= 2
    return batch, False


def setting(result: Mapping[str, Any], several: str = "a window") -> str:
    """Returns what was trained."""
    count = result.get("every_k") or result["num_microbatches"]
    devices = f" x {result['devices']}" if "devices" in result else ""
    return (
        f"Transformer of {result['parameters'] / 1e6:,.1f} M parameters, "
        f"{result.get('dtype', 'float32')}, {several} of {count}{devices} x {result['microbatch']} "
        f"sequences of {result['sequence']} tokens."
    )
