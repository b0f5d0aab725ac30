"""Pytrees: dtypes, ownership of arrays, and non-array leaves."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import optax

ARRAYS = jax.Array, np.ndarray, np.generic, int, float, complex


def strongly_typed(x: Any) -> Any:
    """Casts numbers and arrays to a strongly typed `jax.Array`; other leaves pass through."""
    if isinstance(x, jax.Array | float | int | complex) or hasattr(x, "__array__"):
        x = jnp.asarray(x)
        return x.astype(x.dtype) if jax.typeof(x).weak_type else x
    return x


def cast_like(tree: Any, like: Any) -> Any:
    """Casts `tree` to the dtypes of `like`, strongly typed."""

    def cast(x, y):
        x, dtype = jnp.asarray(x), jnp.result_type(y)
        return x if x.dtype == dtype and not jax.typeof(x).weak_type else x.astype(dtype)

    return jax.tree.map(cast, tree, like)


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts the floating leaves of `tree`; None leaves it as it is."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def copy_shared(state: Any, params: Any) -> Any:
    """Copies arrays of a fresh `state` that are in `params`, or in `state` twice.

    Some optimizers start from the parameters, and one buffer cannot be donated twice. All leaves
    become strongly typed.
    """
    seen = {id(x) for x in jax.tree.leaves(params)}

    def leaf(x):
        if isinstance(x, jax.Array):
            if id(x) in seen:
                return jnp.copy(x)
            seen.add(id(x))
        return strongly_typed(x)

    return jax.tree.map(leaf, state)


def take_apart(tree: Any) -> tuple[list, Callable[[Any], Any]]:
    """Returns the arrays of `tree`, and a function that puts arrays back between other leaves.

    A module of Equinox has functions among its leaves, which no branch can return.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, ARRAYS)]

    def join(arrays):
        whole = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            whole[i] = x
        return structure.unflatten(whole)

    return [leaves[i] for i in places], join


def fast(params: Any) -> Any:
    """Returns the tree that has gradients and sums: not the slow copy of lookahead."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def keep_untrained(params: Any, new: Any, grads: Any) -> Any:
    """Returns `new` with the leaves of `params` that have no gradient and cannot have one.

    A branch would have turned Python numbers, such as settings in a module, into arrays.
    """
    if isinstance(params, optax.LookaheadParams):
        return new

    def keep(x, p):
        array = isinstance(p, jax.Array | np.ndarray)
        return x if array and jnp.issubdtype(p.dtype, jnp.inexact) else p

    return jax.tree.map(
        lambda g, x, p: jax.tree.map(keep, x, p) if g is None else x,
        grads,
        new,
        params,
        is_leaf=is_none,
    )


def tracing() -> bool:
    """Returns whether a program is being traced, even if its arguments are constants."""
    return isinstance(jnp.zeros([]), Tracer)


def is_none(x: Any) -> bool:
    """Returns whether `x` is None."""
    return x is None


def apply_updates(params: Any, updates: optax.Updates) -> Any:
    """`optax.apply_updates`; a parameter whose update is None is kept."""
    return jax.tree.map(
        lambda u, p: p if u is None else optax.apply_updates(p, u),
        updates,
        params,
        is_leaf=is_none,
    )
