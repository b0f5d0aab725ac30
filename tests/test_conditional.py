"""Both forms of the conditional compute the same, and their derivatives are those of one batch.

Only GPUs are given the loop. Here it runs on a CPU, where it is slower and no less right.
"""

import functools

from helpers.meshes import make_mesh
from helpers.steps import every_step
import jax
from jax import lax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients

K = 4
X = jax.random.normal(jax.random.key(0), (2 * K, 4, 3))
PARAMS = jnp.arange(1.0, 4.0)


@pytest.fixture(params=["conditional", "loop"])
def form(request, monkeypatch):
    if request.param == "loop":
        monkeypatch.setattr(lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))


def _loss(params, x):
    return jnp.mean((x @ params - 1) ** 2)


def _train(params, rate, step):
    tx = accumulate(K, optax.adam(rate))

    def microbatch(carry, x):
        params, state = carry
        return step(tx, jax.grad(_loss)(params, x), state, params), None

    (params, _), _ = lax.scan(microbatch, (params, tx.init(params)), X)
    return params


def _train_on_full_batches(params, rate):
    tx = optax.adam(rate)
    state = tx.init(params)
    for x in (X[:K], X[K:]):
        updates, state = tx.update(jax.grad(_loss)(params, x.reshape(-1, 3)), state, params)
        params = optax.apply_updates(params, updates)
    return params


@functools.cache
def _on_full_batches():
    """Returns the parameters after both full batches, and their derivatives by all arguments."""
    run = _train_on_full_batches
    return jax.jit(lambda *args: (run(*args), jax.jacrev(run, (0, 1))(*args)))(PARAMS, 0.1)


@functools.cache
def _second_derivative_on_full_batches():
    def loss(rate):
        return jnp.sum(_train_on_full_batches(PARAMS, rate) ** 2)

    return jax.jit(jax.hessian(loss))(0.1)


def _assert_close(found, expected):
    # Some tens of float32 operations, each rounded to 1.2e-7.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@every_step
@pytest.mark.parametrize("differentiate", [jax.jacrev, jax.jacfwd])
def test_meta_gradients_are_those_of_the_full_batch(form, step, differentiate):
    run = functools.partial(_train, step=step)
    found = jax.jit(lambda *args: (run(*args), differentiate(run, (0, 1))(*args)))(PARAMS, 0.1)
    _assert_close(found, _on_full_batches())


@pytest.mark.slow
@every_step
def test_second_derivatives_are_those_of_the_full_batch(form, step):
    def loss(rate):
        return jnp.sum(_train(PARAMS, rate, step) ** 2)

    found = jax.jit(jax.hessian(loss))(0.1)
    np.testing.assert_allclose(found, _second_derivative_on_full_batches(), rtol=1e-5)


@every_step
def test_a_derivative_reaches_a_function_among_the_extra_arguments(form, step):
    """L-BFGS calls its `value_fn` within the release; here it closes over what is differentiated.

    One step of `u - d value_fn / d scale` gives d params / d scale = -1.
    """

    def inner_update(updates, state, params=None, *, value_fn):
        return jax.tree.map(lambda u: -value_fn(u), updates), state

    def train(scale):
        def microbatch(carry, _):
            params, state = carry
            return step(tx, jnp.ones(2), state, params, value_fn=lambda u: scale * u), None

        carry, _ = lax.scan(microbatch, (jnp.zeros(2), tx.init(jnp.zeros(2))), None, length=K)
        return carry[0]

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, inner_update)
    tx = accumulate(K, inner, window_args=("value_fn",))
    np.testing.assert_array_equal(jax.jit(jax.jacrev(train))(2.0), [-1, -1])


@every_step
def test_members_of_an_ensemble_release_by_themselves(form, step):
    tx = accumulate(K, optax.sgd(1.0))

    def member(params, state, release):
        return step(tx, jnp.ones(2), state, params, release=release)

    params = jnp.zeros((2, 2))
    state = jax.vmap(tx.init)(params)
    params, state = jax.jit(jax.vmap(member))(params, state, jnp.array([True, False]))
    np.testing.assert_array_equal(params, [[-1, -1], [0, 0]])
    np.testing.assert_array_equal(state.released, [True, False])


@every_step
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_eight_devices_the_result_is_the_same(form, step, kind):
    tx = accumulate(2, optax.sgd(1.0))
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.zeros(8), jax.NamedSharding(mesh, P("data")))
        grads = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, P("data")))
        state = tx.init(params)
        run = jax.jit(functools.partial(step, tx))
        for _ in range(2):
            params, state = run(grads, state, params)
    np.testing.assert_array_equal(params, -np.arange(8.0))


@every_step
def test_integers_among_the_extra_arguments_may_be_batched(form, step):
    """They have no derivative, but like all else of a trace they belong to it."""

    def inner_update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: u * factor, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, inner_update)
    tx = accumulate(2, inner)

    def member(params, state, factor):
        return step(tx, jnp.ones(2), state, params, factor=factor, release=state.mini_step == 0)

    params, factors = jnp.zeros((2, 2)), jnp.array([2, 3])
    state = jax.vmap(tx.init)(params)
    for run in (jax.vmap(member), jax.jit(jax.vmap(member))):
        np.testing.assert_array_equal(run(params, state, factors)[0], [[2, 2], [3, 3]])


@every_step
def test_nothing_of_a_trace_is_kept(form, step):
    tx = accumulate(K, optax.adam(0.1))
    state = tx.init(PARAMS)
    with jax.checking_leaks():
        jax.jit(lambda *args: step(tx, *args))(PARAMS, state, PARAMS)


def test_one_exported_program_has_both_forms():
    tx = accumulate(K, optax.adam(0.1))
    leaves, tree = jax.tree.flatten((PARAMS, tx.init(PARAMS), PARAMS))

    def run(*leaves):
        return jax.tree.leaves(apply_gradients(tx, *jax.tree.unflatten(tree, leaves)))

    exported = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(*leaves)
    assert "stablehlo.while" in exported.mlir_module()
    for found, expected in zip(exported.call(*leaves), run(*leaves), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
def test_shardings_stay_in_a_branch_unless_they_are_types(kind):
    params, tx = jnp.zeros(8), accumulate(2, optax.sgd(0.1))
    if kind is not None:
        params = jax.device_put(params, jax.NamedSharding(make_mesh(kind), P("data")))
    lowered = jax.jit(functools.partial(apply_gradients, tx)).lower(params, tx.init(params), params)
    assert ("sdy.propagation_barrier" in lowered.as_text()) == (kind is not AxisType.Explicit)
