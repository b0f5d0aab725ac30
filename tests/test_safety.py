"""The faults that accumulators are known to have: one test for each, and none of them is ours.

Where it is cheap, the fault is shown in `optax.MultiSteps` as well: a guard is worth its place
where there is something to guard against. What is promised beyond that is in test_promises.py.
"""

import functools
from typing import Any

from helpers.steps import every_step, recording
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optaccum

NAN = float("nan")

# What MultiSteps is shown to do, it does in this release.
shows_incumbent = pytest.mark.skipif(
    tuple(int(part) for part in optax.__version__.split(".")[:3]) != (0, 2, 8),
    reason="another release of optax.MultiSteps",
)


def _grads(x: Any) -> dict[str, jax.Array]:
    return {"w": jnp.full((3,), x, jnp.float32), "b": jnp.asarray(x, jnp.float32)}


def _drive(tx, step, gradients, **columns):
    """Feeds numbers as gradients to zero parameters; returns `w[0]` and the state after each.

    Args:
        tx: the transformation, jitted.
        step: one of `helpers.steps.STEPS`.
        gradients: one number for each microbatch.
        **columns: extra arguments, one for each microbatch.
    """
    step = jax.jit(functools.partial(step, tx))
    params = _grads(0.0)
    state = tx.init(params)
    results, states = [], []
    for i, g in enumerate(gradients):
        extra_args = {name: jnp.asarray(column[i]) for name, column in columns.items()}
        params, state = step(_grads(g), state, params, **extra_args)
        results.append(float(params["w"][0]))
        states.append(state)
    return results, states


def _multi_steps(gradients, k, inner, **kwargs):
    """Returns what `optax.MultiSteps` makes of the same gradients: `w[0]`, state and object."""
    tx = optax.MultiSteps(inner, k, **kwargs)
    params = _grads(0.0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    results, states = [], []
    for g in gradients:
        updates, state = update(_grads(g), state, params)
        params = optax.apply_updates(params, updates)
        results.append(float(params["w"][0]))
        states.append(state)
    return results, states, tx


# One NaN poisons every later window.


@every_step
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_spoils_its_own_window_only(step, position):
    """MultiSteps multiplies old sums by zero, and 0 * NaN is NaN."""
    gradients = [1.0, 2.0, 3.0]
    gradients[position] = NAN
    inner = optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=100)
    tx = optaccum.accumulate(3, inner)
    results, states = _drive(tx, step, [*gradients, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    assert results == [0, 0, 0, 0, 0, -5, -5, -5, -13]
    assert [int(s.gradient_step) for s in states] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert int(states[-1].inner_state.total_notfinite) == 1


@shows_incumbent
def test_multisteps_never_recovers_from_nan():
    gradients = [NAN, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    inner = optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=100)
    results, _, _ = _multi_steps(gradients, 3, inner)
    assert results[-1] == 0


# The inner optimizer runs on every microbatch.


def _counting(calls):
    def update_fn(updates, state, params=None):
        del params
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    return optax.GradientTransformation(optax.identity().init, update_fn)


@every_step
def test_inner_runs_once_per_window(step):
    calls = []
    _drive(optaccum.accumulate(4, _counting(calls)), step, np.ones(8))
    jax.effects_barrier()
    assert len(calls) == 2


@shows_incumbent
def test_multisteps_runs_inner_on_every_microbatch():
    calls = []
    _multi_steps(np.ones(8), 4, _counting(calls))
    jax.effects_barrier()
    assert len(calls) == 8


# An update is reported that was not.


@every_step
def test_has_released_is_false_after_a_rejection(step):
    """MultiSteps' `has_updated` stays True after a rejected microbatch that follows a release."""
    tx = optaccum.accumulate(2, optax.sgd(1.0), should_skip_update_fn=optax.skip_not_finite)
    _, states = _drive(tx, step, [1.0, 1.0, NAN, 1.0, NAN, 1.0])
    released = [bool(optaccum.has_released(s)) for s in states]
    assert released == [False, True, False, False, False, True]


@shows_incumbent
def test_multisteps_reports_an_update_that_was_not():
    _, states, tx = _multi_steps(
        [1.0, 1.0, NAN], 2, optax.sgd(1.0), should_skip_update_fn=optax.skip_not_finite
    )
    assert [bool(tx.has_updated(s)) for s in states] == [False, True, True]


# A complex gradient loses its imaginary part, a double one half of its bits.


@every_step
def test_complex_gradients_keep_their_imaginary_part(step):
    tx = optaccum.accumulate(2, optax.identity())
    params = {"w": jnp.zeros(2, jnp.complex64)}
    state = tx.init(params)
    for g in (1 + 2j, 3 - 8j):
        params, state = step(tx, {"w": jnp.full(2, g, jnp.complex64)}, state, params)
    assert state.grad_sum["w"].dtype == jnp.complex64
    np.testing.assert_array_equal(params["w"], [2 - 3j, 2 - 3j])


@pytest.mark.usefixtures("x64")
@every_step
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_double_precision_gradients_are_summed_in_it(step, dtype):
    """MultiSteps sums float64 gradients in float32: 1 + 2^-30 is 1 there."""
    tx = optaccum.accumulate(2, optax.identity())
    params = jnp.zeros(2, dtype)
    state = tx.init(params)
    for g in (1.0, 2.0**-30):
        params, state = step(tx, jnp.full(2, g, dtype), state, params)
    assert state.grad_sum.dtype == dtype
    np.testing.assert_array_equal(params, [(1 + 2.0**-30) / 2] * 2)


# Extra arguments are dropped, or reach the inner optimizer from the last microbatch only.


@every_step
def test_extra_arguments_pass_through_chain(step):
    """`MultiSteps(...).gradient_transformation()` in a chain drops them without a word."""
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    params = _grads(0.0)
    for every_k in (1, 2):
        tx = optax.chain(optax.clip(1.0), optaccum.accumulate(every_k, recorder), optax.scale(1.0))
        state, new = tx.init(params), params
        for value in (3.0, 5.0):
            extra_args = {"value": value, "tag": "x", "weight": 2.0, "release": value == 5 or None}
            new, state = step(tx, _grads(1.0), state, new, **extra_args)
        assert seen[-1] == {"value": 5.0, "tag": "x"}


@every_step
def test_value_is_the_mean_of_the_window(step):
    """Polyak's step size is loss / |gradient|^2: of the window, not of its last microbatch."""
    tx = optaccum.accumulate(2, optax.polyak_sgd(100.0), average_args=("value",))
    # Mean gradient 2 in 4 entries, weighted mean loss (1 * 2 + 3 * 6) / 4 = 5: the step is
    # 5 / (4 * 2^2) of the gradient. The last loss alone would make it 6 / 16.
    results, _ = _drive(tx, step, [2.0, 2.0], value=[2.0, 6.0], weight=[1.0, 3.0])
    np.testing.assert_allclose(results, [0, -2 * 5 / 16], rtol=1e-6)


# A run resumed with a shorter window loses what it held.


@every_step
def test_resumed_with_smaller_k_closes_the_open_window(step):
    _, states = _drive(optaccum.accumulate(4, optax.sgd(1.0)), step, [1.0, 2.0, 3.0])
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    params, state = step(tx, _grads(6.0), states[-1], _grads(0.0))
    assert (int(state.mini_step), bool(optaccum.has_released(state))) == (0, True)
    np.testing.assert_array_equal(params["w"], [-3.0] * 3)


@shows_incumbent
def test_multisteps_resumed_with_smaller_k_loses_the_open_window():
    _, states, _ = _multi_steps([1.0, 2.0, 3.0], 4, optax.sgd(1.0))
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    updates, state = tx.update(_grads(6.0), states[-1], _grads(0.0))
    assert not np.any(updates["w"])
    assert int(state.mini_step) == 0


# Window lengths are not judged where they are given.


@pytest.mark.parametrize("every_k", [0, -1])
def test_window_of_nothing_is_an_error(every_k):
    """MultiSteps accepts it, and never steps."""
    with pytest.raises(ValueError, match=rf"`every_k` must be >= 1, got {every_k}"):
        optaccum.accumulate(every_k, optax.sgd(1.0))


@every_step
@pytest.mark.parametrize("every_k", [np.int64(4), np.uint8(4), np.asarray(4), jnp.asarray(4)])
def test_integers_of_any_kind_are_window_lengths(step, every_k):
    """MultiSteps takes `np.int64(4)`, and fails at the first update."""
    results, _ = _drive(optaccum.accumulate(every_k, optax.sgd(1.0)), step, [1, 2, 3, 6])
    assert results == [0, 0, 0, -3]


@every_step
def test_window_of_one_has_no_accumulator(step):
    """MultiSteps allocates one, as large as the parameters."""
    tx = optaccum.accumulate(1, optax.sgd(1.0))
    _, states = _drive(tx, step, [1.0, 2.0])
    assert jax.tree.leaves(states[-1].grad_sum) == []
    assert all(leaf.size == 1 for leaf in jax.tree.leaves(states[-1]))


# A gradient of the wrong shape is broadcast.


@every_step
@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradient_of_the_wrong_shape_is_an_error(step, shape):
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    params = _grads(0.0)
    with pytest.raises(ValueError, match=r"\['w'\] has shape"):
        step(tx, {**params, "w": jnp.ones(shape)}, tx.init(params), params)


@shows_incumbent
def test_multisteps_broadcasts_a_gradient_of_the_wrong_shape():
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    params = _grads(0.0)
    _, state = tx.update({**params, "w": jnp.ones(())}, tx.init(params), params)
    assert state.acc_grads["w"].shape == (3,)


# Sums drift in the dtype of what is summed, and a ragged batch is refused.


@every_step
@pytest.mark.parametrize(
    ("dtype", "exact"), [(jnp.bfloat16, 10.25), (jnp.float16, 10.2421875)], ids=["bf16", "f16"]
)
def test_narrow_sums_do_not_drift(step, dtype, exact):
    """optax.microbatch sums in bfloat16, where 1024 times 0.01 stalls at 4.

    The bfloat16 next to 0.01 is 0.010009765625, the float16 is 0.01000213623046875.
    """
    tx = optaccum.accumulate(1024, optax.identity(), use_grad_mean=False)
    g = jnp.full(2, 0.01, dtype)

    def body(carry, _):
        params, state = carry
        return step(tx, g, state, params), None

    carry = jnp.zeros(2, dtype), tx.init(g)
    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=1024))(carry)
    assert state.grad_sum.dtype == jnp.float32
    np.testing.assert_array_equal(state.grad_sum, [exact, exact])
    assert params.dtype == dtype
    np.testing.assert_array_equal(params, jnp.full(2, exact, dtype))


@every_step
def test_token_weights_give_the_token_mean(step):
    """Ragged microbatches of 1, 7 and 4 tokens: the mean over tokens, not of three means."""
    tokens = [np.asarray([12.0]), np.arange(7.0), np.asarray([2.0, 4.0, 6.0, 8.0])]
    token_mean = float(np.mean(np.concatenate(tokens)))
    gradients = [float(np.mean(x)) for x in tokens]
    weights = [float(len(x)) for x in tokens]
    tx = optaccum.accumulate(3, optax.sgd(1.0))
    results, _ = _drive(tx, step, gradients, weight=weights)
    np.testing.assert_allclose(results, [0, 0, -token_mean], rtol=1e-6)
    assert abs(np.mean(gradients) - token_mean) > 1
    exact = reference.weighted_mean([np.asarray(g) for g in gradients], weights)
    np.testing.assert_allclose(exact, token_mean, rtol=1e-12)


# One key for all microbatches; metrics divided by tokens; schedules and averages that count
# microbatches; a short window that is divided by k.


def test_microbatches_do_not_share_a_dropout_key():
    """T5X gives all of them the same."""

    def loss(w, batch, key):
        return jnp.mean(w * batch), jax.random.bernoulli(key, shape=(64,))

    step = optaccum.value_and_grad(loss, has_aux=True, num_microbatches=4, rng_argnums=2)
    (_, masks), _ = step(1.0, jnp.ones(8), jax.random.key(0))
    assert len(np.unique(masks, axis=0)) == 4


def test_auxiliary_losses_are_not_divided_by_the_tokens():
    """MaxText does; here each microbatch has its own, as `fun` returned it."""

    def loss(w, tokens):
        return jnp.mean(w * tokens), {"router": 0.5 * tokens[0]}

    step = optaccum.value_and_grad(
        loss, has_aux=True, num_microbatches=2, weight_fn=lambda w, tokens: jnp.sum(tokens)
    )
    (_, aux), _ = step(1.0, jnp.array([2.0, 6.0, 1.0, 5.0]))
    np.testing.assert_array_equal(aux["router"], [1.0, 3.0])


@every_step
def test_schedules_and_averages_count_windows(step):
    """In Keras they count microbatches."""
    inner = optax.chain(
        optax.sgd(lambda count: 1.0 + count), optax.ema(0.5, debias=False), recording()
    )
    results, states = _drive(optaccum.accumulate(2, inner), step, [2.0] * 6)
    # Steps of 2, 4 and 6 go into the average as halves of what came: 1, 2.5 and 4.25.
    assert results == [0, -1, -1, -3.5, -3.5, -7.75]
    assert int(states[-1].inner_state[-1].count) == 3


@every_step
@pytest.mark.parametrize("traced", [True, False])
def test_partial_window_is_divided_by_what_it_holds(step, traced):
    """Accelerate and Lightning divide the last, shorter window of an epoch by k."""
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    step = functools.partial(step, tx)
    step = jax.jit(step) if traced else step
    params = _grads(0.0)
    state, weights = tx.init(params), []
    for i, g in enumerate((1.0, 3.0, 5.0)):
        last = i == 2
        release = jnp.asarray(last or i == 1) if traced else True if last else None
        params, state = step(_grads(g), state, params, release=release)
        weights.append(float(state.weight))
    np.testing.assert_array_equal(params["w"], [-7.0] * 3)
    assert weights == [1, 2, 1]
    assert int(state.gradient_step) == 2
