"""`apply_gradients`: for any transformation and module; one that is misplaced is warned of."""

import dataclasses
import functools
from typing import Any, assert_type
import warnings

import equinox as eqx
from flax import nnx
from helpers.steps import every_step
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import accumulate, apply_gradients, value_and_grad
import optaccum.flax

PARAMS = {"a": jnp.ones(2), "b": jnp.zeros(3)}


def _grads(a, b):
    return {
        "a": None if a is None else jnp.full(2, a),
        "b": None if b is None else jnp.full(3, b),
    }


@every_step
def test_a_transformation_with_a_tuple_for_its_state_is_not_a_chain(step):
    inner = accumulate(2, optax.sgd(1.0))

    def update(updates, state, params=None):
        updates, inner_state = inner.update(updates, state[1], params)
        return jax.tree.map(lambda u, p: u - 0.5 * p, updates, params), (state[0], inner_state)

    tx = optax.GradientTransformation(lambda params: (jnp.zeros(()), inner.init(params)), update)
    params, _ = step(tx, _grads(1.0, 1.0), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(params["a"], np.full(2, 0.5))


@every_step
@pytest.mark.parametrize("jit", [False, True])
def test_a_chain_whose_last_link_only_wraps_an_accumulate(step, jit):
    inner = accumulate(4, optax.sgd(1.0))

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u, p: u - 0.5 * p, updates, params), state

    tx = optax.chain(optax.clip(9.0), optax.GradientTransformationExtraArgs(inner.init, update))
    step = functools.partial(step, tx)
    params, _ = (jax.jit(step) if jit else step)(_grads(1.0, 1.0), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(params["a"], np.full(2, 0.5))


def test_extra_arguments_that_a_transformation_does_not_take_are_refused():
    tx = optax.scale(-0.1)
    with pytest.raises(TypeError, match="weight"):
        apply_gradients(tx, _grads(1.0, 1.0), tx.init(PARAMS), PARAMS, weight=3)


@pytest.mark.parametrize("wrap", [lambda f: lambda g: g, functools.wraps], ids=["plain", "wraps"])
def test_a_replaced_update_is_the_one_that_runs(wrap):
    tx = accumulate(2, optax.sgd(1.0))
    calls = []

    @wrap(tx.update)
    def update(*args, **kwargs):
        calls.append(args)
        return tx.update(*args, **kwargs)

    replaced = tx._replace(update=update)
    apply_gradients(replaced, _grads(1.0, 1.0), tx.init(PARAMS), PARAMS)
    assert len(calls) == 1


def test_arguments_of_apply_gradients_may_be_named_as_ours_are():
    def update(g, state, params=None, *, grads, tx, opt_state, **_):
        return g * grads * tx * opt_state, state

    tx = accumulate(1, optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
    extra_args = {"grads": 2.0, "tx": 3.0, "opt_state": 5.0}
    params, _ = apply_gradients(tx, jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2), **extra_args)
    np.testing.assert_array_equal(params, np.full(2, 30.0))


# A type checker shows users the type of their own parameters; the gate runs it on this file.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    w: jax.Array


def _loss(model: Model, batch: jax.Array) -> jax.Array:
    return jnp.mean((batch @ model.w) ** 2)


def test_parameters_keep_their_type():
    model, batch = Model(jnp.ones(2)), jnp.ones((4, 2))
    loss, grads = value_and_grad(_loss, num_microbatches=2)(model, batch)
    assert_type(grads, Model)
    summed = value_and_grad(
        _loss, num_microbatches=2, loss_reduction="sum", weight_fn=lambda *_: 1, batch_argnums=None
    )
    assert_type(summed(model, batch)[1], Model)
    tx = accumulate(2, optax.sgd(0.1))
    new, _ = apply_gradients(tx, grads, tx.init(model), model)
    assert_type(new, Model)
    assert (type(new), type(grads)) == (Model, Model)
    both: Any = value_and_grad(_loss, (0,), num_microbatches=2)(model, batch)
    assert both[0] == loss


# Modules of Equinox, with functions and settings among their leaves.


@pytest.mark.parametrize("step", ["apply_gradients", "update"])
@pytest.mark.parametrize("jit", [False, True])
def test_whole_modules_of_equinox_are_parameters(step, jit):
    """Functions among the leaves, and a last microbatch that releases."""
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    tx = optaccum.accumulate(2, optax.adamw(0.1))
    state, batch = tx.init(eqx.filter(model, eqx.is_inexact_array)), jnp.ones((4, 2))

    def run(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean(jax.vmap(model)(batch) ** 2))(model)
        if step == "apply_gradients":
            return optaccum.apply_gradients(tx, grads, state, model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    run = eqx.filter_jit(run) if jit else run
    before = model
    for _ in range(2):
        model, state = run(model, state)
    assert model.activation is before.activation
    moved = jnp.abs(model.layers[0].weight - before.layers[0].weight).max()
    assert float(moved) == pytest.approx(0.1, rel=0.1)


class Scaled(eqx.Module):
    """A module with Python numbers among its leaves."""

    w: jax.Array
    scale: float = 2.0
    centred: bool = True

    def __call__(self, x):
        return self.scale * (x @ self.w) - (1.0 if self.centred else 0.0)


@pytest.mark.parametrize("k", [1, 2])
def test_settings_of_a_module_stay_what_they_are(k):
    model, tx = Scaled(jnp.ones(3)), optaccum.accumulate(k, optax.sgd(0.01))
    state, batch = tx.init(eqx.filter(model, eqx.is_inexact_array)), jnp.ones((4, 3))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean(model(batch) ** 2))(model)
        return optaccum.apply_gradients(tx, grads, state, model)

    for _ in range(2 * k):
        model, state = step(model, state)
    assert (model.scale, model.centred) == (2.0, True)
    assert (type(model.scale), type(model.centred)) == (float, bool)
    assert optaccum.has_released(state)
    assert not jnp.allclose(model.w, 1.0)


# The misplaced optimizer: wrong in silence, and so the reason for a warning.


WEIGHTS = {"w": jnp.ones(2)}
MISPLACED = {
    "adam": (lambda: optax.chain(accumulate(4), optax.adam(0.1)), "ScaleByAdamState"),
    "a schedule": (
        lambda: optax.chain(accumulate(4), optax.sgd(lambda step: 0.1)),
        "ScaleByScheduleState",
    ),
    "an average": (
        lambda: optax.chain(optax.clip(1.0), optax.chain(accumulate(4)), optax.ema(0.9)),
        "EmaState",
    ),
    "behind a stateless one": (
        lambda: optax.chain(accumulate(4, optax.scale(2.0)), optax.clip(1.0), optax.adam(0.1)),
        "ScaleByAdamState",
    ),
}
RIGHT = {
    "inside": lambda: accumulate(4, optax.adam(0.1)),
    "in front of what keeps no state": lambda: optax.chain(accumulate(4), optax.sgd(0.1)),
    "behind": lambda: optax.chain(optax.ema(0.9), accumulate(4)),
    "without holds": lambda: optax.chain(accumulate(1), optax.adam(0.1)),
    "in a chain": lambda: optax.chain(optax.clip(1.0), accumulate(4, optax.adam(0.1))),
    "of groups": lambda: optax.partition(
        {"a": accumulate(4), "b": accumulate(2, optax.adam(0.1))}, {"w": "b"}
    ),
}


def _step_alone(tx):
    return apply_gradients(tx, WEIGHTS, tx.init(WEIGHTS), WEIGHTS)


def _step_linen(tx):
    state = optaccum.flax.TrainState.create(apply_fn=None, params=WEIGHTS, tx=tx)
    return state.apply_gradients(grads=WEIGHTS)


def _step_nnx(tx):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(2))[0])(model))


@pytest.mark.parametrize("step", [_step_alone, _step_linen, _step_nnx])
@pytest.mark.parametrize(("make", "link"), MISPLACED.values(), ids=MISPLACED)
def test_the_warning_names_the_link_that_keeps_state(step, make, link):
    with pytest.warns(UserWarning, match=rf"in front of a link that keeps state, {link}") as seen:
        step(make())
    assert len(seen) == 1
    assert step is not _step_alone or seen[0].filename == __file__


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_no_warning_where_the_order_is_right(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step_alone(make())


def test_the_warning_comes_when_a_program_is_traced():
    tx = optax.chain(accumulate(4), optax.adam(0.1))
    with pytest.warns(UserWarning, match="keeps state"):
        jax.jit(lambda state: apply_gradients(tx, WEIGHTS, state, WEIGHTS))(tx.init(WEIGHTS))
