"""A type checker shows users the type of their own parameters; the gate runs it on this file."""

import dataclasses
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

from optaccum import accumulate, apply_gradients, value_and_grad


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
