"""Rows, keys, carries and outputs that cannot be: what is wrong is named before anything runs."""

import re

import equinox as eqx
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum

PARAMS = jnp.ones(3)
BATCH = {"x": jnp.ones((12, 3)), "y": jnp.ones(12)}
KEY = jax.random.key(0)


def _loss(params, batch, *rest, **options):
    return jnp.mean(batch["x"] @ params - batch["y"])


def _with_aux(params, batch, carry):
    return _loss(params, batch), carry


def _counting(params, batch, carry):
    return _loss(params, batch), ({"mean": carry["mean"] + 0.5}, ())


def _growing(params, batch, carry):
    return _loss(params, batch), (jnp.append(carry, 0.0), ())


class Config:
    """What many programs pass about; nothing here is an array."""

    dtype = "auto"
    shape = None


EVERY_WAY = [optaccum.value_and_grad, optaccum.grad, optaccum.microbatched]


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        *(
            (make, options, error, message)
            for make in EVERY_WAY
            for options, error, message in [
                ({"num_microbatches": 0}, ValueError, r"`num_microbatches` must be >= 1, got 0"),
                ({"num_microbatches": -2}, ValueError, r"`num_microbatches` must be >= 1, got -2"),
                ({"num_microbatches": 2.0}, TypeError, r"must be an integer.*got 2\.0"),
                ({"num_microbatches": True}, TypeError, r"must be an integer.*got True"),
                ({"num_microbatches": None}, TypeError, r"must be an integer.*got None"),
                ({"batch_argnums": ()}, ValueError, r"`batch_argnums` must name at least one"),
                ({"batch_argnums": "1"}, TypeError, r"must be an integer or a tuple.*'1'"),
                ({"rng_argnums": True}, TypeError, r"must be an integer or a tuple.*True"),
                ({"rng_argnums": 0.5}, TypeError, r"must be an integer or a tuple.*0\.5"),
                ({"fun": PARAMS}, TypeError, r"`fun` must be a function, got float32\[3\]"),
                ({"accumulator_dtype": int}, TypeError, r"must be floating-point"),
                ({"reduce_axes": 3}, TypeError, r"must be names of mesh axes, got 3"),
            ]
        ),
        *(
            (make, options, error, message)
            for make in EVERY_WAY[:2]
            for options, error, message in [
                ({"argnums": ()}, ValueError, r"`argnums` must name at least one argument to diff"),
                ({"argnums": 0.5}, TypeError, r"`argnums` must be an integer or a tuple.*0\.5"),
                ({"carry_argnum": 2}, ValueError, r"`carry_argnum` needs `has_aux=True`"),
                ({"weight_fn": 3.0}, TypeError, r"`weight_fn` must be a function, got 3\.0"),
            ]
        ),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(n, make, options, error, message):
    (name,) = options
    with pytest.raises(error, match=message) as raised:
        make(**{"fun": _loss, "num_microbatches": n, **options})
    assert f"`{name}`" in str(raised.value)


def test_a_configuration_is_no_key():
    step = optaccum.grad(
        lambda params, batch, config, **_: _loss(params, batch), num_microbatches=2
    )
    assert step(PARAMS, BATCH, Config(), other=Config()).shape == (3,)


def test_a_traced_number_of_microbatches_is_refused():
    with pytest.raises(
        TypeError, match=r"`num_microbatches` must be an integer >= 1 or, of stacked.* got"
    ):
        jax.jit(lambda n: optaccum.grad(_loss, num_microbatches=n))(2)


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize(
    ("options", "args", "kwargs", "error", "message"),
    [
        ({}, (PARAMS,), {"batch": BATCH}, ValueError, r"`batch_argnums` names argument 1, but the"),
        ({"argnums": (0, -4)}, (PARAMS, BATCH), {}, ValueError, r"`argnums` names argument -4"),
        ({"argnums": 1}, (PARAMS, BATCH), {}, ValueError, r"1, which `argnums` names already"),
        ({"rng_argnums": -1}, (PARAMS, BATCH), {}, ValueError, r"-1, which `batch_argnums` names"),
        ({}, (PARAMS, {}), {}, ValueError, r"hold no array to split"),
        (
            {},
            (PARAMS, BATCH | {"s": 2.0}),
            {},
            ValueError,
            r"1\['s'\] has no leading axis.*float32\[\]",
        ),
        ({}, (PARAMS, {"k": KEY}), {}, ValueError, r"argument 1\['k'\] has no leading axis"),
        (
            {},
            (PARAMS, BATCH | {"z": jnp.ones((6, 2))}),
            {},
            ValueError,
            r"argument 1\['x'\] has 12 and argument 1\['z'\] has 6",
        ),
        (
            {},
            (PARAMS, BATCH, [KEY]),
            {},
            TypeError,
            r"argument 2\[0\] is a PRNG key.*`rng_argnums`",
        ),
        ({}, (PARAMS, BATCH), {"k": {"d": KEY}}, TypeError, r"argument `k`\['d'\] is a PRNG key"),
        (
            {"rng_argnums": 2},
            (PARAMS, BATCH, {"d": 3}),
            {},
            TypeError,
            r"argument 2\['d'\], which is not a PRNG key but int32\[\]",
        ),
        (
            {"weight_fn": lambda *_: jnp.ones(2)},
            (PARAMS, BATCH),
            {},
            TypeError,
            r"`weight_fn\(...\)` must be a scalar.*float32\[2\]",
        ),
        ({"weight_fn": lambda *_: None}, (PARAMS, BATCH), {}, TypeError, r"must be a scalar.*None"),
        (
            {"fun": _with_aux, "has_aux": True, "carry_argnum": 2},
            (PARAMS, BATCH, jnp.ones(3)),
            {},
            TypeError,
            r"`fun` must return `\(loss, \(carry, aux\)\)`.*float32\[3\]",
        ),
        (
            {"fun": _with_aux, "has_aux": True, "carry_argnum": 2},
            (PARAMS, BATCH, (0, (1, 2))),
            {},
            TypeError,
            r"`fun` returned a carry of the tree structure",
        ),
        (
            {"fun": _counting, "has_aux": True, "carry_argnum": 2},
            (PARAMS, BATCH, {"mean": 0}),
            {},
            TypeError,
            r"carry whose leaf \['mean'\] is float32\[\], but it began as int32\[\]",
        ),
        (
            {"fun": _counting, "has_aux": True, "carry_argnum": 2},
            (PARAMS, BATCH, {"mean": jnp.zeros(1, bool)}),
            {},
            TypeError,
            r"carry whose leaf \['mean'\] is float32\[1\], but it began as bool\[1\]",
        ),
        (
            {"fun": _growing, "has_aux": True, "carry_argnum": 2},
            (PARAMS, BATCH, jnp.zeros(1)),
            {},
            TypeError,
            r"carry whose leaf .* is float32\[2\], but it began as float32\[1\]",
        ),
        (
            {"rng_argnums": 2},
            (PARAMS, BATCH, {"a": KEY, "b": jax.random.PRNGKey(1)}),
            {},
            TypeError,
            r"argument 2\['b'\], a raw key beside typed ones",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused_when_traced(n, options, args, kwargs, error, message):
    step = optaccum.value_and_grad(**{"fun": _loss, "num_microbatches": n, **options})
    with pytest.raises(error, match=message):
        jax.jit(step)(*args, **kwargs)


@pytest.mark.parametrize(
    ("rows", "n", "nearest"),
    [(12, 5, "4 and 6"), (12, 7, "6 and 12"), (12, 24, "12"), (7, 2, "1 and 7")],
)
def test_rows_that_do_not_divide_are_refused_with_the_nearest(rows, n, nearest):
    batch = {"x": np.ones((rows, 3)), "y": np.ones(rows)}
    message = rf"`num_microbatches` {n} does not divide the {rows} rows in batch leaf argument 1"
    with pytest.raises(ValueError, match=rf"{message}\['x'\]; nearest are {nearest}, or pad"):
        optaccum.grad(_loss, num_microbatches=n)(PARAMS, batch)


def test_what_jax_refuses_it_refuses():
    with pytest.raises(TypeError, match="real- or complex-valued"):
        optaccum.grad(_loss, num_microbatches=2)(jnp.ones(3, int), BATCH)
    with pytest.raises(TypeError, match="scalar-output functions"):
        optaccum.grad(lambda p, b: p, num_microbatches=2)(PARAMS, BATCH)


@pytest.mark.parametrize("result", [jnp.float32(1), (1.0, 2.0, 3.0)])
def test_a_loss_without_aux_is_refused(result):
    step = optaccum.value_and_grad(lambda p, b: result, has_aux=True, num_microbatches=2)
    with pytest.raises(TypeError, match=r"must return `\(loss, aux\)` with `has_aux=True`, got "):
        step(PARAMS, BATCH)


@pytest.mark.parametrize("n", [1, 2])
def test_aux_that_cannot_be_stacked_is_refused(n):
    def named(p, b):
        return _loss(p, b), {"name": "train"}

    step = optaccum.value_and_grad(named, has_aux=True, num_microbatches=n)
    with pytest.raises(TypeError, match=r"returned 'train' of type str as aux leaf \['name'\]"):
        step(PARAMS, BATCH)


# A carry keeps its kind.


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


def test_a_whole_module_in_one_step_says_how_to_take_it_apart():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    step = optaccum.value_and_grad(lambda model, x: jnp.mean(x), num_microbatches=2)
    message = r"argument 0\.activation is not an array.*equinox\.partition"
    with pytest.raises(TypeError, match=message):
        step(model, jnp.ones((4, 2)))


# Arguments of `microbatched`.


W = jnp.ones(3)
X = jnp.ones((12, 3))


def _fun(w, x, *rest, **options):
    return x @ w


def _in(n, fun=_fun, **options):
    return optaccum.microbatched(fun, num_microbatches=n, **options)


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
        ({"rng_argnums": 2}, (W, X, W), {}, TypeError, r"argument 2, which is not a PRNG key"),
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
def test_arguments_of_microbatched_are_refused_when_traced(
    n, options, args, kwargs, error, message
):
    with pytest.raises(error, match=message):
        _in(n, **options)(*args, **kwargs)


def test_a_key_that_is_refused_is_not_told_of_carries():
    with pytest.raises(TypeError) as info:
        _in(2)(W, X, KEY)
    assert "carry" not in str(info.value)


def test_rows_of_microbatched_that_do_not_divide_are_refused():
    message = r"5 does not divide the 12 rows.*nearest are 4 and 6, or pad the batch and drop the"
    with pytest.raises(ValueError, match=message):
        _in(5)(W, X)


def test_a_second_batch_that_nobody_named_is_refused():
    def encode(w, images, texts):
        return images @ w, texts @ w

    message = r"argument 2 has 12 rows.*pass `batch_argnums=\(1, 2\)` to split both, or .*=1`"
    with pytest.raises(ValueError, match=message):
        _in(4, fun=encode)(W, X, X)
    assert [y.shape[0] for y in _in(4, fun=encode, batch_argnums=(1, 2))(W, X, X)] == [12, 12]
    whole = _in(4, fun=lambda w, x, bank: x @ w + bank.mean(), batch_argnums=1)(W, X, X)
    assert whole.shape[0] == 12


# Rows of a size that only the exported program knows.


@pytest.mark.parametrize("transform", ["value_and_grad", "microbatched"])
def test_a_program_with_symbolic_rows_is_exported_if_n_divides_them(transform):
    def loss(w, x):
        if transform == "value_and_grad":
            return optaccum.value_and_grad(lambda w, x: jnp.mean(x @ w), num_microbatches=4)(w, x)
        rows = optaccum.microbatched(lambda w, x: x @ w, num_microbatches=4)
        return jax.value_and_grad(lambda w: jnp.mean(rows(w, x)))(w)

    def exported(rows):
        x = jax.ShapeDtypeStruct(export.symbolic_shape(f"{rows}, 3"), jnp.float32)
        return export.export(jax.jit(loss))(jnp.ones(3), x)

    x = jnp.arange(24.0).reshape(8, 3)
    value, grad = exported("4*b").call(jnp.ones(3), x)
    np.testing.assert_allclose(value, x.sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(grad, x.mean(0), rtol=1e-6)
    for rows in ("b", "2*b"):
        text = rf"`num_microbatches` 4 does not divide the {re.escape(rows)} rows .* `4\*b`"
        with pytest.raises(ValueError, match=text):
            exported(rows)
