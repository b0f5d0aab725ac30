"""From the state of `optax.MultiSteps` to ours and back, wherever in a state it is."""

import functools
import inspect

from flax import nnx
from flax.training import train_state
from helpers.meshes import make_mesh, needs_reshard
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

import optaccum
from optaccum import (
    accumulate,
    apply_gradients,
    from_multi_steps,
    get_state,
    to_multi_steps,
)
import optaccum.flax

PARAMS = {"a": jnp.ones(2), "b": jnp.full(3, 2.0), "frozen": jnp.ones(2)}
LABELS = {"a": "a", "b": "b", "frozen": "none"}
INNER = optax.adam(0.1)
OLD = "accumulator_dtype" not in inspect.signature(optax.MultiSteps.__init__).parameters


def grads(i):
    return jax.tree.map(lambda p: p * (0.25 + i % 5), PARAMS)


def multi_steps(k=4, inner=INNER, **options):
    return optax.MultiSteps(inner, k, **options).gradient_transformation()


WRAPPERS = {
    "alone": lambda make: make(),
    "chain": lambda make: optax.chain(optax.clip(100.0), make(), optax.scale(0.5)),
    "chain with a state of its own": lambda make: optax.chain(make(), optax.ema(0.5)),
    "masked": lambda make: optax.masked(make(), {"a": True, "b": True, "frozen": False}),
    "partition": lambda make: optax.partition(
        {"a": make(), "b": make(), "none": optax.set_to_zero()}, LABELS
    ),
    "frozen groups": lambda make: optax.chain(
        optax.clip(100.0),
        optax.partition({"a": make(), "none": optax.set_to_zero()}, {**LABELS, "b": "a"}),
    ),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(lambda rate: make())(rate=0.1),
}


@functools.partial(jax.jit, static_argnums=0)
def update_and_apply(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, state, params, start, stop):
    for i in range(start, stop):
        params, state = update_and_apply(tx, grads(i), state, params)
    return params, state


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("held", [0, 3])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_there_and_back_again_trains_as_before(wrap, held):
    """In mid-window: 4 + held microbatches of one, then ours, then theirs again."""
    old, new = wrap(multi_steps), wrap(functools.partial(accumulate, 4, INNER))
    params, state = train(old, old.init(PARAMS), PARAMS, 0, 4 + held)
    expected, last = train(old, state, params, 4 + held, 12)
    ours = from_multi_steps(new, state, params)
    assert jax.tree.structure(ours) == jax.tree.structure(new.init(params))
    found, ours = train(new, ours, params, 4 + held, 8 + held)
    if held and wrap is not WRAPPERS["alone"]:
        with pytest.raises(ValueError, match="cannot be seen; pass it as `every_k`"):
            to_multi_steps(old, ours, found)
        with pytest.raises(ValueError, match="windows of 3, and would lose or misweight"):
            to_multi_steps(old, ours, found, every_k=3)
    back = to_multi_steps(old, ours, found, every_k=4)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    types = [jax.tree.map(jnp.result_type, tree) for tree in (back, state)]
    assert types[0] == types[1]
    found, back = train(old, back, found, 8 + held, 12)
    assert_close((found, back), (expected, last))


def test_a_shorter_window_of_one_keeps_the_sums_of_a_group():
    old, new = WRAPPERS["masked"](multi_steps), WRAPPERS["masked"](lambda: accumulate(1, INNER))
    params, state = train(old, old.init(PARAMS), PARAMS, 0, 2)
    ours = from_multi_steps(new, state, params)
    _, ours = new.update(grads(2), ours, params)
    assert get_state(ours).released
    mean = np.mean([0.25, 1.25, 2.25])
    np.testing.assert_allclose(get_state(ours).inner_state[0].mu["a"], 0.1 * mean, rtol=1e-6)


@pytest.mark.parametrize("convert", [from_multi_steps, to_multi_steps])
def test_a_replicated_state_has_to_be_unreplicated(convert):
    old, new = multi_steps(), accumulate(4, INNER)
    given, wanted = (old, new) if convert is from_multi_steps else (new, old)
    state = jax.tree.map(lambda x: jnp.stack([x, x]), given.init(PARAMS))
    with pytest.raises(TypeError, match=r"flax\.jax_utils\.unreplicate\(state\)"):
        convert(wanted, state, PARAMS)


def test_the_form_has_to_be_the_same():
    old, new = multi_steps(), accumulate(4, INNER)
    chained = optax.chain(optax.clip(1.0), old).init(PARAMS)
    for tx, state in ((new, chained), (optax.chain(optax.clip(1.0), new), old.init(PARAMS))):
        with pytest.raises(TypeError, match=r"where `state` has MultiStepsState, at (\[1\]|its)"):
            from_multi_steps(tx, state, PARAMS)
    with pytest.raises(TypeError, match="holds no AccumulateState, got tuple"):
        to_multi_steps(old, INNER.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"`state\[1\]\.count`|`state\[1\]|does not fit"):
        from_multi_steps(accumulate(4, optax.sgd(0.1)), old.init(PARAMS), PARAMS)


def test_weights_that_multi_steps_can_express_go_back():
    """0.5 and 1.5 sum to 2: each further microbatch counts 1, in both."""
    tx, old = accumulate(3, INNER), multi_steps(3)
    state = tx.init(PARAMS)
    for i, weight in enumerate((0.5, 1.5)):
        _, state = tx.update(grads(i), state, PARAMS, weight=weight)
    back = to_multi_steps(old, state, PARAMS)
    (ours, _), (theirs, _) = (t.update(grads(2), s, PARAMS) for t, s in ((tx, state), (old, back)))
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("tx", "arguments", "old", "message"),
    [
        (accumulate(4, INNER), {"weight": 3.0}, multi_steps(), r"weights sum to 6 and not to"),
        (
            accumulate(4, INNER, average_args=("value",)),
            {"value": 1.0},
            multi_steps(),
            r"`metrics` name, \('value',\)",
        ),
        (accumulate(4, INNER), {}, multi_steps(2), r"windows of 2, and would lose or misweight"),
        pytest.param(
            accumulate(4, INNER),
            {},
            multi_steps() if OLD else multi_steps(accumulator_dtype=jnp.bfloat16),
            r"its sums are float32, and its accumulator would be bfloat16",
            marks=pytest.mark.skipif(OLD, reason="needs a newer Optax"),
        ),
    ],
)
def test_windows_that_multi_steps_cannot_express_are_refused(tx, arguments, old, message):
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(grads(i), state, PARAMS, **arguments)
    with pytest.raises(ValueError, match=rf"cannot go on with the open window of 2 .*{message}"):
        to_multi_steps(old, state, PARAMS)
    for i in range(2):
        _, state = tx.update(grads(i), state, PARAMS, **arguments)
    assert int(to_multi_steps(old, state, PARAMS).gradient_step) == 1


def test_sums_go_back_whatever_their_weights():
    tx, old = accumulate(3, INNER, use_grad_mean=False), multi_steps(3, use_grad_mean=False)
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(grads(i), state, PARAMS, weight=2.0)
    back = to_multi_steps(old, state, PARAMS, use_grad_mean=False)
    assert_close(back.acc_grads, state.grad_sum)
    assert "to_multi_steps" in optaccum.__all__


# In mid-window, with every length of ours.


DENSE = {"b": jnp.zeros(2, jnp.bfloat16), "w": jnp.ones((8, 2))}


def narrow_grads(i):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
    return {
        "b": jax.random.normal(keys[0], (2,), jnp.bfloat16),
        "w": jax.random.normal(keys[1], (8, 2)),
    }


MODES = pytest.mark.parametrize("use_grad_mean", [True, False], ids=["mean", "sum"])

SMOOTH = optax.adam(0.1, eps=0.1)


def float_grads(i):
    return narrow_grads(i) | {"b": narrow_grads(i)["b"].astype(jnp.float32)}


@functools.cache
def run_of_multi_steps(use_grad_mean):
    """Returns parameters and state before each of eight microbatches."""
    tx = optax.MultiSteps(
        SMOOTH, 4, use_grad_mean=use_grad_mean, should_skip_update_fn=optax.skip_not_finite
    )
    params = DENSE | {"b": jnp.zeros(2)}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for i in range(8):
        seen.append((params, state))
        updates, state = update(float_grads(i), state, params)
        params = optax.apply_updates(params, updates)
    return seen


@MODES
@pytest.mark.parametrize("held", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_an_open_window_of_multi_steps_goes_on(use_grad_mean, held, k):
    """The open window of 4 goes on as one of k, with all that it held."""
    tx = accumulate(
        k, SMOOTH, use_grad_mean=use_grad_mean, should_skip_update_fn=optax.skip_not_finite
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
    updates, _ = SMOOTH.update(total, state.inner_opt_state, params)
    expected = optax.apply_updates(params, updates)
    # A mean that was divided and multiplied again, and up to 6 additions; a step of about 0.1.
    tolerance = 16 * np.finfo(np.float32).eps
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_nothing_is_taken_over_of_a_nan_between_windows():
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


def test_a_linen_train_state_goes_on():
    """As the page on old checkpoints says, and nnx from a constant `every_k` of 1 too."""
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


def test_an_nnx_optimizer_goes_on():
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


def test_what_cannot_be_taken_over_is_refused():
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
    link = optax.TraceState({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"`state\[0\]"):
        from_multi_steps(optax.chain(optax.trace(0.9), tx), (link, state), params)


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
