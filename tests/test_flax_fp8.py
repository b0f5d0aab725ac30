"""Flax's FP8 collections, which are overwritten and not trained, through a window."""

from flax.linen import fp8_ops
from flax.training import train_state
from helpers import meshes
from helpers.fp8 import OWG, Fp8, input_history
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
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


@pytest.mark.parametrize("has_aux", [False, True])
def test_the_optimizer_gets_the_loss_and_one_weight(has_aux):
    def loss_fn(params, x):
        loss = jnp.mean(Fp8().apply(params, x) ** 2)
        return (loss, x) if has_aux else loss

    tx = accumulate(2, optax.sgd(0.1), metrics=("value",))
    state, _ = fp8_state(optaccum.flax.TrainState, tx)
    x = jnp.full((16, 16), 2.0)
    options = {"has_aux": has_aux, "weight_fn": lambda params, x: 3.0}
    value, new = state.value_and_apply(loss_fn, x, **options)
    metrics = optaccum.window_metrics(new.opt_state)
    assert metrics["value"] == jnp.asarray(value[0] if has_aux else value, jnp.float32)
    assert metrics["weight"] == 3
    with pytest.raises(TypeError, match="`weight` was passed beside `weight_fn`"):
        state.value_and_apply(loss_fn, x, weight=2.0, **options)
    # So does one that does not accumulate.
    tx = optax.contrib.reduce_on_plateau()
    state, _ = fp8_state(optaccum.flax.TrainState, optax.chain(optax.sgd(0.1), tx))
    value, new = state.value_and_apply(loss_fn, x, has_aux=has_aux)
    assert new.opt_state[1].best_value == (value[0] if has_aux else value)


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


# A window inside one step.


ROWS = jax.random.normal(jax.random.key(3), (12, 16))
VARIABLES = Fp8().init(jax.random.key(0), ROWS)


def mean_square(params, x, *_):
    return jnp.mean(Fp8().apply(params, x) ** 2)


def in_one_step(**options):
    return optaccum.grad(mean_square, **options)


def wrapped(**options):
    return jax.grad(optaccum.microbatched_loss(mean_square, **options))


def largest_of(microbatches):
    """Returns the new collection, by one call of JAX for each microbatch."""
    new = [jax.grad(mean_square)(VARIABLES, x)[OWG] for x in microbatches]
    return jax.tree.map(lambda *xs: np.max(np.stack(xs), axis=0), *new)


both_ways = pytest.mark.parametrize("way", [in_one_step, wrapped])


@both_ways
@pytest.mark.parametrize("n", [1, 3])
def test_in_one_step_collections_are_the_largest_and_gradients_the_mean(way, n):
    found = jax.jit(way(num_microbatches=n))(VARIABLES, ROWS)
    microbatches = [ROWS[i::n] for i in range(n)]
    assert_same(found[OWG], largest_of(microbatches))
    expected = np.mean(
        [jax.grad(mean_square)(VARIABLES, x)["params"]["kernel"] for x in microbatches], 0
    )
    np.testing.assert_allclose(found["params"]["kernel"], expected, rtol=1e-6, atol=1e-7)


@both_ways
@pytest.mark.parametrize("n", [1, 3])
def test_in_one_step_microbatches_without_weight_leave_no_trace(way, n):
    rows = ROWS.at[0::n].set(jnp.nan)
    weights = jnp.ones(12).at[0::n].set(0.0)
    step = jax.jit(
        way(
            num_microbatches=n,
            batch_argnums=(1, 2),
            weight_fn=lambda params, x, weights: weights.sum(),
        )
    )
    found = step(VARIABLES, rows, weights)
    assert_same(
        found[OWG], largest_of([ROWS[i::n] for i in range(1, n)]) if n > 1 else VARIABLES[OWG]
    )
    nothing = step(VARIABLES, rows, jnp.zeros(12))
    assert_same(nothing[OWG], VARIABLES[OWG])
    np.testing.assert_array_equal(nothing["params"]["kernel"], 0.0)


@both_ways
def test_in_one_step_only_real_microbatches_are_seen(way):
    step = jax.jit(
        way(
            num_microbatches=lambda params, x, count: count,
            batch_argnums=1,
            batch_layout="stacked",
        )
    )
    stacked = ROWS.reshape(3, 4, 16).at[2].set(100.0)
    assert_same(step(VARIABLES, stacked, 2)[OWG], largest_of(stacked[:2]))
    assert_same(step(VARIABLES, stacked, 0)[OWG], VARIABLES[OWG])


@both_ways
def test_a_window_in_one_step_is_one_across_calls(way):
    """The collections of three steps, and the parameters up to the order of a sum."""
    state, step = fp8_state(optaccum.flax.TrainState, accumulate(3, optax.sgd(0.1)))
    plain, _ = fp8_state(train_state.TrainState, optax.sgd(0.1))
    grad = jax.jit(way(num_microbatches=3))
    for scale in (1.0, 3.0, 2.0):
        for i in range(3):
            state, _ = step(state, scale * ROWS[i::3])
        plain = plain.apply_gradients(grads=grad(plain.params, scale * ROWS))
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(input_history(state)) == 3


def test_in_one_step_devices_that_would_overwrite_it_are_refused():
    step = in_one_step(num_microbatches=2, reduce_axes="data")
    mesh = meshes.make_mesh(AxisType.Auto)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"'_overwrite_with_gradient' cannot .* `reduce_axes`"):
        mapped(VARIABLES, jnp.ones((16, 16)))
