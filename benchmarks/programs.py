"""Programs of a contender: compiled for devices that are here or elsewhere, run, and checked."""

from collections.abc import Sequence
import contextlib
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax

from benchmarks.contender import Carry, Contender, Step
from benchmarks.parallel import AXIS

WINDOWS = 2  # that a contender runs before it is checked


class Window:
    """The programs of one window of a contender, compiled.

    Attributes:
        contender: what they are programs of.
        programs: one for each call.
        trace_s: seconds to trace and lower all that differ.
        compile_s: seconds to compile them.
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
        only_last: bool = False,
    ):
        """Compiles each program, its part of the carry donated.

        Args:
            contender: the way of accumulating.
            params: the parameters, of which only shapes and dtypes are read.
            batch: what a call is given, likewise: rows for the model, or gradients without one.
            model: with `mean_loss` and `tokens_of`, or None where the gradients lie ready.
            weighted: whether a microbatch counts with its tokens.
            devices: that share the rows; None for the default device.
            optimized: whether the CPU's code is optimised. That takes most of the time, and comes
                after memory is assigned and collectives are placed.
            only_last: whether to compile the last program alone, the one that releases.
        """
        self.contender, self.model, self.weighted = contender, model, weighted
        layout = contender.layout
        self.manual = devices is not None and layout.axis_type is AxisType.Manual
        self.mesh = None
        if devices is not None:
            kind = AxisType.Auto if self.manual else layout.axis_type
            self.mesh = Mesh(np.array(devices), (AXIS,), axis_types=(kind,))
        cpu = jax.default_backend() == "cpu" and (not devices or devices[0].platform == "cpu")
        skip = {"xla_backend_optimization_level": "0"} if cpu and not optimized else {}
        options: dict[str, str | bool] = {**skip}
        steps = contender.steps[-1:] if only_last else contender.steps
        self.trace_s = self.compile_s = 0.0
        with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
            shapes = self._carry_shapes(params)
            batch = self._shapes(batch, P(AXIS))
            compiled = {}
            for step in dict.fromkeys(steps):
                start = time.perf_counter()
                part = {name: shapes[name] for name in self._names(step)}
                lowered = self._jit(step, part).lower(part, batch)
                middle = time.perf_counter()
                compiled[step] = lowered.compile(options)
                self.trace_s += middle - start
                self.compile_s += time.perf_counter() - middle
        self.programs = [compiled[step] for step in steps]

    @property
    def peak_bytes(self) -> int:
        """The most memory that one of the programs needs, its arguments included."""
        return max(map(peak_bytes, self.programs))

    @property
    def temporary_bytes(self) -> int:
        """The largest temporaries of one of the programs."""
        return max(program.memory_analysis().temp_size_in_bytes for program in self.programs)

    def start(self, params: Any) -> None:
        """Makes the carry for a copy of `params`."""
        params = jax.tree.map(jnp.array, params)
        if self.mesh:
            with jax.set_mesh(self.mesh):
                self.carry = self._init()(params)
        else:
            self.carry = self.contender.init(params)

    def put(self, batch: Any) -> Any:
        """Returns a batch on the devices."""
        return jax.device_put(batch, NamedSharding(self.mesh, P(AXIS)) if self.mesh else None)

    def call(self, index: int, batch: Any) -> Any:
        """Runs the program of one call of the window, and returns the loss if there is a model."""
        names = self._names(self.contender.steps[index])
        part = {name: self.carry[name] for name in names}
        part, loss = self.programs[index](part, batch)
        self.carry = self.carry | part
        return loss

    def hold(self, batches: Sequence[Any]) -> Carry:
        """Runs all of a window but its last call; the batches repeat where there are too few."""
        for i in range(len(self.programs) - 1):
            self.call(i, batches[i % len(batches)])
        return self.carry

    def release(self, batches: Sequence[Any]) -> Carry:
        """Runs the last call of a window."""
        last = len(self.programs) - 1
        self.call(last, batches[last % len(batches)])
        return self.carry

    def run(self, batches: Sequence[Any]) -> Carry:
        """Runs a window."""
        self.hold(batches)
        return self.release(batches)

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
        weight_fn = self.model.tokens_of if self.weighted else None
        differentiate = self.contender.differentiate(self.model.mean_loss, weight_fn)
        prepare = self.contender.layout.prepare if self.mesh else lambda params: params
        loss, grads = differentiate(prepare(part["params"]), batch)
        weight = self.model.tokens_of(part["params"], batch) if self.weighted else None
        return part | step.apply(part, grads, weight), loss[None] if self.manual else loss

    def _jit(self, step: Step, part: Carry) -> Any:
        # An unused argument is kept, or what overwrites a buffer could not be given that buffer.
        jit = functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
        run = functools.partial(self._run, step)
        if not self.mesh:
            return jit(run)
        specs = {name: self.specs[name] for name in part}
        out_specs = specs, P(AXIS) if self.manual else P()
        if self.manual:
            in_specs = specs, P(AXIS)
            run = jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)
        return jit(run, out_shardings=self._named(out_specs))

    def _init(self) -> Any:
        init, specs = self.contender.init, self.specs
        if self.manual:
            init = jax.shard_map(init, mesh=self.mesh, in_specs=P(), out_specs=specs)
        return jax.jit(init, out_shardings=self._named(specs))

    def _carry_shapes(self, params: Any) -> Carry:
        if not self.mesh:
            return jax.eval_shape(self.contender.init, params)
        params = self._shapes(params, P())
        entries = [name for step in self.contender.steps for name in step.names]
        self.specs = dict.fromkeys(["params", *entries], P()) | self.contender.layout.specs(params)
        init = self._init()
        shapes = jax.eval_shape(init, params)
        if None in self.specs.values():  # only the compiler knows
            placed = init.lower(params).compile().output_shardings
        else:
            placed = jax.tree.map(
                lambda sharding, part: jax.tree.map(lambda _: sharding, part),
                self._named(self.specs),
                shapes,
            )
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            placed,
        )

    def _named(self, specs: Any) -> Any:
        assert self.mesh
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)

    def _shapes(self, tree: Any, spec: P) -> Any:
        sharding = NamedSharding(self.mesh, spec) if self.mesh else None
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )


def peak_bytes(program: Any) -> int:
    """Returns the most memory that a compiled program needs, its arguments included."""
    sizes = program.memory_analysis()
    kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + kept + sizes.temp_size_in_bytes


def nbytes(tree: Any) -> int:
    """Returns the bytes of the arrays, or of the shapes, in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def full_batch(
    inner: optax.GradientTransformation, every_k: int, params: Any, microbatches: Sequence[Any]
) -> Any:
    """Returns the parameters after two steps of `inner` on the mean gradient of a window.

    Not jitted: with many leaves the check would take longer to compile than what it checks.
    """
    counts = np.bincount(np.arange(every_k) % len(microbatches), minlength=len(microbatches))

    def mean(*leaves):
        total = jnp.zeros(leaves[0].shape, jnp.float32)
        for n, x in zip(counts.tolist(), leaves, strict=True):
            total += n * x.astype(jnp.float32)
        return (total / every_k).astype(leaves[0].dtype)

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
