"""A run that accumulates parts of sums is saved in mid-window, and goes on on any devices."""

from helpers.meshes import DEVICES, make_mesh, needs_reshard
from helpers.tokens import (
    INNER,
    MASK,
    PARAMS,
    K,
    X,
    assert_close,
    explicit_step,
    full_batches,
    loss_fn,
    make_programs,
)
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp
import pytest

from optaccum import accumulate, state_shardings

HELD = K + 2  # microbatches before the save: one window, and two thirds of the next
AVERAGING = accumulate(K, INNER, reduce_axes="data", average_args=("value",))


def save(tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()


def restore(folder, template):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", template)


def train(step, params, state, start=0, end=2 * K):
    for x, mask in zip(X[start:end], MASK[start:end], strict=True):
        params, state = step(params, state, np.asarray(x), np.asarray(mask))
    return params, state


def fold(state, devices):
    """Returns the state of `jax.shard_map` with all parts on the first of so many devices."""

    def first(x):
        return jnp.zeros((devices, *x.shape[1:]), x.dtype).at[0].set(x.sum(axis=0))

    parts = {name: getattr(state, name) for name in ("weight", "grad_sum", "arg_sums")}
    return state._replace(**jax.tree.map(first, parts))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run in `jax.shard_map`: its step, where it stopped, the result, and the checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    init, step = make_programs(AVERAGING, make_mesh(AxisType.Auto))
    held = train(step, jax.tree.map(jnp.copy, PARAMS), init(PARAMS), end=HELD)
    save(held, folder)
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, held)
    return step, template, train(step, *held, start=HELD), folder


def test_parts_in_shard_map_go_on_bit_for_bit_on_as_many_devices(stopped):
    step, template, expected, folder = stopped
    params, state = restore(folder, template)
    assert state.mini_step == HELD % K
    assert state.grad_sum["w"].sharding.spec == P("data")
    # Each device has its own, none the sum.
    assert np.ptp(np.asarray(state.grad_sum["w"]), axis=0).max() > 0
    actual = train(step, params, state, start=HELD)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert_close(actual[0], full_batches())


@pytest.mark.parametrize("devices", [4, 1])
def test_parts_in_shard_map_go_on_on_other_devices(stopped, devices):
    _, template, (_, expected), folder = stopped
    mesh = make_mesh(AxisType.Auto, devices)
    everywhere = NamedSharding(mesh, P())
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), template
    )
    params, state = restore(folder, template)
    _, step = make_programs(AVERAGING, mesh)
    params, state = train(step, params, fold(state, devices), start=HELD)
    assert state.grad_sum["w"].shape == (devices, *PARAMS["w"].shape)
    assert_close(params, full_batches())
    for name in ("weight", "arg_sums"):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a.sum(), e.sum(), rtol=1e-5),
            getattr(state, name),
            getattr(expected, name),
        )


def whole(tree):
    """Returns the tree with every sum reduced, under explicit sharding."""
    return jax.tree.map(lambda x: jax.reshard(x, P(*jax.typeof(x).sharding.spec.partitions)), tree)


def place(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def start_explicit(mesh):
    """Returns the step, parameters and a state to begin with, and how that is sharded."""
    tx = accumulate(K, INNER, reduce_axes="data")
    step = explicit_step(tx, loss_fn)
    params = place(mesh, jax.tree.map(np.asarray, PARAMS), P())
    return (
        lambda *args: step(*args[:2], *place(mesh, args[2:], P("data"))),
        params,
        tx.init(params),
        state_shardings(tx, params),
    )


@pytest.fixture(scope="module")
def stopped_explicit(tmp_path_factory):
    """The checkpoint of a run under explicit sharding, and the sums in it."""
    folder = tmp_path_factory.mktemp("stopped")
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        step, params, fresh, _ = start_explicit(mesh)
        params, state = train(step, params, fresh, end=HELD)
        with pytest.raises((NotImplementedError, jax.errors.JaxRuntimeError), match="nreduced"):
            np.asarray(state.grad_sum["w"])  # no device's part is taken for the sum
        save((params, whole(state)), folder)
    return folder


@needs_reshard
@pytest.mark.parametrize("devices", [DEVICES, 1])
def test_unreduced_sums_are_saved_whole_and_go_on_on_any_devices(request, devices):
    folder = request.getfixturevalue("stopped_explicit")
    mesh = make_mesh(AxisType.Explicit, devices)
    with jax.set_mesh(mesh):
        step, params, fresh, shardings = start_explicit(mesh)
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, whole(fresh)))
        params, state = restore(folder, template)
        assert state.mini_step == HELD % K
        sums = jax.tree.map(np.asarray, state.grad_sum)
        state = jax.reshard(state, shardings)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, fresh)
        jax.tree.map(np.testing.assert_array_equal, whole(state.grad_sum), sums)
        params, state = train(step, params, state, start=HELD)
    assert int(state.gradient_step) == 2
    assert_close(params, full_batches())
