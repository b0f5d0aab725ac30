"""On eight devices: rows stay where they are, and parameters are reduced once."""

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
PARAMS = {"w": jnp.linspace(-1, 1, 512).reshape(8, 64), "b": jnp.linspace(-1, 1, 64)}
BATCH = {
    "x": jax.random.normal(jax.random.key(0), (ROWS, 8)),
    "y": jax.random.normal(jax.random.key(1), (ROWS, 8)),
}


def _encode(params, batch):
    return {name: jnp.tanh(x @ params["w"] + params["b"]) for name, x in batch.items()}


def _contrast(z):
    similarity = z["x"] @ z["y"].T / 8
    return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity))


def _place(mesh, params=PARAMS):
    return (
        jax.device_put(params, NamedSharding(mesh, P())),
        jax.device_put(BATCH, NamedSharding(mesh, P("data"))),
    )


def _assert_close(actual, expected):
    # Sums over 64 rows, in another order.
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=64 * EPS, atol=64 * EPS)


def _expected():
    return jax.value_and_grad(lambda p: _contrast(_encode(p, BATCH)))(PARAMS)


def _reductions(compiled):
    """Returns the bytes of each reduction of gradients, as often as it runs."""
    of_the_loss = 4 * ROWS**2  # its similarities, and a scalar
    sizes = hlo.collectives(compiled, "all-reduce")[0]
    return [size for size in sizes if 4 * 512 <= size < of_the_loss]


def test_rows_that_are_sharded_stay_where_they_are():
    mesh = make_mesh(AxisType.Auto)
    encoder = jax.jit(optaccum.microbatched(_encode, num_microbatches=4))
    params, batch = _place(mesh)
    compiled = encoder.lower(params, batch).compile()
    assert not hlo.kinds(compiled)
    _assert_close(compiled(params, batch), _encode(PARAMS, BATCH))
    assert all(z.sharding.spec[0] == "data" for z in encoder(params, batch).values())


def test_automatic_sharding():
    mesh = make_mesh(AxisType.Auto)
    encoder = optaccum.microbatched(_encode, num_microbatches=4)
    step = jax.jit(jax.value_and_grad(lambda p, batch: _contrast(encoder(p, batch))))
    _assert_close(step(*_place(mesh)), _expected())


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
    compiled = _mapped(mesh, n, reduce_axes).lower(*_place(mesh)).compile()
    _assert_close(compiled(*_place(mesh)), _expected())
    assert len(_reductions(compiled)) == times
    if times == 1:
        assert sum(_reductions(compiled)) == 4 * (512 + 64)


def test_the_loss_in_shard_map_too():
    mesh = make_mesh(AxisType.Auto)
    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")

    def local(params, batch):
        z = encoder(params, batch)
        everyone = jax.lax.all_gather(z, "data", tiled=True)
        similarity = z["x"] @ everyone["y"].T / 8
        own = jnp.sum(z["x"] * z["y"], axis=1) / 8
        return jax.lax.pmean(jnp.mean(jax.nn.logsumexp(similarity, axis=1) - own), "data")

    loss = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    _assert_close(jax.jit(jax.value_and_grad(loss))(*_place(mesh)), _expected())


def test_products_with_the_hessian_in_shard_map():
    mesh = make_mesh(AxisType.Auto)
    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")

    def product(encoder, params, batch):
        grad = jax.grad(lambda params: _contrast(encoder(params, batch)))
        return jax.jvp(grad, (params,), (params,))[1]

    mapped = jax.shard_map(encoder, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    found = jax.jit(functools.partial(product, mapped))(*_place(mesh))
    _assert_close(found, product(_encode, PARAMS, BATCH))


def test_sums_of_bfloat16_are_reduced_before_they_are_cast():
    mesh = make_mesh(AxisType.Auto)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)

    def loss(encoder, params, batch):
        z = jax.tree.map(lambda x: x.astype(jnp.float32), encoder(params, batch))
        return _contrast(z)

    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")
    mapped = jax.shard_map(encoder, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    ours = jax.jit(jax.grad(functools.partial(loss, mapped)))
    text = ours.lower(*_place(mesh, params)).as_text()
    reductions = [line for line in text.split("stablehlo.all_reduce")[1:]]
    assert reductions
    assert all("tensor<8x64xbf16>" not in line.split("->")[0] for line in reductions)
    expected = jax.grad(functools.partial(loss, _encode))(params, BATCH)
    for a, e in zip(*map(jax.tree.leaves, (ours(*_place(mesh, params)), expected)), strict=True):
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
    expected = jax.grad(functools.partial(loss, encode), (0, 1))(scales, *_place(mesh))
    _assert_close(
        jax.jit(jax.grad(functools.partial(loss, ours), (0, 1)))(scales, *_place(mesh)), expected
    )


def test_without_check_vma_nothing_tells_what_is_shared():
    mesh = make_mesh(AxisType.Auto)
    with pytest.raises(TypeError, match=r"`reduce_axes` names \['data'\].*`check_vma=False`"):
        _mapped(mesh, 4, check_vma=False)(*_place(mesh))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_reduce_axes_outside_shard_map(kind):
    encoder = optaccum.microbatched(_encode, num_microbatches=4, reduce_axes="data")
    with (
        jax.set_mesh(make_mesh(kind)),
        pytest.raises(ValueError, match=r"`reduce_axes` names .*'data'"),
    ):
        jax.jit(encoder)(PARAMS, BATCH)


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
        params, batch = _place(mesh)
        compiled = jax.jit(jax.grad(loss)).lower(params["w"], batch["x"]).compile()
        result = compiled(params["w"], batch["x"])
    expected = jax.grad(plain)(PARAMS["w"], BATCH["x"])
    # Its entries are products of two sums over 64 rows, of cotangents up to 10.
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=10 * 64 * EPS)
    assert _reductions(compiled) == [4 * 512]
