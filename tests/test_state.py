"""The state: found anywhere, saved and restored at any microbatch, bit for bit, on any devices."""

import os
import pathlib
import signal
import subprocess
import sys

from flax import nnx, serialization
from helpers import resume_program
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
import optax
import orbax.checkpoint as ocp
import pytest

from optaccum import accumulate, apply_gradients, get_state, has_released, state_shardings
import optaccum.flax

LAYER = {"layer": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}}


def test_get_state_refuses_none_and_several():
    two = optax.partition(
        {"a": accumulate(2, optax.sgd(0.1)), "b": accumulate(3, optax.sgd(0.1))},
        {"layer": {"w": "a", "b": "b"}},
    )
    for read in (get_state, has_released):
        with pytest.raises(ValueError, match=r"holds no AccumulateState.*got tuple"):
            read(optax.adam(0.1).init(LAYER))
        with pytest.raises(ValueError, match=r"holds 2 AccumulateStates, at .*'a'.*'b'"):
            read(two.init(LAYER))
    assert get_state(two.init(LAYER).inner_states["a"]).mini_step == 0


# A run that is stopped at any microbatch goes on bit for bit, whatever it was saved with.


DENSE = {"b": jnp.zeros(2, jnp.bfloat16), "w": jnp.ones((8, 2))}


def make_tx(k=3):
    return accumulate(
        k,
        optax.adam(0.1),
        should_skip_update_fn=optax.skip_not_finite,
        average_args=("value",),
    )


def grads(i):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
    return {
        "b": jax.random.normal(keys[0], (2,), jnp.bfloat16),
        "w": jax.random.normal(keys[1], (8, 2)),
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def through_orbax(tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(
            folder / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        )


def through_bytes(tree, folder):
    del folder
    return serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, tree), serialization.to_bytes(tree)
    )


@pytest.mark.parametrize("through", [through_orbax, through_bytes])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_round_trip_at_every_mini_step_changes_no_bit(through, sharded, tmp_path):
    tx, params = make_tx(), DENSE
    if sharded:
        mesh = jax.make_mesh((8,), ("data",))
        place = {"b": jax.P(), "w": jax.P("data")}
        params = jax.device_put(params, jax.tree.map(lambda p: jax.NamedSharding(mesh, p), place))

    @jax.jit
    def step(params, state, grads, value):
        return optaccum.apply_gradients(tx, grads, state, params, value=value)

    state = tx.init(params)
    expected = saved = (params, state)
    for i in range(7):
        g = jax.tree.map(lambda x, i=i: x * jnp.nan if i == 2 else x, grads(i))
        expected = step(*expected, g, jnp.float32(i))
        saved = through(step(*saved, g, jnp.float32(i)), tmp_path / str(i))
        assert_same(saved, expected)
        if sharded and through is through_orbax:
            sums = saved[1].grad_sum["w"]
            placed = jax.NamedSharding(mesh, jax.P("data"))
            assert sums.sharding.is_equivalent_to(placed, sums.ndim)
    assert int(expected[1].gradient_step) == 2
    assert int(expected[1].skipped) == 1


def test_a_round_trip_of_train_states_changes_no_bit(tmp_path):
    tx = accumulate(3, optax.adam(0.1))
    state = optaccum.flax.TrainState.create(apply_fn=None, params=DENSE, tx=tx)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    state = step(step(state, grads(0)), grads(1))
    assert_same(step(through_orbax(state, tmp_path), grads(2)), step(state, grads(2)))
    assert_same(step(through_bytes(state, tmp_path), grads(2)), step(state, grads(2)))

    def make():
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        return model, optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)

    def train(model, optimizer, i):
        x = jax.random.normal(jax.random.key(i), (4, 3))
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))

    pair = make()
    for i in range(2):
        train(*pair, i)
    pure = nnx.to_pure_dict(nnx.state(pair))
    restored = make()
    abstract = nnx.state(restored)
    nnx.replace_by_pure_dict(abstract, through_orbax(pure, tmp_path / "nnx"))
    nnx.update(restored, abstract)
    for i in range(2, 4):
        train(*pair, i)
        train(*restored, i)
    assert_same(jax.tree.leaves(nnx.state(restored)), jax.tree.leaves(nnx.state(pair)))
    assert int(restored[1].gradient_step) == 1


TESTS = pathlib.Path(__file__).parent


def run_and_kill(folder, after):
    """Runs the program; kills it, without mercy, once it has said that it saved that microbatch."""
    process = subprocess.Popen(
        [sys.executable, "-m", resume_program.__name__, str(folder), "11", str(after)],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == f"saved {after}\n":
            process.kill()
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors


@pytest.mark.slow
def test_a_run_that_is_killed_in_mid_window_goes_on_bit_for_bit(tmp_path, capsys):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    resume_program.main(tmp_path / "whole", 11, [])
    run_and_kill(tmp_path / "killed", after=6)
    assert not (tmp_path / "killed" / "params.npz").exists()
    capsys.readouterr()
    resume_program.main(tmp_path / "killed", 11, [])
    assert capsys.readouterr().out.split("\n")[:-1] == [f"saved {i}" for i in range(7, 12)]
    whole, resumed = (np.load(tmp_path / name / "params.npz") for name in ("whole", "killed"))
    assert sorted(whole) == sorted(resumed)
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
    assert float(whole[".opt_state.mini_step"]) == 3


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1), (1, 4), (1, 1)])
def test_a_run_resumes_with_another_k(before, after, tmp_path):
    """Every microbatch counts once, in the window that is open when it comes."""
    params, n = {"w": jnp.ones(2)}, 3
    old, new = (accumulate(k, optax.sgd(1.0)) for k in (before, after))
    state = old.init(params)
    for _ in range(n):
        params, state = apply_gradients(old, {"w": jnp.ones(2)}, state, params)
    params, state = through_orbax((params, state), tmp_path)
    if before == 1 and after > 1:
        with pytest.raises(ValueError, match=r"grad_sum=tx\.init") as error:
            apply_gradients(new, {"w": jnp.ones(2)}, state, params)
        remedy = str(error.value).split("`")[-2]
        state = eval(remedy, {"state": state, "tx": new, "params": params})
    held = int(state.mini_step)
    assert held == n % before
    missing = max(after - held, 1)  # microbatches until the open window closes
    for i in range(missing):
        assert int(state.gradient_step) == n // before, i
        params, state = apply_gradients(new, {"w": jnp.full(2, 5.0)}, state, params)
    assert int(state.gradient_step) == n // before + 1
    mean = (held + 5.0 * missing) / (held + missing)
    np.testing.assert_allclose(params["w"], 1.0 - n // before - mean, rtol=1e-6)


# A run that accumulates parts of sums is saved in mid-window, and goes on on any devices.


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
