"""What models bring along: keys, batch statistics, Flax and Equinox modules."""

import equinox as eqx
from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum

ROWS, FEATURES = 16, 5
BATCH = {
    "x": jax.random.normal(jax.random.key(2), (ROWS, FEATURES)),
    "y": jax.random.normal(jax.random.key(3), (ROWS,)),
}
PARAMS = jax.random.normal(jax.random.key(0), (FEATURES,))
TOLERANCE = 64 * float(np.finfo(np.float32).eps)

every_n = pytest.mark.parametrize("n", [1, 4])


def _loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params) - batch["y"]) ** 2)


def _assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=TOLERANCE, atol=TOLERANCE)


def _split(n):
    """Returns the microbatches as the docstring says which rows they hold."""
    return [jax.tree.map(lambda x, i=i: x[i::n], BATCH) for i in range(n)]


def _noise(params, batch, rngs):
    noise = jax.tree.map(lambda key: jax.random.normal(key, (3,)), rngs)
    return _loss(params, batch), noise


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_every_microbatch_has_keys_of_its_own(make):
    rngs = {"dropout": make(0), "other": make(1)}
    step = jax.jit(optaccum.value_and_grad(_noise, has_aux=True, num_microbatches=8, rng_argnums=2))
    (_, noise), _ = step(PARAMS, BATCH, rngs)
    drawn = np.concatenate([*noise.values(), *_noise(PARAMS, BATCH, rngs)[1].values()], axis=None)
    assert len(np.unique(drawn)) == 2 * 9 * 3, "a key was used twice"
    for name, key in rngs.items():
        for i in range(8):
            expected = jax.random.normal(jax.random.fold_in(key, i), (3,))
            np.testing.assert_array_equal(noise[name][i], expected)
    (_, again), _ = step(PARAMS, jax.tree.map(lambda x: -x, BATCH), rngs)
    jax.tree.map(np.testing.assert_array_equal, noise, again)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_arrays_of_keys_are_keys(make):
    keys = jax.random.split(make(0), (2, 3))

    def draw(params, batch, keys):
        each = jax.vmap(jax.vmap(lambda key: jax.random.normal(key)))
        return _loss(params, batch), each(keys)

    step = optaccum.value_and_grad(draw, has_aux=True, num_microbatches=4, rng_argnums=(2,))
    (_, noise), _ = jax.jit(step)(PARAMS, BATCH, keys)
    assert noise.shape == (4, 2, 3)
    assert len(np.unique(noise)) == 24


@every_n
def test_a_key_for_each_example_is_split_like_data(n):
    def loss(params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)
        return _loss(params, batch | {"x": batch["x"] + noise})

    keys = jax.random.split(jax.random.key(0), ROWS)
    step = optaccum.value_and_grad(loss, num_microbatches=n, batch_argnums=(1, 2))
    expected = jax.value_and_grad(loss)(PARAMS, BATCH, keys)
    _assert_close(jax.jit(step)(PARAMS, BATCH, keys), expected)


@every_n
def test_the_carry_goes_from_one_microbatch_to_the_next(n):
    def loss(params, carry, batch):
        key, draw = jax.random.split(carry["key"])
        mean = 0.5 * carry["mean"] + 0.5 * jnp.mean(batch["x"])
        noise = jax.random.normal(draw)
        return _loss(params, batch), ({"key": key, "mean": mean}, {"noise": noise})

    start = {"key": jax.random.key(0), "mean": 1.0}
    step = optaccum.value_and_grad(
        loss, has_aux=True, num_microbatches=n, batch_argnums=2, carry_argnum=1
    )
    (value, (carry, aux)), grads = jax.jit(step)(PARAMS, start, BATCH)
    _assert_close((value, grads), jax.value_and_grad(_loss)(PARAMS, BATCH))
    expected = start
    for i, microbatch in enumerate(_split(n)):
        _, (expected, single) = loss(PARAMS, expected, microbatch)
        np.testing.assert_allclose(aux["noise"][i], single["noise"], rtol=1e-6)
    assert jnp.all(carry["key"] == expected["key"])
    np.testing.assert_allclose(carry["mean"], expected["mean"], rtol=1e-5)


def _one_by_one(fun, params, carry, n):
    """Returns loss, carry and gradients of the microbatches, one after the other."""
    losses, gradients = [], []
    for microbatch in _split(n):
        (loss, (carry, _)), grads = jax.value_and_grad(fun, has_aux=True)(params, carry, microbatch)
        losses.append(loss)
        gradients.append(grads)
    return sum(losses) / n, carry, jax.tree.map(lambda *g: sum(g) / n, *gradients)


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
        x = linen.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        return linen.Dense(1)(x)[:, 0]


@every_n
def test_linen_batch_statistics(n):
    model = Normed()
    variables = model.init(jax.random.key(0), BATCH["x"], train=True)

    def loss(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        predicted, new = model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return jnp.mean((predicted - batch["y"]) ** 2), (new["batch_stats"], predicted)

    step = optaccum.value_and_grad(
        loss, has_aux=True, num_microbatches=n, batch_argnums=2, carry_argnum=1
    )
    params, stats = variables["params"], variables["batch_stats"]
    (value, (carry, predicted)), grads = jax.jit(step)(params, stats, BATCH)
    _assert_close((value, carry, grads), _one_by_one(loss, params, stats, n))
    assert predicted.shape == (n, ROWS // n)


def test_linen_dropout():
    model = Normed()
    variables = model.init(jax.random.key(0), BATCH["x"], train=False)

    def loss(params, batch, rngs):
        inputs = {**variables, "params": params}
        ones = jnp.ones_like(batch["x"])
        predicted = model.apply(inputs, ones, train=False, rngs=rngs)
        return jnp.mean((predicted - batch["y"]) ** 2), predicted

    step = optaccum.value_and_grad(loss, has_aux=True, num_microbatches=4, rng_argnums=2)
    rngs = {"dropout": jax.random.key(1)}
    (_, predicted), _ = jax.jit(step)(variables["params"], BATCH, rngs)
    assert len(np.unique(predicted, axis=0)) == 4, "microbatches share a mask"


@every_n
def test_nnx_state_is_carried_with_its_statistics_and_counts(n):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(FEATURES, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x))).sum(axis=1)

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, rest, batch):
        model = nnx.merge(graph, params, rest, copy=True)
        value = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        return value, (nnx.split(model, nnx.Param, ...)[2], ())

    step = optaccum.value_and_grad(
        loss, has_aux=True, num_microbatches=n, batch_argnums=2, carry_argnum=1
    )
    (value, (carry, _)), grads = jax.jit(step)(params, rest, BATCH)
    expected_value, expected, expected_grads = _one_by_one(loss, params, rest, n)
    _assert_close((value, grads), (expected_value, expected_grads))
    _assert_close(nnx.filter_state(carry, nnx.BatchStat), nnx.filter_state(expected, nnx.BatchStat))
    (count,) = jax.tree.leaves(nnx.filter_state(carry, nnx.RngCount))
    (before,) = jax.tree.leaves(nnx.filter_state(rest, nnx.RngCount))
    assert count == before + n


def test_nnx_keys_beside_their_counts():
    _, rngs = nnx.split(nnx.Rngs(dropout=0), ...)
    graph = nnx.graphdef(nnx.Rngs(dropout=0))

    def loss(params, batch, rngs):
        draw = jax.random.normal(nnx.merge(graph, rngs, copy=True).dropout())
        return _loss(params, batch), draw

    step = optaccum.value_and_grad(loss, has_aux=True, num_microbatches=4, rng_argnums=2)
    (_, drawn), _ = jax.jit(step)(PARAMS, BATCH, rngs)
    for i in range(4):  # a stream folds its count, here 0, into its key
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0)
        np.testing.assert_array_equal(drawn[i], jax.random.normal(key))


def test_equinox_modules():
    model = eqx.nn.MLP(5, "scalar", 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, batch):
        predicted = jax.vmap(eqx.combine(params, static))(batch["x"])
        return jnp.mean((predicted - batch["y"]) ** 2)

    ours = jax.jit(optaccum.value_and_grad(loss, num_microbatches=4))(params, BATCH)
    _assert_close(ours, jax.value_and_grad(loss)(params, BATCH))
