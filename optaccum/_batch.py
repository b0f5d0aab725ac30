"""Rows and keys: what one microbatch is given of a whole batch."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def by_position(fun: Callable[..., Any], count: int, names: Sequence[str]) -> Callable[..., Any]:
    """Returns `fun` with all arguments by position: `count` of them, then those with `names`."""

    @functools.wraps(fun)
    def call(*args):
        return fun(*args[:count], **dict(zip(names, args[count:], strict=True)))

    return call


def split(tree: Any, n: int) -> Any:
    """Returns leaves [rows, ...] as [rows / n, n, ...]: views, sharded as they were.

    Microbatch i is index i of the second axis, so it holds the rows i, i + n, i + 2n, ... Read in
    a loop, it costs its own rows. An axis of microbatches in front, which `lax.scan` slices by
    itself, would cost a copy of the batch before the loop.
    """
    return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:])), tree)


def take(tree: Any, i: jax.Array) -> Any:
    """Returns microbatch i of the tree that :func:`split` returned."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False), tree)


def put(tree: Any, microbatch: Any, i: jax.Array) -> Any:
    """Returns a tree like that of :func:`split`, with microbatch i replaced."""

    def leaf(x, own):
        return lax.dynamic_update_index_in_dim(x, own.astype(x.dtype), i, 1)

    return jax.tree.map(leaf, tree, microbatch)


def join(tree: Any) -> Any:
    """Returns leaves [m, n, ...] as [m n, ...]: what :func:`split` undoes."""
    return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])), tree)


def is_typed_key(x: Any) -> bool:
    """Returns whether `x` is a key of `jax.random.key`."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def own_keys(tree: Any, i: jax.Array) -> Any:
    """Returns a tree of keys with those of microbatch i."""
    typed = any(map(is_typed_key, jax.tree.leaves(tree)))

    def fold(x):
        if typed and not is_typed_key(x):
            return x  # a count of `flax.nnx.RngState`
        each = functools.partial(jax.random.fold_in, data=i)
        for _ in range(x.ndim if typed else x.ndim - 1):
            each = jax.vmap(each)
        return each(x)

    return jax.tree.map(fold, tree)
