"""On eight devices: splitting the batch costs no communication, in auto and explicit sharding."""

import functools

from helpers import hlo
from helpers.meshes import DEVICES, make_mesh, needs_reshard
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import optaccum

ROWS = 64
PARAMS = {"w": jnp.linspace(-1, 1, 512).reshape(8, 64), "b": jnp.zeros(64)}
BATCH = {
    "x": jax.random.normal(jax.random.key(0), (ROWS, 8)),
    "weight": jnp.where(jnp.arange(ROWS) % 4 == 1, 0.0, 1.0 + jnp.arange(ROWS) % 4),
}


def _loss(params, batch):
    errors = jnp.mean(jnp.tanh(batch["x"] @ params["w"] + params["b"]) ** 2, axis=1)
    return jnp.sum(batch["weight"] * errors) / jnp.maximum(jnp.sum(batch["weight"]), 1e-9)


def _weight(params, batch):
    return jnp.sum(batch["weight"])


def _ours(n=4):
    return optaccum.value_and_grad(_loss, num_microbatches=n, weight_fn=_weight)


def _place(mesh):
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    return params, jax.device_put(BATCH, NamedSharding(mesh, P("data")))


def _assert_close(actual):
    expected = jax.value_and_grad(_loss)(PARAMS, BATCH)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_replicated_parameters_need_all_reduces_only(mesh):
    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        compiled = jax.jit(_ours()).lower(params, batch).compile()
        result = compiled(params, batch)
    _assert_close(result)
    assert hlo.kinds(compiled) == {"all-reduce"}
    assert max(hlo.collectives(compiled)[0]) >= PARAMS["w"].nbytes
    # What the batch's axis costs if it is split in the order of its rows.
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data"))

        def in_order(x):
            x = jax.sharding.reshard(x, P()) if mesh.axis_types[0] is AxisType.Explicit else x
            parts = jnp.reshape(x, (4, ROWS // 4, -1))
            return jax.lax.map(jnp.sum, parts)

        split = jax.jit(in_order, in_shardings=sharding).lower(batch["x"]).compile()
    assert "all-gather" in hlo.kinds(split)


def test_sharded_parameters_are_gathered_as_for_the_full_batch(mesh):
    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        params["w"] = jax.device_put(PARAMS["w"], NamedSharding(mesh, P("data", None)))
        compiled = jax.jit(_ours()).lower(params, batch).compile()
        full = jax.jit(jax.value_and_grad(_loss)).lower(params, batch).compile()
        result = compiled(params, batch)
    _assert_close(result)
    assert hlo.kinds(compiled) == hlo.kinds(full)


def test_gradients_keep_the_sharding_of_explicit_parameters():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        params["w"] = jax.device_put(PARAMS["w"], NamedSharding(mesh, P("data", None)))
        for run in (jax.jit(_ours()), _ours()):
            result = run(params, batch)
            _assert_close(result)
            assert jax.tree.map(jax.typeof, result[1]) == jax.tree.map(jax.typeof, params)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_rows_over_two_axes_of_a_mesh(types):
    mesh = make_mesh(types, (4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        batch = jax.device_put(BATCH, NamedSharding(mesh, P(("data", "model"))))
        compiled = jax.jit(_ours(8)).lower(params, batch).compile()
        result = compiled(params, batch)
    _assert_close(result)
    assert hlo.kinds(compiled) == {"all-reduce"}


@needs_reshard
def test_gradients_of_reduced_parameters_are_reduced_once():
    mesh = make_mesh(AxisType.Explicit)

    def step(params, batch):
        # Of `b` JAX has no unreduced gradient: it adds nothing sharded to what is reduced.
        w = jax.reshard(params["w"], P(None, None, reduced={"data"}))
        loss, grads = _ours()({**params, "w": w}, batch)
        return loss, jax.tree.map(lambda g: jax.reshard(g, P()), grads)

    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        compiled = jax.jit(step).lower(params, batch).compile()
        result = compiled(params, batch)
    _assert_close(result)
    # One reduction of the matrix, and in each of the 4 microbatches one of the vector at most.
    assert hlo.kinds(compiled) == {"all-reduce"}
    large = [size for size in hlo.collectives(compiled)[0] if size >= PARAMS["w"].nbytes]
    assert len(large) == 1, "reduced in the loop"


def test_rows_of_a_device_that_do_not_divide():
    mesh = make_mesh(AxisType.Explicit)
    message = (
        r"16 does not divide the 8 rows that a device holds of the 64 in batch leaf argument 1"
    )
    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        for run in (jax.jit(_ours(16)), _ours(16)):
            with pytest.raises(ValueError, match=message):
                run(params, batch)


def test_weights_of_devices_whose_gradients_are_summed(mesh):
    """Replicated parameters: JAX sums their gradients, and no local weight can be right."""

    def local(vary, params, x):
        if vary:
            params = jax.lax.pcast(params, "data", to="varying")
        step = optaccum.value_and_grad(
            lambda params, x: jnp.mean(x @ params["w"]),
            num_microbatches=4,
            weight_fn=lambda params, x: jnp.sum(x > 0),
        )
        weight, (_, grads) = jnp.sum(x > 0), step(params, x)
        total = jax.lax.psum(weight, "data")
        return jax.tree.map(lambda g: jax.lax.psum(weight * g, "data") / total, grads)

    def mapped(vary):
        run = functools.partial(local, vary)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))

    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        params = {"w": params["w"]}
        with pytest.raises(TypeError, match=r"differs between the devices of \['data'\].*pcast"):
            mapped(False)(params, batch["x"])
        if hasattr(jax.lax, "pcast"):
            grads = mapped(True)(params, batch["x"])
            parts = [d[i::4] for d in np.split(np.asarray(BATCH["x"]), DEVICES) for i in range(4)]
            weights = [np.sum(x > 0) for x in parts]
            mean = np.average([x.mean(axis=0) for x in parts], axis=0, weights=weights)
            rows, columns = params["w"].shape
            expected = np.broadcast_to(mean[:, None] / columns, (rows, columns))
            np.testing.assert_allclose(grads["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(mesh, check_vma):
    def local(params, batch):
        loss, grads = optaccum.value_and_grad(_unweighted, num_microbatches=4)(params, batch)
        if check_vma:  # the gradient of replicated parameters is already summed
            grads = jax.tree.map(lambda g: g / DEVICES, grads)
        else:
            grads = jax.lax.pmean(grads, "data")
        return jax.lax.pmean(loss, "data"), grads

    def _unweighted(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        result = jax.jit(mapped)(params, batch["x"])
    expected = jax.value_and_grad(_unweighted)(PARAMS, BATCH["x"])
    for a, e in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
