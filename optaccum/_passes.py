"""Two passes over a batch, one microbatch in memory at a time: outputs first, then cotangents.

A loss of all outputs Y has the gradient sum_i vjp_i(y-bar_i), with y-bar_i the rows of dL/dY of
microbatch i. So the first pass keeps nothing but the outputs, and once dL/dY is known the second
computes each microbatch again, for its part of the gradient.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
import numpy as np

from optaccum import _batch, _devices, _gradients, _scatters, _window
from optaccum._call import Roles
from optaccum._trees import cast_like
from optaccum._validate import describe


class Arrays:
    """Where the arrays of a call belong among its arguments.

    It keeps none of them: rules of differentiation outlive the trace that they belong to.

    Attributes:
        in_rows: for each array whether it has rows.
    """

    def __init__(self, args: list[Any], roles: Roles):
        leaves, self._structure = jax.tree.flatten(args)
        self._leaves = [None if is_array(x) else x for x in leaves]
        self._at = [k for k, x in enumerate(leaves) if is_array(x)]
        self._roles = roles
        self.in_rows = [
            j in roles.rows
            for j, tree in enumerate(args)
            for x in jax.tree.leaves(tree)
            if is_array(x)
        ]

    def to_args(self, arrays: Sequence[jax.Array]) -> list[Any]:
        """Returns the arguments with these arrays in them."""
        leaves = self._leaves.copy()
        for k, x in zip(self._at, arrays, strict=True):
            leaves[k] = x
        return self._structure.unflatten(leaves)

    def microbatch(self, arrays: Sequence[jax.Array], i: jax.Array) -> list[jax.Array]:
        """Returns the arrays of microbatch i: its rows, its keys and the others whole."""
        leaves = jax.tree.leaves(self._roles.microbatch(self.to_args(arrays), i))
        return [leaves[k] for k in self._at]

    def share(self, arrays: Sequence[jax.Array], devices: _devices.Replicated) -> list[jax.Array]:
        """Returns the arrays, those without rows as :func:`share` does."""
        known = zip(arrays, self.in_rows, strict=True)
        return [x if in_rows else share(x, devices) for x, in_rows in known]

    def divide(self, some: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        """Returns what belongs to arrays without rows, and what to arrays with rows."""
        whole = {k: x for k, x in some.items() if not self.in_rows[k]}
        return whole, {k: x for k, x in some.items() if self.in_rows[k]}


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """A function of microbatches and its rule of differentiation.

    `run`, `forward` and `backward` are the functions that `jax.custom_vjp` wants. They take the
    arrays of all arguments, rows as [m, n, ...], and what the function closes over.

    Attributes:
        fun: `(closed_over, *arrays)` returns the outputs of one microbatch, leaves [m, ...].
        arrays: where its arrays belong.
        devices: how they share what has no rows.
        n: the number of microbatches.
        accumulator_dtype: dtype of the sums of gradients, or None.
    """

    fun: Callable[..., Any]
    arrays: Arrays
    devices: _devices.Replicated
    n: int
    accumulator_dtype: Any

    def run(self, arrays: Sequence[jax.Array], closed_over: Sequence[jax.Array]) -> Any:
        """Returns the outputs of all microbatches, leaves [m, n, ...].

        Each is written to its place in the order of the batch. `lax.scan` would stack microbatches,
        and it takes a copy of all outputs to order them.
        """
        shared = self.arrays.share(arrays, self.devices)

        def outputs(i):
            return self.fun(closed_over, *self.arrays.microbatch(shared, i))

        def body(found, i):
            new, _ = _scatters.trace(functools.partial(outputs, i))
            return _batch.put(found, new, i), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(outputs, jnp.int32(0)))
        start = jax.vmap(lambda _: zeros, out_axes=1)(jnp.arange(self.n))
        return lax.scan(body, start, jnp.arange(self.n))[0]

    def forward(self, arrays: Sequence[Any], closed_over: Sequence[Any]) -> tuple[Any, Any]:
        """Returns the outputs, and what `backward` needs."""
        for x in closed_over:
            if x.perturbed:
                raise TypeError(
                    f"`fun` closes over a value, {describe(x.value)}, that is being differentiated, "
                    "but only its arguments have gradients here; pass it as an argument"
                )
        closed_over, values = ([x.value for x in found] for found in (closed_over, arrays))
        trained = [k for k, x in enumerate(arrays) if x.perturbed]
        _gradients.check_parameters({k: values[k] for k in trained}, self.accumulator_dtype)
        return self.run(values, closed_over), (trained, values, closed_over)

    def backward(self, residuals: Any, cotangents: Any) -> tuple[list[Any], list[None]]:
        """Returns the cotangents of the arrays, from those of the outputs."""
        trained, arrays, closed_over = residuals
        shared = self.arrays.share(arrays, self.devices)

        def body(carried, i):
            sums, of_rows, seen = carried
            pull = functools.partial(self._pull, trained, shared, closed_over, cotangents, i)
            (new, whole), holds = _scatters.trace(pull)
            whole = _scatters.apart(whole, holds, seen)
            return (_window.add(sums, whole), _batch.put(of_rows, new, i), seen + 1), None

        # Zeros of the cotangents' type: if it is `unreduced`, that of the arguments is not.
        whole, rows = jax.grad(lambda _: 0.0)(self.arrays.divide({k: shared[k] for k in trained}))
        start = _window.open_sums(whole, self.accumulator_dtype), rows, jnp.float32(0)
        (sums, of_rows, _), _ = lax.scan(body, start, jnp.arange(self.n))
        sums = {k: _devices.reduce_like(s, arrays[k], self.devices) for k, s in sums.items()}
        found = cast_like(sums, {k: arrays[k] for k in sums}) | of_rows
        return [found.get(k) for k in range(len(arrays))], [None for _ in closed_over]

    def _pull(self, trained, shared, closed_over, cotangents, i) -> tuple[Any, Any]:
        """Returns the cotangents of microbatch i: those of its rows, then those of the rest."""
        arrays = self.arrays.microbatch(shared, i)

        # With the fences of `jax.checkpoint` compilers go through the parts of `fun` one after the
        # other. Without, XLA:GPU keeps what two towers compute at the same time.
        @jax.checkpoint
        def of_trained(some):
            return self.fun(closed_over, *(some.get(k, x) for k, x in enumerate(arrays)))

        outputs, vjp = jax.vjp(of_trained, {k: arrays[k] for k in trained})
        (found,) = vjp(jax.tree.map(functools.partial(_cotangent, i), outputs, cotangents))
        return self.arrays.divide(found)[::-1]


def _cotangent(i: jax.Array, y: jax.Array, cotangent: Any) -> Any:
    """Returns the cotangent of an output of microbatch i, from that of all, [m, n, ...]."""
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return np.zeros(y.shape, jax.dtypes.float0)
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros_like(y)
    return _batch.take(cotangent, i)


def is_array(x: Any) -> bool:
    """Returns whether a leaf of the arguments is an array."""
    return isinstance(x, jax.Array)


def share(tree: Any, devices: _devices.Replicated) -> Any:
    """Returns a tree whose arrays that can have a gradient vary over the devices."""

    def leaf(x):
        inexact = is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)
        return devices.share(x) if inexact else x

    return jax.tree.map(leaf, tree)
