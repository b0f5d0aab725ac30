"""Pytrees: dtypes, ownership and leaves that are no arrays."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def where(predicate: jax.Array, on_true: Any, on_false: Any) -> Any:
    """`jnp.where` of two trees."""
    return jax.tree.map(functools.partial(jnp.where, predicate), on_true, on_false)


def strongly_typed(x: Any) -> Any:
    """Returns a leaf of a fresh state as an array that keeps its dtype in every operation."""
    if isinstance(x, jax.Array | float | int | complex) or hasattr(x, "__array__"):
        x = jnp.asarray(x)
        return x.astype(x.dtype) if jax.typeof(x).weak_type else x
    return x


def own_arrays(state: Any, params: Any) -> Any:
    """Returns a fresh state whose arrays are strongly typed, each its own, and none a parameter.

    Some optimizers begin with the parameters, or with one array in two places. Copies can be
    donated.
    """
    taken = {id(x) for x in jax.tree.leaves(params)}

    def own(x):
        if isinstance(x, jax.Array):
            if id(x) in taken:
                return jnp.copy(x)
            taken.add(id(x))
        return strongly_typed(x)

    return jax.tree.map(own, state)


def cast_like(tree: Any, like: Any) -> Any:
    """Returns `tree` in the dtypes of `like`, strongly typed."""

    def cast(x, y):
        x, dtype = jnp.asarray(x), jnp.result_type(y)
        return x if x.dtype == dtype and not jax.typeof(x).weak_type else x.astype(dtype)

    return jax.tree.map(cast, tree, like)


ARRAYS = jax.Array, np.ndarray, np.generic, int, float, complex


def take_apart(tree: Any) -> tuple[list, Callable[[Any], Any]]:
    """Returns the arrays of a tree, and a function that puts such among its other leaves.

    A whole module of Equinox has functions among its leaves, which no branch can return.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, ARRAYS)]

    def join(arrays):
        whole = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            whole[i] = x
        return structure.unflatten(whole)

    return [leaves[i] for i in places], join


def keep_untrained(params: Any, new: Any, grads: Any) -> Any:
    """Returns new parameters, of which those without a gradient are what they were.

    The settings among the leaves of a module, Python numbers, come out of a branch as arrays.
    """
    if isinstance(params, optax.LookaheadParams):
        return new

    def keep(g, x, p):
        return p if g is None else x

    return jax.tree.map(keep, grads, new, params, is_leaf=lambda g: g is None)
