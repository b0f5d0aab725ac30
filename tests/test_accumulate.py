"""Accumulation inside, around and beside other Optax transformations equals the full batch."""

import functools

from helpers.steps import every_step, update_and_apply
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients, get_state, has_released

K, WINDOWS = 4, 3
PARAMS = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.ones(3)}
# Two to three roundings a microbatch and a step, of values of order one.
TOLERANCE = 8 * K * WINDOWS * float(np.finfo(np.float32).eps)


def _gradients(i):
    keys = dict(zip(PARAMS, jax.random.split(jax.random.key(i + 1), len(PARAMS)), strict=True))
    return {name: 0.3 + jax.random.normal(keys[name], p.shape) for name, p in PARAMS.items()}


def _mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


MICROBATCHES = [_gradients(i) for i in range(K * WINDOWS)]
FULL_BATCHES = [_mean(MICROBATCHES[i : i + K]) for i in range(0, K * WINDOWS, K)]


def _train(tx, batches, step=update_and_apply, params=PARAMS, **extra):
    run = jax.jit(functools.partial(step, tx, **extra))
    state = tx.init(params)
    for grads in batches:
        params, state = run(grads, state, params)
    return params, state


def _assert_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=TOLERANCE, atol=TOLERANCE)


def _adam():
    return optax.adamw(0.1)


ONLY_W, ONLY_B = {"w": True, "b": False}, {"w": False, "b": True}
PAIRS = {
    "last link": (
        lambda: optax.chain(optax.scale(2.0), accumulate(K, _adam())),
        lambda: optax.chain(optax.scale(2.0), _adam()),
    ),
    "middle link": (
        lambda: optax.chain(optax.scale(2.0), accumulate(K, _adam()), optax.scale(0.5)),
        lambda: optax.chain(optax.scale(2.0), _adam(), optax.scale(0.5)),
    ),
    "named chain": (
        lambda: optax.named_chain(("a", optax.scale(2.0)), ("b", accumulate(K, _adam()))),
        lambda: optax.chain(optax.scale(2.0), _adam()),
    ),
    "clipping inside": (
        lambda: accumulate(K, optax.chain(optax.clip_by_global_norm(0.1), _adam())),
        lambda: optax.chain(optax.clip_by_global_norm(0.1), _adam()),
    ),
    "masked": (
        lambda: optax.chain(
            optax.masked(accumulate(K, _adam()), ONLY_W),
            optax.masked(accumulate(K, optax.sgd(0.1)), ONLY_B),
        ),
        lambda: optax.chain(optax.masked(_adam(), ONLY_W), optax.masked(optax.sgd(0.1), ONLY_B)),
    ),
    "masked inside": (
        lambda: accumulate(K, optax.chain(_adam(), optax.masked(optax.scale(2.0), ONLY_W))),
        lambda: optax.chain(_adam(), optax.masked(optax.scale(2.0), ONLY_W)),
    ),
    "partition inside": (
        lambda: accumulate(
            K, optax.partition({"a": _adam(), "s": optax.sgd(0.1)}, {"w": "a", "b": "s"})
        ),
        lambda: optax.partition({"a": _adam(), "s": optax.sgd(0.1)}, {"w": "a", "b": "s"}),
    ),
    "every_k a hyperparameter": (
        lambda: optax.inject_hyperparams(accumulate)(every_k=K, inner=_adam()),
        _adam,
    ),
    "injected inside": (
        lambda: accumulate(
            K,
            optax.inject_hyperparams(optax.adamw)(
                learning_rate=optax.linear_schedule(0.1, 0.01, WINDOWS)
            ),
        ),
        lambda: optax.inject_hyperparams(optax.adamw)(
            learning_rate=optax.linear_schedule(0.1, 0.01, WINDOWS)
        ),
    ),
    "apply_if_finite": (lambda: optax.apply_if_finite(accumulate(K, _adam()), 3), _adam),
    "apply_if_finite inside": (
        lambda: accumulate(K, optax.apply_if_finite(_adam(), 3)),
        _adam,
    ),
    "ema inside": (
        lambda: accumulate(K, optax.chain(_adam(), optax.ema(0.5))),
        lambda: optax.chain(_adam(), optax.ema(0.5)),
    ),
}


@functools.cache
def _full_batch(name):
    return _train(PAIRS[name][1](), FULL_BATCHES)[0]


@pytest.mark.parametrize("name", PAIRS)
def test_among_other_transformations_a_window_equals_the_full_batch(name):
    params, _ = _train(PAIRS[name][0](), MICROBATCHES, apply_gradients)
    _assert_equal(params, _full_batch(name))


def test_each_group_of_a_partition_has_its_own_k():
    tx = optax.partition(
        {"slow": accumulate(K, _adam()), "fast": accumulate(2, optax.sgd(0.1))},
        {"w": "slow", "b": "fast"},
    )
    params, _ = _train(tx, MICROBATCHES, apply_gradients)
    pairs = [_mean(MICROBATCHES[i : i + 2]) for i in range(0, K * WINDOWS, 2)]
    _assert_equal(params["w"], _train(_adam(), FULL_BATCHES)[0]["w"])
    _assert_equal(params["b"], _train(optax.sgd(0.1), pairs)[0]["b"])


@pytest.mark.parametrize("outside", [True, False])
def test_lookahead_counts_windows_inside_and_microbatches_outside(outside):
    """Inside, lookahead counts windows; outside, microbatches."""
    params = optax.LookaheadParams.init_synced(PARAMS)
    period = 2
    full, _ = _train(optax.lookahead(_adam(), period, 0.5), FULL_BATCHES, params=params)
    tx = (
        optax.lookahead(accumulate(K, _adam()), K * period, 0.5)
        if outside
        else accumulate(K, optax.lookahead(_adam(), period, 0.5))
    )
    actual, _ = _train(tx, MICROBATCHES, apply_gradients, params)
    _assert_equal(actual, full)


def test_reduce_on_plateau_sees_the_mean_value_of_the_window():
    def optimizer():
        return optax.chain(
            optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0, factor=0.5)
        )

    tx = accumulate(2, optimizer(), average_args=("value",))
    # The means are 4, 5, 6: no improvement. The last values, 7, 5, 3, would be improvements.
    values = [1.0, 7.0, 5.0, 5.0, 9.0, 3.0]
    run, full = jax.jit(functools.partial(apply_gradients, tx)), jax.jit(optimizer().update)
    params, state = PARAMS, tx.init(PARAMS)
    full_state = optimizer().init(PARAMS)
    for grads, value in zip(MICROBATCHES, values, strict=False):
        params, state = run(grads, state, params, value=value)
    for i, value in enumerate([4.0, 5.0, 6.0]):
        _, full_state = full(_mean(MICROBATCHES[2 * i : 2 * i + 2]), full_state, value=value)
    scale = optax.tree.get(get_state(state).inner_state, "scale")
    assert scale == optax.tree.get(full_state, "scale") == 0.25  # halved at 5 and at 6


@pytest.mark.parametrize("outside", [True, False])
def test_hyperparameters_can_change_in_mid_window(outside):
    """The release uses the value of its own moment; the sums know nothing of it."""
    inside = optax.inject_hyperparams(optax.sgd)
    around = optax.inject_hyperparams(lambda learning_rate: accumulate(2, optax.sgd(learning_rate)))
    tx = around(learning_rate=0.1) if outside else accumulate(2, inside(learning_rate=0.1))
    params, state = apply_gradients(tx, MICROBATCHES[0], tx.init(PARAMS), PARAMS)
    state = optax.tree.set(state, learning_rate=jnp.float32(1.0))
    params, state = apply_gradients(tx, MICROBATCHES[1], state, params)
    mean = _mean(MICROBATCHES[:2])
    _assert_equal(params, jax.tree.map(lambda p, g: p - g, PARAMS, mean))
    assert has_released(state)


def test_every_k_can_change_in_mid_window():
    tx = optax.inject_hyperparams(accumulate)(every_k=8, inner=optax.sgd(1.0))
    run = jax.jit(functools.partial(apply_gradients, tx))
    params, state = PARAMS, tx.init(PARAMS)
    for grads in MICROBATCHES[:3]:
        params, state = run(grads, state, params)
    assert not has_released(state)
    state.hyperparams["every_k"] = jnp.int32(2)
    params, state = run(MICROBATCHES[3], state, params)
    assert has_released(state)
    _assert_equal(params, jax.tree.map(lambda p, g: p - g, PARAMS, FULL_BATCHES[0]))


def test_an_accumulation_within_an_accumulation_is_a_mean_of_means():
    tx = accumulate(2, accumulate(3, optax.sgd(1.0)))
    params, _ = _train(tx, MICROBATCHES[:6])
    expected = jax.tree.map(lambda p, g: p - g, PARAMS, _mean(MICROBATCHES[:6]))
    _assert_equal(params, expected)


# Programs as people write them: eager loops, strict settings, random keys.


SMALL = {"a": jnp.ones(2), "b": jnp.zeros(3)}


def _small_grads(a, b):
    return {
        "a": None if a is None else jnp.full(2, a),
        "b": None if b is None else jnp.full(3, b),
    }


@pytest.mark.parametrize("jit", [False, True])
def test_random_keys_and_python_numbers_may_be_in_the_inner_state(jit):
    """Keys cannot be cast; a hyperparameter assigned as a Python float has no dtype."""
    inner = optax.inject_hyperparams(optax.noisy_sgd)(learning_rate=0.1, eta=0.0, key=3)
    tx = accumulate(2, inner)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(_small_grads(1.0, 1.0), tx.init(SMALL), SMALL)
    state.inner_state.hyperparams["learning_rate"] = 0.5
    state = state._replace(weight=3.0)
    updates, state = update(_small_grads(1.0, 1.0), state, SMALL)
    np.testing.assert_array_equal(updates["a"], np.full(2, -0.25))
    assert state.inner_state.hyperparams["learning_rate"].dtype == jnp.float32


@pytest.mark.parametrize("form", [lambda ms: ms, lambda ms: ms.gradient_transformation()])
def test_multi_steps_inside_is_a_likely_mistake_and_gets_the_extra_arguments(form):
    with pytest.warns(UserWarning, match="pass the optimizer that is inside it") as found:
        tx = accumulate(2, form(optax.MultiSteps(optax.polyak_sgd(), 1)))
    assert found[0].filename == __file__
    state, params = tx.init(SMALL), SMALL
    for _ in range(2):
        params, state = apply_gradients(tx, _small_grads(1.0, 0.0), state, params, value=2.0)
    # The Polyak step is value / |g|^2 = 2 / 2.
    np.testing.assert_allclose(params["a"], np.zeros(2), atol=1e-6)


@every_step
def test_strict_dtype_and_rank_promotion_refuse_nothing(step):
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
        state, params = tx.init(SMALL), SMALL
        for _ in range(6):
            params, state = run(_small_grads(1.0, 1.0), state, params)
        caplog.clear()
        with jax.log_compiles():
            for _ in range(6):
                params, state = run(_small_grads(1.0, 1.0), state, params)
        assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
        assert get_state(state).gradient_step == 4
