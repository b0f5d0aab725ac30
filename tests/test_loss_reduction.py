"""Losses that are sums, with a denominator that comes separately: G = sum g_i / sum w_i."""

import functools

from helpers.steps import every_step, recording
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum

# Microbatches of 1, 3 and 2 tokens; the loss of a token x at w is w x, so gradients are sums of x.
TOKENS = [[6.0], [1.0, 2.0, 3.0], [10.0, 2.0]]
MEAN = 24.0 / 6


def _run(tx, step, jit, weights=(1, 3, 2), sums=(6.0, 6.0, 12.0)):
    run = functools.partial(step, tx)
    run = jax.jit(run) if jit else run
    params, state = jnp.float32(0), tx.init(jnp.float32(0))
    for g, weight in zip(sums, weights, strict=True):
        params, state = run(jnp.float32(g), state, params, weight=weight, value=jnp.float32(2 * g))
    return float(params), state


@pytest.mark.parametrize("jit", [False, True])
@every_step
def test_sums_are_divided_by_the_tokens_of_the_window(step, jit):
    inner = optax.chain(optax.sgd(1.0), recording())
    tx = optaccum.accumulate(3, inner, loss_reduction="sum", average_args=("value",))
    params, state = _run(tx, step, jit)
    assert (params, float(state.weight), float(state.grad_sum)) == (-MEAN, 6, 24)
    assert float(state.inner_state[1].value) == 2 * MEAN
    wrong, _ = _run(optaccum.accumulate(3, optax.sgd(1.0)), step, jit)
    assert wrong == -(6 + 18 + 24) / 6, "as a mean over its tokens"


@pytest.mark.parametrize("jit", [False, True])
@every_step
def test_microbatches_without_weight_add_nothing(step, jit):
    tx = optaccum.accumulate(4, optax.sgd(1.0), loss_reduction="sum")
    params, state = _run(tx, step, jit, (1, 0, 3, 2), (6.0, np.nan, 6.0, 12.0))
    assert (params, int(state.mini_step)) == (-MEAN, 0)
    params, state = _run(tx, step, jit, (0, 0.0, 1e-33, 0), (6.0, np.nan, 6.0, 12.0))
    assert (params, bool(state.released)) == (0.0, False)


@every_step
@pytest.mark.parametrize("every_k", [1, 2])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss_reduction": "sum"}, (6 / 1, 12 / 3, 6.0)),
        ({"loss_reduction": "sum", "use_grad_mean": False}, (6.0, 12.0, 6.0)),
        ({"loss_reduction": "mean", "use_grad_mean": False}, (6.0, 36.0, 6.0)),
        ({}, (6.0, 12.0, 6.0)),
    ],
)
def test_a_window_of_one(step, every_k, options, expected):
    """Without an accumulator, and with one that `release` closes at once."""
    tx = optaccum.accumulate(every_k, optax.sgd(1.0), **options)
    state = tx.init(jnp.float32(0))
    last = 1 if options == {"loss_reduction": "sum"} else None  # sums need a denominator
    for (g, weight), value in zip(((6, 1), (12, 3), (6, last)), expected, strict=True):
        params, state = step(tx, jnp.float32(g), state, jnp.float32(0), weight=weight, release=True)
        assert float(params) == -value


@pytest.mark.parametrize("n", [1, 2, 4])
def test_in_one_step(n):
    """As `jax.value_and_grad` of the sum over the batch, divided by its tokens."""
    mask = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    batch = {"x": jnp.arange(1.0, 9), "mask": mask}

    def loss_fn(w, batch):
        return jnp.sum(batch["mask"] * jnp.tanh(w * batch["x"]))

    step = optaccum.value_and_grad(
        loss_fn,
        num_microbatches=n,
        weight_fn=lambda w, batch: jnp.sum(batch["mask"]),
        loss_reduction="sum",
    )
    loss, grad = jax.jit(step)(jnp.float32(0.1), batch)
    expected = jax.value_and_grad(loss_fn)(jnp.float32(0.1), batch)
    np.testing.assert_allclose((loss, grad), np.array(expected) / 5, rtol=1e-6)
    zeros = {**batch, "mask": 0 * mask}
    assert [*map(float, jax.jit(step)(jnp.float32(0.1), zeros))] == [0, 0]


def test_sums_without_a_denominator_are_refused():
    message = "`loss_reduction` 'sum' needs `weight_fn`, the number of examples or tokens"
    with pytest.raises(ValueError, match=message):
        optaccum.value_and_grad(lambda w, x: w, num_microbatches=2, loss_reduction="sum")
    tx = optaccum.accumulate(2, optax.sgd(1.0), loss_reduction="sum")
    with pytest.raises(ValueError, match=message.replace("weight_fn", "weight")):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


def test_on_many_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optaccum.accumulate(1, optax.sgd(1.0), loss_reduction="sum", reduce_axes="data")
    step = optaccum.value_and_grad(
        lambda w, x: jnp.sum(w * x),
        num_microbatches=2,
        weight_fn=lambda w, x: x[0],
        loss_reduction="sum",
        reduce_axes="data",
    )

    def run(x):
        params = jnp.float32(0)
        state = tx.init(params)
        released = tx.update(x[0] * x[0], state, params, weight=x[0])[0]
        return -released, step(params, x)[1]

    specs = {"in_specs": jax.P("data"), "out_specs": jax.P()}
    x = jnp.repeat(jnp.arange(8.0), 2)
    both = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(x)
    # Of 8 devices with sums d^2 and weights d: 140 / 28; in one step 2 d of 2 d.
    np.testing.assert_allclose(both, (5.0, 1.0), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["tokens", None, True])
def test_other_reductions_are_refused(reduction):
    message = r"`loss_reduction` must be 'mean' or 'sum', got"
    with pytest.raises(ValueError, match=message):
        optaccum.accumulate(2, optax.sgd(0.1), loss_reduction=reduction)
    with pytest.raises(ValueError, match=message):
        optaccum.value_and_grad(lambda w, x: w, num_microbatches=2, loss_reduction=reduction)
