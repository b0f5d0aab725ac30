"""Collections of Flax whose gradients are their new values, through a window of microbatches."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optaccum._overwritten import NAME
from optaccum._state import accumulates, get_state
from optaccum._window import adds


class OverwriteState(NamedTuple):
    """Optimizer state of a :class:`TrainState` with a collection to be overwritten.

    Attributes:
        largest: The elementwise largest values of the window's microbatches that count, a tree
            like the collection, which a release overwrites.
        opt_state: The state of `tx`.

    A state from elsewhere becomes one by `state.replace(opt_state=OverwriteState(
    jax.tree.map(jnp.copy, state.params["_overwrite_with_gradient"]), state.opt_state))`.
    """

    largest: Any
    opt_state: Any


def holds(tree: Any) -> bool:
    """Returns whether parameters or gradients have such a collection."""
    return isinstance(tree, Mapping) and NAME in tree


def init(params: Any, opt_state: Any) -> Any:
    """Returns the state of an optimizer, with room for the collection if it accumulates."""
    if not holds(params) or not accumulates(opt_state):
        return opt_state
    get_state(opt_state)  # of several windows, none could say when to overwrite
    # A copy, since one buffer cannot be donated as a parameter and as a state.
    return OverwriteState(jax.tree.map(jnp.copy, params[NAME]), opt_state)


def step(train: Callable[..., Any], weight: Any, grads: Any, state: Any, params: Any) -> Any:
    """Returns parameters and state after a microbatch, of which `train` takes what is trained."""
    values = grads[NAME]
    if not isinstance(state, OverwriteState):
        if accumulates(state):
            raise ValueError(
                f"the optimizer state has no room for a window of {NAME!r}; "
                "make the train state with `optaccum.flax.TrainState.create`, or give it one as "
                "`optaccum.flax.OverwriteState` says"
            )
        trained, state = train(grads["params"], state, params["params"])
        return {"params": trained, NAME: values}, state
    trained, opt_state = train(grads["params"], state.opt_state, params["params"])
    old, new = get_state(state.opt_state), get_state(opt_state)
    if old.weight.ndim:
        raise ValueError(
            f"parameters with the collection {NAME!r} cannot be trained with "
            "`reduce_axes` in jax.shard_map, where each device would overwrite it with its own "
            "values; leave `reduce_axes` out and use jax.jit"
        )
    accepted = new.skipped == old.skipped
    if weight is not None:
        accepted &= adds(jnp.asarray(weight, jnp.float32))
    opens = (old.mini_step == 0) | (old.weight == 0)
    maxima = jax.tree.map(lambda x, y: jnp.maximum(_float(x), _float(y)), state.largest, values)
    largest = _select(accepted, _select(opens, values, maxima), state.largest)
    overwritten = _select(new.released, largest, params[NAME])
    state = OverwriteState(largest, opt_state)
    return {"params": trained, NAME: overwritten}, state


def _select(predicate: jax.Array, on_true: Any, on_false: Any) -> Any:
    """`jnp.where` of two trees, in the dtypes of `on_false`."""

    def leaf(x, y):
        chosen = jnp.where(predicate, _float(x), _float(y))
        return lax.convert_element_type(chosen, jax.typeof(y).dtype)

    return jax.tree.map(leaf, on_true, on_false)


def _float(x: Any) -> jax.Array:
    """Returns `x` as float32, since Flax's dtype for these values has no arithmetic."""
    return lax.convert_element_type(x, jnp.float32)
