"""What a contender is, and the inner optimizers that all of them step.

The inner optimizers are Optax's and Keras's, with the same hyperparameters. Adam and Muon are blind
to the scale of their gradients but for `eps`. A small one would let a contender that releases the
sum pass for one that releases the mean, and turn the rounding of a small gradient into a step of
full size, so theirs are large: a step is nearly linear in the gradients.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

AXIS, INSIDE = "data", "fsdp"
RATES: Any = {"learning_rate": 1e-2, "weight_decay": 1e-2}
ADAM_EPS, MUON_EPS = 0.1, 10.0  # to be compared to an element, and to the norm of a leaf
B2, MUON_RMS = 0.999, 0.2
# Optax corrects the bias of Nesterov's momentum, Keras does not. Without Nesterov the bias is a
# factor that the orthogonalisation cancels, and the two define the same update.
_muon = functools.partial(optax.contrib.muon, **RATES, nesterov=False, consistent_rms=MUON_RMS)


def _adam_eps_of_keras(count: Any) -> Any:
    # Keras adds its epsilon to the root of the second moment before correcting the bias.
    return ADAM_EPS / jnp.sqrt(1 - B2 ** (count + 1))


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner optimizer."""

    transformation: optax.GradientTransformation
    keras: tuple[str, dict[str, Any]]  # the name and the options of Keras's, which accumulates
    reference: optax.GradientTransformation  # what one step of that does


INNERS = {
    "sgd": Inner(optax.sgd(1e-2), ("SGD", {"learning_rate": 1e-2}), optax.sgd(1e-2)),
    "adamw": Inner(
        optax.adamw(**RATES, b2=B2, eps=ADAM_EPS),
        ("AdamW", RATES | {"beta_2": B2, "epsilon": ADAM_EPS}),
        optax.inject_hyperparams(optax.adamw)(**RATES, b2=B2, eps=_adam_eps_of_keras),
    ),
    "muon": Inner(
        _muon(eps=MUON_EPS),
        ("Muon", RATES | {"nesterov": False, "rms_rate": MUON_RMS}),
        _muon(eps=1e-7),  # which Keras fixes
    ),
}
Carry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """The program of one call, without the gradients that it is given."""

    # `(part, grads) -> part`. The part has the entries `names` of the carry.
    apply: Callable[[Carry, Any], Carry]
    names: tuple[str, ...] = ("params", "state")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of accumulating. It knows neither a model nor a device; a `Window` does."""

    # `params -> carry`: a dict with the entry `params` and whatever else a step needs. JAX passes
    # entries in alphabetical order; with `params` first XLA does best by all.
    init: Callable[[Any], Carry]
    # One for each call of a window. A single one is given the whole batch, more a microbatch each.
    steps: tuple[Step, ...]
    # `(loss_fn, params, batch) -> (loss, grads)`
    differentiate: Callable[..., Any] = lambda loss_fn, *args: jax.value_and_grad(loss_fn)(*args)
    reference: optax.GradientTransformation | None = None  # that it steps, if not the one given
    # How many devices a replica is divided over, along a second axis of the mesh, `INSIDE`.
    inside: int = 1
    # `params -> {name: spec}`, of entries of the carry that are not replicated: each a prefix of
    # its tree. Called under `jax.set_mesh`.
    specs: Callable[[Any], Carry] = lambda params: {}


def update(tx: Any, grads: Any, opt_state: Any, params: Any) -> Any:
    """Returns what a transformation makes of the parameters and its state."""
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def of(tx: Any, calls: int, apply: Any = update, init: Any = None, **more: Any) -> Contender:
    """Returns a contender whose calls are all the same step of a transformation."""

    def step(part, grads):
        params, state = apply(tx, grads, part["state"], part["params"])
        return {"params": params, "state": state}

    init = init or (lambda params: {"params": params, "state": tx.init(params)})
    return Contender(init, (Step(step),) * calls, **more)
