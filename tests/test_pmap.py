"""Training in `jax.pmap`: gradients that are reduced before they are summed, or once per window."""

import re

from helpers.hlo import collectives
from helpers.meshes import DEVICES
from helpers.tokens import (
    BYTES,
    INNER,
    MASK,
    PARAMS,
    SCALAR_BYTES,
    K,
    X,
    assert_close,
    full_batches,
    loss_fn,
)
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients


@pytest.fixture(autouse=True)
def _devices():
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")


def summed_loss(params, x, mask):
    return loss_fn(params, x, mask) * mask.sum()


def train(tx, gradients, mask=MASK):
    """Returns the parameters of all devices, and the bytes sent on every call and on a release."""

    def train_step(params, state, x, mask):
        grads, extra_args = gradients(params, x, mask)
        return apply_gradients(tx, grads, state, params, **extra_args)

    step = jax.pmap(train_step, axis_name="data")
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, (DEVICES, *p.shape)), PARAMS)
    state = jax.pmap(tx.init, axis_name="data")(params)
    batches = [a.reshape(2 * K, DEVICES, -1, *a.shape[2:]) for a in (X, mask)]
    for x, m in zip(*batches, strict=True):
        params, state = step(params, state, x, m)
    np.testing.assert_array_equal(state.gradient_step, np.full(DEVICES, 2))
    program = step.lower(params, state, batches[0][0], batches[1][0]).compile()
    return params, *collectives(program)


def assert_all_close(params, expected):
    for i in range(DEVICES):
        assert_close(jax.tree.map(lambda p, i=i: p[i], params), expected)


def test_gradients_that_are_reduced_as_they_come():
    """The weight is that of all devices' rows, and so the same on all."""

    def gradients(params, x, mask):
        tokens = jax.lax.psum(mask.sum(), "data")
        grads = jax.lax.psum(jax.grad(summed_loss)(params, x, mask), "data")
        return jax.tree.map(lambda g: g / tokens, grads), {"weight": tokens}

    params, always, on_release = train(accumulate(K, INNER), gradients)
    assert_all_close(params, full_batches())
    assert (sum(always), on_release) == (BYTES + SCALAR_BYTES, [])


def test_means_of_as_many_rows_are_reduced_once_a_window():
    pmean = optax.stateless(lambda updates, _: jax.lax.pmean(updates, "data"))
    tx = accumulate(K, optax.chain(pmean, INNER))

    def gradients(params, x, mask):
        return jax.grad(loss_fn)(params, x, mask), {}

    mask = jnp.ones_like(MASK)
    params, always, on_release = train(tx, gradients, mask)
    assert (always, sum(on_release)) == ([], BYTES)
    alone, state = PARAMS, INNER.init(PARAMS)
    for x in X.reshape(2, -1, X.shape[-1]):
        grads = jax.grad(loss_fn)(alone, x, jnp.ones(len(x)))
        updates, state = INNER.update(grads, state, alone)
        alone = optax.apply_updates(alone, updates)
    assert_all_close(params, alone)


def mean_over_devices(axis):
    """Returns a link that divides the devices' sums by the number of their tokens."""

    def update(updates, state, params=None, *, tokens, **extra_args):
        del params, extra_args
        total = jnp.maximum(jax.lax.psum(tokens, axis), 1)
        return jax.tree.map(lambda u: u / total, jax.lax.psum(updates, axis)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def test_sums_over_tokens_are_reduced_once_a_window():
    """A window's mean of sums over its mean of tokens is its mean over tokens."""
    inner = optax.chain(mean_over_devices("data"), INNER)
    tx = accumulate(K, inner, average_args=("tokens",))

    def gradients(params, x, mask):
        return jax.grad(summed_loss)(params, x, mask), {"tokens": mask.sum()}

    params, always, on_release = train(tx, gradients)
    assert_all_close(params, full_batches())
    assert (always, sum(on_release)) == ([], BYTES + SCALAR_BYTES)


def test_reduce_axes_needs_types_that_pmap_has_not():
    tx = accumulate(K, INNER, reduce_axes="data")

    def gradients(params, x, mask):
        return jax.grad(loss_fn)(params, x, mask), {}

    message = re.compile(r"`reduce_axes`.*jax\.shard_map", re.DOTALL)
    with pytest.raises((TypeError, ValueError), match=message):
        train(tx, gradients)
