"""The two ways to take a step, and an inner optimizer that tells what it was given."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optaccum


def update_and_apply(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """Returns what `apply_gradients` should: parameters and state, by the two calls of Optax."""
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
    return optax.apply_updates(params, updates), opt_state


STEPS = {"update": update_and_apply, "apply_gradients": optaccum.apply_gradients}
# What the two do to a state is one program: it runs in both forms on one version.
every_step = pytest.mark.parametrize(
    "step",
    [pytest.param(update_and_apply, marks=pytest.mark.slow), optaccum.apply_gradients],
    ids=STEPS,
)


class RecordingState(NamedTuple):
    """State of :func:`recording`.

    Attributes:
        count: i32[], calls so far.
        value: f32[], the `value` of the last call.
    """

    count: jax.Array
    value: jax.Array


def recording() -> optax.GradientTransformationExtraArgs:
    """Returns an identity that counts its calls and remembers the last `value`."""

    def init_fn(params):
        del params
        return RecordingState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update_fn(updates, state, params=None, *, value=0.0, **extra_args):
        del params, extra_args
        return updates, RecordingState(state.count + 1, jnp.asarray(value, jnp.float32))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
