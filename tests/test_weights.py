"""Weights at the ends of float32, of every kind that a program may have them in."""

import contextlib
import functools

from helpers.steps import recording
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum

PARAMS, G = jnp.zeros(2), jnp.full(2, 2.0)
KINDS = {
    "python": lambda x: x,
    "numpy scalar": np.float32,
    "numpy double": np.float64,
    "numpy array": np.asarray,
    "jax": jnp.float32,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("jit", ["eager", "argument", "constant"])
@pytest.mark.parametrize("every_k", [1, 2])
def test_a_weight_means_the_same_however_it_comes(every_k, jit, kind):
    tx = optaccum.accumulate(every_k, optax.sgd(1.0))
    run = functools.partial(optaccum.apply_gradients, tx)
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for weight in (np.nan, 1.0, -1.0, 1e-33, np.inf, 3e38, 2.0):
        weight = kind(weight)
        if jit == "argument":
            params, state = jax.jit(run)(G, state, params, weight=weight)
        elif jit == "constant":
            params, state = jax.jit(functools.partial(run, weight=weight))(G, state, params)
        else:
            params, state = run(G, state, params, weight=weight)
        seen.append((float(params[0]), int(state.mini_step), int(state.skipped)))
    if every_k == 1:
        assert seen[2:] == [(-2, 0, 2), (-2, 0, 2), (-2, 0, 3), (-2, 0, 4), (-4, 0, 4)]
    else:
        assert seen[2:] == [(0, 1, 2), (-2, 0, 2), (-2, 0, 3), (-2, 0, 4), (-2, 1, 4)]


def test_integers_that_no_float_holds_are_rejected():
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    _, state = tx.update(G, tx.init(PARAMS), PARAMS, weight=10**400)
    assert int(state.skipped) == 1


def test_averaged_arguments_go_with_their_microbatch():
    tx = optaccum.accumulate(3, recording(), average_args=("value",))
    state = tx.init(PARAMS)
    rows = [(2.0**120, 5.0), (2.0**126, 99.0), (1e-33, 77.0), (np.nan, 66.0), (1.0, 5.0)]
    for weight, value in rows:
        _, state = tx.update(G, state, PARAMS, weight=weight, value=value)
    assert (float(state.inner_state.value), int(state.skipped)) == (5.0, 2)


@pytest.mark.parametrize("x64", [False, True])
def test_the_sum_of_the_weights_in_one_step(x64):
    """The third microbatch would take the sum above 2**126; what it carries is dropped too."""

    def fun(w, batch, carry):
        return jnp.mean(batch["x"]) * w, (carry + batch["x"][0], ())

    step = optaccum.value_and_grad(
        fun,
        has_aux=True,
        num_microbatches=4,
        carry_argnum=2,
        weight_fn=lambda w, batch, carry: batch["weight"][0],
    )
    batch = {"x": jnp.array([1.0, 3.0, 50.0, 60.0])}
    batch["weight"] = jnp.array([2.0**125, 2.0**125, 2.0**125, 1e-33])
    with jax.enable_x64(x64) if hasattr(jax, "enable_x64") else contextlib.nullcontext():
        (loss, (carry, _)), grad = jax.jit(step)(jnp.float32(1), batch, jnp.float32(0))
    assert (float(loss), float(grad), float(carry)) == (2.0, 2.0, 4.0)


@pytest.mark.parametrize("shared", [False, True])
def test_on_many_devices_the_sum_of_all_weights_is_bounded(shared):
    """A device whose weight does not fit counts 0; the others go on."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optaccum.accumulate(1, optax.sgd(1.0), reduce_axes="data")

    def run(weight, g):
        params = jnp.zeros(())
        state = tx.init(params)
        params, state = optaccum.apply_gradients(tx, g[0], state, params, weight=weight[0])
        return params, state.released

    weights = jnp.full(8, 2.0**123).at[3].set(2.0**126)
    spec = jax.P() if shared else jax.P("data")
    weights = weights[:1] if shared else weights
    params, released = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(spec, jax.P("data")), out_specs=jax.P())
    )(weights, jnp.full(8, 0.25).at[3].set(0.5))
    expected = 2.25 / 8 if shared else 0.25
    np.testing.assert_allclose(params, -expected, rtol=1e-6)
    assert released


def test_a_symbolic_number_of_rows_is_a_weight():
    tx = optaccum.accumulate(2, optax.sgd(1.0))

    def step(state, params, x):
        grads = jax.grad(lambda params: jnp.mean(x * params))(params)
        return optaccum.apply_gradients(tx, grads, state, params, weight=x.shape[0])

    params = jnp.float32(0)
    (rows,) = export.symbolic_shape("rows")
    args = tx.init(params), params, jax.ShapeDtypeStruct((rows,), jnp.float32)
    exported = export.export(jax.jit(step))(*args)
    state = tx.init(params)
    for x in (jnp.ones(1), jnp.full(3, 5.0)):
        params, state = exported.call(state, params, x)
    assert (float(params), float(state.weight)) == (-4.0, 4.0)


def test_the_derivative_with_respect_to_a_weight():
    """As documented: none at 0, where a microbatch must add nothing, not even a NaN."""
    tx = optaccum.accumulate(2, optax.sgd(1.0))

    def run(weight):
        params, state = jnp.float32(0), tx.init(jnp.float32(0))
        for g, w in ((1.0, 1.0), (3.0, weight)):
            params, state = optaccum.apply_gradients(tx, jnp.float32(g), state, params, weight=w)
        return -params  # (1 + 3 w) / (1 + w), whose derivative is 2 / (1 + w)^2

    assert float(jax.grad(run)(1.0)) == pytest.approx(0.5)
    assert float(jax.grad(run)(0.0)) == 0
    assert "derivative with respect to a weight" in " ".join(
        str(optaccum.accumulate.__doc__).split()
    )
