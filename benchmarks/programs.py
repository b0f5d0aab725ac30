"""Programs of a contender: compiled for devices that are here or elsewhere, run, and checked."""

from collections.abc import Mapping, Sequence
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax

from benchmarks.contenders import AXIS, Carry, Contender, Step

WINDOWS = 2  # that a contender runs before it is checked


class Window:
    """The programs of one window of a contender, compiled: one for each call.

    `trace_s` and `compile_s` are the seconds to trace and lower, and to compile, all that differ;
    `peak_bytes` and `temporary_bytes` those of the hungriest of them.
    """

    def __init__(
        self,
        contender: Contender,
        params: Any,
        batch: Any,
        *,
        model: Any = None,
        weighted: bool = False,
        devices: Sequence[Any] | None = None,
        optimized: bool = True,
    ):
        """Compiles each program, its part of the carry donated.

        Of `params` and `batch` only shapes and dtypes are read. A batch is rows for the model, or
        gradients without one; `devices` share it, and if `weighted` it counts with its tokens.
        """
        self.contender, self.model, self.weighted = contender, model, weighted
        devices = devices or jax.devices()[:1]
        kind = contender.axis_type
        self.manual = kind is AxisType.Manual
        kinds = (AxisType.Auto if self.manual else kind,)
        self.mesh = Mesh(np.array(devices), (AXIS,), axis_types=kinds)
        self.trace_s = self.compile_s = 0.0
        with jax.set_mesh(self.mesh):
            shapes, batch = self._carry_shapes(params), self._shapes(batch, self._named(P(AXIS)))
            compiled = {}
            for step in dict.fromkeys(contender.steps):
                start = time.perf_counter()
                part = {name: shapes[name] for name in self._names(step)}
                lowered = self._jit(step, part).lower(part, batch)
                middle = time.perf_counter()
                compiled[step] = lowered.compile(options(optimized, devices[0]))
                self.trace_s += middle - start
                self.compile_s += time.perf_counter() - middle
        self.programs = [compiled[step] for step in contender.steps]
        sizes = [program.memory_analysis().temp_size_in_bytes for program in self.programs]
        self.peak_bytes, self.temporary_bytes = max(map(peak_bytes, self.programs)), max(sizes)

    def start(self, params: Any) -> None:
        """Makes the carry for a copy of `params`."""
        with jax.set_mesh(self.mesh):
            self.carry = self._init(jax.tree.map(jnp.array, params))

    def put(self, batch: Any) -> Any:
        """Returns a batch on the devices."""
        return jax.device_put(batch, NamedSharding(self.mesh, P(AXIS)))

    def call(self, index: int, batches: Sequence[Any]) -> Carry:
        """Runs the program of one call of the window; the batches repeat where there are few."""
        part = {name: self.carry[name] for name in self._names(self.contender.steps[index])}
        part, _ = self.programs[index](part, batches[index % len(batches)])
        self.carry = self.carry | part
        return self.carry

    def hold(self, batches: Sequence[Any]) -> Carry:
        """Runs all of a window but its last call."""
        for i in range(len(self.programs) - 1):
            self.call(i, batches)
        return self.carry

    def run(self, batches: Sequence[Any]) -> Carry:
        """Runs a window."""
        self.hold(batches)
        return self.call(len(self.programs) - 1, batches)

    def train(self, params: Any, batches: Sequence[Any]) -> Any:
        """Returns what two windows make of `params`, on the host, and forgets the carry."""
        self.start(params)
        for _ in range(WINDOWS):
            jax.block_until_ready(self.run(batches))
        trained = jax.device_get(self.carry["params"])
        del self.carry
        return trained

    def _names(self, step: Step) -> tuple[str, ...]:
        # Differentiating needs the parameters, which the step itself may leave alone.
        return tuple(dict.fromkeys(("params", *step.names) if self.model else step.names))

    def _run(self, step: Step, part: Carry, batch: Any) -> tuple[Carry, Any]:
        if self.model is None:
            return part | step.apply(part, batch, None), None
        functions = self.model.mean_loss, self.model.tokens_of if self.weighted else None
        params = self.contender.prepare(part["params"])
        loss, grads = self.contender.differentiate(*functions, params, batch)
        weight = self.model.tokens_of(part["params"], batch) if self.weighted else None
        return part | step.apply(part, grads, weight), loss[None] if self.manual else loss

    def _jit(self, step: Step, part: Carry) -> Any:
        run = functools.partial(self._run, step)
        specs = {name: self.specs[name] for name in part}
        out_specs = specs, P(AXIS) if self.manual else P()
        if self.manual:
            in_specs = specs, P(AXIS)
            run = jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)
        # An unused argument is kept, or what overwrites a buffer could not be given that buffer.
        given = {"donate_argnums": 0, "keep_unused": True}
        return jax.jit(run, out_shardings=self._named(out_specs), **given)

    def _carry_shapes(self, params: Any) -> Carry:
        params = self._shapes(params, self._named(P()))
        entries = [name for step in self.contender.steps for name in step.names]
        self.specs = dict.fromkeys(["params", *entries], P()) | self.contender.specs(params)
        init = self.contender.init
        if self.manual:
            init = jax.shard_map(init, mesh=self.mesh, in_specs=P(), out_specs=self.specs)
        self._init = jax.jit(init, out_shardings=self._named(self.specs))
        shapes = jax.eval_shape(self._init, params)
        if None in self.specs.values():  # only the compiler knows
            placed = self._init.lower(params).compile().output_shardings
        else:
            placed = self._named(self.specs)
        return self._shapes(shapes, placed)

    def _named(self, specs: Any) -> Any:
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)

    def _shapes(self, tree: Any, shardings: Any) -> Any:
        def shape(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(shape, tree, jax.tree.broadcast(shardings, tree))


def options(optimized: bool, device: Any = None) -> Any:
    """Returns options to compile with.

    Optimising code for a CPU takes most of the time, and comes after memory is assigned and
    collectives are placed: without it all figures but times are the same.
    """
    cpu = (device or jax.devices()[0]).platform == "cpu"
    return {"xla_backend_optimization_level": "0"} if cpu and not optimized else {}


def peak_bytes(program: Any) -> int:
    """Returns the most memory that a compiled program needs, its arguments included."""
    sizes = program.memory_analysis()
    kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + kept + sizes.temp_size_in_bytes


def nbytes(tree: Any) -> int:
    """Returns the bytes of the arrays, or of the shapes, in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_trees(count: int, leaves: int, shape: tuple[int, ...], dtype: Any = "float32") -> Any:
    """Returns trees of normal deviates."""
    keys = jax.random.split(jax.random.key(0), (count, leaves))
    return [
        {f"{i:04d}": jax.random.normal(key, shape, dtype) for i, key in enumerate(x)} for x in keys
    ]


def check(
    found: Mapping[str, Contender], inner: Any, every_k: int, trees: Any, tolerance: float
) -> tuple[dict[str, Window], dict[str, Any]]:
    """Returns windows that are ready to run, and for each whether it agrees with the full batch."""
    windows, rows, (params, *grads) = {}, {}, trees
    expected = functools.cache(lambda tx: full_batch(tx, every_k, params, grads))
    for name, one in found.items():
        window, right = Window(one, params, params), expected(one.reference or inner)
        windows[name] = window
        error = largest_error(window.train(params, grads), right, params, tolerance)
        rows[name] = {"name": name, "equivalent": one.equivalent, "agrees": error <= 1}
        window.start(params)
    return windows, rows


def full_batch(
    inner: optax.GradientTransformation, every_k: int, params: Any, microbatches: Sequence[Any]
) -> Any:
    """Returns the parameters after two steps of `inner` on the mean gradient of a window.

    Not jitted: with many leaves the check would take longer to compile than what it checks.
    """
    counts = np.bincount(np.arange(every_k) % len(microbatches), minlength=len(microbatches))

    def mean(*leaves):
        wide = [np.asarray(leaf, np.float32) for leaf in leaves]
        return jnp.asarray(np.average(wide, axis=0, weights=counts), leaves[0].dtype)

    grads, state = jax.tree.map(mean, *microbatches), inner.init(params)
    for _ in range(WINDOWS):
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def largest_error(trained: Any, expected: Any, start: Any, tolerance: float) -> float:
    """Returns how far `trained` is from `expected`, 1 being what rounding explains.

    The way from `start` to `expected` may be off by `tolerance` of its length; then each window
    rounds the new parameters to their dtype. The largest of all leaves counts.
    """

    def error(x, y, start):
        rounding = float(jnp.finfo(start.dtype).eps) * np.sqrt(WINDOWS)
        x, y, start = (np.asarray(leaf, np.float64) for leaf in (x, y, start))
        allowed = tolerance * np.linalg.norm(y - start) + rounding * np.linalg.norm(y)
        return np.linalg.norm(x - y) / allowed

    return float(np.max(jax.tree.leaves(jax.tree.map(error, trained, expected, start))))
