"""A loss whose derivative is taken in microbatches, by whoever calls `jax.grad`."""

import functools

import equinox as eqx
from flax import nnx
from helpers import meshes
from helpers.hlo import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest

import optaccum

N = 3
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "w": jax.random.normal(KEYS[0], (8, 4), jnp.bfloat16),
    "layers": jax.random.normal(KEYS[1], (3, 4, 4)),
    "none": None,
}
X = jax.random.normal(KEYS[2], (12, 8))
MASK = jnp.where(jnp.arange(12) % 3 == 1, 0.0, 1.0 + jnp.arange(12) % 4)  # one has no weight


def loss_fn(params, x, mask):
    h = x @ params["w"].astype(jnp.float32)
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])
    return jnp.sum(mask[:, None] * h**2) / jnp.sum(mask)


def sum_fn(params, x, mask):
    return loss_fn(params, x, mask) * jnp.sum(mask)


def noisy_fn(params, carry, x, key):
    value = jnp.mean((x @ params["w"]) ** 2) + jax.random.normal(key)
    return value, (carry + x.sum(), {"sum": x.sum(), "number": 3})


def tokens(params, x, mask):
    return mask.sum()


CASES = {
    "plain": (loss_fn, (X, jnp.ones(12)), {"batch_argnums": (1, 2)}),
    "weights": (loss_fn, (X, MASK), {"batch_argnums": (1, 2), "weight_fn": tokens}),
    "known weights": (
        loss_fn,
        (X, jnp.ones(12)),
        {"batch_argnums": (1, 2), "weight_fn": lambda params, x, mask: len(x)},
    ),
    "sums": (
        sum_fn,
        (X, MASK),
        {"batch_argnums": (1, 2), "weight_fn": tokens, "loss_reduction": "sum"},
    ),
    "carry, keys, aux": (
        noisy_fn,
        (0.0, X, jax.random.key(1)),
        {"batch_argnums": 2, "carry_argnum": 1, "rng_argnums": 3, "has_aux": True},
    ),
    "raw key": (
        noisy_fn,
        (jnp.zeros(()), np.asarray(X), np.asarray(jax.random.PRNGKey(1))),
        {"batch_argnums": 2, "carry_argnum": 1, "rng_argnums": 3, "has_aux": True},
    ),
    "narrow sums": (
        loss_fn,
        (X, jnp.ones(12)),
        {"batch_argnums": (1, 2), "accumulator_dtype": jnp.bfloat16},
    ),
}


@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_have_the_bits_of_value_and_grad(case, n):
    fun, args, options = CASES[case]
    has_aux = options.get("has_aux", False)
    loss = optaccum.microbatched_loss(fun, num_microbatches=n, **options)
    found = jax.jit(jax.value_and_grad(loss, has_aux=has_aux))(PARAMS, *args)
    expected = jax.jit(optaccum.value_and_grad(fun, num_microbatches=n, **options))(PARAMS, *args)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    # Another program, in which XLA may fuse, and so round, in another way.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, jax.jit(loss)(PARAMS, *args), found[0])


def test_gradients_of_a_scaled_loss_are_rounded_once():
    loss = optaccum.microbatched_loss(loss_fn, num_microbatches=N, batch_argnums=(1, 2))
    mask = jnp.ones(12)
    once = jax.grad(loss)(PARAMS, X, mask)
    found = jax.grad(lambda *args: 0.1 * loss(*args))(PARAMS, X, mask)

    def check(scaled, g):
        expected = (np.float32(0.1) * np.asarray(g, np.float32)).astype(g.dtype)
        np.testing.assert_array_equal(scaled, expected)

    jax.tree.map(check, found, once)


def test_several_arguments_are_differentiated_by_keyword_too():
    def fun(scale, x, *, shift):
        return jnp.mean((scale * x - shift) ** 2)

    loss = optaccum.microbatched_loss(fun, num_microbatches=4)
    x = jnp.arange(8.0)

    def both(scale, shift):
        return loss(scale, x, shift=shift)

    found = jax.grad(both, (0, 1))(2.0, 3.0)
    expected = jax.grad(lambda scale, shift: fun(scale, x, shift=shift), (0, 1))(2.0, 3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_differentiated_it_costs_one_forward_and_one_backward_pass_and_else_forward_passes():
    def fun(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    w, x = jnp.ones((4, 4)), jnp.ones((6, 4))
    loss = optaccum.microbatched_loss(fun, num_microbatches=N)
    in_three = optaccum.value_and_grad(fun, num_microbatches=N)

    def flops(fun):
        return jax.jit(fun).lower(w, x).compile().cost_analysis()["flops"]

    # A cost analysis counts the body of a loop once.
    assert flops(jax.value_and_grad(loss)) == pytest.approx(flops(in_three), abs=20)
    assert flops(loss) < 0.6 * flops(in_three)


def test_fun_is_traced_once():
    calls = []

    def fun(w, x):
        calls.append(w)
        return jnp.mean(w * x)

    loss = optaccum.microbatched_loss(fun, num_microbatches=2, weight_fn=lambda w, x: jnp.sum(x))
    jax.jit(jax.value_and_grad(loss)).lower(jnp.ones(2), jnp.ones((4, 2)))
    assert len(calls) == 1


# Derivatives.


@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivatives_are_those_of_the_full_batch(weighted):
    params = {"w": 0.3 * PARAMS["w"].astype(jnp.float32), "layers": PARAMS["layers"]}
    options = {"weight_fn": tokens} if weighted else {}
    mask = MASK if weighted else jnp.ones(12)
    loss = optaccum.microbatched_loss(loss_fn, num_microbatches=N, batch_argnums=(1, 2), **options)

    def squared(fun):
        return jax.jit(jax.grad(lambda p: optax.tree.norm(jax.grad(fun)(p, X, mask), squared=True)))

    for transform in (lambda fun: jax.jit(jax.hessian(fun)), squared):
        args = (params,) if transform is squared else (params, X, mask)
        for a, e in zip(
            jax.tree.leaves(transform(loss)(*args)),
            jax.tree.leaves(transform(loss_fn)(*args)),
            strict=True,
        ):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * float(jnp.abs(e).max()))


def test_a_microbatch_without_weight_has_no_second_derivative_either():
    loss = optaccum.microbatched_loss(
        loss_fn, num_microbatches=N, batch_argnums=(1, 2), weight_fn=tokens
    )
    x = X.at[1::3].set(jnp.nan)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    grads = jax.grad(lambda p: optax.tree.norm(jax.grad(loss)(p, x, MASK)))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("aux", "`aux` of optaccum.microbatched_loss is differentiated"),
        ("rows", "argument 2 is differentiated, but it is split into microbatches"),
        ("carry", "argument 1 is differentiated, but it is the carry"),
        ("closed over", r"`fun` closes over a value, float32\[\], that is being differentiated"),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_what_has_no_derivative_is_refused(what, text, jitted):
    def total(w):
        def fun(scale, carry, x):
            value = jnp.mean(scale * x) * (w if what == "closed over" else 1.0)
            return value, (carry, scale * x)

        loss = optaccum.microbatched_loss(
            fun, has_aux=True, num_microbatches=2, batch_argnums=2, carry_argnum=1
        )
        x, carry = jnp.ones(4), jnp.ones(())
        value, (_, aux) = loss(
            1.0 if what == "closed over" else w,
            w if what == "carry" else carry,
            w * x if what == "rows" else x,
        )
        return value + (aux.sum() if what == "aux" else 0.0)

    with pytest.raises(TypeError, match=text):
        (jax.jit(jax.grad(total)) if jitted else jax.grad(total))(jnp.float32(2))


def test_what_is_not_differentiated_may_be_closed_over_rows_and_carry():
    scale = jnp.float32(3)

    @jax.jit
    def grads(w, scale, x):
        def fun(w, carry, x):
            return jnp.mean(w * scale * x), (carry + 1, w * x)

        loss = optaccum.microbatched_loss(
            fun, has_aux=True, num_microbatches=2, batch_argnums=2, carry_argnum=1
        )
        return jax.value_and_grad(loss, has_aux=True)(w, jnp.int32(0), x)

    (value, (carry, aux)), g = grads(jnp.float32(2), scale, jnp.arange(4.0))
    assert (float(value), int(carry), float(g)) == (9.0, 2, 4.5)
    np.testing.assert_array_equal(aux, [[0, 4], [2, 6]])


def test_it_may_be_mapped_checkpointed_and_scanned():
    loss = optaccum.microbatched_loss(noisy_fn, num_microbatches=N, **CASES["raw key"][2])
    args = PARAMS, jnp.zeros(()), X, jax.random.key(1)
    expected = jax.grad(loss, has_aux=True)(*args)[0]["w"]
    remat = jax.jit(jax.grad(jax.checkpoint(loss), has_aux=True))(*args)[0]["w"]
    np.testing.assert_array_equal(remat, expected)
    mapped = jax.vmap(jax.grad(loss, has_aux=True), (None, None, 0, None))(
        *args[:2], jnp.stack([X, X]), args[3]
    )
    np.testing.assert_allclose(mapped[0]["w"][1], expected, rtol=2**-7)

    def body(params, _):
        return params, jax.grad(loss, has_aux=True)(params, *args[1:])[0]["w"]

    np.testing.assert_array_equal(jax.lax.scan(body, PARAMS, length=2)[1][1], expected)


# Who differentiates.


def test_nnx_value_and_grad():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    x, y = X[:, :3], jnp.arange(12.0)

    def mse(model, x, y):
        return jnp.mean((model(x)[:, 0] - y) ** 2)

    loss = optaccum.microbatched_loss(mse, num_microbatches=4, batch_argnums=(1, 2))
    found = nnx.jit(nnx.value_and_grad(loss))(model, x, y)
    expected = nnx.value_and_grad(mse)(model, x, y)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5)


def test_equinox_filter_value_and_grad():
    model = eqx.nn.MLP(3, "scalar", 4, 2, key=jax.random.key(0))  # functions are among its leaves
    x, y = X[:, :3], jnp.arange(12.0)

    def mse(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    loss = optaccum.microbatched_loss(mse, num_microbatches=4, batch_argnums=(1, 2))
    found = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, x, y)
    expected = eqx.filter_value_and_grad(mse)(model, x, y)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_devices_reduce_the_gradients_once(weighted):
    mesh = meshes.make_mesh(AxisType.Auto)
    rows = 2 * len(mesh.devices)
    x = jax.random.normal(jax.random.key(5), (rows, 4))
    mask = jnp.where(jnp.arange(rows) % 3 == 0, 0.0, 1.0 + jnp.arange(rows) % 4)
    params = {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}

    def fun(params, x, mask):
        y = jnp.tanh(x @ params["w"] + params["b"])
        total = jnp.sum(mask) if weighted else len(x)
        return jnp.sum((mask if weighted else jnp.ones(len(x)))[:, None] * y) / total

    options = {"weight_fn": tokens} if weighted else {}
    loss = optaccum.microbatched_loss(
        fun, num_microbatches=2, batch_argnums=(1, 2), reduce_axes="data", **options
    )
    with jax.set_mesh(mesh):
        step = jax.shard_map(
            jax.value_and_grad(loss), in_specs=(P(), P("data"), P("data")), out_specs=P()
        )
        program = jax.jit(step).lower(params, x, mask).compile()
        found = program(params, x, mask)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        found,
        jax.value_and_grad(fun)(params, x, mask),
    )


@pytest.mark.parametrize("form", ["mean of losses", "weighed losses", "varying parameters"])
def test_in_shard_map_the_caller_may_reduce_losses_or_gradients(form):
    """Parameters that all devices share get the sum of their gradients, in one reduction."""
    mesh = meshes.make_mesh(AxisType.Auto)
    x = jax.random.normal(jax.random.key(6), (4 * mesh.size, 4))
    w = jnp.ones((4, 3))

    def fun(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def step(loss, w, x):
        if form == "mean of losses":
            return jax.grad(lambda w: jax.lax.pmean(loss(w, x), "data"))(w)
        if form == "weighed losses":
            weight = jax.lax.axis_index("data") + 1.0
            return jax.grad(lambda w: jax.lax.psum(weight * loss(w, x), "data"))(w)
        return jax.lax.pmean(jax.grad(loss)(meshes.vary(w), x), "data")

    def mapped(loss):
        one = functools.partial(step, loss)
        return jax.jit(jax.shard_map(one, in_specs=(P(), P("data")), out_specs=P()))

    with jax.set_mesh(mesh):
        program = mapped(optaccum.microbatched_loss(fun, num_microbatches=4)).lower(w, x).compile()
        found, expected = program(w, x), mapped(fun)(w, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert collectives(program, "all-reduce")[0].count(w.nbytes) == 1


def test_an_object_that_fun_changes_in_place_is_refused():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    loss = optaccum.microbatched_loss(lambda model, x: jnp.mean(model(x)), num_microbatches=2)
    with pytest.raises(TypeError, match=r"`fun` changed argument 0.* in place"):
        nnx.grad(loss)(model, X[:, :3])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_microbatches": 0}, ValueError, "`num_microbatches` must be >= 1"),
        ({"num_microbatches": 5}, ValueError, "does not divide the 12 rows"),
        ({"loss_reduction": "sum"}, ValueError, "needs `weight_fn`"),
        ({"carry_argnum": 0}, ValueError, "needs `has_aux=True`"),
        ({"accumulator_dtype": {"w": jnp.float32}}, TypeError, "is not a dtype"),
        ({"weight_fn": 3}, TypeError, "`weight_fn` must be a function"),
    ],
)
def test_options_that_cannot_be_are_refused(options, error, text):
    options = {"num_microbatches": 2} | options
    with pytest.raises(error, match=text):
        optaccum.microbatched_loss(lambda w, x: jnp.mean(w * x), **options)(1.0, X)
