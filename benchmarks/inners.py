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


def _muon(eps: float) -> optax.GradientTransformation:
    # Optax corrects the bias of Nesterov's momentum, Keras does not. Without Nesterov the bias is
    # a factor that the orthogonalisation cancels, and the two define the same update.
    return optax.contrib.muon(
        LEARNING_RATE,
        eps=eps,
        weight_decay=WEIGHT_DECAY,
        nesterov=False,
        consistent_rms=MUON_RMS,
    )


def _adam_eps_of_keras(count: Any) -> Any:
    # Keras adds its epsilon to the root of the second moment before correcting the bias.
    return ADAM_EPS / jnp.sqrt(1 - B2 ** (count + 1))


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner optimizer.

    Attributes:
        transformation: it, as Optax defines it.
        keras: `(keras.optimizers, every_k) -> ` the optimizer of Keras that accumulates itself.
        reference: what one step of that optimizer does, in Optax's terms.
        bandwidth_bound: whether a release takes as long as its bytes take to move; Muon's
            multiplies matrices.
    """

    transformation: optax.GradientTransformation
    keras: Callable[[Any, int], Any]
    reference: optax.GradientTransformation
    bandwidth_bound: bool = True


INNERS = {
    "sgd": Inner(
        transformation=optax.sgd(LEARNING_RATE),
        keras=lambda optimizers, every_k: optimizers.SGD(
            LEARNING_RATE, gradient_accumulation_steps=every_k
        ),
        reference=optax.sgd(LEARNING_RATE),
    ),
    "adamw": Inner(
        transformation=optax.adamw(LEARNING_RATE, b2=B2, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY),
        keras=lambda optimizers, every_k: optimizers.AdamW(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            beta_2=B2,
            epsilon=ADAM_EPS,
            gradient_accumulation_steps=every_k,
        ),
        reference=optax.inject_hyperparams(optax.adamw)(
            LEARNING_RATE, b2=B2, eps=_adam_eps_of_keras, weight_decay=WEIGHT_DECAY
        ),
    ),
    "muon": Inner(
        transformation=_muon(MUON_EPS),
        keras=lambda optimizers, every_k: optimizers.Muon(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            nesterov=False,
            rms_rate=MUON_RMS,
            gradient_accumulation_steps=every_k,
        ),
        reference=_muon(1e-7),  # which Keras fixes
        bandwidth_bound=False,
    ),
}
