"""Flax's FP8 collections, which are overwritten and not trained, through a window."""

from flax.linen import fp8_ops
from flax.training import train_state
from helpers.fp8 import OWG, Fp8, input_history
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaccum import accumulate, get_state
import optaccum.flax


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def fp8_state(TrainState, tx):
    model = Fp8()
    variables = model.init(jax.random.key(0), jnp.ones((16, 16)))
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    @jax.jit
    def step(state, x):
        grads = jax.grad(lambda params: jnp.mean(state.apply_fn(params, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads), grads[OWG]

    return state, step


def test_collections_without_accumulation_are_those_of_flax():
    results = []
    for TrainState in (optaccum.flax.TrainState, train_state.TrainState):
        state, step = fp8_state(TrainState, optax.sgd(0.1))
        for scale in (1.0, 3.0):
            state, _ = step(state, jnp.full((16, 16), scale))
        results.append(state)
    assert_same(results[0].params, results[1].params)
    assert_same(results[0].opt_state, results[1].opt_state)


def test_collections_are_overwritten_once_a_window_with_the_largest():
    tx = accumulate(3, optax.sgd(0.1), should_skip_update_fn=optax.skip_not_finite)
    state, step = fp8_state(optaccum.flax.TrainState, tx)
    before = state.params[OWG]
    for scale in (2.0, 5.0, jnp.nan):
        state, _ = step(state, jnp.full((16, 16), scale))
        assert_same(state.params[OWG], before)
    state, given = step(state, jnp.full((16, 16), 3.0))
    assert state.has_released
    assert int(get_state(state.opt_state).skipped) == 1
    # One entry per window: that of the largest activation of the accepted microbatches.
    np.testing.assert_array_equal(input_history(state), [5.0, 0.0, 0.0])
    for scale in (7.0, 1.0, 1.0):
        state, _ = step(state, jnp.full((16, 16), scale))
    np.testing.assert_array_equal(input_history(state), [7.0, 0.0, 5.0])  # Flax rolls to the left
    assert jax.tree.structure(given) == jax.tree.structure(state.params[OWG])


def test_collections_of_a_loss_that_is_taken_in():
    def loss_fn(params, x):
        return jnp.mean(Fp8().apply(params, x) ** 2)

    states = []
    for by_loss in (True, False):
        state, step = fp8_state(optaccum.flax.TrainState, accumulate(2, optax.sgd(0.1)))
        for scale in (2.0, 5.0):
            x = jnp.full((16, 16), scale)
            if by_loss:
                _, state = state.value_and_apply(loss_fn, x)
            else:
                state, _ = step(state, x)
        states.append(state)
    assert_same(states[0].params[OWG], states[1].params[OWG])
    np.testing.assert_array_equal(input_history(states[0]), [5.0, 0.0, 0.0])


@pytest.mark.parametrize("empty", [0, 2])
def test_a_microbatch_of_weight_0_leaves_no_trace(empty):
    state, _ = fp8_state(optaccum.flax.TrainState, accumulate(3, optax.sgd(0.1)))
    before = state.params[OWG]

    @jax.jit
    def step(state, x, weight):
        grads = jax.grad(lambda params: jnp.mean(state.apply_fn(params, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads, weight=weight)

    for _ in range(3):  # a window that is dropped
        state = step(state, jnp.full((16, 16), jnp.nan), 0)
    assert_same(state.params[OWG], before)
    for i in range(3):
        scale, weight = (jnp.nan, 0) if i == empty else (2.0 + i, 1)
        state = step(state, jnp.full((16, 16), scale), weight)
    assert state.has_released
    np.testing.assert_array_equal(input_history(state), [3.0 if empty == 2 else 4.0, 0.0, 0.0])


def test_microbatches_of_a_window_compute_as_one_batch():
    """The inputs' history after a window is that of the whole batch."""
    x = jax.random.normal(jax.random.key(2), (4, 16, 16))
    whole, step = fp8_state(train_state.TrainState, optax.sgd(0.0))
    whole, _ = step(whole, x.reshape(64, 16))
    parts, step = fp8_state(optaccum.flax.TrainState, accumulate(4, optax.sgd(0.0)))
    for part in x:
        parts, _ = step(parts, part)
    np.testing.assert_array_equal(input_history(parts), input_history(whole))


def test_values_of_the_type_that_takes_the_largest_keep_it():
    """Parameters of the dtype that Flax gives to values that are used more than once."""

    @jax.jit
    def as_fm32(x):
        return jax.lax.convert_element_type(jnp.full(1, x), fp8_ops.fp32_max_grad)

    params = {
        "params": {"w": jnp.ones(2)},
        OWG: {"scale": as_fm32(1.0)},
    }
    tx = accumulate(2, optax.sgd(1.0))
    state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0)
    for value in (4.0, 2.0):
        state = step(state, {"params": {"w": jnp.ones(2)}, OWG: {"scale": as_fm32(value)}})
    scale = state.params[OWG]["scale"]
    assert scale.dtype == fp8_ops.fp32_max_grad
    assert jax.jit(lambda x: jax.lax.convert_element_type(x, jnp.float32))(scale) == 4.0


def test_collections_need_a_state_with_room_for_them():
    tx = accumulate(2, optax.sgd(0.1))
    state, step = fp8_state(optaccum.flax.TrainState, tx)
    state = state.replace(opt_state=tx.init(state.params["params"]))
    with pytest.raises(ValueError, match=r"TrainState\.create"):
        step(state, jnp.ones((16, 16)))
    largest = jax.tree.map(jnp.copy, state.params[OWG])
    state = state.replace(opt_state=optaccum.flax.OverwriteState(largest, state.opt_state))
    assert step(state, jnp.ones((16, 16)))[0].mini_step == 1


def test_collections_beside_several_windows_are_refused():
    tx = optax.partition(
        {"a": accumulate(2, optax.sgd(0.1)), "b": accumulate(3, optax.sgd(0.1))},
        lambda params: {"kernel": "a"},
    )
    with pytest.raises(ValueError, match="holds 2 AccumulateStates"):
        fp8_state(optaccum.flax.TrainState, tx)
