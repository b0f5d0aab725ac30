"""What is trained, and the programs of a contender: compiled, run, timed and checked."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import random
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.contender import AXIS, INNERS, INSIDE, Carry, Contender, Inner, Step, of

WINDOWS = 2  # that a contender runs before it is checked
WARMUP_ROUNDS = 3
progress = functools.partial(track, console=Console(stderr=True))


@dataclasses.dataclass(frozen=True)
class Task:
    """Parameters, and the microbatches of a window: rows for a loss, or gradients without one.

    Both are arrays, or shapes if nothing shall run. The microbatches repeat in a longer window.
    """

    params: Any
    microbatches: Sequence[Any]
    every_k: int
    inner: Inner = INNERS["adamw"]
    tolerance: float = 1e-3  # how much of a step rounding explains
    loss_fn: Callable[..., Any] | None = None
    devices: Sequence[Any] | None = None  # that share the rows of each batch

    @property
    def size(self) -> int:
        """Bytes of the parameters."""
        return nbytes(self.params)

    def batches(self, calls: int) -> list[Any]:
        """Returns what the calls of a window are given: the whole batch if there is but one."""
        if calls > 1:
            return list(self.microbatches)
        count = len(self.microbatches)
        if self.loss_fn:
            return [jax.tree.map(lambda *leaves: np.concatenate(leaves), *self.microbatches)]
        times = np.bincount(np.arange(self.every_k) % count, minlength=count)

        def mean(*leaves):
            wide = [np.asarray(leaf, np.float32) for leaf in leaves]
            return jnp.asarray(np.average(wide, axis=0, weights=times), leaves[0].dtype)

        return [jax.tree.map(mean, *self.microbatches)]

    def shapes(self, calls: int) -> Any:
        def shape(x):
            rows = len(x) * self.every_k if calls == 1 else len(x)
            return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)

        return jax.tree.map(shape, self.microbatches[0]) if self.loss_fn else self.microbatches[0]


class Window:
    """The programs of one window of a contender, compiled: one for each call.

    `trace_s` and `compile_s` are seconds for all that differ. `peak_bytes`, and the `temporaries`
    in sizes of the parameters, are those of the hungriest.
    """

    def __init__(self, contender: Contender, task: Task):
        """Compiles each program; it donates its part of the carry."""
        self.contender, self.task = contender, task
        devices = task.devices or jax.devices()[:1]
        axes = (AXIS,) if contender.inside == 1 else (AXIS, INSIDE)
        grid = np.array(devices).reshape((-1, contender.inside)[: len(axes)])
        self.mesh = Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))
        self.rows = P(axes)
        self.trace_s = self.compile_s = 0.0
        compiled = {}
        with jax.set_mesh(self.mesh):
            params = jax.eval_shape(lambda: task.params)
            entries = [name for step in contender.steps for name in step.names]
            self.specs = dict.fromkeys(["params", *entries], P()) | contender.specs(params)
            self._init = jax.jit(contender.init, out_shardings=self.specs)
            carry = jax.eval_shape(self._init, params)
            batch = task.shapes(len(contender.steps))
            for step in dict.fromkeys(contender.steps):
                start = time.perf_counter()
                part = {name: carry[name] for name in self._names(step)}
                lowered = self._jit(step).lower(part, batch)
                middle = time.perf_counter()
                compiled[step] = lowered.compile()
                self.trace_s += middle - start
                self.compile_s += time.perf_counter() - middle
        self.programs = [compiled[step] for step in contender.steps]
        sizes = [program.memory_analysis() for program in self.programs]
        self.temporaries = max(x.temp_size_in_bytes for x in sizes) / task.size
        self.peak_bytes = max(
            x.argument_size_in_bytes
            + (x.output_size_in_bytes - x.alias_size_in_bytes)
            + x.temp_size_in_bytes
            for x in sizes
        )

    def start(self) -> None:
        """Makes the carry for a copy of the parameters, and puts the batches on the devices."""
        sharding = NamedSharding(self.mesh, self.rows)
        with jax.set_mesh(self.mesh):
            self.carry = self._init(jax.tree.map(jnp.array, self.task.params))
        self.batches = jax.device_put(self.task.batches(len(self.programs)), sharding)
        self.times: list[Any] = []

    def call(self, index: int) -> Carry:
        """Runs the program of one call of the window."""
        part = {name: self.carry[name] for name in self._names(self.contender.steps[index])}
        part, _ = self.programs[index](part, self.batches[index % len(self.batches)])
        self.carry = self.carry | part
        return self.carry

    def run(self) -> Carry:
        """Runs a window."""
        for i in range(len(self.programs)):
            self.call(i)
        return self.carry

    def call_by_call(self) -> None:
        """Runs a window, and keeps the seconds until each call has returned, and is done."""
        times = []
        for i in range(len(self.programs)):
            start = time.perf_counter()
            self.call(i)
            returned = time.perf_counter()
            jax.block_until_ready(self.carry)
            times.append((returned - start, time.perf_counter() - start))
        self.times.append(times)

    def train(self) -> Any:
        """Returns what two windows make of the parameters, on the host."""
        self.start()
        for _ in range(WINDOWS):
            jax.block_until_ready(self.run())
        return jax.device_get(self.carry["params"])

    def _names(self, step: Step) -> tuple[str, ...]:
        # Differentiating needs the parameters, which the step itself may leave alone.
        return tuple(dict.fromkeys(("params", *step.names) if self.task.loss_fn else step.names))

    def _run(self, step: Step, part: Carry, batch: Any) -> tuple[Carry, Any]:
        loss, grads = None, batch
        if self.task.loss_fn:
            loss, grads = self.contender.differentiate(self.task.loss_fn, part["params"], batch)
        return part | step.apply(part, grads), loss

    def _jit(self, step: Step) -> Any:
        part = {name: self.specs[name] for name in self._names(step)}
        # An unused argument is kept, or what overwrites a buffer could not be given that buffer.
        return jax.jit(
            functools.partial(self._run, step),
            in_shardings=(part, self.rows),
            out_shardings=(part, P()),
            donate_argnums=0,
            keep_unused=True,
        )


def nbytes(tree: Any) -> int:
    """Returns the bytes of the arrays, or of the shapes, in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_trees(count: int, leaves: int, shape: tuple[int, ...], dtype: Any = "float32") -> Any:
    """Returns trees of normal deviates."""
    keys = jax.random.split(jax.random.key(0), (count, leaves))
    return [
        {f"{i:04d}": jax.random.normal(key, shape, dtype) for i, key in enumerate(x)} for x in keys
    ]


def check(found: Mapping[str, Contender], task: Task) -> tuple[dict[str, Window], dict[str, Any]]:
    """Returns windows that are ready to run, and for each whether it agrees with the full batch."""
    windows, rows, expected = {}, {}, {}
    for name, one in progress(found.items(), "Compiling"):
        window = windows[name] = Window(one, task)
        trained, tx = window.train(), one.reference or task.inner.transformation
        if tx not in expected:
            expected[tx] = Window(of(tx, 1), task).train()
        error = largest_error(trained, expected[tx], task)
        row = {"name": name, "agrees": error <= 1, "error": error}
        figures = "peak_bytes", "trace_s", "compile_s", "temporaries"
        rows[name] = row | {x: getattr(window, x) for x in figures}
    return windows, rows


def largest_error(trained: Any, expected: Any, task: Task) -> float:
    """Returns how far `trained` is from `expected`, 1 being what rounding explains.

    A step may be off by the tolerance times its length; then each window rounds the new parameters
    to their dtype. The largest of all leaves counts.
    """

    def error(x, y, start):
        rounding = float(jnp.finfo(start.dtype).eps) * np.sqrt(WINDOWS)
        x, y, start = (np.asarray(leaf, np.float64) for leaf in (x, y, start))
        allowed = task.tolerance * np.linalg.norm(y - start) + rounding * np.linalg.norm(y)
        return np.linalg.norm(x - y) / allowed

    return float(np.max(jax.tree.leaves(jax.tree.map(error, trained, expected, task.params))))


def take_turns(turns: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Returns the seconds that each turn took, round by round.

    All run once a round, in a new order every round, so that whatever else the machine does
    falls on all alike. What a turn returns is waited for.
    """
    seconds = {name: [] for name in turns}
    shuffled = random.Random(0)
    for _ in progress(range(WARMUP_ROUNDS + rounds), "Timing"):
        for name in shuffled.sample(list(turns), len(turns)):
            start = time.perf_counter()
            jax.block_until_ready(turns[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times[WARMUP_ROUNDS:]) for name, times in seconds.items()}


def time_parts(windows: Mapping[str, Window], rounds: int, kernels: Any = ()) -> dict[str, Any]:
    """Returns the seconds of each contender by part of a window and round, and of each kernel.

    A contender takes two turns: a window at full speed, and one that waits for each of its calls.
    """
    turns = dict(kernels)
    for name, window in windows.items():
        turns |= {name: window.run, f"{name}, call by call": window.call_by_call}
    seconds: dict[str, Any] = dict(take_turns(turns, rounds))
    for name, window in windows.items():
        dispatch, calls = np.moveaxis(np.array(window.times[WARMUP_ROUNDS:]), -1, 0)
        seconds[name] = {"window": seconds[name], "release": calls[:, -1]}
        seconds[name] |= {"microbatch": calls.mean(axis=1), "dispatch": dispatch.mean(axis=1)}
        seconds[name] |= {"hold": calls[:, :-1].mean(axis=1)} if calls.shape[1] > 1 else {}
    return seconds
