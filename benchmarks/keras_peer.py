"""Keras 3's own accumulation as a contender: `gradient_accumulation_steps` of its optimizers."""

import os

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.inners import Inner


def keras_optimizer(inner: Inner, every_k: int) -> peers.Peer:
    """Returns `stateless_apply` of Keras' optimizer on its JAX backend.

    Raises:
        ImportError: if Keras 3 is missing, lacks the optimizer, or runs on another backend.
    """
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError(f"Keras runs on {keras.backend.backend()}, not on jax")
    try:
        optimizer = inner.keras(keras.optimizers, every_k)
    except (AttributeError, ValueError) as error:  # what older versions say of Muon
        raise ImportError(f"Keras {keras.__version__}: {error}") from error

    def init(params):
        if not optimizer.built:
            # Keras keeps concrete variables, even while a caller traces this for its shapes.
            with jax.ensure_compile_time_eval():
                optimizer.build(
                    [
                        keras.Variable("zeros", shape=p.shape, dtype=p.dtype)
                        for p in jax.tree.leaves(params)
                    ]
                )
        state = [jnp.copy(variable.value) for variable in optimizer.variables]
        return {"params": params, "opt_state": state}

    def step(part, grads):
        params, treedef = jax.tree.flatten(part["params"])
        params, opt_state = optimizer.stateless_apply(
            part["opt_state"], jax.tree.leaves(grads), params
        )
        return {"params": jax.tree.unflatten(treedef, params), "opt_state": opt_state}

    program = peers.make_program(step, ("params", "opt_state"))
    name = "Keras, accumulation steps"
    return peers.Peer(name, init, (program,) * every_k, reference=inner.reference)
