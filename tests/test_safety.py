"""Nothing that a microbatch holds, and no moment a run stops at, corrupts a window.

One test per fault that accumulators are known to have. Where it is cheap, the fault is shown in
`optax.MultiSteps` as well: a guard is worth its place where there is something to guard against.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import support

import optaccum

NAN = float("nan")

both_steps = pytest.mark.parametrize("make_step", support.STEPS.values(), ids=support.STEPS)
# What MultiSteps is shown to do, it does in this release.
shows_incumbent = pytest.mark.skipif(
    tuple(int(part) for part in optax.__version__.split(".")[:3]) != (0, 2, 8),
    reason="another release of optax.MultiSteps",
)


def _grads(x: Any) -> dict[str, jax.Array]:
    return {"w": jnp.full((3,), x, jnp.float32), "b": jnp.asarray(x, jnp.float32)}


def _drive(tx, make_step, gradients, **columns):
    """Feeds numbers as gradients to zero parameters; returns `w[0]` and the state after each.

    Args:
        tx: the transformation, jitted.
        make_step: one of `support.STEPS`.
        gradients: one number a microbatch.
        **columns: extra arguments, one a microbatch.
    """
    step = jax.jit(make_step(tx))
    params = _grads(0.0)
    state = tx.init(params)
    results, states = [], []
    for i, g in enumerate(gradients):
        extra_args = {name: jnp.asarray(column[i]) for name, column in columns.items()}
        params, state = step(params, state, _grads(g), **extra_args)
        results.append(float(params["w"][0]))
        states.append(state)
    return results, states


def _multi_steps(gradients, k, inner, **kwargs):
    """Returns what `optax.MultiSteps` makes of the same gradients: `w[0]`, state and object."""
    tx = optax.MultiSteps(inner, k, **kwargs)
    params = _grads(0.0)
    state = tx.init(params)
    results, states = [], []
    for g in gradients:
        updates, state = tx.update(_grads(g), state, params)
        params = optax.apply_updates(params, updates)
        results.append(float(params["w"][0]))
        states.append(state)
    return results, states, tx


# A NaN stays in its window.


@both_steps
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_spoils_its_own_window_only(make_step, position):
    """MultiSteps multiplies old sums by zero, and 0 * NaN poisons every later window."""
    gradients = [1.0, 2.0, 3.0]
    gradients[position] = NAN
    inner = optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=100)
    tx = optaccum.accumulate(3, inner)
    results, states = _drive(tx, make_step, [*gradients, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    assert results == [0, 0, 0, 0, 0, -5, -5, -5, -13]
    assert [int(s.gradient_step) for s in states] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert int(states[-1].inner_state.total_notfinite) == 1


@shows_incumbent
def test_multisteps_never_recovers_from_nan():
    gradients = [NAN, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    inner = optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=100)
    results, _, _ = _multi_steps(gradients, 3, inner)
    assert results[-1] == 0


@both_steps
@pytest.mark.parametrize("position", [0, 1, 2])
def test_rejected_nan_leaves_the_window_as_it_was(make_step, position):
    """A skip function keeps a NaN out of the window, at whichever place of it."""
    gradients = [1.0, 2.0, 6.0]
    gradients.insert(position, NAN)
    tx = optaccum.accumulate(3, optax.sgd(1.0), should_skip_update_fn=optax.skip_not_finite)
    results, states = _drive(tx, make_step, [*gradients, NAN, 4.0, 5.0, 6.0])
    assert results == [0, 0, 0, -3, -3, -3, -3, -8]
    assert int(states[-1].skipped) == 2
    assert np.all(np.isfinite(states[-1].grad_sum["w"]))


@both_steps
def test_rejection_changes_nothing_but_the_count(make_step):
    """Every leaf but `skipped`, `released` and the skip function's report is bitwise the same."""
    tx = optaccum.accumulate(3, optax.adam(1.0), should_skip_update_fn=optax.skip_not_finite)
    _, (*_, before, after) = _drive(tx, make_step, [1.0, 2.0, 3.0, 4.0, NAN])
    assert int(after.skipped) == int(before.skipped) + 1
    unchanged = {"skipped": before.skipped, "skip_state": before.skip_state}
    jax.tree.map(np.testing.assert_array_equal, after._replace(**unchanged), before)


@both_steps
@pytest.mark.parametrize("weight", [-1.0, NAN, float("inf"), -float("inf")])
def test_weight_that_is_no_weight_is_rejected(make_step, weight):
    """A traced weight cannot raise, so its microbatch is turned down and counted."""
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    results, states = _drive(tx, make_step, [2.0, 9.0, 4.0], weight=[1.0, weight, 3.0])
    assert results == [0, 0, -3.5]
    assert [int(s.skipped) for s in states] == [0, 1, 1]


# The inner optimizer runs once a window.


@both_steps
def test_inner_runs_once_a_window(make_step):
    """MultiSteps runs the inner optimizer on every microbatch and masks the result."""
    calls = []

    def update_fn(updates, state, params=None):
        del params
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    inner = optax.GradientTransformation(optax.identity().init, update_fn)
    _drive(optaccum.accumulate(4, inner), make_step, np.ones(8))
    jax.effects_barrier()
    assert len(calls) == 2


# A release is reported when there was one.


@both_steps
def test_has_released_is_false_after_a_rejection(make_step):
    """MultiSteps' `has_updated` stays True after a rejected microbatch that follows a release."""
    tx = optaccum.accumulate(2, optax.sgd(1.0), should_skip_update_fn=optax.skip_not_finite)
    _, states = _drive(tx, make_step, [1.0, 1.0, NAN, 1.0, NAN, 1.0])
    released = [bool(optaccum.has_released(s)) for s in states]
    assert released == [False, True, False, False, False, True]


@shows_incumbent
def test_multisteps_reports_an_update_that_was_not():
    _, states, tx = _multi_steps(
        [1.0, 1.0, NAN], 2, optax.sgd(1.0), should_skip_update_fn=optax.skip_not_finite
    )
    assert [bool(tx.has_updated(s)) for s in states] == [False, True, True]


@both_steps
def test_rejected_microbatch_does_not_release(make_step):
    """`release=True` on a rejected microbatch leaves the window open, not closed without it."""
    tx = optaccum.accumulate(4, optax.sgd(1.0), should_skip_update_fn=optax.skip_not_finite)
    results, states = _drive(
        tx, make_step, [2.0, NAN, 4.0], release=[False, True, True], weight=[1.0, 1.0, 1.0]
    )
    assert results == [0, 0, -3]
    assert [bool(s.released) for s in states] == [False, False, True]
    assert [int(s.mini_step) for s in states] == [1, 1, 0]


# Dtypes: never narrower, never real for a complex leaf.


@both_steps
def test_complex_gradients_keep_their_imaginary_part(make_step):
    """MultiSteps' accumulator is real, and drops it."""
    tx = optaccum.accumulate(2, optax.identity())
    params = {"w": jnp.zeros(2, jnp.complex64)}
    state = tx.init(params)
    for g in (1 + 2j, 3 - 8j):
        params, state = make_step(tx)(params, state, {"w": jnp.full(2, g, jnp.complex64)})
    assert state.grad_sum["w"].dtype == jnp.complex64
    np.testing.assert_array_equal(params["w"], [2 - 3j, 2 - 3j])


@pytest.mark.usefixtures("x64")
@both_steps
def test_double_precision_gradients_are_summed_in_it(make_step):
    """MultiSteps sums float64 gradients in float32: 1 + 2^-30 is 1 there."""
    tx = optaccum.accumulate(2, optax.identity())
    for dtype in (jnp.float64, jnp.complex128):
        params = jnp.zeros(2, dtype)
        state = tx.init(params)
        for g in (1.0, 2.0**-30):
            params, state = make_step(tx)(params, state, jnp.full(2, g, dtype))
        assert state.grad_sum.dtype == dtype
        np.testing.assert_array_equal(params, [(1 + 2.0**-30) / 2] * 2)


@both_steps
def test_bfloat16_sums_do_not_drift(make_step):
    """optax.microbatch sums in bfloat16, where 1024 times 0.01 stalls at 4.

    The bfloat16 next to 0.01 is 0.010009765625, 1024 of which are 10.25 exactly.
    """
    tx = optaccum.accumulate(1024, optax.identity(), use_grad_mean=False)
    step = make_step(tx)
    g = jnp.full(2, 0.01, jnp.bfloat16)

    def body(carry, _):
        return step(*carry, g), None

    carry = jnp.zeros(2, jnp.bfloat16), tx.init(g)
    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=1024))(carry)
    assert state.grad_sum.dtype == jnp.float32
    np.testing.assert_array_equal(state.grad_sum, [10.25, 10.25])
    assert params.dtype == jnp.bfloat16
    np.testing.assert_array_equal(params.astype(jnp.float32), [10.25, 10.25])


# Extra arguments reach the inner optimizer, averaged where that is asked for.


def test_extra_arguments_pass_through_chain():
    """`MultiSteps(...).gradient_transformation()` in a chain drops them without a word."""
    tx = optax.chain(
        optax.clip(100.0), optaccum.accumulate(2, support.recording()), optax.scale(1.0)
    )
    params = _grads(0.0)
    state = tx.init(params)
    for value in (3.0, 5.0):
        _, state = tx.update(_grads(1.0), state, params, value=value)
    assert float(optaccum.get_state(state).inner_state.value) == 5


@both_steps
def test_value_is_the_mean_of_the_window(make_step):
    """Polyak's step size is loss / |gradient|^2: of the window, not of its last microbatch."""
    tx = optaccum.accumulate(2, optax.polyak_sgd(100.0), average_args=("value",))
    # Mean gradient 2 in 4 entries, weighted mean loss (1 * 2 + 3 * 6) / 4 = 5: the step is
    # 5 / (4 * 2^2) of the gradient. The last loss alone would make it 6 / 16.
    results, _ = _drive(tx, make_step, [2.0, 2.0], value=[2.0, 6.0], weight=[1.0, 3.0])
    np.testing.assert_allclose(results, [0, -2 * 5 / 16], rtol=1e-6)


@both_steps
@pytest.mark.parametrize("traced", [True, False])
def test_value_is_not_narrowed(make_step, traced):
    """A Python number is a float32 to the inner optimizer, as it is without a window."""
    tx = optaccum.accumulate(2, support.recording(), average_args=("value",))
    step = jax.jit(make_step(tx), static_argnames=() if traced else "value")
    params = _grads(0.0)
    state = tx.init(params)
    for value in (1.0, 1.0 + 2.0**-20):
        params, state = step(params, state, _grads(1.0), value=value)
    assert float(state.inner_state.value) == 1 + 2.0**-21


@both_steps
def test_value_of_a_rejected_or_weightless_microbatch_does_not_count(make_step):
    """A NaN loss comes with a NaN gradient, and must go with it."""
    tx = optaccum.accumulate(
        3,
        support.recording(),
        should_skip_update_fn=optax.skip_not_finite,
        average_args=("value",),
    )
    _, states = _drive(
        tx,
        make_step,
        [1.0, NAN, 1.0, 1.0],
        value=[2.0, NAN, 4.0, NAN],
        weight=[1.0, 1.0, 1.0, 0.0],
    )
    assert float(states[-1].inner_state.value) == 3


# A run resumed with another window length loses nothing.


@both_steps
@pytest.mark.parametrize("k", [2, 3, 4])
def test_resumed_with_smaller_k_closes_the_open_window(make_step, k):
    """At mini_step 3 of 4, MultiSteps resumed with k = 2 loses what it holds."""
    _, states = _drive(optaccum.accumulate(4, optax.sgd(1.0)), make_step, [1.0, 2.0, 3.0])
    tx = optaccum.accumulate(k, optax.sgd(1.0))
    params, state = make_step(tx)(_grads(0.0), states[-1], _grads(6.0))
    assert bool(optaccum.has_released(state))
    assert int(state.mini_step) == 0
    np.testing.assert_array_equal(params["w"], [-3.0] * 3)
    for _ in range(k):  # and the next window is one of k
        assert int(state.gradient_step) == 1
        params, state = make_step(tx)(params, state, _grads(1.0))
    np.testing.assert_array_equal(params["w"], [-4.0] * 3)
    assert int(state.gradient_step) == 2


@shows_incumbent
def test_multisteps_resumed_with_smaller_k_loses_the_open_window():
    _, states, _ = _multi_steps([1.0, 2.0, 3.0], 4, optax.sgd(1.0))
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    updates, state = tx.update(_grads(6.0), states[-1], _grads(0.0))
    assert not np.any(updates["w"])
    assert int(state.mini_step) == 0


# Window lengths are judged where they are given.


@pytest.mark.parametrize("every_k", [0, -1, np.int64(0), jnp.asarray(0)])
def test_window_of_nothing_is_an_error(every_k):
    """MultiSteps accepts 0 and -1, and never steps."""
    with pytest.raises(ValueError, match=r"`every_k` must be >= 1, got (0|-1)"):
        optaccum.accumulate(every_k, optax.sgd(1.0))


@pytest.mark.parametrize("every_k", [2.0, True, "4", None])
def test_window_length_that_is_no_integer_is_an_error(every_k):
    with pytest.raises(TypeError, match="`every_k`"):
        optaccum.accumulate(every_k, optax.sgd(1.0))


@both_steps
@pytest.mark.parametrize("every_k", [np.int64(4), np.uint8(4), np.asarray(4), jnp.asarray(4)])
def test_integers_of_any_kind_are_window_lengths(make_step, every_k):
    """MultiSteps takes `np.int64(4)`, and fails at the first update."""
    results, _ = _drive(optaccum.accumulate(every_k, optax.sgd(1.0)), make_step, [1, 2, 3, 6])
    assert results == [0, 0, 0, -3]


@both_steps
def test_window_of_one_has_no_accumulator(make_step):
    """MultiSteps allocates one, as large as the parameters."""
    tx = optaccum.accumulate(1, optax.sgd(1.0))
    results, states = _drive(tx, make_step, [1.0, 2.0])
    assert results == [-1, -3]
    assert jax.tree.leaves(states[-1].grad_sum) == []
    assert all(leaf.size == 1 for leaf in jax.tree.leaves(states[-1]))


# A gradient that does not fit is an error that says where.


@both_steps
@pytest.mark.parametrize("every_k", [1, 2])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (4,)])
def test_gradient_of_the_wrong_shape_is_an_error(make_step, every_k, shape):
    """MultiSteps broadcasts it into the accumulator."""
    tx = optaccum.accumulate(every_k, optax.sgd(1.0))
    params = _grads(0.0)
    grads = {**params, "w": jnp.ones(shape)}
    with pytest.raises(ValueError, match=r"\['w'\] has shape"):
        make_step(tx)(params, tx.init(params), grads)


@both_steps
def test_integer_gradient_is_an_error(make_step):
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    params = _grads(0.0)
    grads = {**params, "w": jnp.ones(3, jnp.int32)}
    with pytest.raises(TypeError, match=r"\['w'\] has dtype int32"):
        make_step(tx)(params, tx.init(params), grads)


@shows_incumbent
def test_multisteps_broadcasts_a_gradient_of_the_wrong_shape():
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    params = _grads(0.0)
    _, state = tx.update({**params, "w": jnp.ones(())}, tx.init(params), params)
    assert state.acc_grads["w"].shape == (3,)


# Weights are first-class.


@both_steps
def test_token_weights_give_the_token_mean(make_step):
    """Microbatches of 1, 7 and 4 tokens: the mean over tokens, not the mean of three means."""
    tokens = [np.asarray([12.0]), np.arange(7.0), np.asarray([2.0, 4.0, 6.0, 8.0])]
    token_mean = float(np.mean(np.concatenate(tokens)))
    gradients = [float(np.mean(x)) for x in tokens]
    weights = [float(len(x)) for x in tokens]
    tx = optaccum.accumulate(3, optax.sgd(1.0))
    results, _ = _drive(tx, make_step, gradients, weight=weights)
    np.testing.assert_allclose(results, [0, 0, -token_mean], rtol=1e-6)
    assert abs(np.mean(gradients) - token_mean) > 1
    exact = reference.weighted_mean([np.asarray(g) for g in gradients], weights)
    np.testing.assert_allclose(exact, token_mean, rtol=1e-12)


@both_steps
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_weightless_microbatch_adds_nothing(make_step, position, poison):
    """All padding: its mean loss is 0 / 0, and its gradient NaN."""
    gradients, weights = [2.0, 4.0], [1.0, 3.0]
    gradients.insert(position, poison)
    weights.insert(position, 0.0)
    tx = optaccum.accumulate(3, optax.sgd(1.0))
    results, states = _drive(tx, make_step, gradients, weight=weights)
    assert results == [0, 0, -3.5]
    assert int(states[-1].skipped) == 0
    assert float(states[-1].weight) == 4


@both_steps
@pytest.mark.parametrize("release", [None, True])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("every_k", [1, 2])
def test_weightless_window_is_dropped(make_step, every_k, static, release):
    """Zero updates, the inner optimizer untouched, no step counted, and no NaN."""
    tx = optaccum.accumulate(every_k, optax.adam(1.0))
    params = _grads(1.0)
    state = tx.init(params)

    static_names = ("release", "weight") if static else ("release",)
    step = jax.jit(make_step(tx), static_argnames=static_names)

    def run(params, state, weight, gradients):
        for i, g in enumerate(gradients[:every_k]):
            closes = False if release and i < every_k - 1 else release
            params, state = step(params, state, _grads(g), weight=weight, release=closes)
        return params, state

    same_params, dropped = run(params, state, 0.0, [5.0, NAN])
    jax.tree.map(np.testing.assert_array_equal, same_params, params)
    jax.tree.map(np.testing.assert_array_equal, dropped.inner_state, state.inner_state)
    assert not bool(optaccum.has_released(dropped))
    assert (int(dropped.mini_step), int(dropped.gradient_step), int(dropped.skipped)) == (0, 0, 0)
    # The next window is what a first one would have been.
    expected, afresh = run(params, state, 2.0, [5.0, 7.0])
    actual, after = run(same_params, dropped, 2.0, [5.0, 7.0])
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    jax.tree.map(np.testing.assert_array_equal, after, afresh)
    assert bool(after.released)
    assert not np.array_equal(actual["w"], params["w"])


# A partial window is divided by what it holds.


@both_steps
@pytest.mark.parametrize("traced", [True, False])
def test_partial_window_is_divided_by_what_it_holds(make_step, traced):
    """Accelerate and Lightning divide the last, shorter window of an epoch by k."""
    tx = optaccum.accumulate(4, optax.sgd(1.0))
    step = jax.jit(make_step(tx), static_argnames=() if traced else ("release",))
    params = _grads(0.0)
    state = tx.init(params)
    for g, last in ((1.0, False), (2.0, False), (6.0, True)):
        release = jnp.asarray(last) if traced else last
        params, state = step(params, state, _grads(g), release=release)
    np.testing.assert_array_equal(params["w"], [-3.0] * 3)
    assert int(state.gradient_step) == 1


@both_steps
def test_schedule_counts_windows(make_step):
    """A learning-rate schedule inside sees windows; Keras counts microbatches in it."""
    tx = optaccum.accumulate(2, optax.sgd(lambda step: 1.0 + step))
    results, _ = _drive(tx, make_step, [1.0] * 6)
    assert results == [0, -1, -1, -3, -3, -6]


@both_steps
def test_release_false_outlives_the_count(make_step):
    """A window kept open beyond k closes on the first call that lets it, and loses nothing."""
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    results, states = _drive(tx, make_step, [1.0, 2.0, 3.0], release=[False] * 3)
    assert results == [0, 0, 0]
    params, state = make_step(tx)(_grads(0.0), states[-1], _grads(6.0))
    np.testing.assert_array_equal(params["w"], [-3.0] * 3)
    assert int(state.mini_step) == 0


# Hyperparameters may change while a window is open.


@both_steps
def test_inner_hyperparameters_may_change_within_a_window(make_step):
    """The release uses the value of its own moment; the sums know nothing of it."""
    tx = optaccum.accumulate(2, optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    step = jax.jit(make_step(tx))
    params = _grads(0.0)
    params, state = step(params, tx.init(params), _grads(2.0))
    state.inner_state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    params, state = step(params, state, _grads(4.0))
    np.testing.assert_array_equal(params["w"], [-1.5] * 3)
    assert float(state.inner_state.hyperparams["learning_rate"]) == 0.5


def test_accumulate_within_inject_hyperparams():
    """The same with the hyperparameters outside."""
    tx = optax.inject_hyperparams(
        lambda learning_rate: optaccum.accumulate(2, optax.sgd(learning_rate))
    )(learning_rate=1.0)
    params = _grads(0.0)
    step = jax.jit(support.update_step(tx))
    params, state = step(params, tx.init(params), _grads(2.0))
    state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    params, state = step(params, state, _grads(4.0))
    np.testing.assert_array_equal(params["w"], [-1.5] * 3)
    assert bool(optaccum.has_released(state))


# Stopped and resumed at any moment, a run goes on as if it had not been.


@both_steps
@pytest.mark.parametrize("stop", range(7))
def test_state_that_left_the_device_goes_on(make_step, stop):
    """The state of an open window survives a round trip through host memory bit for bit."""
    gradients = [1.0, 2.0, NAN, 4.0, 5.0, 6.0, 7.0]
    tx = optaccum.accumulate(3, optax.adam(1.0), should_skip_update_fn=optax.skip_not_finite)
    step = jax.jit(make_step(tx))
    straight, resumed = ((_grads(0.0), tx.init(_grads(0.0))) for _ in range(2))
    for i, g in enumerate(gradients):
        if i == stop:
            resumed = jax.tree.map(jnp.asarray, jax.device_get(resumed))
        straight, resumed = (step(*carry, _grads(g)) for carry in (straight, resumed))
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert int(straight[1].gradient_step) == 2
