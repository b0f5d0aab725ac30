"""On eight devices: rows stay where they are, and splitting them costs no communication."""

import functools

from helpers import hlo
from helpers.coupled import EPS
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
def test_rows_over_two_axes_of_a_mesh_need_all_reduces_only(types):
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


def test_rows_of_a_device_that_do_not_divide_are_refused():
    mesh = make_mesh(AxisType.Explicit)
    message = (
        r"16 does not divide the 8 rows that a device holds of the 64 in batch leaf argument 1"
    )
    with jax.set_mesh(mesh):
        params, batch = _place(mesh)
        for run in (jax.jit(_ours(16)), _ours(16)):
            with pytest.raises(ValueError, match=message):
                run(params, batch)


@needs_reshard
def test_devices_that_divide_columns_do_not_divide_rows():
    mesh = make_mesh(AxisType.Explicit, (2, 4), ("data", "model"))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data", "model")))
        run = optaccum.value_and_grad(lambda w, x: jnp.mean((w * x) ** 2), num_microbatches=4)
        np.testing.assert_allclose(jax.jit(run)(jnp.ones(()), x), (1.0, 2.0), rtol=1e-6)


def test_local_weights_of_summed_gradients_are_refused(mesh):
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
def test_value_and_grad_in_shard_map_equals_the_full_batch(mesh, check_vma):
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


# `microbatched`: parameters are reduced once.

PARAMETERS = {"w": jnp.linspace(-1, 1, 512).reshape(8, 64), "b": jnp.linspace(-1, 1, 64)}
PAIRS = {
    "x": jax.random.normal(jax.random.key(0), (ROWS, 8)),
    "y": jax.random.normal(jax.random.key(1), (ROWS, 8)),
}


def _encode(params, batch):
    return {name: jnp.tanh(x @ params["w"] + params["b"]) for name, x in batch.items()}


def _contrast(z):
    similarity = z["x"] @ z["y"].T / 8
    return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity))


def _place_pairs(mesh, params=PARAMETERS):
    return (
        jax.device_put(params, NamedSharding(mesh, P())),
        jax.device_put(PAIRS, NamedSharding(mesh, P("data"))),
    )


def _assert_all_close(actual, expected):
    # Sums over 64 rows, in another order.
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=64 * EPS, atol=64 * EPS)


def _expected():
    return jax.value_and_grad(lambda p: _contrast(_encode(p, PAIRS)))(PARAMETERS)


def _reductions(compiled):
    """Returns the bytes of each reduction of gradients, as often as it runs."""
    of_the_loss = 4 * ROWS**2  # its similarities, and a scalar
    sizes = hlo.collectives(compiled, "all-reduce")[0]
    return [size for size in sizes if 4 * 512 <= size < of_the_loss]


def test_rows_that_are_sharded_stay_where_they_are():
    mesh = make_mesh(AxisType.Auto)
    encoder = jax.jit(optaccum.microbatched(_encode, num_microbatches=4))
    params, batch = _place_pairs(mesh)
    compiled = encoder.lower(params, batch).compile()
    assert not hlo.kinds(compiled)
    _assert_all_close(compiled(params, batch), _encode(PARAMETERS, PAIRS))
    assert all(z.sharding.spec[0] == "data" for z in encoder(params, batch).values())


def test_microbatched_under_automatic_sharding_equals_the_full_batch():
    mesh = make_mesh(AxisType.Auto)
    encoder = optaccum.microbatched(_encode, num_microbatches=4)
    step = jax.jit(jax.value_and_grad(lambda p, batch: _contrast(encoder(p, batch))))
    _assert_all_close(step(*_place_pairs(mesh)), _expected())


def _mapped(mesh, n, reduce_axes="data", **options):
    """The loss outside of `jax.shard_map`: JAX gathers what it needs."""
    encoder = optaccum.microbatched(_encode, num_microbatches=n, reduce_axes=reduce_axes)
    encoder = jax.shard_map(
        encoder, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), **options
    )
    return jax.jit(jax.value_and_grad(lambda p, batch: _contrast(encoder(p, batch))))


@pytest.mark.parametrize(
    ("n", "reduce_axes", "times"), [(4, "data", 1), (1, "data", 1), (4, (), 4)]
)
def test_shard_map_reduces_parameters_once(n, reduce_axes, times):
    mesh = make_mesh(AxisType.Auto)
    compiled = _mapped(mesh, n, reduce_axes).lower(*_place_pairs(mesh)).compile()
    _assert_all_close(compiled(*_place_pairs(mesh)), _expected())
    assert len(_reductions(compiled)) == times
    if times == 1:
        assert sum(_reductions(compiled)) == 4 * (512 + 64)


def test_the_loss_may_be_in_shard_map_too():
    mesh = make_mesh(AxisType.Auto)
    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")

    def local(params, batch):
        z = encoder(params, batch)
        everyone = jax.lax.all_gather(z, "data", tiled=True)
        similarity = z["x"] @ everyone["y"].T / 8
        own = jnp.sum(z["x"] * z["y"], axis=1) / 8
        return jax.lax.pmean(jnp.mean(jax.nn.logsumexp(similarity, axis=1) - own), "data")

    loss = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    _assert_all_close(jax.jit(jax.value_and_grad(loss))(*_place_pairs(mesh)), _expected())


def test_products_with_the_hessian_in_shard_map_are_those_of_the_full_batch():
    mesh = make_mesh(AxisType.Auto)
    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")

    def product(encoder, params, batch):
        grad = jax.grad(lambda params: _contrast(encoder(params, batch)))
        return jax.jvp(grad, (params,), (params,))[1]

    mapped = jax.shard_map(encoder, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    found = jax.jit(functools.partial(product, mapped))(*_place_pairs(mesh))
    _assert_all_close(found, product(_encode, PARAMETERS, PAIRS))


def test_sums_of_bfloat16_are_reduced_before_they_are_cast():
    mesh = make_mesh(AxisType.Auto)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMETERS)

    def loss(encoder, params, batch):
        z = jax.tree.map(lambda x: x.astype(jnp.float32), encoder(params, batch))
        return _contrast(z)

    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")
    mapped = jax.shard_map(encoder, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    ours = jax.jit(jax.grad(functools.partial(loss, mapped)))
    text = ours.lower(*_place_pairs(mesh, params)).as_text()
    reductions = [line for line in text.split("stablehlo.all_reduce")[1:]]
    assert reductions
    assert all("tensor<8x64xbf16>" not in line.split("->")[0] for line in reductions)
    expected = jax.grad(functools.partial(loss, _encode))(params, PAIRS)
    for a, e in zip(
        *map(jax.tree.leaves, (ours(*_place_pairs(mesh, params)), expected)), strict=True
    ):
        assert a.dtype == jnp.bfloat16
        # A product with 8 bits per microbatch of a device, and one rounding of each result.
        scale = float(jnp.max(jnp.abs(e)))
        np.testing.assert_allclose(np.float32(a), np.float32(e), atol=4 * 2.0**-8 * scale)


def test_what_devices_do_not_share_is_not_reduced():
    """A leaf that varies over the axes keeps each device's own gradient, as JAX would have it."""
    mesh = make_mesh(AxisType.Auto)
    scales = jnp.arange(1.0, DEVICES + 1)

    def loss(encoder, scales, params, batch):
        specs = P("data"), P(), P("data")
        mapped = jax.shard_map(encoder, mesh=mesh, in_specs=specs, out_specs=P("data"))
        return jnp.mean(mapped(scales, params, batch)["x"] ** 2)

    def encode(scale, params, batch):
        return {"x": scale * _encode(params, batch)["x"]}

    ours = optaccum.microbatched(encode, num_microbatches=2, batch_argnums=2, reduce_axes="data")
    expected = jax.grad(functools.partial(loss, encode), (0, 1))(scales, *_place_pairs(mesh))
    _assert_all_close(
        jax.jit(jax.grad(functools.partial(loss, ours), (0, 1)))(scales, *_place_pairs(mesh)),
        expected,
    )


def test_reduce_axes_without_check_vma_are_refused():
    mesh = make_mesh(AxisType.Auto)
    with pytest.raises(TypeError, match=r"`reduce_axes` names \['data'\].*`check_vma=False`"):
        _mapped(mesh, 4, check_vma=False)(*_place_pairs(mesh))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_reduce_axes_outside_shard_map_are_refused(kind):
    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")
    with (
        jax.set_mesh(make_mesh(kind)),
        pytest.raises(ValueError, match=r"`reduce_axes` names .*'data'"),
    ):
        jax.jit(encoder)(PARAMETERS, PAIRS)


@needs_reshard
def test_explicit_sharding_reduces_once_if_parameters_are_marked():
    mesh = make_mesh(AxisType.Explicit)
    encoder = optaccum.microbatched(lambda w, x: jnp.tanh(x @ w), num_microbatches=4)

    def loss(w, x):
        z = encoder(jax.reshard(w, P(None, None, reduced={"data"})), x)
        return jnp.mean(jnp.einsum("bi,bj->ij", z, z, out_sharding=P(None, None)) ** 2)

    def plain(w, x):
        z = jnp.tanh(x @ w)
        return jnp.mean((z.T @ z) ** 2)

    with jax.set_mesh(mesh):
        params, batch = _place_pairs(mesh)
        compiled = jax.jit(jax.grad(loss)).lower(params["w"], batch["x"]).compile()
        result = compiled(params["w"], batch["x"])
    expected = jax.grad(plain)(PARAMETERS["w"], PAIRS["x"])
    # Its entries are products of two sums over 64 rows, of cotangents up to 10.
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=10 * 64 * EPS)
    assert _reductions(compiled) == [4 * 512]
