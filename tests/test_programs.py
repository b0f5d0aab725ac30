"""Programs as people write them: Flax train states, eager loops, restarts, strict settings."""

import functools

from helpers.steps import every_step
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients, get_state, has_released

PARAMS = {"a": jnp.ones(2), "b": jnp.zeros(3)}


def _grads(a, b):
    return {
        "a": None if a is None else jnp.full(2, a),
        "b": None if b is None else jnp.full(3, b),
    }


@pytest.mark.parametrize("jit", [False, True])
def test_random_keys_and_python_numbers_in_the_inner_state(jit):
    """Keys cannot be cast; a hyperparameter assigned as a Python float has no dtype."""
    inner = optax.inject_hyperparams(optax.noisy_sgd)(learning_rate=0.1, eta=0.0, key=3)
    tx = accumulate(2, inner)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(_grads(1.0, 1.0), tx.init(PARAMS), PARAMS)
    state.inner_state.hyperparams["learning_rate"] = 0.5
    state = state._replace(weight=3.0)
    updates, state = update(_grads(1.0, 1.0), state, PARAMS)
    np.testing.assert_array_equal(updates["a"], np.full(2, -0.25))
    assert state.inner_state.hyperparams["learning_rate"].dtype == jnp.float32


@every_step
def test_a_transformation_with_a_tuple_for_its_state_is_not_a_chain(step):
    inner = accumulate(2, optax.sgd(1.0))

    def update(updates, state, params=None):
        updates, inner_state = inner.update(updates, state[1], params)
        return jax.tree.map(lambda u, p: u - 0.5 * p, updates, params), (state[0], inner_state)

    tx = optax.GradientTransformation(lambda params: (jnp.zeros(()), inner.init(params)), update)
    params, _ = step(tx, _grads(1.0, 1.0), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(params["a"], np.full(2, 0.5))


@every_step
@pytest.mark.parametrize("jit", [False, True])
def test_a_chain_whose_last_link_only_wraps_an_accumulate(step, jit):
    inner = accumulate(4, optax.sgd(1.0))

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u, p: u - 0.5 * p, updates, params), state

    tx = optax.chain(optax.clip(9.0), optax.GradientTransformationExtraArgs(inner.init, update))
    step = functools.partial(step, tx)
    params, _ = (jax.jit(step) if jit else step)(_grads(1.0, 1.0), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(params["a"], np.full(2, 0.5))


@pytest.mark.filterwarnings("ignore:`accumulate` and optax.MultiSteps:UserWarning")
@every_step
def test_multi_steps_inside_gets_the_extra_arguments(step):
    tx = accumulate(2, optax.MultiSteps(optax.polyak_sgd(), 1))
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(2):
        params, state = step(tx, _grads(1.0, 0.0), state, params, value=2.0)
    # The Polyak step is value / |g|^2 = 2 / 2.
    np.testing.assert_allclose(params["a"], np.zeros(2), atol=1e-6)


def test_extra_arguments_that_a_transformation_does_not_take():
    tx = optax.scale(-0.1)
    with pytest.raises(TypeError, match="weight"):
        apply_gradients(tx, _grads(1.0, 1.0), tx.init(PARAMS), PARAMS, weight=3)


@pytest.mark.parametrize("wrap", [lambda f: lambda g: g, functools.wraps], ids=["plain", "wraps"])
def test_a_replaced_update_is_the_one_that_runs(wrap):
    tx = accumulate(2, optax.sgd(1.0))
    calls = []

    @wrap(tx.update)
    def update(*args, **kwargs):
        calls.append(args)
        return tx.update(*args, **kwargs)

    replaced = tx._replace(update=update)
    apply_gradients(replaced, _grads(1.0, 1.0), tx.init(PARAMS), PARAMS)
    assert len(calls) == 1


@every_step
def test_strict_dtype_and_rank_promotion(step):
    params = {"z": jnp.ones(2, jnp.complex64), "h": jnp.ones(2, jnp.bfloat16), "f": jnp.ones(())}
    for every_k in (2, jnp.int8(2), lambda step: jnp.uint8(2)):
        tx = accumulate(every_k, optax.identity())
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            state, new = tx.init(params), params
            for _ in range(2):
                new, state = step(tx, params, state, new, weight=jnp.float32(3))
        assert has_released(state)
        np.testing.assert_array_equal(new["z"], np.full(2, 2))


@every_step
def test_an_eager_loop_compiles_nothing_anew(step, caplog):
    for tx in (
        accumulate(3, optax.adam(0.1)),
        optax.chain(optax.scale(2.0), accumulate(3, optax.adam(0.1))),
    ):
        run = functools.partial(step, tx)
        state, params = tx.init(PARAMS), PARAMS
        for _ in range(6):
            params, state = run(_grads(1.0, 1.0), state, params)
        caplog.clear()
        with jax.log_compiles():
            for _ in range(6):
                params, state = run(_grads(1.0, 1.0), state, params)
        assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
        assert get_state(state).gradient_step == 4
