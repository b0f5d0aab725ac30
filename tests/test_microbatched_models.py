"""What `microbatched` composes with: transformations of JAX, optimizers, models."""

import equinox as eqx
from flax import linen, nnx
from helpers import coupled
from helpers.coupled import BATCH, EPS, encode, info_nce, make_params, with_encoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum

PARAMS = make_params(jnp.float32)


def _in(n, fun=encode, **options):
    return optaccum.microbatched(fun, num_microbatches=n, **options)


def _assert_close(actual, expected, ulps=64):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=ulps * EPS, atol=ulps * EPS)


OURS, EXPECTED = with_encoder(info_nce, _in(4)), with_encoder(info_nce, encode)
COMPOSED = {
    "vmap of grad": lambda loss: jax.vmap(jax.grad(loss), (None, 0)),
    "grad of vmap": lambda loss: jax.grad(lambda p, b: jnp.sum(jax.vmap(loss, (None, 0))(p, b))),
    "checkpoint": lambda loss: jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0)),
    "scan": lambda loss: lambda p, b: jax.lax.scan(lambda c, x: (c, jax.grad(loss)(p, x)), 0, b)[1],
    "grad of grad": lambda loss: jax.grad(
        lambda p, b: jnp.sum(jax.grad(loss)(p, jax.tree.map(lambda x: x[0], b))["encoder"] ** 2)
    ),
}


BATCHES = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), BATCH)


@pytest.mark.parametrize("compose", COMPOSED.values(), ids=COMPOSED)
def test_transformations(compose):
    ours, expected = jax.jit(compose(OURS)), jax.jit(compose(EXPECTED))
    _assert_close(ours(PARAMS, BATCHES), expected(PARAMS, BATCHES))


@pytest.mark.slow
def test_transformations_outside_of_jit():
    compose = COMPOSED["vmap of grad"]
    _assert_close(compose(OURS)(PARAMS, BATCHES), jax.jit(compose(EXPECTED))(PARAMS, BATCHES))


def test_over_batches_of_keys():
    keys = jax.random.split(jax.random.key(0), 3)

    def noisy(w, x, key):
        return w * x + jax.random.normal(key, x.shape)

    def loss(w, key):
        z = _in(4, noisy, rng_argnums=2)(w, BATCH["x"], key)
        return jnp.mean((z.T @ z) ** 2)

    each = jnp.stack([jax.grad(loss)(2.0, key) for key in keys])
    np.testing.assert_allclose(jax.vmap(jax.grad(loss), (None, 0))(2.0, keys), each, rtol=1e-5)


def test_a_window_of_coupled_batches():
    """`accumulate` outside: a window of batches, each one coupled in itself."""
    tx = optaccum.accumulate(2, optax.adam(0.1))

    def train(loss):
        params, state = PARAMS, tx.init(PARAMS)
        step = jax.jit(
            lambda params, state, batch: optaccum.apply_gradients(
                tx, jax.grad(loss)(params, batch), state, params
            )
        )
        for _ in range(4):
            params, state = step(params, state, BATCH)
        return params

    # A step of 0.1 divided by |g|, where |g| may be as small as 1e-3.
    _assert_close(train(OURS), train(EXPECTED), ulps=2**14)


def test_configurations_and_flags_are_not_traced():
    def fun(w, x, config, *, train, scale):
        assert config == "gelu"
        assert train is True
        return w * x * scale if train else x

    def loss(w, scale):
        z = _in(2, fun)(w, BATCH["x"], "gelu", train=True, scale=scale)
        return jnp.sum(z**2)

    ours = jax.jit(jax.grad(loss, (0, 1)))(2.0, 3.0)
    total = float(jnp.sum(BATCH["x"] ** 2))
    np.testing.assert_allclose(ours, (2 * 2.0 * 9.0 * total, 2 * 3.0 * 4.0 * total), rtol=1e-5)


class Tower(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(jnp.tanh(linen.Dense(8)(x)))


def test_linen_modules():
    model = Tower()
    variables = model.init(jax.random.key(0), BATCH["x"])

    def loss(apply, variables):
        z = apply(variables, BATCH["x"])
        return coupled.covariance({"z": z, "view": z[::-1]}, BATCH, PARAMS)

    expected = jax.jit(jax.value_and_grad(lambda v: loss(model.apply, v)))(variables)
    ours = jax.jit(jax.value_and_grad(lambda v: loss(_in(4, model.apply), v)))(variables)
    _assert_close(ours, expected)


def test_nnx_modules():
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.gelu)
    graph, params = nnx.split(model, nnx.Param)

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    def loss(apply, params):
        z = apply(params, BATCH["x"])
        return jnp.mean((z.T @ z) ** 2)

    expected = jax.jit(jax.value_and_grad(lambda p: loss(apply, p)))(params)
    ours = jax.jit(jax.value_and_grad(lambda p: loss(_in(4, apply), p)))(params)
    _assert_close(ours, expected)


def test_equinox_modules():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def loss(apply, params):
        z = apply(params, BATCH["x"])
        return jnp.mean((z.T @ z) ** 2)

    expected = jax.jit(jax.value_and_grad(lambda p: loss(apply, p)))(params)
    ours = jax.jit(jax.value_and_grad(lambda p: loss(_in(4, apply), p)))(params)
    _assert_close(ours, expected)


def test_batch_norm_sees_the_rows_of_its_microbatch():
    def norm(w, x):
        return w * (x - x.mean(axis=0))

    ours = _in(4, norm)(2.0, BATCH["x"])
    for i in range(4):
        np.testing.assert_allclose(ours[i::4], norm(2.0, BATCH["x"][i::4]), atol=1e-6)
