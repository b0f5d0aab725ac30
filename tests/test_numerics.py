"""Dtypes, drift, counters near their maximum, and what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate, apply_gradients, get_state, skip_not_finite

INT32_MAX = np.iinfo(np.int32).max


def _release(tx, grads, params, **extra):
    """Returns the updates and state after the given microbatches."""
    updates, state = params, tx.init(params)
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params, **extra)
    return updates, state


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_the_default_accumulator_has_at_least_32_bits(param, expected):
    params = jnp.ones(3, param)
    updates, state = _release(accumulate(2), [params, params], params)
    assert state.grad_sum.dtype == expected
    assert updates.dtype == param
    np.testing.assert_array_equal(np.asarray(updates, np.complex64), np.ones(3))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("param", "expected"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.complex64, jnp.complex64),
        (jnp.complex128, jnp.complex128),
    ],
)
def test_the_default_accumulator_keeps_64_bits(param, expected):
    params = jnp.ones(3, param)
    updates, state = _release(accumulate(2), [params, params], params)
    assert state.grad_sum.dtype == expected
    assert updates.dtype == param
    assert (state.weight.dtype, state.mini_step.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.usefixtures("x64")
def test_the_mean_of_64_bit_gradients_is_rounded_twice():
    third = [jnp.array([1.0]), jnp.array([1.0]), jnp.array([2.0])]
    updates, _ = _release(accumulate(3), third, jnp.zeros(1))
    # One rounding of the reciprocal, one of the product.
    np.testing.assert_allclose(updates, [4 / 3], rtol=2 * np.finfo(np.float64).eps)


@pytest.mark.parametrize(
    ("requested", "leaf", "expected"),
    [
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        ("float16", jnp.float32, jnp.float16),
        (jnp.complex64, jnp.complex64, jnp.complex64),
        (jnp.complex64, jnp.float32, jnp.float32),
    ],
)
def test_the_accumulator_has_the_dtype_asked_for(requested, leaf, expected):
    params = jnp.ones(3, leaf)
    tx = accumulate(2, accumulator_dtype=requested)
    updates, state = _release(tx, [params, 3 * params], params)
    assert state.grad_sum.dtype == expected
    assert updates.dtype == leaf
    np.testing.assert_array_equal(np.asarray(updates, np.complex64), np.full(3, 2))


@pytest.mark.usefixtures("x64")
def test_gradients_may_be_wider_than_their_parameters():
    tx = accumulate(2, accumulator_dtype=jnp.float64)
    grads = [jnp.array([1.0 + 2.0**-40]), jnp.array([1.0])]
    updates, _ = _release(tx, grads, jnp.zeros(1, jnp.float32))
    assert updates.dtype == jnp.float64
    np.testing.assert_array_equal(updates, [1.0 + 2.0**-41])


@pytest.mark.usefixtures("x64")
def test_sums_of_complex_gradients_may_be_wider():
    tx = accumulate(2, accumulator_dtype=jnp.complex128)
    state = tx.init(jnp.zeros(1, jnp.complex64))
    assert state.grad_sum.dtype == jnp.complex128
    for g in (1.0 + 0j, 2.0**-40 * 1j):
        _, state = tx.update(jnp.array([g], jnp.complex64), state)
    np.testing.assert_array_equal(state.grad_sum, [1.0 + 2.0**-40 * 1j])


def test_a_narrow_accumulator_rounds_once_a_microbatch():
    # 256 + 1 is not a bfloat16; 256 + 0.75 * 2 = 257.5 rounds to 258 only if the product and
    # the sum are rounded together: 0.75 * 2 = 1.5, and 256 + 1.5 = 257.5 -> 258 (even).
    tx = accumulate(2, use_grad_mean=False, accumulator_dtype=jnp.bfloat16)
    params = jnp.zeros(1)
    state = tx.init(params)
    _, state = tx.update(jnp.array([256.0]), state)
    _, state = tx.update(jnp.array([0.75]), state, weight=2.0)
    np.testing.assert_array_equal(np.asarray(state.grad_sum, np.float32), [258.0])


@pytest.mark.parametrize("k", [3, 5, 7, 10, 100])
def test_the_mean_of_equal_gradients_is_that_gradient(k):
    g = jnp.array([1.0, 1 / 3, 1e-30, 1e30, -7.7], jnp.float32)
    updates, _ = _release(accumulate(k), [g] * k, g)
    # k - 1 additions, the reciprocal and the product: each rounds by at most eps / 2.
    np.testing.assert_allclose(updates, g, rtol=(k + 1) / 2 * np.finfo(np.float32).eps)


def test_large_weights_are_exact_and_do_not_overflow_the_mean():
    """Sums of token counts stay exact to 2**24; large weights do not overflow the mean."""
    grads = [jnp.array([1.0]), jnp.array([3.0])]
    updates, state = _release(accumulate(2), grads, jnp.zeros(1), weight=2.0**23)
    assert state.weight == 2.0**24
    np.testing.assert_array_equal(updates, [2.0])
    updates, _ = _release(accumulate(2), grads, jnp.zeros(1), weight=1e30)
    np.testing.assert_allclose(updates, [2.0], rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("param", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("grad", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fused", [False, True], ids=["update", "apply_gradients"])
def test_inner_sees_the_dtypes_of_the_full_batch(param, grad, fused):
    """`inner` gets the gradient's dtype back, and gives the updates' dtype it always gives."""
    params, grads = jnp.ones(3, param), jnp.ones(3, grad)
    inner = optax.sgd(0.1, momentum=0.9)
    tx = accumulate(2, inner)
    state = tx.init(params)
    step = functools.partial(apply_gradients, tx) if fused else tx.update
    out, new_state = jax.jit(step)(grads, state, params)
    updates, _ = inner.update(grads, inner.init(params), params)
    assert out.dtype == (param if fused else updates.dtype)
    assert [x.dtype for x in jax.tree.leaves(new_state)] == [
        x.dtype for x in jax.tree.leaves(state)
    ]


def test_average_args_are_summed_in_float32():
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = accumulate(2, inner, average_args=("value",))
    for values, expected, dtype in (
        ((1.0, 1.0 + 2.0**-20), 1 + 3 * 2.0**-22, jnp.float32),
        ((jnp.bfloat16(1), jnp.bfloat16(2)), 1.75, jnp.bfloat16),
        ((1, 2), 1.75, jnp.float32),
        ((float("nan"), 2.0), 2.0, jnp.float32),
    ):
        first = 0.0 if np.isnan(values[0]) else 1.0
        state = tx.init(jnp.ones(1))
        _, state = tx.update(jnp.ones(1), state, value=values[0], weight=first)
        _, state = tx.update(jnp.ones(1), state, value=values[1], weight=3.0)
        assert seen[-1] == expected
        assert jnp.result_type(seen[-1]) == dtype
        assert state.arg_sums["sum_of_value"].dtype == jnp.float32


def test_counters_saturate():
    tx = accumulate(2, optax.sgd(1.0), should_skip_update_fn=optax.skip_not_finite)
    params = jnp.ones(1)
    full = jnp.int32(INT32_MAX)
    state = tx.init(params)._replace(mini_step=full, gradient_step=full, skipped=full)
    update = jax.jit(tx.update)
    _, skipped = update(params * jnp.nan, state, params)
    assert skipped.skipped == INT32_MAX
    _, held = update(params, state, params, release=False)
    assert held.mini_step == INT32_MAX
    _, released = update(params, state, params)
    assert released.gradient_step == INT32_MAX
    assert released.mini_step == 0


@pytest.mark.parametrize("fused", [False, True], ids=["update", "apply_gradients"])
def test_every_k_of_one_passes_the_gradient_on_untouched(fused):
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    grads = jnp.array([1 / 3, 1e-3], jnp.bfloat16)
    tx, inner = accumulate(1, optax.adam(0.1)), optax.adam(0.1)
    expected, _ = inner.update(grads, inner.init(params), params)
    # The mean of one is itself, whatever it weighs.
    for weight in (None, 3.0, jnp.float32(1 / 7)):
        out, state = (
            apply_gradients(tx, grads, tx.init(params), params, weight=weight)
            if fused
            else tx.update(grads, tx.init(params), params, weight=weight)
        )
        expected_out = optax.apply_updates(params, expected) if fused else expected
        np.testing.assert_array_equal(out, expected_out)
        assert (int(state.gradient_step), bool(state.released)) == (1, True)
        assert state.weight == (1.0 if weight is None else jnp.float32(weight))
    tx = accumulate(1, use_grad_mean=False)
    updates, _ = tx.update(grads, tx.init(params), weight=2.0)
    np.testing.assert_array_equal(updates, 2 * grads)
    assert updates.dtype == grads.dtype


def test_sums_stay_readable_after_a_release():
    grads = [jnp.array([1.0, 2.0]), jnp.array([4.0, 8.0])]
    tx = accumulate(2, optax.sgd(1.0))
    state = tx.init(jnp.zeros(2))
    for g, w in zip(grads, (1.0, 2.0), strict=True):
        updates, state = tx.update(g, state, weight=w)
    np.testing.assert_array_equal(state.grad_sum, [9.0, 18.0])
    assert state.weight == 3.0
    np.testing.assert_allclose(-updates, [3.0, 6.0], rtol=2 * np.finfo(np.float32).eps)
    _, state = tx.update(grads[0], state)
    np.testing.assert_array_equal(get_state(state).grad_sum, grads[0])
    assert state.weight == 1.0


# `skip_not_finite`: found by a sum, the same verdict as that of Optax for every dtype.


DTYPES = ["float32", "bfloat16", "float16", "float8_e5m2", "complex64", "float64", "complex128"]


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_not_finite_judges_as_optax_does(dtype, jitted, x64):
    largest = jnp.finfo(dtype).max
    judge = jax.jit(skip_not_finite) if jitted else skip_not_finite
    for bad in (0.0, -1.0, largest, -largest, jnp.nan, jnp.inf, -jnp.inf):
        leaf = jnp.full((3, 2), largest, dtype).at[1, 1].set(jnp.asarray(bad, dtype))
        grads = {"a": jnp.ones(4), "b": leaf, "none": None}
        expected, _ = optax.skip_not_finite(grads, jnp.int32(0), None)
        skip, report = judge(grads, jnp.int32(0), None)
        assert bool(skip) == bool(expected) == (not np.isfinite(bad)), bad
        assert (skip.dtype, skip.shape, bool(report["should_skip"])) == (jnp.bool_, (), bool(skip))


def test_an_imaginary_part_is_judged_and_no_gradients_are_finite():
    leaf = jnp.array([1.0 + 1j * np.nan, 1.0])
    assert bool(skip_not_finite(leaf, 0, None)[0])
    assert not bool(skip_not_finite({"a": None}, 0, None)[0])


# G in the dtype of the sums: `cast_mean=False`.


def _seen_by_inner(calls, k, params, fused, **options):
    """Returns what `inner` gets in the last of some calls, gradients and `value`."""
    seen = []

    def update(updates, state, params=None, *, value=None, **_):
        seen.append((updates, value))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = accumulate(k, inner, average_args=("value",), **options)
    state = tx.init(params)
    for g, value in calls:
        if fused:
            new, state = apply_gradients(tx, g, state, params, value=value)
            assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, params)
        else:
            updates, state = tx.update(g, state, params, value=value)
            types = jax.tree.map(lambda x: (x.shape, x.dtype), updates)
            assert types == jax.tree.map(lambda x: (x.shape, x.dtype), seen[-1][0])
    return seen[-1]


@pytest.mark.parametrize("fused", [False, True])
def test_without_the_cast_inner_gets_the_mean_to_the_precision_of_its_sums(fused):
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(8, 1000)), jnp.bfloat16)
    exact = np.asarray(grads, np.float64).mean(0)
    calls = [(g, jnp.bfloat16(0.1)) for g in grads]

    def error(**options):
        mean, value = _seen_by_inner(calls, 8, grads[0], fused, **options)
        return np.linalg.norm(np.asarray(mean, np.float64) - exact) / np.linalg.norm(exact), value

    cast, value = error()
    kept, exact_value = error(cast_mean=False)
    # Eight additions and a product of float32, whose rounding is 2**-24 of partial sums that are
    # not much larger than the result; one rounding to bfloat16 is 2**-9 at most, and 2**-11 rarely.
    assert kept < 9 * 2.0**-24
    assert 2.0**-11 < cast < 2.0**-8
    assert (value.dtype, exact_value.dtype) == (jnp.bfloat16, jnp.float32)


def _narrow_experts(path, p):
    wide = p.ndim > 1 and "experts" in jax.tree_util.keystr(path)
    return jnp.bfloat16 if wide else None


@pytest.mark.parametrize(
    "asked",
    [
        _narrow_experts,
        {"router": None, "experts": {"w": "bfloat16", "b": None, "none": None}, "steps": None},
        {"router": jnp.float32, "experts": {"w": jnp.bfloat16, "b": None, "none": None}}
        | {"steps": jnp.float32},
        {"router": None, "experts": jnp.bfloat16, "steps": None},
    ],
    ids=["function", "tree", "dtypes of all", "prefix"],
)
def test_each_parameter_has_the_accumulator_dtype_asked_for(asked):
    params = {
        "router": jnp.ones(2, jnp.bfloat16),
        "experts": {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "none": None},
        "steps": jnp.arange(2),
    }
    prefix = isinstance(asked, dict) and not isinstance(asked["experts"], dict)
    expected = {
        "router": jnp.float32,
        "experts": {"w": jnp.bfloat16, "b": jnp.bfloat16 if prefix else jnp.float32, "none": None},
        "steps": jnp.int32,
    }
    tx = accumulate(2, accumulator_dtype=asked, average_args=("grad",))
    state = tx.init(params)
    for sums in (state.grad_sum, state.arg_sums["sum_of_grad"]):
        assert jax.tree.map(lambda s: s.dtype, sums) == jax.tree.map(jnp.dtype, expected)

    def loss(trained, x):
        return sum(jnp.sum(p**2) * jnp.sum(x) for p in jax.tree.leaves(trained))

    # 1 + 2**-9 is not a bfloat16: its first sum in bfloat16 rounds to 1.
    trained = params | {"steps": None}
    if isinstance(asked, dict):
        asked = asked | {"steps": None}
    in_two = optaccum.grad(loss, num_microbatches=2, accumulator_dtype=asked)
    grads = jax.jit(in_two)(trained, jnp.full(2, (1 + 2.0**-9) / 2))
    narrow = {"w": 1.0, "b": 1.0 if prefix else 1 + 2.0**-9}
    for name, value in narrow.items():
        np.testing.assert_array_equal(np.unique(grads["experts"][name]), value)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "wanted", "expected"),
    [
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float16, None, jnp.float32),
        (jnp.complex64, None, jnp.complex64),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_without_the_cast_the_dtype_is_the_same_at_every_k(k, dtype, wanted, expected):
    g = {"a": jnp.full(2, 3, dtype), "none": None}
    options = {"accumulator_dtype": {"a": wanted, "none": None}, "cast_mean": False}
    mean, _ = _seen_by_inner([(g, 1.0)] * 2, k, g, fused=False, **options)
    assert mean["none"] is None
    assert mean["a"].dtype == expected
    np.testing.assert_array_equal(np.asarray(mean["a"], np.complex64), np.full(2, 3))


def test_with_float32_parameters_the_cast_is_none():
    params = jnp.ones(3)

    def text(**options):
        tx = accumulate(2, optax.adam(0.1), **options)
        step = jax.jit(lambda g, s, p: apply_gradients(tx, g, s, p))
        return step.lower(params, tx.init(params), params).as_text()

    assert text() == text(cast_mean=True) == text(cast_mean=False)
