"""Corners that an adversary found: each was silent, or failed in words that help nobody."""

from helpers.steps import every_step, recording
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate, apply_gradients

PARAMS = jnp.zeros(2)
GRADS = jnp.ones(2)


@every_step
@pytest.mark.parametrize("length", [2**32 - 1, 2**31])
def test_every_k_wider_than_int32_does_not_wrap(step, length):
    wide = jnp.uint32(length)
    for tx, run in (
        (accumulate(lambda step: wide, optax.sgd(1.0)), lambda f: f),
        (accumulate(2, optax.sgd(1.0)), jax.jit),
    ):
        state = tx.init(PARAMS)

        def call(k, state, tx=tx):
            tx = tx if callable(k) else accumulate(k, optax.sgd(1.0))
            return step(tx, GRADS, state, PARAMS)

        for _ in range(2):
            _, state = run(call)(wide, state) if run is jax.jit else step(tx, GRADS, state, PARAMS)
        assert (int(state.mini_step), int(state.gradient_step)) == (2, 0)


def test_every_k_of_64_bits_does_not_wrap(x64):
    for length, released in ((2**33, 0), (-(2**33), 2), (2**33 + 1, 0), (2, 1)):
        tx = accumulate(lambda step, k=length: jnp.int64(k) + 0 * step, optax.sgd(1.0))
        state = tx.init(PARAMS)
        for _ in range(2):
            _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        assert int(state.gradient_step) == released


def _stateful(first, new):
    return optax.GradientTransformation(
        lambda params: {"a": first}, lambda g, state, params=None: (g, {"a": new(state["a"])})
    )


@pytest.mark.parametrize("every_k", [1, 2])
@pytest.mark.parametrize(
    ("first", "new", "was", "is_"),
    [
        (0, lambda x: x + 0.26, "int32", "float32"),
        (jnp.float32(0), lambda x: x + 1j, "float32", "complex64"),
        (jnp.bool_(True), lambda x: x + 1, "bool", "int32"),
    ],
)
def test_an_inner_state_that_changes_its_kind(every_k, first, new, was, is_):
    tx = accumulate(every_k, _stateful(first, new))
    message = rf"`inner` returned a state whose leaf \['a'\] is {is_}, but began as {was}"
    for update in (tx.update, jax.jit(tx.update)):
        state = tx.init(PARAMS)
        with pytest.raises(TypeError, match=message):
            update(GRADS, state, PARAMS)


def _carrying(new):
    return optaccum.value_and_grad(
        lambda w, x, carry: (jnp.sum(w) * jnp.mean(x), (new(carry), ())),
        has_aux=True,
        num_microbatches=2,
        carry_argnum=2,
    )


@pytest.mark.parametrize(
    ("first", "new", "was", "is_"),
    [
        (jnp.int8(0), lambda c: c + jnp.int32(1000), r"int8\[\]", r"int32\[\]"),
        (jnp.float16(0), lambda c: c + jnp.float32(1e6), r"float16\[\]", r"float32\[\]"),
        (jax.random.key(0), lambda c: jnp.float32(0), r"key<fry>\[\]", r"float32\[\]"),
        (jnp.float32(0), lambda c: jax.random.key(0), r"float32\[\]", r"key<fry>\[\]"),
    ],
)
def test_a_carry_does_not_narrow_nor_stop_being_a_key(first, new, was, is_):
    message = rf"carry whose leaf .* is {is_}, but it began as {was}; begin with"
    with pytest.raises(TypeError, match=message):
        _carrying(new)(PARAMS, jnp.ones(4), first)


def test_a_carry_may_be_narrower_than_it_began():
    for first, new in (
        (jnp.float32(0), lambda c: jnp.float16(2)),
        (jnp.int8(0), lambda c: c + 1),
        (0.0, lambda c: c + 1),
    ):
        (_, (carry, _)), _ = _carrying(new)(PARAMS, jnp.ones(4), first)
        assert float(carry) == 2
        assert carry.dtype == jnp.asarray(first).dtype


def test_arguments_of_apply_gradients_may_be_named_as_ours_are():
    def update(g, state, params=None, *, grads, tx, opt_state, **_):
        return g * grads * tx * opt_state, state

    tx = accumulate(1, optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
    extra_args = {"grads": 2.0, "tx": 3.0, "opt_state": 5.0}
    params, _ = apply_gradients(tx, GRADS, tx.init(PARAMS), PARAMS, **extra_args)
    np.testing.assert_array_equal(params, np.full(2, 30.0))


@pytest.mark.parametrize("inner", [optax.lbfgs(), optax.scale_by_lbfgs()])
def test_where_the_state_of_lbfgs_lies(inner):
    """Its history is of the parameters' shapes with an axis in front; some leaves are scalars."""
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    specs = {"w": jax.P("data", None), "b": jax.P()}
    tx = accumulate(2, inner)
    placed = optaccum.state_shardings(tx, params, specs)
    state = tx.init(params)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert len(s) <= x.ndim
    history = optax.tree.get(placed, "diff_params_memory")
    assert history["w"] == jax.P(None, "data", None)
    assert placed.grad_sum == specs


@every_step
def test_a_tree_without_leaves_keeps_its_weights(step):
    """Opened at 3 and continued at the constant 1: the averaged loss is that of both."""
    tx, one = (accumulate(k, recording(), average_args=("value",)) for k in (3, 1))
    params, state = step(tx, {}, tx.init({}), {}, weight=3.0, value=2.0)
    params, state = step(one, {}, state, params, weight=1.0, value=6.0)
    assert (float(state.inner_state.value), float(state.weight)) == (3.0, 4.0)


def test_a_state_has_arrays_of_its_own():
    """A loss that is in the state too could not be donated with it."""
    tx = accumulate(1, optax.sgd(1.0), average_args=("value",), loss_reduction="sum")
    loss, weight = jnp.float32(3), jnp.float32(2)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=loss, weight=weight)
    assert state.arg_sums["sum_of_value"] is not loss
    assert state.weight is not weight
    tx = accumulate(1, optax.sgd(1.0), average_args=("value",))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=loss)
    assert state.arg_sums["sum_of_value"] is not loss
    assert (float(state.arg_sums["sum_of_value"]), float(loss)) == (3, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8e9), ("16GiB", 16 * 2**30), ("1.5 mib", 1.5 * 2**20), ("700kB", 7e5), ("300b", 300)],
)
def test_memory_limits_as_text(text, expected):
    fit = optaccum.fit_num_microbatches(lambda n: lambda x: x, [1], GRADS, memory_limit=text)
    assert fit.memory_limit == expected


def test_memory_limits_that_are_none():
    def fit(limit):
        return optaccum.fit_num_microbatches(lambda n: lambda x: x, [1], GRADS, memory_limit=limit)

    for limit in ("much", "8", "1.2.3GB", "0GB"):
        with pytest.raises(ValueError, match=rf"bytes > 0, got '{limit}'; text is like '8GB'"):
            fit(limit)
    if not (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"):
        with pytest.raises(ValueError, match=r"is needed: cpu .* pass .*memory_limit='80GB'"):
            fit(None)
