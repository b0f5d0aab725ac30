"""Two passes over a batch, one microbatch in memory at a time: outputs first, then cotangents.

A loss of all outputs Y has the gradient sum_i vjp_i(y-bar_i), where y-bar_i are the rows of its
derivative by Y that belong to microbatch i. So outputs are computed without keeping what led to
them, and once Y-bar is known each microbatch is computed again, for its own share of the gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
import numpy as np

from optaccum import _batch, _scatters, _window


def outputs(fun: Callable[[jax.Array], Any], n: int) -> Any:
    """Returns `fun(0)` to `fun(n - 1)`, leaves [m, ...], as leaves [m, n, ...].

    Each is written to its place in the order of the batch. The results of `lax.scan` would lie
    microbatch after microbatch, and to bring them into order takes a copy of them all.
    """

    def body(found, i):
        return _batch.put(found, _scatters.trace(lambda: fun(i))[0], i), None

    return lax.scan(body, _room(jax.eval_shape(fun, jnp.int32(0)), n), jnp.arange(n))[0]


def cotangents(
    pull: Callable[[jax.Array], tuple[Any, Any]],
    whole: Any,
    rows: Any,
    n: int,
    accumulator_dtype: Any = None,
) -> tuple[Any, Any]:
    """Returns the sums of what `pull` returns first, and its second results as [m, n, ...].

    Args:
        pull: `pull(i)` returns the cotangents of microbatch i: those of what all share and those
            of its rows.
        whole: what all share.
        rows: what is divided, leaves [m, n, ...].
        n: the number of microbatches.
        accumulator_dtype: dtype of the sums, as `window.open_sums` takes it.
    """

    def body(found, i):
        sums, of_rows, seen = found
        (of_own, of_whole), holds = _scatters.trace(lambda: pull(i)[::-1])
        of_whole = _scatters.apart(of_whole, holds, seen)
        return (_window.add(sums, of_whole), _batch.put(of_rows, of_own, i), seen + 1), None

    # Zeros of the cotangents' type: where it is `unreduced`, that of the arguments is not.
    zeros_of_whole, zeros_of_rows = jax.grad(lambda _: 0.0)((whole, rows))
    start = _window.open_sums(zeros_of_whole, accumulator_dtype), zeros_of_rows
    return lax.scan(body, (*start, jnp.float32(0)), jnp.arange(n))[0][:2]


def own_cotangents(found: Any, of_all: Any, i: jax.Array) -> Any:
    """Returns the cotangents of the outputs of microbatch i, with zeros where there are none.

    Args:
        found: the outputs of microbatch i.
        of_all: cotangents of the outputs of all, leaves [m, n, ...] or symbolic zeros.
        i: the microbatch.
    """

    def own(y, cotangent):
        if not jnp.issubdtype(y.dtype, jnp.inexact):
            return np.zeros(y.shape, jax.dtypes.float0)
        if isinstance(cotangent, SymbolicZero):
            return jnp.zeros_like(y)
        return _batch.take(cotangent, i)

    return jax.tree.map(own, found, of_all)


def _room(tree: Any, n: int) -> Any:
    """Returns zeros [m, n, ...] for n trees with leaves [m, ...], on devices as these are."""
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return jax.vmap(lambda _: zeros, out_axes=1)(jnp.arange(n))
