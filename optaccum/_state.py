"""The state of an accumulating optimizer, and how to find it in a larger state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AccumulateState(NamedTuple):
    """State of :func:`optaccum.accumulate`.

    Every leaf is a strongly typed `jax.Array` whose dtype never changes. Sums and weight stay
    readable after a release, until the next accepted microbatch overwrites them. Then
    `grad_sum / weight` is the mean that was released.

    Attributes:
        mini_step: i32[], microbatches accepted in the open window, 0 once it is closed.
        gradient_step: i32[], windows released so far, which are the steps of the inner optimizer.
        released: bool[], whether the last call released a window.
        skipped: i32[], microbatches rejected so far.
        weight: f32[], sum of the weights of the window's microbatches.
        grad_sum: Weighted sums of the window's gradients, a tree like the parameters in the
            accumulator dtype, or () if `every_k` is the constant 1.
        arg_sums: Weighted sums of the `average_args` and `metrics`, under `sum_of_value` for
            `value`. They are f32[], or a tree if the argument is one. Metrics with another
            reduction are under `mean_of_` (weighted sums of a tree), `total_of_`, `max_of_` and
            `ratio_of_` (sums of numerator and denominator).
        skip_state: What `should_skip_update_fn` last reported, () without one.
        inner_state: State of the inner optimizer, which only a release changes.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    released: jax.Array
    skipped: jax.Array
    weight: jax.Array
    grad_sum: Any
    arg_sums: dict[str, Any]
    skip_state: Any
    inner_state: Any


def accumulates(opt_state: Any) -> bool:
    """Returns whether a state holds an AccumulateState."""
    return bool(optax.tree.get_all_with_path(opt_state, AccumulateState.__name__))


def get_state(opt_state: Any) -> AccumulateState:
    """Find the :class:`AccumulateState` in the state of any optimizer.

    Args:
        opt_state: An optimizer state with one AccumulateState at any depth, such as the state of
            `optax.chain(optax.clip(1.0), accumulate(4, optax.adam(1e-3)))`.

    Raises:
        ValueError: if `opt_state` holds none or several, for example under `optax.partition` with
            one :func:`accumulate` per group.
    """
    found = optax.tree.get_all_with_path(opt_state, AccumulateState.__name__)
    if len(found) == 1:
        return found[0][1]
    if not found:
        raise ValueError(
            "`opt_state` holds no AccumulateState; pass the state of an optimizer built with "
            f"optaccum.accumulate (a checkpoint's restored into `tx.init(params)`), got "
            f"{type(opt_state).__name__}"
        )
    paths = ", ".join(jax.tree_util.keystr(path) or "its root" for path, _ in found)
    raise ValueError(
        f"`opt_state` holds {len(found)} AccumulateStates, at {paths}; pass the part of it that "
        "holds the one you mean"
    )


def read(opt_state: Any, caller: str) -> AccumulateState:
    """Returns the state of one optimizer, its scalars out of the variables of flax.nnx."""
    state = get_state(opt_state)
    scalars = {name: jax.tree.leaves(getattr(state, name))[0] for name in state._fields[:5]}
    if shape := jnp.shape(scalars["mini_step"]):
        raise ValueError(
            f"`opt_state` has the states of several members of jax.vmap, {shape}; pass one: "
            f"`jax.vmap({caller})(...)`"
        )
    return state._replace(**scalars)


def has_released(opt_state: Any) -> jax.Array:
    """Return whether the last update released a window, as a bool[] (one per member under vmap).

    False before the first update, on every hold, after a rejected microbatch and after a window
    that was dropped because its weights sum to zero.

    Args:
        opt_state: As for :func:`get_state`.

    Raises:
        ValueError: as :func:`get_state` does.
    """
    (released,) = jax.tree.leaves(get_state(opt_state).released)  # it may be a variable of flax.nnx
    return released


def is_variable(x: Any) -> bool:
    """Returns whether `x` is a variable of flax.nnx."""
    return type(x).__module__.startswith("flax.nnx")


def as_array(x: Any) -> Any:
    """Returns the array of a variable."""
    return jax.tree.leaves(x)[0] if is_variable(x) else x


def has_sums(state: AccumulateState) -> bool:
    """Returns whether a state has sums of gradients."""
    return jax.tree.structure(state.grad_sum) != jax.tree.structure(())


def check_state(state: Any) -> None:
    """Raises unless `state` is what `init` returns."""
    if not isinstance(state, AccumulateState):
        remedy = "the order is (grads, state, params), in `value_and_apply` (params, state, *args)"
        if isinstance(state, optax.MultiStepsState):
            remedy = "convert it with optaccum.from_multi_steps"
        elif isinstance(state, dict):
            remedy += ", and a checkpoint is restored into `tx.init(params)`"
        raise TypeError(
            "the optimizer state must be the AccumulateState that `init` returns, got "
            f"{type(state).__name__}; {remedy}"
        )
