"""Devices that share an optimizer: what they must agree on, and what is refused as no part."""

import functools

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from helpers.meshes import DEVICES, make_mesh, needs_reshard, vary
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from optaccum import accumulate, apply_gradients, skip_not_finite, state_shardings, value_and_grad
import optaccum.flax


@pytest.fixture
def mesh():
    return make_mesh(AxisType.Auto)


def test_members_of_an_ensemble_judge_their_own_weights(mesh):
    """Without `reduce_axes` a weight that is none rejects its device's microbatch."""
    tx = accumulate(2, optax.sgd(1.0))

    def train(params, weights):
        state = tx.init(params)
        for i in range(2):
            grads = jnp.ones_like(params)
            params, state = apply_gradients(tx, grads, state, params, weight=weights[0, i])
        return params

    bad = jnp.array([jnp.inf, jnp.nan, -0.5])
    weights = jnp.ones((DEVICES, 2)).at[1:4, 0].set(bad)
    mapped = jax.shard_map(train, mesh=mesh, in_specs=(P("data"),) * 2, out_specs=P("data"))
    params = jax.jit(mapped)(jnp.zeros((DEVICES, 1)), weights)
    np.testing.assert_array_equal(params[:, 0], [-1, 0, 0, 0, -1, -1, -1, -1])


@pytest.mark.parametrize("release", [None, True])
def test_devices_with_pieces_of_the_parameters_reject_together(release):
    """A NaN in the columns of one device rejects the microbatch for the other columns too."""
    mesh, columns = make_mesh(AxisType.Auto, (4, 2), ("data", "model")), P(None, "model")
    tx = accumulate(1, optax.sgd(0.1), reduce_axes="data", should_skip_update_fn=skip_not_finite)

    def train(params, scale):
        state = tx.init(params)
        for i in range(2):
            grads = vary(jnp.ones_like(params)) * jnp.where(i == 0, scale[0], 1.0)
            params, state = apply_gradients(tx, grads, state, params, release=release)
        return params, state.skipped

    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(columns, P("model")), out_specs=(columns, P())
    )
    params, skipped = jax.jit(mapped)(jnp.zeros((2, 4)), jnp.array([1.0, jnp.nan]))
    np.testing.assert_allclose(params, np.full((2, 4), -0.1), rtol=1e-6)
    assert int(skipped) == 1


def test_an_ensemble_whose_members_have_several_devices():
    """Weights vary over the members too, of which each closes its own windows."""
    mesh = make_mesh(AxisType.Auto, (2, 4), ("member", "data"))
    tx = accumulate(2, optax.sgd(1.0), reduce_axes="data")

    def train(params, weights):
        params, state = params[0], tx.init(params[0])
        for i in range(2):
            grads = vary(jnp.ones_like(params)) * (i + 1)
            params, state = apply_gradients(tx, grads, state, params, weight=weights[0, 0, i])
        return params[None]

    weights = np.ones((2, 4, 2), np.float32)
    weights[1] = 0  # of this member's windows none counts
    weights[0, 0, 1] = 5
    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(P("member"), P("member", "data")), out_specs=P("member")
    )
    params = jax.jit(mapped)(jnp.zeros((2, 3)), weights)
    np.testing.assert_allclose(params[0], np.full(3, -(4 * 1 + 8 * 2) / 12), rtol=1e-6)
    np.testing.assert_array_equal(params[1], np.zeros(3))


def test_parameters_that_are_divided_over_the_axis(mesh):
    """Sums of pieces of different devices would be added to each other."""
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    rows = {"experts": P("data")}
    params = {"experts": jnp.ones((DEVICES, 2))}
    message = r"leaf \['experts'\] varies over \['data'\] of `reduce_axes`.*of their own"
    with pytest.raises(TypeError, match=message):
        jax.shard_map(tx.init, mesh=mesh, in_specs=(rows,), out_specs=P())(params)
    step = value_and_grad(
        lambda params, x: jnp.mean(x @ params["experts"].T),
        num_microbatches=2,
        reduce_axes="data",
    )
    specs = rows, P("data")
    with pytest.raises(TypeError, match=message):
        jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())(params, jnp.ones((16, 2)))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"sharded as .* over \['data'\]"):
        state_shardings(tx, params, rows)


def test_an_axis_of_the_rows_that_was_not_named():
    """JAX sums over it on its own, and nobody would divide."""
    mesh = make_mesh(AxisType.Auto, (2, 4), ("replica", "data"))
    x = jnp.arange(64.0).reshape(16, 4)

    def loss_fn(w, x):
        return jnp.mean((x @ w) ** 2)

    def run(fun, axes):
        step = value_and_grad(fun, num_microbatches=2, reduce_axes=axes)
        specs = P(), P(("replica", "data"))
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P()))(w, x)

    w = jnp.ones(4)
    with pytest.raises(TypeError, match=r"varies over \['replica'\].*`reduce_axes` too"):
        run(loss_fn, "data")
    expected = jax.value_and_grad(loss_fn)(w, x)
    averaged = run(lambda w, x: jax.lax.pmean(loss_fn(w, x), "replica"), "data")
    for actual in (run(loss_fn, ("replica", "data")), averaged):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_carried_is_each_devices_own(mesh, n, weighted):
    def loss_fn(w, stats, x):
        return jnp.mean((x @ w) ** 2), ({"mean": (stats["mean"] + x.mean()) / 2}, ())

    step = value_and_grad(
        loss_fn,
        has_aux=True,
        num_microbatches=n,
        batch_argnums=2,
        carry_argnum=1,
        weight_fn=(lambda w, stats, x: jnp.sum(x > 0)) if weighted else None,
        reduce_axes="data",
    )

    def local(w, stats, x):
        (loss, (stats, _)), grads = step(w, stats, x)
        return loss, stats["mean"][None], jax.lax.pmean(stats["mean"], "data"), grads

    x = jnp.arange(1, 33.0).reshape(16, 2)
    out_specs = P(), P("data"), P(), P()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=out_specs)
    _, own, mean, _ = jax.jit(mapped)(jnp.ones(2), {"mean": jnp.zeros(())}, x)
    expected = np.zeros(DEVICES)
    for i in range(n):
        expected = (expected + x.reshape(DEVICES, 2, 2)[:, i::n].mean(axis=(1, 2))) / 2
    np.testing.assert_allclose(own, expected, rtol=1e-6)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-6)


def test_a_collection_to_overwrite(mesh):
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(())}}

    def step(params):
        state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
        return state.apply_gradients(grads=vary(params)).params

    with pytest.raises(ValueError, match=rf"'{OVERWRITE_WITH_GRADIENT}'.*`reduce_axes`"):
        jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())(params)


def test_specs_where_the_mesh_is_explicit():
    """They are those of `jax.shard_map`, and an `init` that reshards is none of its business."""
    mesh = make_mesh(AxisType.Explicit)
    reshard = getattr(jax, "reshard", None) or jax.sharding.reshard
    plain = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: reshard(p, P("data")), params),
        lambda updates, state, params=None: (updates, state),
    )
    params = jnp.ones((16, 2))
    with jax.set_mesh(mesh):
        assert state_shardings(plain, params, P("data")) == P("data")
        tx = accumulate(2, optax.sgd(0.1, momentum=0.9), reduce_axes="data")
        specs = state_shardings(tx, params, P())
    assert (specs.grad_sum, specs.weight) == (P("data"), P("data"))
    assert specs.inner_state[0].trace == P()


@needs_reshard
def test_what_explicit_sharding_has_no_parts_of():
    mesh = make_mesh(AxisType.Explicit)
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    with jax.set_mesh(mesh):
        params = {"c": jax.device_put(jnp.ones(2, jnp.complex64), NamedSharding(mesh, P()))}
        with pytest.raises(TypeError, match=r"leaf \['c'\] is complex, and JAX cannot"):
            tx.init(params)


@needs_reshard
def test_the_state_of_parameters_that_wait_to_be_reduced():
    mesh = make_mesh(AxisType.Explicit)
    tx = accumulate(2, optax.sgd(0.1, momentum=0.9), reduce_axes="data")
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, P()))
        params = jax.reshard(params, P(None, None, reduced={"data"}))
        shardings = state_shardings(tx, params)
        state = jax.jit(tx.init)(params)
    assert (
        shardings.grad_sum.spec.unreduced == {"data"} == shardings.inner_state[0].trace.spec.reduced
    )
    assert jax.typeof(state.grad_sum).sharding.spec.unreduced == {"data"}


@pytest.mark.skipif(hasattr(jax, "reshard"), reason="this JAX knows unreduced arrays")
def test_a_jax_that_cannot_compute_with_unreduced_arrays():
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    message = r"'data', an Explicit axis.*update JAX"
    with jax.set_mesh(make_mesh(AxisType.Explicit)), pytest.raises(ValueError, match=message):
        tx.init(jnp.ones(2))


@needs_reshard
def test_a_state_of_multi_steps_is_taken_over_unreduced():
    mesh = make_mesh(AxisType.Explicit)
    old = optax.MultiSteps(optax.sgd(0.1), 2)
    tx = accumulate(2, optax.sgd(0.1), reduce_axes="data")
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, P())
        params = jax.device_put(jnp.ones((4, 2)), everywhere)
        grads = jax.device_put(jnp.full((4, 2), 3.0), everywhere)
        _, held = old.update(grads, old.init(params), params)
        state = optaccum.from_multi_steps(tx, held, params)
        grads = jax.reshard(jnp.ones((4, 2)), P(None, None, unreduced={"data"}))
        params, state = apply_gradients(tx, grads, state, params)
    np.testing.assert_allclose(params, np.full((4, 2), 1 - 0.1 * (3 + 1) / 2), rtol=1e-6)
