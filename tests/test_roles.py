"""Which arguments are rows: the named ones are split, and rows that nobody named are refused."""

import equinox as eqx
from flax import linen, nnx
from helpers import meshes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum
from optaccum.testing import assert_equivalent, check_loss

W = jnp.array([1.0, -0.5, 0.3])
X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jnp.arange(8.0)
MASK = jnp.where(jnp.arange(8) % 4 == 1, 0.25, jnp.arange(8.0) % 3)
every_n = pytest.mark.parametrize("n", [1, 2, 8])


def masked(w, x, y=0.0, *, mask, scale=1.0):
    return jnp.sum(mask * (jnp.tanh(x @ w) - y) ** 2) / jnp.sum(mask) * jnp.mean(scale)


def tokens(w, x, y=0.0, *, mask, scale=1.0):
    return jnp.sum(mask)


def _assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@every_n
@pytest.mark.parametrize("names", ["mask", ("mask",), ["mask"]], ids=str)
def test_a_named_keyword_is_split(n, names):
    step = optaccum.value_and_grad(
        masked, num_microbatches=n, batch_argnames=names, weight_fn=tokens
    )
    for mask in (MASK, np.asarray(MASK)):
        _assert_close(jax.jit(step)(W, X, mask=mask), jax.value_and_grad(masked)(W, X, mask=MASK))
    grad = optaccum.grad(masked, num_microbatches=n, batch_argnames=names, weight_fn=tokens)
    _assert_close(grad(W, X, mask=MASK), jax.grad(masked)(W, X, mask=MASK))


@every_n
def test_a_batch_may_come_by_keyword_alone(n):
    options = {"num_microbatches": n, "batch_argnames": ("x", "y", "mask"), "weight_fn": tokens}
    expected = jax.value_and_grad(masked)(W, X, Y, mask=MASK)
    for given in ({}, {"batch_argnums": ()}):
        step = optaccum.value_and_grad(masked, **options, **given)
        _assert_close(jax.jit(step)(W, y=Y, mask=MASK, x=X), expected)

    def carried(w, stats, *, x):
        return jnp.mean(x @ w), (stats + jnp.sum(x), ())

    step = optaccum.value_and_grad(
        carried, has_aux=True, num_microbatches=n, batch_argnames="x", carry_argnum=1
    )
    (_, (stats, _)), _ = step(W, 1.0, x=X)  # the argument 1 has a role
    np.testing.assert_allclose(stats, 1.0 + X.sum(), rtol=1e-5)


@every_n
def test_a_keyword_may_be_a_tree_with_nones_and_keys(n):
    def loss(w, x, *, more):
        assert more["none"] is None
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(more["keys"])
        return jnp.mean(((x + noise) @ w - more["y"]) ** 2)

    more = {"y": Y, "none": None, "keys": jax.random.split(jax.random.key(1), 8)}
    step = optaccum.value_and_grad(loss, num_microbatches=n, batch_argnames="more")
    _assert_close(jax.jit(step)(W, X, more=more), jax.value_and_grad(loss)(W, X, more=more))


SPLIT = {
    "value_and_grad": lambda n, **options: optaccum.value_and_grad(
        masked, num_microbatches=n, **options
    ),
    "grad": lambda n, **options: optaccum.grad(masked, num_microbatches=n, **options),
    "microbatched": lambda n, **options: optaccum.microbatched(
        lambda w, x, y=0.0, *, mask, scale=1.0: mask[:, None] * x * w * jnp.mean(scale),
        num_microbatches=n,
        **options,
    ),
    "check_loss": lambda n, **options: (
        lambda w, x, **kwargs: check_loss(
            masked, w, x, kwargs=kwargs, num_microbatches=n if n > 1 else None, **options
        )
    ),
}
everywhere = pytest.mark.parametrize("make", SPLIT.values(), ids=SPLIT)


@everywhere
@every_n
def test_a_name_that_is_left_out_has_its_default(make, n):
    """Many models have a mask that most calls do not pass."""
    options = {"batch_argnames": ("mask", "y", "scale")}
    make(n, **options)(W, X, mask=MASK)
    with pytest.raises(ValueError, match=r"names 'mask', but the call has the keyword .*\['y'\]"):
        make(n, **options)(W, X, y=Y)
    with pytest.raises(ValueError, match=r"names \('y',\), but the call has the keyword .* \[\]"):
        make(n, batch_argnums=(), batch_argnames="y")(W, X)


@everywhere
@every_n
def test_a_keyword_with_rows_that_nobody_named_is_refused(make, n):
    message = r"argument `mask` has 8 rows, as many as the batch in argument 1, but `batch_argn.*"
    remedy = r'pass `batch_argnames=\("mask",\)` to split it, or `batch_argnames=\(\)` to give'
    with pytest.raises(ValueError, match=message + remedy):
        make(n)(W, X, mask=MASK)
    with pytest.raises(ValueError, match=message + remedy):
        make(n, batch_argnums=1)(W, X, mask=MASK)
    with pytest.raises(ValueError, match=r"argument `mask`\['a'\]\[1\] has 8 rows"):
        make(n)(W, X, mask={"a": (1.0, MASK)})
    both = r'`batch_argnames=\("mask", "scale",\)` to split them'
    with pytest.raises(ValueError, match=both):
        make(n)(W, X, mask=MASK, scale=MASK)


def test_a_keyword_with_as_many_rows_is_whole_if_somebody_says_so():
    def fun(w, x, *, bank):
        return x * w + bank.sum()

    options = {"num_microbatches": 4, "batch_argnames": ()}
    whole = optaccum.microbatched(fun, **options)(W, X, bank=MASK)
    np.testing.assert_allclose(whole, fun(W, X, bank=MASK), rtol=1e-6)
    grad = optaccum.grad(lambda *args, **kwargs: fun(*args, **kwargs).mean(), **options)
    np.testing.assert_allclose(grad(W, X, bank=MASK), X.mean(axis=0) / 3, rtol=1e-5)


@everywhere
@pytest.mark.parametrize(
    ("options", "args", "kwargs", "error", "message"),
    [
        ({"batch_argnames": 3}, (W, X), {}, TypeError, r"`batch_argnames` must be a name or a tu"),
        ({"batch_argnames": (1,)}, (W, X), {}, TypeError, r"`batch_argnames` must be a name or"),
        ({"batch_argnums": ()}, (W, X), {}, ValueError, r"`batch_argnums` must name at least one"),
        (
            {"batch_argnums": (), "batch_argnames": ()},
            (W, X),
            {},
            ValueError,
            r"`batch_argnums` must name at least one argument to split, got \(\) and no name in",
        ),
        (
            {"batch_argnames": "masks"},
            (W, X),
            {"mask": MASK},
            ValueError,
            r"names 'masks', but the call has the keyword arguments \['mask'\]",
        ),
        (
            {"batch_argnames": "x"},
            (W, X),
            {"mask": 1.0},
            ValueError,
            r"names 'x', which the call passes by position; name argument 1 in `batch_argnums`",
        ),
        (
            {"batch_argnames": "mask"},
            (W, X),
            {"mask": MASK[:4]},
            ValueError,
            r"one number of rows, but argument 1 has 8 and argument `mask` has 4",
        ),
        (
            {"batch_argnames": "mask"},
            (W, X),
            {"mask": 2.0},
            ValueError,
            r"batch leaf argument `mask` has no leading axis",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused(make, options, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(2, **options)(*args, **kwargs)


@pytest.mark.parametrize("make", list(SPLIT.values())[:3], ids=list(SPLIT)[:3])
def test_a_batch_by_keyword_that_nobody_named_is_refused(make):
    message = r"argument 1, but the call has 1 positional .* keyword argument in `batch_argnames`"
    with pytest.raises(ValueError, match=message):
        make(2)(W, x=X, mask=MASK)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_microbatched_takes_rows_by_keyword(n):
    def encode(w, *, x, mask, shift):
        return mask[:, None] * jnp.tanh(x * w) + shift

    names = {"batch_argnums": (), "batch_argnames": ("mask", "x")}
    ours = optaccum.microbatched(encode, num_microbatches=n, **names)

    def loss(encode, w, x, mask, shift):
        z = encode(w, mask=mask, shift=shift, x=x)
        return jnp.mean((z.T @ z) ** 2)

    args = W, X, MASK, 0.5
    expected = jax.value_and_grad(lambda *args: loss(encode, *args), (0, 1, 2, 3))(*args)
    found = jax.jit(jax.value_and_grad(lambda *args: loss(ours, *args), (0, 1, 2, 3)))(*args)
    _assert_close(found, expected)


class Tower(linen.Module):
    @linen.compact
    def __call__(self, image, text, *, train):
        return linen.Dense(4)(jnp.tanh(image)) * linen.Dense(4)(text) + train


@pytest.mark.parametrize("n", [1, 4])
def test_models_may_be_called_by_keyword(n):
    names = {"num_microbatches": n, "batch_argnums": (), "batch_argnames": ("image", "text")}
    rows = {"image": X, "text": Y[:, None]}

    def check(apply, params, **kwargs):
        def loss(apply, params):
            z = apply(params, **rows, **kwargs)
            return jnp.mean((z.T @ z) ** 2)

        ours = jax.jit(jax.value_and_grad(lambda p: loss(optaccum.microbatched(apply, **names), p)))
        _assert_close(ours(params), jax.value_and_grad(lambda p: loss(apply, p))(params))

    model = Tower()
    check(model.apply, model.init(jax.random.key(0), **rows, train=True), train=True)
    module = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    check(lambda model, image, text: model(image) * text, module)
    layer = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    check(lambda model, image, text: jax.vmap(model)(image) * text, layer)


@meshes.needs_reshard
def test_rows_by_keyword_stay_on_their_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jnp.concatenate([X, -X])
    mask = jnp.arange(16.0)

    def loss(w, *, x, mask):
        return jnp.mean(mask * (x @ w) ** 2)

    expected = jax.value_and_grad(loss)(W, x=x, mask=mask)
    step = optaccum.value_and_grad(loss, num_microbatches=4, batch_argnames=("x", "mask"))
    with jax.set_mesh(mesh):
        rows = [jax.device_put(a, jax.P("data")) for a in (x, mask)]
        _assert_close(jax.jit(step)(W, x=rows[0], mask=rows[1]), expected)
        with pytest.raises(ValueError, match=r"the 4 rows that a device holds of the 16"):
            optaccum.grad(loss, num_microbatches=8, batch_argnames=("x", "mask"))(
                W, x=rows[0], mask=rows[1]
            )


def test_check_loss_judges_a_loss_that_is_called_by_keyword():
    given = {"kwargs": {"mask": MASK}, "batch_argnames": "mask", "num_microbatches": 2}
    report = check_loss(masked, W, X, **given)
    assert report.kind == "weights"
    assert "`mask.sum()`" in str(report)
    assert_equivalent(masked, W, X, **given, weight_fn=tokens)
    given |= {"kwargs": {"mask": MASK, "x": X}, "batch_argnames": ("x", "mask")}
    assert_equivalent(masked, W, **given, weight_fn=tokens)
    with pytest.raises(TypeError, match="`kwargs` must be the keyword arguments of `fun`, a dict"):
        check_loss(masked, W, X, kwargs=("mask", MASK))


# Rows in an argument that `batch_argnums` does not name.


def _loss(w, x, y, scale=1.0):
    return jnp.mean((x @ w - y) ** 2) * jnp.mean(scale)


ROWS = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
LABELS = jnp.array([0.0, 1.0, 5.0, -1.0])
WEIGHTS = jnp.array([1.0, -1.0])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_labels_beside_the_batch_are_refused(n):
    step = optaccum.value_and_grad(_loss, num_microbatches=n)
    message = r"argument 2 has 4 rows, as many as the batch in argument 1.*`batch_argnums=\(1, 2\)`"
    with pytest.raises(ValueError, match=message):
        jax.jit(step)(WEIGHTS, ROWS, LABELS)
    with pytest.raises(ValueError, match=r"argument 2\['y'\] has 4 rows.*`batch_argnums=1` to"):
        optaccum.grad(lambda w, x, y: 0.0, num_microbatches=n)(
            WEIGHTS, ROWS, {"scale": 2.0, "y": LABELS}
        )
    both = optaccum.value_and_grad(_loss, num_microbatches=n, batch_argnums=(1, 2))
    loss, grads = both(WEIGHTS, ROWS, LABELS)
    expected = jax.value_and_grad(_loss)(WEIGHTS, ROWS, LABELS)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grads, expected[1], rtol=1e-6)


def test_as_many_rows_are_whole_if_somebody_says_so():
    whole = jnp.arange(4.0)
    expected, _ = jax.value_and_grad(_loss)(WEIGHTS, ROWS, 0.0, whole)
    named = optaccum.value_and_grad(_loss, num_microbatches=2, batch_argnums=1)
    left_out = optaccum.value_and_grad(_loss, num_microbatches=2)
    by_name = optaccum.value_and_grad(_loss, num_microbatches=2, batch_argnames=())
    for loss, _ in (named(WEIGHTS, ROWS, 0.0, whole), by_name(WEIGHTS, ROWS, 0.0, scale=whole)):
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"argument 3 has 4 rows.*`batch_argnums=\(1, 3\)`"):
        left_out(WEIGHTS, ROWS, 0.0, whole)


def test_what_has_another_role_may_have_as_many_rows():
    def fun(w, x, carry):
        return jnp.mean(x) * jnp.mean(w), (carry + 1, ())

    step = optaccum.value_and_grad(fun, has_aux=True, num_microbatches=2, carry_argnum=2)
    (_, (carry, _)), _ = step(jnp.ones(4), ROWS, jnp.zeros(4))
    np.testing.assert_array_equal(carry, np.full(4, 2.0))
