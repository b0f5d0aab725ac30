"""The inner optimizers, as Optax and as Keras define them, with the same hyperparameters.

Adam and Muon are blind to the scale of their gradients but for `eps`: a small one would let a
contender that releases the sum pass for one that releases the mean, so theirs are large.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-2
ADAM_EPS, MUON_EPS = 0.1, 10.0  # to be compared to an element, and to the norm of a leaf
B2, MUON_RMS = 0.999, 0.2
DECAY: Any = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner optimizer."""

    transformation: optax.GradientTransformation
    keras: Callable[..., Any]  # `(keras.optimizers, **options)`: Keras's, which accumulates itself
    reference: optax.GradientTransformation  # what one step of that does
    bandwidth_bound: bool = True  # whether a release takes as long as its bytes take to move


def _muon(eps: float) -> optax.GradientTransformation:
    # Optax corrects the bias of Nesterov's momentum, Keras does not. Without Nesterov the bias is
    # a factor that the orthogonalisation cancels, and the two define the same update.
    return optax.contrib.muon(**DECAY, eps=eps, nesterov=False, consistent_rms=MUON_RMS)


def _adam_eps_of_keras(count: Any) -> Any:
    # Keras adds its epsilon to the root of the second moment before correcting the bias.
    return ADAM_EPS / jnp.sqrt(1 - B2 ** (count + 1))


INNERS = {
    "sgd": Inner(
        optax.sgd(LEARNING_RATE),
        lambda optimizers, **options: optimizers.SGD(LEARNING_RATE, **options),
        optax.sgd(LEARNING_RATE),
    ),
    "adamw": Inner(
        optax.adamw(**DECAY, b2=B2, eps=ADAM_EPS),
        lambda optimizers, **options: optimizers.AdamW(
            **DECAY, beta_2=B2, epsilon=ADAM_EPS, **options
        ),
        optax.inject_hyperparams(optax.adamw)(**DECAY, b2=B2, eps=_adam_eps_of_keras),
    ),
    "muon": Inner(
        _muon(MUON_EPS),
        lambda optimizers, **options: optimizers.Muon(
            **DECAY, nesterov=False, rms_rate=MUON_RMS, **options
        ),
        _muon(1e-7),  # which Keras fixes
        bandwidth_bound=False,
    ),
}
