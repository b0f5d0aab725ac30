"""Two passes over a batch, one microbatch in memory at a time: outputs first, then cotangents.

A loss of all outputs Y has the gradient sum_i vjp_i(y-bar_i), with y-bar_i the rows of dL/dY of
microbatch i. So the first pass keeps nothing but the outputs, and once dL/dY is known the second
computes each microbatch again, for its part of the gradient.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
import jax.numpy as jnp
import numpy as np

from optaccum import _batch, _devices, _gradients, _scatters, _window
from optaccum._backward import add_gradients
from optaccum._call import Roles
from optaccum._trees import cast_like
from optaccum._validate import describe
from optaccum._window import UNWEIGHTED

Arrays = list[jax.Array]


def take_apart(args: list[Any], roles: Roles) -> tuple[Arrays, Arrays, Callable[..., list[Any]]]:
    """Returns the arrays without rows, the arrays with rows, and what joins both.

    `join(i, *whole, *rows)` returns the arguments of microbatch i, with its keys. It keeps no
    array: rules of differentiation outlive the trace that arrays belong to.
    """
    named = {*roles.rows, *roles.keys, *roles.trained}  # raw keys and rows may be NumPy's
    args = [jax.tree.map(jnp.asarray, x) if j in named else x for j, x in enumerate(args)]
    leaves, structure = jax.tree.flatten(args)
    in_rows = [j in roles.rows for j, tree in enumerate(args) for _ in jax.tree.leaves(tree)]
    arrays = [k for k, x in enumerate(leaves) if isinstance(x, jax.Array)]
    whole = [k for k in arrays if not in_rows[k]]
    rows = [k for k in arrays if in_rows[k]]
    others = [None if isinstance(x, jax.Array) else x for x in leaves]

    def join(i, *arrays):
        leaves = others.copy()
        for k, x in zip((*whole, *rows), arrays, strict=True):
            leaves[k] = x
        args = structure.unflatten(leaves)
        for j in roles.keys:
            args[j] = _batch.fold_in(args[j], i)
        return args

    return [leaves[k] for k in whole], [leaves[k] for k in rows], join


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """A function of microbatches and its rule of differentiation.

    `run`, `forward` and `backward` are what `jax.custom_vjp` wants. They take the arrays without
    rows, the ones with rows as [m, n, ...], and what the function closes over.
    """

    # `(closed_over, i, *whole, *rows)` returns the outputs of microbatch i, leaves [m, ...].
    fun: Callable[..., Any]
    devices: _devices.Replicated  # they cast what has no rows
    n: int  # the number of microbatches
    accumulator_dtype: Any

    def run(self, whole: Arrays, rows: Arrays, closed_over: Arrays) -> Any:
        """Returns the outputs of all microbatches, leaves [m, n, ...].

        Each is written to its place in the order of the batch. `lax.scan` would stack microbatches,
        and it takes a copy of all outputs to order them.
        """
        whole = vary(whole, self.devices)

        def outputs(i):
            return self.fun(closed_over, i, *whole, *_batch.take(rows, i))

        def body(found, i):
            new, _ = _scatters.trace(functools.partial(outputs, i))
            return _batch.put(found, new, i), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(outputs, jnp.int32(0)))
        start = jax.vmap(lambda _: zeros, out_axes=1)(jnp.arange(self.n))
        return lax.scan(body, start, jnp.arange(self.n, dtype=jnp.int32))[0]

    def forward(self, whole: list, rows: list, closed_over: list) -> tuple[Any, Any]:
        """Returns the outputs, and what `backward` needs."""
        check_closed_over(closed_over)
        trained = [{k: x.value for k, x in enumerate(xs) if x.perturbed} for xs in (whole, rows)]
        _gradients.dtypes_of_sums(trained, self.accumulator_dtype)  # raises if it does not fit
        values = custom_vjp_primal_tree_values((whole, rows, closed_over))
        return self.run(*values), (trained, *values)

    def backward(self, residuals: Any, cotangents: Any) -> tuple[list, list, None]:
        """Returns the cotangents of whole arrays and of rows, and none of what is closed over."""
        (of_whole, of_rows), whole, rows, closed_over = residuals
        varied = vary(whole, self.devices)
        trained = {k: varied[k] for k in of_whole}, of_rows

        def pull(i):
            """Returns the cotangents of the rows of microbatch i, and of whole arrays."""
            microbatch = _batch.take(rows, i)

            # With the fences of `jax.checkpoint` compilers go through the parts of `fun` one after
            # the other. Without, XLA:GPU keeps what two towers compute at the same time.
            @jax.checkpoint
            def fun(some_whole, some_rows):
                arrays = [some_whole.get(k, x) for k, x in enumerate(varied)]
                arrays += [some_rows.get(k, x) for k, x in enumerate(microbatch)]
                return self.fun(closed_over, i, *arrays)

            outputs, vjp = jax.vjp(fun, trained[0], {k: microbatch[k] for k in of_rows})
            return vjp(jax.tree.map(functools.partial(_cotangent, i), outputs, cotangents))[::-1]

        def body(carried, i):
            sums, joined, seen = carried
            of_rows, sums = add_gradients(functools.partial(pull, i), sums, UNWEIGHTED, seen)
            return (sums, _batch.put(joined, of_rows, i), seen + 1), None

        # Zeros of the cotangents' type: if it is `unreduced`, the type of the arguments is not.
        zeros, joined = jax.grad(lambda _: 0.0)(trained)
        dtypes = _gradients.dtypes_of_sums(zeros, self.accumulator_dtype)
        start = _window.open_sums(zeros, dtypes), joined, jnp.float32(0)
        (sums, joined, _), _ = lax.scan(body, start, jnp.arange(self.n, dtype=jnp.int32))
        with jax.named_scope("optaccum.reduce"):
            sums = {k: _devices.reduce_like(s, whole[k], self.devices) for k, s in sums.items()}
        sums = cast_like(sums, of_whole)
        of_whole = [sums.get(k) for k in range(len(whole))]
        return of_whole, [joined.get(k) for k in range(len(rows))], None


def check_closed_over(values: list) -> None:
    """Raises if a value that `fun` closes over is differentiated."""
    for x in values:
        if x.perturbed:
            raise TypeError(
                f"`fun` closes over a value, {describe(x.value)}, that is being differentiated, "
                "but only its arguments have gradients here; pass it as an argument"
            )


def _cotangent(i: jax.Array, y: jax.Array, cotangent: Any) -> Any:
    """Returns the cotangent of an output of microbatch i, from the one of all, [m, n, ...]."""
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return np.zeros(y.shape, jax.dtypes.float0)
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros_like(y)
    return _batch.take(cotangent, i)


def vary(tree: Any, devices: _devices.Replicated) -> Any:
    """Returns a tree whose arrays that can have a gradient vary over the devices."""

    def leaf(x):
        inexact = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
        return devices.vary(x) if inexact else x

    return jax.tree.map(leaf, tree)
