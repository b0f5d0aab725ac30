"""Accumulating inside one step gives what `jax.value_and_grad` of the full batch gives."""

import functools
import warnings

import equinox as eqx
from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum

ROWS = 16
PARAMS = {
    "hidden": {"w": jax.random.normal(jax.random.key(0), (5, 8)) / 2, "b": jnp.zeros(8)},
    "out": jax.random.normal(jax.random.key(1), (8,)),
}
BATCH = {
    "x": jax.random.normal(jax.random.key(2), (ROWS, 5)),
    "y": jax.random.normal(jax.random.key(3), (ROWS,)),
}
EPS = float(np.finfo(np.float32).eps)


def _predict(params, x):
    return jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"]) @ params["out"]


def _loss(params, batch):
    return jnp.mean((_predict(params, batch["x"]) - batch["y"]) ** 2)


def _masked_loss(params, batch):
    errors = batch["mask"] * (_predict(params, batch["x"]) - batch["y"]) ** 2
    return jnp.sum(errors) / jnp.sum(batch["mask"])


def _tokens(params, batch):
    return jnp.sum(batch["mask"])


def _assert_close(actual, expected, ulps=64):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(a, e, rtol=ulps * EPS, atol=ulps * EPS)


def _split(n):
    """Returns the microbatches as the docstring says which rows they hold."""
    return [jax.tree.map(lambda x, i=i: x[i::n], BATCH) for i in range(n)]


every_n = pytest.mark.parametrize("n", [1, 4])


@pytest.mark.parametrize("n", [1, np.int64(4), ROWS])
def test_equals_the_full_batch(n):
    value_and_grad = optaccum.value_and_grad(_loss, num_microbatches=n)
    expected = jax.value_and_grad(_loss)(PARAMS, BATCH)
    _assert_close(value_and_grad(PARAMS, BATCH), expected)
    _assert_close(jax.jit(value_and_grad)(PARAMS, BATCH), expected)
    grad = jax.jit(optaccum.grad(_loss, num_microbatches=n))
    _assert_close(grad(PARAMS, BATCH), expected[1])


@pytest.mark.parametrize("wrap", [optaccum.value_and_grad, optaccum.grad, optaccum.microbatched])
def test_the_result_is_named_like_fun(wrap):
    assert wrap(_loss, num_microbatches=2).__name__ == "_loss"


@every_n
def test_uneven_microbatches_equal_the_full_batch_if_they_are_weighted(n):
    # Rows are dealt in turn: that every n-th is emptier makes the microbatches uneven.
    mask = jnp.where(jnp.arange(ROWS) % 4 == 0, 1.0, jnp.where(jnp.arange(ROWS) % 2, 0.25, 0.0))
    batch = BATCH | {"mask": mask}
    expected = jax.value_and_grad(_masked_loss)(PARAMS, batch)
    weighted = optaccum.value_and_grad(_masked_loss, num_microbatches=n, weight_fn=_tokens)
    _assert_close(jax.jit(weighted)(PARAMS, batch), expected)
    naive, _ = optaccum.value_and_grad(_masked_loss, num_microbatches=n)(PARAMS, batch)
    assert n == 1 or not abs(naive - expected[0]) < 0.01 * expected[0]


@every_n
@pytest.mark.parametrize("zero", [0, np.float32(0), jnp.zeros(())], ids=["int", "numpy", "jax"])
def test_a_batch_without_weight_has_zeros(n, zero):
    options = {"num_microbatches": n, "weight_fn": lambda params, batch: zero}
    found = jax.jit(optaccum.value_and_grad(_loss, **options))(PARAMS, BATCH)
    assert not any(map(jnp.any, jax.tree.leaves(found)))


def test_it_is_the_arithmetic_of_accumulate():
    """A window over the same microbatches, whose rows are those the docstring says."""
    n = 4
    tx = optaccum.accumulate(n, optax.sgd(1.0))
    state = tx.init(PARAMS)
    weights = [1.0, 3.0, 2.0, 7.0]

    @jax.jit
    def hold(state, microbatch, weight):
        return tx.update(jax.grad(_loss)(PARAMS, microbatch), state, PARAMS, weight=weight)[1]

    for microbatch, weight in zip(_split(n), weights, strict=True):
        state = hold(state, microbatch, weight)
    in_step = optaccum.grad(
        lambda params, batch, _: _loss(params, batch),
        num_microbatches=n,
        batch_argnums=(1, 2),
        weight_fn=lambda params, batch, weight: weight[0],
    )
    grads = jax.jit(in_step)(PARAMS, BATCH, jnp.tile(jnp.array(weights), ROWS // n))
    _assert_close(grads, jax.tree.map(lambda s: s / state.weight, state.grad_sum), ulps=8)


@every_n
@pytest.mark.parametrize(
    ("argnums", "positive"),
    [(0, 0), (-1, 2), ((0, 2), (0, 2)), ((-1,), (2,)), ([2, 0], [2, 0])],
)
def test_argnums_are_those_of_jax(n, argnums, positive):
    def loss(w, batch, b):
        return jnp.mean((batch["x"] @ w + b) ** 2)

    args = jnp.ones(5), BATCH, 3.0
    expected = jax.value_and_grad(loss, positive)(*args)
    _assert_close(optaccum.value_and_grad(loss, argnums, num_microbatches=n)(*args), expected)


@every_n
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_shapes_and_dtypes_are_those_of_jax(n, dtype):
    params = {"w": jnp.ones((5, 2), dtype), "b": jnp.zeros(2)}

    def loss(params, batch):
        predicted = batch["x"].astype(dtype) @ params["w"] + params["b"].astype(dtype)
        return jnp.mean(jnp.abs(predicted)).astype(jnp.bfloat16)

    result = jax.eval_shape(optaccum.value_and_grad(loss, num_microbatches=n), params, BATCH)
    assert result == jax.eval_shape(jax.value_and_grad(loss), params, BATCH)


def test_weights_are_double_precision_too(x64):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    mask = np.random.default_rng(0).uniform(size=ROWS)
    batch = {**jax.tree.map(lambda x: x.astype(jnp.float64), BATCH), "mask": jnp.asarray(mask)}
    value_and_grad = optaccum.value_and_grad(_masked_loss, num_microbatches=4, weight_fn=_tokens)
    expected = jax.value_and_grad(_masked_loss)(params, batch)
    _assert_close(jax.jit(value_and_grad)(params, batch), expected, ulps=1e-6)


def _bf16_error(**options):
    rows = jnp.full((1024, 3), 0.01, jnp.bfloat16)
    value_and_grad = optaccum.value_and_grad(
        lambda w, x: jnp.mean(x @ w), num_microbatches=1024, **options
    )
    value, grad = jax.jit(value_and_grad)(jnp.full(3, 0.5, jnp.bfloat16), rows)
    exact = float(rows[0, 0])
    return abs(float(value) / (1.5 * exact) - 1), abs(float(grad[0]) / exact - 1)


def test_sums_of_bfloat16_do_not_drift():
    assert max(_bf16_error()) < 0.005
    value_error, grad_error = _bf16_error(accumulator_dtype=jnp.bfloat16)
    assert grad_error > 0.1, "the sum is not kept in the dtype asked for"
    assert value_error < 0.005


def test_sums_of_float16_do_not_overflow():
    def loss(w, x):
        return jnp.mean(x * w)

    x, w = jnp.full(8, 6e4, jnp.float16), jnp.float16(1)
    ours = optaccum.value_and_grad(loss, num_microbatches=8)(w, x)
    _assert_close(ours, (jnp.float16(6e4), jnp.float16(6e4)))


def test_under_vmap_each_member_equals_its_full_batch():
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    batch = BATCH | {"mask": jnp.where(jnp.arange(ROWS) % 4, 1.0, 0.5)}
    ours = optaccum.value_and_grad(_masked_loss, num_microbatches=4, weight_fn=_tokens)
    expected = jax.vmap(jax.value_and_grad(_masked_loss), (0, None))(params, batch)
    _assert_close(jax.jit(jax.vmap(ours, (0, None)))(params, batch), expected)


def test_parameters_may_be_donated_and_losses_checkpointed():
    loss = jax.checkpoint(_loss)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params, batch):
        grads = optaccum.grad(loss, num_microbatches=4)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, jax.grad(_loss)(PARAMS, BATCH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _assert_close(step(jax.tree.map(jnp.copy, PARAMS), BATCH), expected)


# What models bring along: keys, batch statistics, Flax and Equinox modules.

WEIGHTS = jax.random.normal(jax.random.key(0), (5,))


def _linear_loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params) - batch["y"]) ** 2)


def _noise(params, batch, rngs):
    noise = jax.tree.map(lambda key: jax.random.normal(key, (3,)), rngs)
    return _linear_loss(params, batch), noise


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_every_microbatch_has_keys_of_its_own(make):
    rngs = {"dropout": make(0), "other": make(1)}
    step = jax.jit(optaccum.value_and_grad(_noise, has_aux=True, num_microbatches=8, rng_argnums=2))
    (_, noise), _ = step(WEIGHTS, BATCH, rngs)
    drawn = np.concatenate([*noise.values(), *_noise(WEIGHTS, BATCH, rngs)[1].values()], axis=None)
    assert len(np.unique(drawn)) == 2 * 9 * 3, "a key was used twice"
    for name, key in rngs.items():
        for i in range(8):
            expected = jax.random.normal(jax.random.fold_in(key, i), (3,))
            np.testing.assert_array_equal(noise[name][i], expected)
    (_, again), _ = step(WEIGHTS, jax.tree.map(lambda x: -x, BATCH), rngs)
    jax.tree.map(np.testing.assert_array_equal, noise, again)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_arrays_of_keys_are_keys(make):
    keys = jax.random.split(make(0), (2, 3))

    def draw(params, batch, keys):
        each = jax.vmap(jax.vmap(lambda key: jax.random.normal(key)))
        return _linear_loss(params, batch), each(keys)

    step = optaccum.value_and_grad(draw, has_aux=True, num_microbatches=4, rng_argnums=(2,))
    (_, noise), _ = jax.jit(step)(WEIGHTS, BATCH, keys)
    assert noise.shape == (4, 2, 3)
    assert len(np.unique(noise)) == 24


@every_n
def test_a_key_for_each_example_is_split_like_data(n):
    def loss(params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)
        return _linear_loss(params, batch | {"x": batch["x"] + noise})

    keys = jax.random.split(jax.random.key(0), ROWS)
    step = optaccum.value_and_grad(loss, num_microbatches=n, batch_argnums=(1, 2))
    expected = jax.value_and_grad(loss)(WEIGHTS, BATCH, keys)
    _assert_close(jax.jit(step)(WEIGHTS, BATCH, keys), expected)


@every_n
def test_the_carry_goes_from_one_microbatch_to_the_next(n):
    def loss(params, carry, batch):
        key, draw = jax.random.split(carry["key"])
        mean = 0.5 * carry["mean"] + 0.5 * jnp.mean(batch["x"])
        noise = jax.random.normal(draw)
        return _linear_loss(params, batch), ({"key": key, "mean": mean}, {"noise": noise})

    start = {"key": jax.random.key(0), "mean": 1.0}
    step = optaccum.value_and_grad(
        loss, has_aux=True, num_microbatches=n, batch_argnums=2, carry_argnum=1
    )
    (value, (carry, aux)), grads = jax.jit(step)(WEIGHTS, start, BATCH)
    _assert_close((value, grads), jax.value_and_grad(_linear_loss)(WEIGHTS, BATCH))
    expected = start
    for i, microbatch in enumerate(_split(n)):
        _, (expected, single) = loss(WEIGHTS, expected, microbatch)
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
def test_batch_statistics_of_linen_go_from_one_to_the_next(n):
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


def test_microbatches_of_linen_have_masks_of_their_own():
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
            self.linear = nnx.Linear(5, 4, rngs=rngs)
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


def test_keys_of_nnx_may_lie_beside_their_counts():
    _, rngs = nnx.split(nnx.Rngs(dropout=0), ...)
    graph = nnx.graphdef(nnx.Rngs(dropout=0))

    def loss(params, batch, rngs):
        draw = jax.random.normal(nnx.merge(graph, rngs, copy=True).dropout())
        return _linear_loss(params, batch), draw

    step = optaccum.value_and_grad(loss, has_aux=True, num_microbatches=4, rng_argnums=2)
    (_, drawn), _ = jax.jit(step)(WEIGHTS, BATCH, rngs)
    for i in range(4):  # a stream folds its count, here 0, into its key
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0)
        np.testing.assert_array_equal(drawn[i], jax.random.normal(key))


def test_equinox_modules_equal_the_full_batch():
    model = eqx.nn.MLP(5, "scalar", 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, batch):
        predicted = jax.vmap(eqx.combine(params, static))(batch["x"])
        return jnp.mean((predicted - batch["y"]) ** 2)

    ours = jax.jit(optaccum.value_and_grad(loss, num_microbatches=4))(params, BATCH)
    _assert_close(ours, jax.value_and_grad(loss)(params, BATCH))
