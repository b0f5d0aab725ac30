"""A run that is stopped at any microbatch goes on bit for bit, whatever it was saved with."""

import functools
import signal
import subprocess
import sys

from flax import nnx, serialization
from flax.training import train_state
from helpers.steps import every_step
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import resume_program

from optaccum import accumulate, from_multi_steps
import optaccum.flax

PARAMS = {"b": jnp.zeros(2, jnp.bfloat16), "w": jnp.ones((8, 2))}


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
def test_a_round_trip_at_every_mini_step(through, sharded, tmp_path):
    tx, params = make_tx(), PARAMS
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


def test_a_round_trip_of_the_flax_train_states(tmp_path):
    tx = accumulate(3, optax.adam(0.1))
    state = optaccum.flax.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
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


def run(folder, kill_after=None):
    """Runs the program; kills it, without mercy, once it has said that it saved that microbatch."""
    command = [sys.executable, resume_program.__file__, str(folder), "11"]
    command += [str(kill_after)] if kill_after else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.strip())
        if line.strip() == f"saved {kill_after}":
            process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == (-signal.SIGKILL if kill_after else 0), errors
    return lines


@pytest.mark.slow
def test_a_run_that_is_killed_in_mid_window_goes_on_bit_for_bit(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    resume_program.main(tmp_path / "whole", 11, [])
    run(tmp_path / "killed", kill_after=2)
    assert not (tmp_path / "killed" / "params.npz").exists()
    run(tmp_path / "killed", kill_after=7)
    lines = run(tmp_path / "killed")
    assert lines == [f"saved {i}" for i in range(8, 12)]
    whole, resumed = (np.load(tmp_path / name / "params.npz") for name in ("whole", "killed"))
    assert sorted(whole) == sorted(resumed)
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
    assert float(whole[".opt_state.mini_step"]) == 3


@every_step
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1), (1, 4), (1, 1)])
def test_resuming_with_another_k(step, before, after, tmp_path):
    """Every microbatch counts once, in the window that is open when it comes."""
    params, n = {"w": jnp.ones(2)}, 3
    old, new = (accumulate(k, optax.sgd(1.0)) for k in (before, after))
    state = old.init(params)
    for _ in range(n):
        params, state = step(old, {"w": jnp.ones(2)}, state, params)
    params, state = through_orbax((params, state), tmp_path)
    if before == 1 and after > 1:
        with pytest.raises(ValueError, match=r"grad_sum=tx\.init") as error:
            step(new, {"w": jnp.ones(2)}, state, params)
        remedy = str(error.value).split("`")[-2]
        state = eval(remedy, {"state": state, "tx": new, "params": params})
    held = int(state.mini_step)
    assert held == n % before
    missing = max(after - held, 1)  # microbatches until the open window closes
    for i in range(missing):
        assert int(state.gradient_step) == n // before, i
        params, state = step(new, {"w": jnp.full(2, 5.0)}, state, params)
    assert int(state.gradient_step) == n // before + 1
    mean = (held + 5.0 * missing) / (held + missing)
    np.testing.assert_allclose(params["w"], 1.0 - n // before - mean, rtol=1e-6)


MODES = pytest.mark.parametrize("use_grad_mean", [True, False], ids=["mean", "sum"])


INNER = optax.adam(0.1, eps=0.1)


def float_grads(i):
    return grads(i) | {"b": grads(i)["b"].astype(jnp.float32)}


@functools.cache
def run_of_multi_steps(use_grad_mean):
    """Returns parameters and state before each of eight microbatches."""
    tx = optax.MultiSteps(
        INNER, 4, use_grad_mean=use_grad_mean, should_skip_update_fn=optax.skip_not_finite
    )
    params = PARAMS | {"b": jnp.zeros(2)}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for i in range(8):
        seen.append((params, state))
        updates, state = update(float_grads(i), state, params)
        params = optax.apply_updates(params, updates)
    return seen


@MODES
@pytest.mark.parametrize("held", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_coming_from_multi_steps(use_grad_mean, held, k):
    """The open window of 4 goes on as one of k, with all that it held."""
    tx = accumulate(
        k, INNER, use_grad_mean=use_grad_mean, should_skip_update_fn=optax.skip_not_finite
    )
    params, state = run_of_multi_steps(use_grad_mean)[4 + held]
    ours = from_multi_steps(tx, state, params, use_grad_mean=use_grad_mean)
    assert (int(ours.mini_step), int(ours.gradient_step)) == (held, 1)
    assert jax.tree.structure(ours.skip_state) == jax.tree.structure(state.skip_state)
    assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(ours))

    n = max(k, held + 1)  # microbatches of the window in the end
    window = [float_grads(i) for i in range(4, 4 + n)]
    new, step = params, jax.jit(functools.partial(optaccum.apply_gradients, tx))
    for g in window[held:]:
        assert not ours.released
        new, ours = step(g, ours, new)
    assert ours.released
    scale = 1 / n if use_grad_mean else 1
    total = jax.tree.map(lambda *g: scale * sum(np.asarray(x, np.float64) for x in g), *window)
    total = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), total)
    updates, _ = INNER.update(total, state.inner_opt_state, params)
    expected = optax.apply_updates(params, updates)
    # A mean that was divided and multiplied again, and up to 6 additions; a step of about 0.1.
    tolerance = 16 * np.finfo(np.float32).eps
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_coming_from_multi_steps_that_nan_has_poisoned():
    """`optax.MultiSteps` keeps a NaN for ever; between windows nothing of it is taken over."""
    old, tx = optax.MultiSteps(optax.sgd(1.0), 2), accumulate(2, optax.sgd(1.0))
    params, state = {"w": jnp.ones(2)}, None
    state = old.init(params)
    for value in (jnp.nan, 1.0):
        _, state = old.update({"w": jnp.full(2, value)}, state, params)
    state = from_multi_steps(tx, state, params)
    for _ in range(2):
        params, state = optaccum.apply_gradients(tx, {"w": jnp.ones(2)}, state, params)
    np.testing.assert_array_equal(params["w"], np.zeros(2))


def test_flax_train_states_coming_from_multi_steps():
    """As the documentation of `optaccum.flax` says, and nnx from a constant `every_k` of 1 too."""
    old_tx, tx = optax.MultiSteps(optax.adam(0.1), 4), accumulate(4, optax.adam(0.1))
    old = train_state.TrainState.create(
        apply_fn=lambda: None, params={"w": jnp.ones(2)}, tx=old_tx.gradient_transformation()
    )
    for _ in range(6):
        old = old.apply_gradients(grads={"w": jnp.ones(2)})
    state = optaccum.flax.TrainState.create(apply_fn=lambda: None, params=old.params, tx=tx)
    opt_state = from_multi_steps(tx, old.opt_state, old.params)
    state = state.replace(step=old.step, tx=tx, opt_state=opt_state)
    for _ in range(2):
        state, old = (s.apply_gradients(grads={"w": jnp.full(2, 3.0)}) for s in (state, old))
    assert (int(state.step), int(state.gradient_step), bool(state.has_released)) == (8, 2, True)
    np.testing.assert_allclose(state.params["w"], old.params["w"], rtol=1e-6)


def test_nnx_optimizers_coming_from_elsewhere():
    pure = optaccum.flax._as_arrays
    models = [nnx.Linear(3, 1, rngs=nnx.Rngs(0)) for _ in range(3)]
    tx, old_tx = accumulate(4, optax.adam(0.1)), optax.MultiSteps(optax.adam(0.1), 4)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(3))[0])(model))

    def assert_close(a, b):  # two steps, and the rounding of optax.MultiSteps' running mean
        leaves = (jax.tree.leaves(nnx.state(model)) for model in (a, b))
        for x, y in zip(*leaves, strict=True):
            np.testing.assert_allclose(x, y, rtol=4 * np.finfo(np.float32).eps)

    old = nnx.Optimizer(models[0], old_tx.gradient_transformation(), wrt=nnx.Param)
    whole = optaccum.flax.Optimizer(models[1], tx, wrt=nnx.Param)
    train(models[0], old, 6)
    train(models[1], whole, 8)
    with pytest.raises(ValueError, match=r"does not fit `params`.*nnx\.as_pure"):
        from_multi_steps(tx, old.opt_state, pure(nnx.state(models[0], nnx.Param)))
    params = pure(nnx.state(models[0], nnx.Param))
    optimizer = optaccum.flax.Optimizer(models[0], tx, wrt=nnx.Param)
    state = from_multi_steps(tx, pure(old.opt_state), params)
    nnx.update(optimizer.opt_state, nnx.state(state))
    train(models[0], optimizer, 2)
    assert_close(models[0], models[1])
    assert jax.tree.structure(nnx.state(optimizer)) == jax.tree.structure(nnx.state(whole))

    one = optaccum.flax.Optimizer(models[2], accumulate(1, optax.adam(0.1)), wrt=nnx.Param)
    train(models[2], one, 1)
    new = optaccum.flax.Optimizer(models[2], tx, wrt=nnx.Param)
    nnx.update(new.opt_state, nnx.state(one.opt_state))
    train(models[2], new, 4)
    assert_close(models[2], models[1])
    new.tx = accumulate(2, optax.adam(0.1))
    train(models[2], new, 2)
    assert (int(new.gradient_step), bool(new.has_released)) == (3, True)


def test_what_cannot_be_taken_over_from_multi_steps():
    params = {"w": jnp.ones(2)}
    old = optax.MultiSteps(optax.adam(0.1), 4)
    state = old.init(params)
    _, held = old.update(params, state, params)
    with pytest.raises(TypeError, match=r"`state` must be an optax.MultiStepsState"):
        from_multi_steps(accumulate(4, optax.adam(0.1)), {"mini_step": 0}, params)
    with pytest.raises(TypeError, match="not a transformation around it"):
        from_multi_steps(optax.chain(accumulate(4, optax.adam(0.1))), state, params)
    with pytest.raises(ValueError, match=r"build `tx` with the inner optimizer"):
        from_multi_steps(accumulate(4, optax.sgd(0.1)), state, params)
    averaging = accumulate(4, optax.adam(0.1), average_args=("value",))
    with pytest.raises(ValueError, match=r"average_args.*'value'"):
        from_multi_steps(averaging, held, params)
    assert from_multi_steps(averaging, state, params).mini_step == 0
    tx = accumulate(4, optax.adam(0.1))
    for other in ({"w": jnp.ones(3)}, {"v": jnp.ones(2)}, {"w": jnp.ones(())}):
        with pytest.raises(ValueError, match=r"the accumulator in `state` does not fit `params`"):
            from_multi_steps(tx, state, other)
    with pytest.raises(TypeError, match="pass the one inside it"):
        from_multi_steps(tx, (optax.EmptyState(), state), params)
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(lambda state: from_multi_steps(tx, state, params))(state)
    wrong = held._replace(acc_grads={"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"leaf \['w'\] is \(3,\) in the first and \(2,\)"):
        from_multi_steps(accumulate(4, optax.adam(0.1)), wrong, params)
