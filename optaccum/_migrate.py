"""From the state of another way to accumulate to ours, in mid-window too."""

from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from optaccum._check.arguments import leaf_name
from optaccum._core import devices, window
from optaccum._core.traced import cast_like
from optaccum._state import AccumulateState


def from_multi_steps(
    tx: optax.GradientTransformation,
    state: optax.MultiStepsState,
    params: Any,
    *,
    use_grad_mean: bool = True,
) -> AccumulateState:
    """Return the state with which `tx` goes on where `optax.MultiSteps` stopped.

    `optax.MultiSteps` keeps the mean of the n microbatches of its open window (or, without
    `use_grad_mean`, their sum); :func:`optaccum.accumulate` keeps sum and weight,

        grad_sum = n * acc_grads,    weight = n.

    The counters and the state of the inner optimizer are taken over as they are. Restore the
    checkpoint into the state that `optax.MultiSteps(...).init(params)` gives, then convert.
    Call this outside of `jax.jit`, once.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, from_multi_steps
    >>> params, old = jnp.zeros(2), optax.MultiSteps(optax.sgd(1.0), 4)
    >>> _, state = old.update(jnp.array([1.0, 3.0]), old.init(params), params)
    >>> _, state = old.update(jnp.array([3.0, 3.0]), state, params)
    >>> state = from_multi_steps(accumulate(4, optax.sgd(1.0)), state, params)
    >>> print(state.mini_step, state.weight, state.grad_sum)
    2 2.0 [4. 6.]

    Args:
        tx: an :func:`optaccum.accumulate` of the same inner optimizer; `every_k` may differ.
        state: the state of `optax.MultiSteps`.
        params: the parameters, as for `tx.init`.
        use_grad_mean: as `optax.MultiSteps` was built; `tx` should be built with the same.

    Raises:
        TypeError: if `tx` is no accumulate, or `state` not one of `optax.MultiSteps`.
        ValueError: if the inner optimizers or the parameters differ; or if a window is open and
            `tx` has `average_args`, which `optax.MultiSteps` has not summed.
    """
    if not isinstance(state, optax.MultiStepsState):
        raise TypeError(
            f"`state` must be an optax.MultiStepsState, got {type(state).__name__}; pass the one "
            "inside it, or restore the checkpoint into optax.MultiSteps(...).init(params)"
        )
    mini_step = jnp.asarray(state.mini_step, jnp.int32)
    if isinstance(mini_step, Tracer) or mini_step.ndim:
        raise TypeError("`state` must be one state, outside of jax.jit and jax.vmap")
    fresh = tx.init(params)
    if not isinstance(fresh, AccumulateState):
        raise TypeError(
            "`tx` must be what optaccum.accumulate returns, not a transformation around it, got "
            f"one whose state is {type(fresh).__name__}; put the converted state in its place"
        )
    _check_same("the accumulator in `state`", state.acc_grads, "`params`", params)
    inner = "the inner optimizer of `tx`"
    _check_same("`state.inner_opt_state`", state.inner_opt_state, inner, fresh.inner_state)
    held = int(mini_step)
    if held and fresh.arg_sums:
        raise ValueError(
            f"optax.MultiSteps has not summed the `average_args` {tuple(fresh.arg_sums)} of the "
            f"{held} microbatches in the open window; go on with it until `mini_step` is 0"
        )
    grad_sum = fresh.grad_sum
    if held:
        if not jax.tree.leaves(grad_sum):  # `every_k` 1, which closes this window
            grad_sum = window.open_sums(params)
        count = held if use_grad_mean else 1

        def take_over(s, x):
            return devices.unreduce(jnp.asarray(x, s.dtype) * count, tuple(devices.unreduced(s)))

        grad_sum = jax.tree.map(take_over, grad_sum, state.acc_grads)
    same = jax.tree.structure(state.skip_state) == jax.tree.structure(fresh.skip_state)
    return fresh._replace(
        mini_step=mini_step,
        gradient_step=jnp.asarray(state.gradient_step, jnp.int32),
        weight=mini_step.astype(jnp.float32),
        grad_sum=grad_sum,
        skip_state=state.skip_state if same else fresh.skip_state,
        inner_state=cast_like(state.inner_opt_state, fresh.inner_state),
    )


def _check_same(name: str, tree: Any, other: str, like: Any) -> None:
    """Raises unless both trees have the same leaves, of the same shapes."""

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {leaf_name(path): jnp.shape(x) for path, x in leaves}

    remedy = (
        "build `tx` with the inner optimizer of optax.MultiSteps, for the same parameters, and "
        "pass arrays, not variables of flax.nnx (nnx.as_pure takes them out)"
    )
    found, expected = shapes(tree), shapes(like)
    for path in (*found, *expected):
        a, b = (x.get(path, "not there") for x in (found, expected))
        if a != b:
            raise ValueError(
                f"{name} does not fit {other}: leaf {path} is {a} in the first and {b} in the "
                f"second; {remedy}"
            )
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(f"{name} has the leaves of {other}, but in other containers; {remedy}")
