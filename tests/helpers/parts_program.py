"""A program for one process of several: devices accumulate parts, and reduce them once per window.

Usage: python -m helpers.parts_program ADDRESS PROCESSES NUMBER FILE. Writes the parameters and the
counters that this process has at the end to FILE. One device sees a NaN, some see no token at all.
"""

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax

from helpers.meshes import vary
import optaccum

EVERY_K, MICROBATCHES, ROWS = 3, 8, 16
REJECTED = 4  # the microbatch with a NaN
noise = np.random.default_rng(0)
X = noise.normal(size=(MICROBATCHES, ROWS, 6)).astype(np.float32)
MASK = (noise.random((MICROBATCHES, ROWS)) > np.linspace(0, 1, ROWS)).astype(np.float32)
X[REJECTED, ROWS - 1], MASK[REJECTED, ROWS - 1] = np.nan, 1


def loss_fn(params, x, mask):
    losses = jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - 0.5) ** 2, axis=1)
    return jnp.sum(mask * losses) / jnp.maximum(mask.sum(), 1)


def train(devices):
    """Trains on `devices`, of this process or of several, and returns what they all have."""
    mesh = Mesh(np.array(devices), "data", axis_types=(AxisType.Auto,))
    tx = optaccum.accumulate(
        EVERY_K,
        optax.adam(0.1, eps=1e-2),
        reduce_axes="data",
        should_skip_update_fn=optax.skip_not_finite,
    )
    params = {"w": np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4), "b": np.zeros(4, "f")}
    with jax.set_mesh(mesh):
        specs = optaccum.state_shardings(tx, params, P())

    def train_step(params, state, x, mask):
        grads = jax.grad(loss_fn)(vary(params), x, mask)
        return optaccum.apply_gradients(tx, grads, state, params, weight=mask.sum())

    def place(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    rows = P("data")
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(P(), specs, rows, rows), out_specs=(P(), specs)
    )
    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(functools.partial(place, spec=P()), params)
    state = jax.jit(init)(params)
    for x, mask in zip(X, MASK, strict=True):
        params, state = step(params, state, place(x, rows), place(mask, rows))
    counters = {
        name: getattr(state, name) for name in ("mini_step", "gradient_step", "skipped", "released")
    }
    return jax.tree.map(np.asarray, params | counters)


if __name__ == "__main__":
    address, processes, number, file = sys.argv[1:]
    jax.distributed.initialize(address, int(processes), int(number), cluster_detection_method=None)
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    np.savez(file, **train(found))
