"""Bad input to `microbatched`: the error names it, and no gradient is silently wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum

W = jnp.ones(3)
X = jnp.ones((12, 3))
KEY = jax.random.key(0)


def _fun(w, x, *rest, **options):
    return x @ w


def _in(n, fun=_fun, **options):
    return optaccum.microbatched(fun, num_microbatches=n, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_microbatches": 0}, ValueError, r"`num_microbatches` must be >= 1, got 0"),
        ({"num_microbatches": 2.0}, TypeError, r"`num_microbatches` must be an integer.*got 2\.0"),
        ({"num_microbatches": True}, TypeError, r"`num_microbatches` must be an integer.*got True"),
        ({"batch_argnums": ()}, ValueError, r"`batch_argnums` must name at least one"),
        ({"batch_argnums": "1"}, TypeError, r"`batch_argnums` must be an integer or a tuple.*'1'"),
        ({"rng_argnums": 0.5}, TypeError, r"`rng_argnums` must be an integer or a tuple.*0\.5"),
        ({"fun": W}, TypeError, r"`fun` must be a function, got float32\[3\]"),
        ({"accumulator_dtype": int}, TypeError, r"`accumulator_dtype` must be floating-point"),
        ({"reduce_axes": 3}, TypeError, r"`reduce_axes` must be names of mesh axes, got 3"),
    ],
)
def test_arguments_of_the_factory(options, error, message):
    with pytest.raises(error, match=message):
        optaccum.microbatched(**{"fun": _fun, "num_microbatches": 2, **options})


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("options", "args", "kwargs", "error", "message"),
    [
        ({}, (W,), {"x": X}, ValueError, r"`batch_argnums` names argument 1, but the call has 1"),
        ({"rng_argnums": -1}, (W, X), {}, ValueError, r"-1, which `batch_argnums` names already"),
        ({}, (W, {}), {}, ValueError, r"hold no array to split"),
        ({}, (W, {"x": X, "s": 2.0}), {}, ValueError, r"1\['s'\] has no leading axis"),
        ({}, (W, (X, X[:6])), {}, ValueError, r"1\[0\] has 12 and argument 1\[1\] has 6"),
        ({}, (W, X, KEY), {}, TypeError, r"argument 2 is a PRNG key.*`rng_argnums`"),
        ({}, (W, X), {"k": KEY}, TypeError, r"argument `k` is a PRNG key"),
        ({"rng_argnums": 2}, (W, X, W), {}, TypeError, r"argument 2, which is no PRNG key"),
        (
            {"fun": lambda w, x: {"loss": jnp.mean(x @ w), "y": x}},
            (W, X),
            {},
            TypeError,
            r"output leaf \['loss'\] of shape \(\).*return `x\[None\]`",
        ),
        (
            {"fun": lambda w, x: jnp.mean(x @ w)},
            (W, X),
            {},
            TypeError,
            r"output leaf \(the only leaf\) of shape \(\)",
        ),
    ],
)
def test_arguments_of_a_call(n, options, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        _in(n, **options)(*args, **kwargs)


def test_a_key_that_is_refused_is_not_told_of_carries():
    with pytest.raises(TypeError) as info:
        _in(2)(W, X, KEY)
    assert "carry" not in str(info.value)


def test_rows_that_do_not_divide():
    message = r"5 does not divide the 12 rows.*nearest are 4 and 6, or pad the batch and drop the"
    with pytest.raises(ValueError, match=message):
        _in(5)(W, X)


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
def test_a_value_that_is_closed_over_and_differentiated(outer, inner):
    def loss(w):
        encoder = _wrap(inner, _in(2, lambda scale, x: scale * (x @ jnp.sin(w))))
        return jnp.sum(encoder(2.0, X) ** 3)

    message = r"closes over a value, float32\[3\], that is being diff.*pass it as an argument"
    with pytest.raises(TypeError, match=message):
        _wrap(outer, jax.grad(_wrap(outer, loss)))(W)


def test_a_value_that_is_closed_over_in_a_scan_of_steps():
    def step(w, _):
        def loss(w):
            return jnp.sum(_in(2, lambda scale, x: scale * (x @ w))(1.0, X) ** 2)

        return w - jax.grad(loss)(w), None

    with pytest.raises(TypeError, match="pass it as an argument"):
        jax.lax.scan(step, W, None, 2)


def test_a_value_that_is_closed_over_is_free_to_be_there():
    """Constants, tracers of `jit`, and integers under `vmap`, at every level."""

    def loss(w, power, shift):
        encoder = _in(2, lambda w, x: (x @ w) ** power + shift + jnp.arange(3.0).sum())
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
def test_forward_mode(mode, jit, inner):
    loss = inner(lambda w: jnp.sum(_in(2)(w, X) ** 3))
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\) to a custom_vjp"):
        jit(mode(loss))(W)


def test_one_microbatch_has_every_mode():
    def loss(w):
        return jnp.sum(_in(1)(w, X) ** 3)

    np.testing.assert_allclose(jax.jvp(loss, (W,), (W,))[1], 3 * 12 * 27.0, rtol=1e-6)


def test_an_accumulator_that_would_drop_an_imaginary_part():
    def loss(w):
        return jnp.sum(jnp.abs(_in(2, accumulator_dtype=jnp.float32)(w, X)))

    message = r"`accumulator_dtype` float32 would drop the imaginary part of the complex64 leaf"
    with pytest.raises(ValueError, match=message):
        jax.grad(loss)(W.astype(jnp.complex64))


def test_a_second_batch_that_nobody_named():
    def encode(w, images, texts):
        return images @ w, texts @ w

    message = r"argument 2 has 12 rows.*pass `batch_argnums=\(1, 2\)` to split both, or .*=1`"
    with pytest.raises(ValueError, match=message):
        _in(4, fun=encode)(W, X, X)
    assert [y.shape[0] for y in _in(4, fun=encode, batch_argnums=(1, 2))(W, X, X)] == [12, 12]
    whole = _in(4, fun=lambda w, x, bank: x @ w + bank.mean(), batch_argnums=1)(W, X, X)
    assert whole.shape[0] == 12


def test_rows_without_entries():
    fun = _in(4, fun=lambda w, x: x[:, :0])
    assert fun(W, X).shape == (12, 0)


def test_no_tracer_outlives_its_trace():
    with jax.checking_leaks():
        jax.grad(lambda w: jnp.sum(_in(4)(w, X)))(W)
