"""What several test modules share: steps, an inner that records, devices, scripts."""

from collections.abc import Callable
import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import optax
import pytest

import optaccum

DEVICES = 8


def update_and_apply(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """Returns what `apply_gradients` should: parameters and state, by the two calls of Optax."""
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
    return optax.apply_updates(params, updates), opt_state


every_step = pytest.mark.parametrize(
    "step", [update_and_apply, optaccum.apply_gradients], ids=["update", "apply_gradients"]
)


def update_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """Returns `step(params, opt_state, grads, **extra_args)` with `update`, `apply_updates`."""
    tx = optax.with_extra_args_support(tx)

    def step(params, opt_state, grads, **extra_args):
        return update_and_apply(tx, grads, opt_state, params, **extra_args)

    return step


def apply_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """Returns `step(params, opt_state, grads, **extra_args)` with `apply_gradients`."""

    def step(params, opt_state, grads, **extra_args):
        return optaccum.apply_gradients(tx, grads, opt_state, params, **extra_args)

    return step


STEPS = {"update": update_step, "apply_gradients": apply_step}


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


def vary(tree: Any) -> Any:
    """Returns values that devices share as each device's own over the axis "data"."""
    if hasattr(jax.lax, "pcast"):
        return jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), tree)
    return jax.tree.map(lambda x: jax.lax.pvary(x, "data"), tree)


def make_mesh(kind: AxisType, devices: int = DEVICES) -> jax.sharding.Mesh:
    """Returns a mesh with one axis "data" over the first devices, or skips the test."""
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")
    shape, chosen = (devices,), jax.devices()[:devices]
    return jax.make_mesh(shape, ("data",), axis_types=(kind,), devices=chosen)


def load_script(path: pathlib.Path) -> Any:
    """Returns the module that a script is."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
