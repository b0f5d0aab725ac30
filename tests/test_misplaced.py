"""The misplaced optimizer: wrong in silence, and so the reason for a warning, once."""

import dataclasses
from typing import NamedTuple
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
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
    "MultiSteps alone": lambda: optax.MultiSteps(optax.adam(0.1), 2),
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


every_place = pytest.mark.parametrize("step", [_bare, _linen, _nnx])


@every_place
@pytest.mark.parametrize(("make", "link"), BARE.values(), ids=BARE)
def test_a_link_that_keeps_state_is_named_once(step, make, link):
    tx = make()
    with pytest.warns(UserWarning, match=rf"in front of a link that keeps state, {link}") as seen:
        step(tx)
    assert [str(w.filename) for w in seen] == [__file__]
    step(tx)


@every_place
def test_nor_does_it_belong_around_or_inside_of_multi_steps(step):
    for make in (
        lambda: accumulate(4, optax.MultiSteps(optax.adam(0.1), 2)),
        lambda: optax.MultiSteps(accumulate(4, optax.adam(0.1)), 2).gradient_transformation(),
    ):
        with pytest.warns(UserWarning, match=r"around each other.*leave one out"):
            step(make())


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_nothing_is_said_where_nothing_is_wrong(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _bare(make())


def test_it_is_said_when_a_program_is_traced():
    tx = optax.chain(accumulate(4), optax.adam(0.1))
    with pytest.warns(UserWarning, match="keeps state"):
        jax.jit(lambda state: apply_gradients(tx, PARAMS, state, PARAMS))(tx.init(PARAMS))


def test_transformations_that_cannot_be_remembered_are_taken():
    """A tuple with methods has no weak references, a dataclass no hash."""

    class Sgd(NamedTuple):
        rate: float

        def init(self, params):
            return ()

        def update(self, updates, state, params=None):
            return jax.tree.map(lambda u: -self.rate * u, updates), state

    @dataclasses.dataclass
    class Other:
        rate: float
        init = Sgd.init
        update = Sgd.update

    for tx in (Sgd(0.5), Other(0.5)):
        params, _ = apply_gradients(tx, jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
        np.testing.assert_array_equal(params, [0.5, 0.5])
