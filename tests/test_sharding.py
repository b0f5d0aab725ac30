"""On several devices: the state lies where its parameters lie, and a window means the same."""

import functools

from helpers.meshes import DEVICES
from helpers.steps import every_step, update_and_apply
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import accumulate

PARAMS = {"w": np.arange(32, dtype=np.float32).reshape(8, 4) / 32, "b": np.ones(4, np.float32)}
SPECS = {"w": P("data", None), "b": P(None)}
BATCH = jax.random.normal(jax.random.key(0), (4, 16, 8))


def _loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


def _place(mesh):
    return jax.device_put(PARAMS, {name: NamedSharding(mesh, s) for name, s in SPECS.items()})


def _specs(tree):
    return {name: x.sharding.spec for name, x in tree.items()}


@functools.cache
def _expected():
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optax.adam(0.1).init(params)
    for i in (0, 2):
        grads = jax.grad(_loss)(params, BATCH[i : i + 2].reshape(32, 8))
        params, state = update_and_apply(optax.adam(0.1), grads, state, params)
    return params


def _assert_close(actual, expected):
    # Adam divides by the root of a second moment that differs in its last bits.
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5)


def test_init_follows_the_parameters_eagerly(mesh):
    with jax.set_mesh(mesh):
        params = _place(mesh)
        state = accumulate(2, optax.adam(0.1)).init(params)
    assert _specs(state.grad_sum) == _specs(params)
    assert _specs(state.inner_state[0].mu) == _specs(params)


@pytest.mark.parametrize("mesh", [AxisType.Explicit], indirect=True)
def test_init_under_jit_follows_where_sharding_is_explicit(mesh):
    with jax.set_mesh(mesh):
        params = _place(mesh)
        state = jax.jit(accumulate(2, optax.adam(0.1)).init)(params)
        assert [jax.typeof(x) for x in jax.tree.leaves(state.grad_sum)] == [
            jax.typeof(x) for x in jax.tree.leaves(params)
        ]


@every_step
def test_sharded_training_equals_the_full_batch(mesh, step):
    tx = accumulate(2, optax.adam(0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, weight):
        grads = jax.grad(_loss)(params, x)
        return step(tx, grads, state, params, weight=weight)

    with jax.set_mesh(mesh):
        params = _place(mesh)
        state = tx.init(params)
        for x in BATCH:
            x = jax.device_put(x, NamedSharding(mesh, P(None, None)))
            params, state = train_step(params, state, x, 2.0)
    for tree in (params, state.grad_sum, state.inner_state[0].mu):
        for name, spec in SPECS.items():
            wanted = NamedSharding(mesh, spec)
            assert tree[name].sharding.is_equivalent_to(wanted, tree[name].ndim)
    _assert_close(params, _expected())


@every_step
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(mesh, step, check_vma):
    tx = accumulate(2, optax.adam(0.1))

    def train_step(params, state, x):
        grads = jax.grad(_loss)(params, x)
        if check_vma:  # the gradient of replicated parameters is already summed
            grads = jax.tree.map(lambda g: g / DEVICES, grads)
        else:
            grads = jax.lax.pmean(grads, "data")
        return step(tx, grads, state, params)

    mapped = jax.shard_map(
        train_step,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        replicated = NamedSharding(mesh, P())
        params = jax.device_put(PARAMS, replicated)
        state = jax.device_put(tx.init(params), replicated)
        for x in BATCH:
            x = jax.device_put(x, NamedSharding(mesh, P("data")))
            params, state = jax.jit(mapped)(params, state, x)
    _assert_close(params, _expected())
