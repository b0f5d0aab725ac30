"""From the state of `optax.MultiSteps` to ours and back, wherever in a state it is."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate, from_multi_steps, get_state, to_multi_steps

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
def step(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, state, params, start, stop):
    for i in range(start, stop):
        params, state = step(tx, grads(i), state, params)
    return params, state


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("held", [0, 3])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_there_and_back_again(wrap, held):
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


def test_weights_that_multi_steps_can_express():
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
def test_windows_that_multi_steps_cannot_express(tx, arguments, old, message):
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(grads(i), state, PARAMS, **arguments)
    with pytest.raises(ValueError, match=rf"cannot go on with the open window of 2 .*{message}"):
        to_multi_steps(old, state, PARAMS)
    for i in range(2):
        _, state = tx.update(grads(i), state, PARAMS, **arguments)
    assert int(to_multi_steps(old, state, PARAMS).gradient_step) == 1


def test_sums_need_no_weights():
    tx, old = accumulate(3, INNER, use_grad_mean=False), multi_steps(3, use_grad_mean=False)
    state = tx.init(PARAMS)
    for i in range(2):
        _, state = tx.update(grads(i), state, PARAMS, weight=2.0)
    back = to_multi_steps(old, state, PARAMS, use_grad_mean=False)
    assert_close(back.acc_grads, state.grad_sum)
    assert "to_multi_steps" in optaccum.__all__
