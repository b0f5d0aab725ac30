"""A training program that checkpoints every microbatch and, run again, goes on where it was.

Usage: python -m helpers.resume_program FOLDER MICROBATCHES [WAIT_AFTER]. Says `saved N` after each
microbatch, after one of them waits to be killed, and writes its state to FOLDER/params.npz.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optaccum.flax


def main(folder, microbatches, wait_after):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4)), "b": jnp.zeros(4, jnp.bfloat16)}
    tx = optaccum.accumulate(4, optax.adam(0.1), average_args=("value",))
    state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)

    @jax.jit
    def train_step(state, x):
        def loss(params):
            return jnp.mean(jnp.sin(x @ params["w"] + params["b"].astype(jnp.float32)) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads, value=value, weight=1 + state.step % 3)

    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        start = manager.latest_step() or 0
        if start:
            # The state as a training step leaves it: Flax begins with a Python number for `step`.
            template = jax.eval_shape(train_step, state, jnp.zeros((2, 8)))
            state = manager.restore(start, args=ocp.args.StandardRestore(template))
        for i in range(start, microbatches):
            state = train_step(
                state, jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (2, 8))
            )
            manager.save(i + 1, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            print("saved", i + 1, flush=True)
            if [str(i + 1)] == wait_after:
                time.sleep(600)

    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    np.savez(folder / "params.npz", **{name: np.asarray(x, np.float64) for name, x in flat.items()})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
