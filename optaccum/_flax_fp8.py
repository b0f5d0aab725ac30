"""Collections of Flax whose gradients are their new values, through a window of microbatches."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
import jax
from jax import lax
import jax.numpy as jnp

from optaccum._state import get_state
from optaccum._window import adds


class OverwriteState(NamedTuple):
    """Optimizer state of a :class:`TrainState` with collections to be overwritten.

    Attributes:
        largest: the values to overwrite with when the window is released, a tree like the
            parameters' collection: the largest of the microbatches that count, element by element.
        opt_state: the state of `tx`.

    A state from elsewhere is given one by `state.replace(opt_state=OverwriteState(
    jax.tree.map(jnp.copy, state.params["_overwrite_with_gradient"]), state.opt_state))`.
    """

    largest: Any
    opt_state: Any


def holds(tree: Any) -> bool:
    """Returns whether parameters or gradients have such a collection."""
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree


def take_in(
    old: Any, new: Any, weight: Any, state: OverwriteState, after: Any
) -> tuple[Any, OverwriteState]:
    """Returns the collection after a microbatch that gave `new`, and the state with it."""
    window, advanced = get_state(state.opt_state), get_state(after)
    if window.weight.ndim:
        raise ValueError(
            f"parameters with the collection {OVERWRITE_WITH_GRADIENT!r} cannot be trained with "
            "`reduce_axes` in jax.shard_map, where each device would overwrite it with its own "
            "values; leave `reduce_axes` out and use jax.jit"
        )
    counts = advanced.skipped == window.skipped
    if weight is not None:
        counts &= adds(jnp.asarray(weight, jnp.float32))
    first = (window.mini_step == 0) | (window.weight == 0)

    def merge(largest, x):
        a, b = _as_float(largest), _as_float(x)
        merged = jnp.where(counts, jnp.where(first, b, jnp.maximum(a, b)), a)
        return lax.convert_element_type(merged, largest.dtype)

    def take(x, largest):
        chosen = jnp.where(advanced.released, _as_float(largest), _as_float(x))
        return lax.convert_element_type(chosen, x.dtype)

    largest = jax.tree.map(merge, state.largest, new)
    return jax.tree.map(take, old, largest), OverwriteState(largest, after)


def _as_float(x: Any) -> jax.Array:
    """Returns a number as float32: the type that Flax has for these values knows no arithmetic."""
    return lax.convert_element_type(x, jnp.float32)
