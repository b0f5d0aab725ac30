"""Bad input to `value_and_grad`: what is wrong is named, with the remedy, before anything runs."""

import jax
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


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize("make", [optaccum.value_and_grad, optaccum.grad])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_microbatches": 0}, ValueError, r"`num_microbatches` must be >= 1, got 0"),
        ({"num_microbatches": -2}, ValueError, r"`num_microbatches` must be >= 1, got -2"),
        ({"num_microbatches": 2.0}, TypeError, r"`num_microbatches` must be an integer.*got 2\.0"),
        ({"num_microbatches": True}, TypeError, r"`num_microbatches` must be an integer.*got True"),
        ({"num_microbatches": None}, TypeError, r"`num_microbatches` must be an integer.*got None"),
        ({"batch_argnums": ()}, ValueError, r"`batch_argnums` must name at least one"),
        ({"argnums": ()}, ValueError, r"`argnums` must name at least one argument to diff"),
        ({"batch_argnums": "1"}, TypeError, r"`batch_argnums` must be an integer or a tuple.*'1'"),
        ({"rng_argnums": True}, TypeError, r"`rng_argnums` must be an integer or a tuple.*True"),
        ({"carry_argnum": 2}, ValueError, r"`carry_argnum` needs `has_aux=True`"),
        ({"weight_fn": 3.0}, TypeError, r"`weight_fn` must be a function, got 3\.0"),
        ({"argnums": 0.5}, TypeError, r"`argnums` must be an integer or a tuple.*0\.5"),
        ({"fun": PARAMS}, TypeError, r"`fun` must be a function, got float32\[3\]"),
        ({"accumulator_dtype": int}, TypeError, r"`accumulator_dtype` must be floating-point"),
    ],
)
def test_what_is_known_at_once(n, make, options, error, message):
    with pytest.raises(error, match=message):
        make(**{"fun": _loss, "num_microbatches": n, **options})


def test_a_configuration_is_no_key():
    step = optaccum.grad(
        lambda params, batch, config, **_: _loss(params, batch), num_microbatches=2
    )
    assert step(PARAMS, BATCH, Config(), other=Config()).shape == (3,)


def test_a_number_that_is_traced():
    with pytest.raises(TypeError, match=r"`num_microbatches` must be an integer >= 1, got"):
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
            r"argument 2\['d'\], which is no PRNG key but int32\[\]",
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
def test_what_is_known_when_it_is_traced(n, options, args, kwargs, error, message):
    step = optaccum.value_and_grad(**{"fun": _loss, "num_microbatches": n, **options})
    with pytest.raises(error, match=message):
        jax.jit(step)(*args, **kwargs)


@pytest.mark.parametrize(
    ("rows", "n", "nearest"),
    [(12, 5, "4 and 6"), (12, 7, "6 and 12"), (12, 24, "12"), (7, 2, "1 and 7")],
)
def test_rows_that_do_not_divide(rows, n, nearest):
    batch = {"x": np.ones((rows, 3)), "y": np.ones(rows)}
    message = rf"`num_microbatches` {n} does not divide the {rows} rows in batch leaf argument 1"
    with pytest.raises(ValueError, match=rf"{message}\['x'\]; nearest are {nearest}, or pad"):
        optaccum.grad(_loss, num_microbatches=n)(PARAMS, batch)


def test_what_jax_refuses_it_refuses():
    with pytest.raises(TypeError, match="real- or complex-valued"):
        optaccum.grad(_loss, num_microbatches=2)(jnp.ones(3, int), BATCH)
    with pytest.raises(TypeError, match="scalar-output functions"):
        optaccum.grad(lambda p, b: p, num_microbatches=2)(PARAMS, BATCH)


@pytest.mark.parametrize("n", [1, 2])
def test_aux_that_cannot_be_stacked(n):
    def named(p, b):
        return _loss(p, b), {"name": "train"}

    step = optaccum.value_and_grad(named, has_aux=True, num_microbatches=n)
    with pytest.raises(TypeError, match=r"returned 'train' of type str as aux leaf \['name'\]"):
        step(PARAMS, BATCH)
