"""The misplaced optimizer: wrong in silence, and so the reason for a warning."""

import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

from optaccum import accumulate, apply_gradients
import optaccum.flax

PARAMS = {"w": jnp.ones(2)}
BARE = {
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
    "in a chain": lambda: optax.chain(optax.clip(1.0), accumulate(4, optax.adam(0.1))),
    "of groups": lambda: optax.partition(
        {"a": accumulate(4), "b": accumulate(2, optax.adam(0.1))}, {"w": "b"}
    ),
}


def _bare(tx):
    return apply_gradients(tx, PARAMS, tx.init(PARAMS), PARAMS)


def _linen(tx):
    state = optaccum.flax.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    return state.apply_gradients(grads=PARAMS)


def _nnx(tx):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = optaccum.flax.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(2))[0])(model))


@pytest.mark.parametrize("step", [_bare, _linen, _nnx])
@pytest.mark.parametrize(("make", "link"), BARE.values(), ids=BARE)
def test_a_link_that_keeps_state_is_named(step, make, link):
    with pytest.warns(UserWarning, match=rf"in front of a link that keeps state, {link}") as seen:
        step(make())
    assert len(seen) == 1
    assert step is not _bare or seen[0].filename == __file__


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_nothing_is_said_where_nothing_is_wrong(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _bare(make())


def test_it_is_said_when_a_program_is_traced():
    tx = optax.chain(accumulate(4), optax.adam(0.1))
    with pytest.warns(UserWarning, match="keeps state"):
        jax.jit(lambda state: apply_gradients(tx, PARAMS, state, PARAMS))(tx.init(PARAMS))
