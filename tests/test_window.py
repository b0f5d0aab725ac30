"""What a window adds up: weights at the ends of float32, means of sums, and any length."""

import contextlib
import functools

from helpers.steps import every_step, recording
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate

PARAMS, G = jnp.zeros(2), jnp.full(2, 2.0)
KINDS = {
    "python": lambda x: x,
    "numpy scalar": np.float32,
    "numpy double": np.float64,
    "numpy array": np.asarray,
    "jax": jnp.float32,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("jit", "kind"),
    [
        *(("eager", kind) for kind in KINDS),
        *(("argument", kind) for kind in ("python", "numpy double", "jax")),  # the others are these
        *(("constant", kind) for kind in ("python", "numpy array", "jax")),
    ],
)
@pytest.mark.parametrize("every_k", [1, 2])
def test_a_weight_means_the_same_however_it_comes(every_k, jit, kind):
    tx = optaccum.accumulate(every_k, optax.sgd(1.0))
    run = functools.partial(optaccum.apply_gradients, tx)
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for weight in (np.nan, 1.0, -1.0, 1e-33, np.inf, 3e38, 2.0):
        weight = KINDS[kind](weight)
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
def test_the_sum_of_the_weights_in_one_step_is_bounded(x64):
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


def test_the_derivative_with_respect_to_a_weight_is_documented():
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


# Losses that are sums, with a denominator that comes separately: G = sum g_i / sum w_i.


# Microbatches of 1, 3 and 2 tokens, (6), (1, 2, 3) and (10, 2). The loss of a token x at w is w x,
# so gradients are sums of x.
MEAN = 24.0 / 6


def _run_sums(tx, step, jit, weights=(1, 3, 2), sums=(6.0, 6.0, 12.0)):
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
    params, state = _run_sums(tx, step, jit)
    assert (params, float(state.weight), float(state.grad_sum)) == (-MEAN, 6, 24)
    assert float(state.inner_state[1].value) == 2 * MEAN
    wrong, _ = _run_sums(optaccum.accumulate(3, optax.sgd(1.0)), step, jit)
    assert wrong == -(6 + 18 + 24) / 6, "as a mean over its tokens"


@pytest.mark.parametrize("jit", [False, True])
@every_step
def test_microbatches_without_weight_add_nothing(step, jit):
    tx = optaccum.accumulate(4, optax.sgd(1.0), loss_reduction="sum")
    params, state = _run_sums(tx, step, jit, (1, 0, 3, 2), (6.0, np.nan, 6.0, 12.0))
    assert (params, int(state.mini_step)) == (-MEAN, 0)
    params, state = _run_sums(tx, step, jit, (0, 0.0, 1e-33, 0), (6.0, np.nan, 6.0, 12.0))
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
def test_a_window_of_one_is_divided_as_any_other(step, every_k, options, expected):
    """Without an accumulator, and with one that `release` closes at once."""
    tx = optaccum.accumulate(every_k, optax.sgd(1.0), **options)
    state = tx.init(jnp.float32(0))
    last = 1 if options == {"loss_reduction": "sum"} else None  # sums need a denominator
    for (g, weight), value in zip(((6, 1), (12, 3), (6, last)), expected, strict=True):
        params, state = step(tx, jnp.float32(g), state, jnp.float32(0), weight=weight, release=True)
        assert float(params) == -value


@pytest.mark.parametrize("n", [1, 2, 4])
def test_sums_in_one_step_are_divided_by_the_tokens(n):
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


def test_sums_on_many_devices_are_divided_by_all_tokens():
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


# Lengths of windows, trees without leaves, and arrays of its own.

ONES = jnp.ones(2)


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
            return step(tx, ONES, state, PARAMS)

        for _ in range(2):
            _, state = run(call)(wide, state) if run is jax.jit else step(tx, ONES, state, PARAMS)
        assert (int(state.mini_step), int(state.gradient_step)) == (2, 0)


def test_every_k_of_64_bits_does_not_wrap(x64):
    for length, released in ((2**33, 0), (-(2**33), 2), (2**33 + 1, 0), (2, 1)):
        tx = accumulate(lambda step, k=length: jnp.int64(k) + 0 * step, optax.sgd(1.0))
        state = tx.init(PARAMS)
        for _ in range(2):
            _, state = jax.jit(tx.update)(ONES, state, PARAMS)
        assert int(state.gradient_step) == released


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
    _, state = tx.update(ONES, tx.init(PARAMS), PARAMS, value=loss, weight=weight)
    assert state.arg_sums["sum_of_value"] is not loss
    assert state.weight is not weight
    tx = accumulate(1, optax.sgd(1.0), average_args=("value",))
    _, state = tx.update(ONES, tx.init(PARAMS), PARAMS, value=loss)
    assert state.arg_sums["sum_of_value"] is not loss
    assert (float(state.arg_sums["sum_of_value"]), float(loss)) == (3, 3)
