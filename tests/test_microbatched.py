"""Losses that couple rows: `microbatched` gives what the full batch gives, whatever the loss."""

import functools

import equinox as eqx
from flax import linen, nnx
from helpers import coupled
from helpers.coupled import BATCH, EPS, LOSSES, ROWS, encode, info_nce, make_params, with_encoder
from helpers.hlo import temporaries
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum

PARAMS = make_params(jnp.float32)


def _in(n, fun=encode, **options):
    return optaccum.microbatched(fun, num_microbatches=n, **options)


def _assert_close(actual, expected, tolerance=64 * EPS):
    """The largest difference in a leaf, in units of its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        dtype = np.complex64 if jnp.iscomplexobj(a) else np.float32
        a, e = np.asarray(a, dtype), np.asarray(e, dtype)
        assert np.max(np.abs(a - e), initial=0) <= tolerance * max(np.max(np.abs(e), initial=0), 1)


every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# Between them they use all outputs, so that all parameters have a gradient.
FEW = ("info_nce", "experts")
few_losses = pytest.mark.parametrize("loss", [LOSSES[name] for name in FEW], ids=FEW)


@functools.cache
def _full_batch(loss):
    return jax.jit(jax.value_and_grad(with_encoder(loss, encode)))(PARAMS, BATCH)


@every_loss
def test_any_loss_of_the_outputs_has_the_gradient_of_the_full_batch(loss):
    ours = jax.value_and_grad(with_encoder(loss, _in(np.int64(4))))
    _assert_close(jax.jit(ours)(PARAMS, BATCH), _full_batch(loss))


@few_losses
@pytest.mark.parametrize("n", [1, ROWS])
def test_any_number_of_microbatches_has_the_gradient_of_the_full_batch(loss, n):
    ours = jax.value_and_grad(with_encoder(loss, _in(n)))
    _assert_close(jax.jit(ours)(PARAMS, BATCH), _full_batch(loss))


@few_losses
def test_means_over_microbatches_are_something_else(loss):
    _, expected = _full_batch(loss)
    naive = jax.jit(optaccum.grad(with_encoder(loss, encode), num_microbatches=4))(PARAMS, BATCH)
    apart = jax.tree.map(lambda a, e: float(jnp.max(jnp.abs(a - e))), naive, expected)
    size = max(float(jnp.max(jnp.abs(e))) for e in jax.tree.leaves(expected))
    assert max(jax.tree.leaves(apart)) > 0.05 * size


def test_eagerly_the_gradient_is_that_of_the_full_batch():
    loss = LOSSES["experts"]
    ours = jax.value_and_grad(with_encoder(loss, _in(3)))
    _assert_close(ours(PARAMS, BATCH), _full_batch(loss))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [("info_nce", jnp.bfloat16), ("experts", jnp.float16), ("experts", jnp.complex64)],
)
def test_any_dtype_has_the_gradient_of_the_full_batch(loss, dtype):
    loss, params = LOSSES[loss], make_params(dtype)
    expected = jax.jit(jax.value_and_grad(with_encoder(loss, encode)))(params, BATCH)
    ours = jax.jit(jax.value_and_grad(with_encoder(loss, _in(4))))(params, BATCH)
    # Rows are computed alike. A gradient is rounded once per microbatch and once at the end, to
    # half a unit each, where the full batch rounds it once; and each cotangent of a row, which
    # both round to a unit before they sum 24 of them, may be rounded from another float32.
    tolerance = 4 * float(jnp.finfo(dtype).eps) if dtype != jnp.complex64 else 64 * EPS
    _assert_close(ours, expected, tolerance)


def test_double_precision_stays(x64):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    batch = jax.tree.map(lambda x: x.astype(jnp.float64), BATCH | {"label": jnp.zeros(ROWS)})

    def loss(encoder, params):
        z = encoder(params, batch)["z"]
        return jnp.sum((z.T @ z) ** 2)

    expected = jax.jit(jax.grad(functools.partial(loss, encode)))(params)
    ours = jax.jit(jax.grad(functools.partial(loss, _in(4))))(params)
    assert ours["encoder"].dtype == jnp.float64
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4])
def test_outputs_are_in_the_order_of_the_batch(n):
    expected, ours = encode(PARAMS, BATCH), jax.jit(_in(n))(PARAMS, BATCH)
    loads, expected_loads = ours.pop("loads"), expected.pop("loads")
    assert ours["expert"].dtype == expected["expert"].dtype
    _assert_close(ours, expected)
    assert loads.shape == (n, coupled.EXPERTS), "a sum per microbatch"
    np.testing.assert_array_equal(loads.sum(axis=0), expected_loads[0])
    each = [encode(PARAMS, jax.tree.map(lambda x, i=i: x[i::n], BATCH))["loads"] for i in range(n)]
    np.testing.assert_array_equal(loads, jnp.concatenate(each))


def test_outputs_that_are_neither_rows_nor_one_entry_are_refused():
    """Joined, 6 sums of 2 microbatches would be 12 entries beside 24 rows."""
    x = BATCH["x"]

    def loads(w, x, reshape):
        return {"y": w * x, "load": reshape(w * x.sum(axis=0))}

    for n in (1, 2):
        bad = _in(n, lambda w, x: loads(w, x, lambda load: load))
        message = (
            rf"output leaf \['load'\] of shape \(6,\) for the {ROWS // n} rows of a .* `x\[None\]`"
        )
        with pytest.raises(ValueError, match=message):
            bad(2.0, x)
        good = _in(n, lambda w, x: loads(w, x, lambda load: load[None]))(2.0, x)
        np.testing.assert_allclose(good["load"].sum(axis=0), 2 * x.sum(axis=0), rtol=1e-5)


def test_several_outputs_of_a_row_have_an_axis_of_their_own():
    crops = _in(4, lambda w, x: jnp.stack([w * x, -w * x], axis=1))(2.0, BATCH["x"])
    np.testing.assert_array_equal(crops, jnp.stack([2 * BATCH["x"], -2 * BATCH["x"]], axis=1))
    m = ROWS // 4
    message = rf"of shape \({2 * m}, 6\) for the {m} rows .*`x.reshape\({m}, r, ...\)`"
    with pytest.raises(ValueError, match=message):
        _in(4, lambda w, x: jnp.concatenate([x, x]))(2.0, BATCH["x"])


def test_rows_have_gradients_in_the_order_of_the_batch():
    def loss(encoder, params, x, view):
        out = encoder(params, BATCH | {"x": x, "view": view})
        return coupled.covariance(out, BATCH, params) + coupled.dice(out, BATCH, params)

    args = PARAMS, BATCH["x"], BATCH["view"]
    expected = jax.jit(jax.grad(functools.partial(loss, encode), (0, 1, 2)))(*args)
    ours = jax.jit(jax.grad(functools.partial(loss, _in(4)), (0, 1, 2)))(*args)
    _assert_close(ours, expected)
    only_rows = jax.jit(jax.grad(functools.partial(loss, _in(4)), 1))(*args)
    _assert_close(only_rows, expected[1])


def test_outputs_that_the_loss_does_not_use_cost_nothing():
    def loss(encoder, params):
        return jnp.sum(encoder(params, BATCH)["z"].sum(axis=0) ** 2)

    expected = jax.jit(jax.grad(functools.partial(loss, encode)))(PARAMS)
    ours = jax.jit(jax.grad(functools.partial(loss, _in(4))))(PARAMS)
    _assert_close(ours, expected)
    assert not np.any(ours["router"])


def test_only_arguments_and_outputs_are_kept_between_the_passes():
    batch = {"x": jnp.ones((64, 100)), "view": jnp.ones((64, 100)), "label": jnp.ones(64, int)}
    params = jax.tree.map(lambda p: p, PARAMS | {"encoder": jnp.ones((100, 8))})
    params["router"] = jnp.ones((100, 4))

    def kept(encoder):
        found = jax.eval_shape(lambda p, b: jax.vjp(encoder, p, b)[1], params, batch)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))

    arguments = sum(x.nbytes for x in jax.tree.leaves((params, batch)))
    assert kept(_in(8)) <= arguments
    assert kept(encode) > arguments


def test_fun_is_traced_once():
    calls = []

    def counting(params, batch):
        calls.append(1)
        return encode(params, batch)

    jax.jit(jax.grad(with_encoder(coupled.info_nce, _in(4, counting))))(PARAMS, BATCH)
    assert len(calls) == 1


def _sums_error(**options):
    """Of the gradient of 512 microbatches that all add the same, in the dtype bfloat16."""
    rows = jnp.full((512, 3), 0.01, jnp.bfloat16)
    encoder = _in(512, lambda w, x: x @ w, **options)
    grad = jax.jit(jax.grad(lambda w: jnp.sum(encoder(w, rows).astype(jnp.float32))))
    exact = 512 * float(rows[0, 0])
    return abs(float(grad(jnp.ones(3, jnp.bfloat16))[0]) / exact - 1)


def test_sums_of_bfloat16_do_not_drift():
    # One rounding to 8 bits.
    assert _sums_error() <= 2.0**-8
    assert _sums_error(accumulator_dtype=jnp.bfloat16) > 0.1, "not the dtype asked for"


def _dropping(params, batch, rngs):
    keep = jax.random.bernoulli(rngs["dropout"], 0.7, batch["x"].shape)
    return encode(params, batch | {"x": jnp.where(keep, batch["x"] / 0.7, 0)}) | {"keep": keep}


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_both_passes_see_the_same_keys(make, x64):
    """The gradient is the slope of the loss along a line, which no other mask would have."""
    encoder = _in(4, _dropping, rng_argnums=-1)
    rngs = {"dropout": make(3)}

    @jax.jit
    def loss(params):
        return coupled.nt_xent(encoder(params, BATCH, rngs), BATCH, params)

    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    grads = jax.jit(jax.grad(loss))(params)
    direction = jax.tree.map(jnp.cos, params)
    slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction))))  # noqa: B905

    def along(t):
        return loss(jax.tree.map(lambda p, d: p + t * d, params, direction))

    # The loss is computed in float32, with an error of about 1e-6; the third derivative is O(1).
    step = 1e-2
    np.testing.assert_allclose(slope, (along(step) - along(-step)) / (2 * step), atol=1e-3)


def test_every_microbatch_has_keys_of_its_own():
    key = jax.random.key(3)
    keep = jax.jit(_in(4, _dropping, rng_argnums=2))(PARAMS, BATCH, {"dropout": key})["keep"]
    for i in range(4):
        own = jax.random.bernoulli(jax.random.fold_in(key, i), 0.7, (ROWS // 4, coupled.FEATURES))
        np.testing.assert_array_equal(keep[i::4], own)
    assert len(np.unique(keep, axis=0)) > ROWS // 2


def _scores(w, x, shift=0.0):
    return w[0] * jnp.tanh(x @ w + shift)


def _coupled_by(encoder):
    def loss(w, x):
        y = encoder(w, x)
        return jnp.var(y) * jnp.sum(y**3)

    return loss


SECOND = {
    "hessian": jax.hessian,
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "forward over reverse": lambda f: (
        lambda w, x: jax.jvp(lambda w: jax.grad(f)(w, x), (w,), (w[::-1],))[1]
    ),
    "rows, then parameters": lambda f: jax.jacrev(jax.grad(f, argnums=1)),
    "parameters, then rows": lambda f: jax.jacfwd(jax.grad(f), argnums=1),
    "third": lambda f: jax.jacfwd(jax.jacrev(jax.jacrev(f))),
}
SCORE_WEIGHTS = jnp.array([1.0, -0.5, 0.3])
SCORED = jax.random.normal(jax.random.key(0), (12, 3))


@pytest.mark.parametrize("derivative", SECOND.values(), ids=SECOND)
def test_second_derivatives_are_those_of_the_full_batch(derivative):
    found = jax.jit(derivative(_coupled_by(_in(6, _scores))))(SCORE_WEIGHTS, SCORED)
    expected = jax.jit(derivative(_coupled_by(_scores)))(SCORE_WEIGHTS, SCORED)
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(found, expected, atol=64 * EPS * np.max(np.abs(expected)))


@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd])
def test_second_derivatives_by_what_is_closed_over_are_right(mode):
    """Only the first derivative is taken by the rule, and it is not by `shift`."""

    def gradient(wrap, shift):
        encoder = wrap(lambda w, x: _scores(w, x, shift))
        return jax.grad(_coupled_by(encoder))(SCORE_WEIGHTS, SCORED)

    found = jax.jit(mode(functools.partial(gradient, functools.partial(_in, 4))))(0.3)
    expected = mode(functools.partial(gradient, lambda fun: fun))(0.3)
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(found, expected, atol=64 * EPS * np.max(np.abs(expected)))


def test_a_product_with_the_hessian_needs_two_microbatches_of_memory():
    weights = [jax.random.normal(jax.random.key(k), (64, 64)) / 8 for k in range(4)]

    def deep(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x[:, :1]

    def needed(n):
        grad = jax.grad(_coupled_by(_in(n, deep)))
        run = jax.jit(lambda w, x: jax.jvp(lambda w: grad(w, x), (w,), (w,))[1])
        rows = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
        return temporaries(run.lower(weights, rows).compile())

    assert needed(16) < needed(1) / 6


# What it composes with: transformations of JAX, optimizers, models.


OURS, EXPECTED = with_encoder(info_nce, _in(4)), with_encoder(info_nce, encode)
COMPOSED = {
    "vmap of grad": lambda loss: jax.vmap(jax.grad(loss), (None, 0)),
    "grad of vmap": lambda loss: jax.grad(lambda p, b: jnp.sum(jax.vmap(loss, (None, 0))(p, b))),
    "checkpoint": lambda loss: jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0)),
    "scan": lambda loss: lambda p, b: jax.lax.scan(lambda c, x: (c, jax.grad(loss)(p, x)), 0, b)[1],
    "grad of grad": lambda loss: jax.grad(
        lambda p, b: jnp.sum(jax.grad(loss)(p, jax.tree.map(lambda x: x[0], b))["encoder"] ** 2)
    ),
}

BATCHES = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), BATCH)


@pytest.mark.parametrize("compose", COMPOSED.values(), ids=COMPOSED)
def test_transformations_of_jax_compose(compose):
    ours, expected = jax.jit(compose(OURS)), jax.jit(compose(EXPECTED))
    _assert_close(ours(PARAMS, BATCHES), expected(PARAMS, BATCHES))


def test_keys_may_be_batched():
    keys = jax.random.split(jax.random.key(0), 3)

    def noisy(w, x, key):
        return w * x + jax.random.normal(key, x.shape)

    def loss(w, key):
        z = _in(4, noisy, rng_argnums=2)(w, BATCH["x"], key)
        return jnp.mean((z.T @ z) ** 2)

    each = jnp.stack([jax.grad(loss)(2.0, key) for key in keys])
    np.testing.assert_allclose(jax.vmap(jax.grad(loss), (None, 0))(2.0, keys), each, rtol=1e-5)


def test_a_window_may_hold_coupled_batches():
    """`accumulate` outside: a window of batches, each one coupled in itself."""
    tx = optaccum.accumulate(2, optax.adam(0.1))

    def train(loss):
        params, state = PARAMS, tx.init(PARAMS)
        step = jax.jit(
            lambda params, state, batch: optaccum.apply_gradients(
                tx, jax.grad(loss)(params, batch), state, params
            )
        )
        for _ in range(4):
            params, state = step(params, state, BATCH)
        return params

    # A step of 0.1 divided by |g|, where |g| may be as small as 1e-3.
    _assert_close(train(OURS), train(EXPECTED), tolerance=2**14 * EPS)


def test_configurations_and_flags_are_not_traced():
    def fun(w, x, config, *, train, scale):
        assert config == "gelu"
        assert train is True
        return w * x * scale if train else x

    def loss(w, scale):
        z = _in(2, fun)(w, BATCH["x"], "gelu", train=True, scale=scale)
        return jnp.sum(z**2)

    ours = jax.jit(jax.grad(loss, (0, 1)))(2.0, 3.0)
    total = float(jnp.sum(BATCH["x"] ** 2))
    np.testing.assert_allclose(ours, (2 * 2.0 * 9.0 * total, 2 * 3.0 * 4.0 * total), rtol=1e-5)


class Tower(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(jnp.tanh(linen.Dense(8)(x)))


def test_linen_modules_have_the_gradient_of_the_full_batch():
    model = Tower()
    variables = model.init(jax.random.key(0), BATCH["x"])

    def loss(apply, variables):
        z = apply(variables, BATCH["x"])
        return coupled.covariance({"z": z, "view": z[::-1]}, BATCH, PARAMS)

    expected = jax.jit(jax.value_and_grad(lambda v: loss(model.apply, v)))(variables)
    ours = jax.jit(jax.value_and_grad(lambda v: loss(_in(4, model.apply), v)))(variables)
    _assert_close(ours, expected)


def _with_nnx():
    model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.gelu)
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def _with_equinox():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


@pytest.mark.parametrize("make", [_with_nnx, _with_equinox], ids=["nnx", "equinox"])
def test_modules_have_the_gradient_of_the_full_batch(make):
    params, apply = make()

    def loss(apply, params):
        z = apply(params, BATCH["x"])
        return jnp.mean((z.T @ z) ** 2)

    expected = jax.jit(jax.value_and_grad(lambda p: loss(apply, p)))(params)
    ours = jax.jit(jax.value_and_grad(lambda p: loss(_in(4, apply), p)))(params)
    _assert_close(ours, expected)


def test_batch_norm_sees_the_rows_of_its_microbatch():
    def norm(w, x):
        return w * (x - x.mean(axis=0))

    ours = _in(4, norm)(2.0, BATCH["x"])
    for i in range(4):
        np.testing.assert_allclose(ours[i::4], norm(2.0, BATCH["x"][i::4]), atol=1e-6)


# What it refuses, so that no gradient is silently wrong.


W = jnp.ones(3)
X = jnp.ones((12, 3))


def _linear(w, x, *rest, **options):
    return x @ w


def _linear_in(n, fun=_linear, **options):
    return optaccum.microbatched(fun, num_microbatches=n, **options)


def _wrap(levels, f):
    for level in levels:
        f = level(f)
    return f


LEVELS = {
    "eager": (),
    "jit": (jax.jit,),
    "checkpoint": (jax.checkpoint,),
    "vmap": (lambda f: lambda w: jax.vmap(f)(w[None])[0],),
    "jit of checkpoint": (jax.checkpoint, jax.jit),
}
inner_and_outer = pytest.mark.parametrize("outer", LEVELS.values(), ids=LEVELS)


@inner_and_outer
@pytest.mark.parametrize("inner", [(), (jax.jit,)], ids=["eager", "jit"])
def test_a_value_that_is_closed_over_and_differentiated_is_refused(outer, inner):
    def loss(w):
        encoder = _wrap(inner, _linear_in(2, lambda scale, x: scale * (x @ jnp.sin(w))))
        return jnp.sum(encoder(2.0, X) ** 3)

    message = r"closes over a value, float32\[3\], that is being diff.*pass it as an argument"
    with pytest.raises(TypeError, match=message):
        _wrap(outer, jax.grad(_wrap(outer, loss)))(W)


def test_a_value_that_is_closed_over_in_a_scan_of_steps_is_refused():
    def step(w, _):
        def loss(w):
            return jnp.sum(_linear_in(2, lambda scale, x: scale * (x @ w))(1.0, X) ** 2)

        return w - jax.grad(loss)(w), None

    with pytest.raises(TypeError, match="pass it as an argument"):
        jax.lax.scan(step, W, None, 2)


def test_a_value_that_is_closed_over_may_be_a_constant():
    """Constants, tracers of `jit`, and integers under `vmap`, at every level."""

    def loss(w, power, shift):
        encoder = _linear_in(2, lambda w, x: (x @ w) ** power + shift + jnp.arange(3.0).sum())
        return jnp.sum(encoder(w, X) ** 2)

    def plain(w, power, shift):
        return jnp.sum(((X @ w) ** power + shift + 3.0) ** 2)

    powers = jnp.arange(1, 4)

    def total(loss, w):
        return jax.vmap(loss, (None, 0, None))(w, powers, 0.5).sum()

    expected = jax.grad(functools.partial(total, plain))(W)
    for grad in (jax.grad(functools.partial(total, loss)),):
        np.testing.assert_allclose(grad(W), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(grad)(W), expected, rtol=1e-6)
    each = jax.vmap(jax.grad(loss), (None, 0, None))(W, powers, 0.5).sum(axis=0)
    np.testing.assert_allclose(each, expected, rtol=1e-6)


@pytest.mark.parametrize("mode", [jax.jacfwd, lambda f: lambda w: jax.jvp(f, (w,), (w,))])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inner", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_forward_mode_is_refused(mode, jit, inner):
    loss = inner(lambda w: jnp.sum(_linear_in(2)(w, X) ** 3))
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\) to a custom_vjp"):
        jit(mode(loss))(W)


def test_one_microbatch_has_every_mode():
    def loss(w):
        return jnp.sum(_linear_in(1)(w, X) ** 3)

    np.testing.assert_allclose(jax.jvp(loss, (W,), (W,))[1], 3 * 12 * 27.0, rtol=1e-6)


def test_an_accumulator_that_would_drop_an_imaginary_part_is_refused():
    def loss(w):
        return jnp.sum(jnp.abs(_linear_in(2, accumulator_dtype=jnp.float32)(w, X)))

    message = r"`accumulator_dtype` float32 would drop the imaginary part of the complex64 leaf"
    with pytest.raises(ValueError, match=message):
        jax.grad(loss)(W.astype(jnp.complex64))


def test_rows_may_have_no_entries():
    fun = _linear_in(4, fun=lambda w, x: x[:, :0])
    assert fun(W, X).shape == (12, 0)


def test_no_tracer_outlives_its_trace():
    with jax.checking_leaks():
        jax.grad(lambda w: jnp.sum(_linear_in(4)(w, X)))(W)
