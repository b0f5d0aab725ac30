"""A model whose devices hold very different numbers of tokens, and what the full batch makes of it.

Gradients of its loss on one device are parts of a sum: a mean over devices is not the mean over
tokens, so whoever reduces them wrongly ends elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax

from helpers import meshes
from helpers.steps import STEPS
from optaccum import AccumulateState, apply_gradients

K, ROWS = 3, 16
SPECS = AccumulateState(
    mini_step=P(),
    gradient_step=P(),
    released=P(),
    skipped=P(),
    weight=P("data"),
    grad_sum=P("data"),
    arg_sums=P("data"),
    skip_state=P(),
    inner_state=P(),
)
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"w": jax.random.normal(KEYS[0], (40, 30)), "b": jnp.zeros(30), "scale": jnp.ones(())}
X = jax.random.normal(KEYS[1], (2 * K, ROWS, 40))
# Devices hold rows of very different numbers of tokens, some of them none.
MASK = (jax.random.uniform(KEYS[2], (2 * K, ROWS)) > jnp.linspace(0, 1, ROWS)).astype(jnp.float32)
INNER = optax.adam(0.1, eps=1e-2)
BYTES = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
SCALAR_BYTES = 4


def loss_fn(params, x, mask):
    y = jnp.tanh(x @ params["w"] / 6 + params["b"]) * params["scale"]
    return jnp.sum(mask[:, None] * (y - 0.3) ** 2) / jnp.maximum(mask.sum(), 1) / 30


@functools.cache
def full_batches(inner=INNER, windows=((0, K), (K, 2 * K)), use_grad_mean=True):
    """Returns the parameters after a step of `inner` on each window, as one batch."""

    @jax.jit
    def step(params, state, x, mask):
        grads = jax.grad(loss_fn)(params, x, mask)
        if not use_grad_mean:
            grads = optax.tree.scale(mask.sum(), grads)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, inner.init(PARAMS)
    for start, end in windows:
        x, mask = X[start:end].reshape(-1, 40), MASK[start:end].reshape(-1)
        params, state = step(params, state, x, mask)
    return jax.tree.map(np.asarray, params)


def assert_close(actual, expected):
    # Three microbatches on 8 devices: sums in another order; a step of 0.1 divided by |g| + eps.
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5), actual, expected
    )


def make_programs(tx, mesh, step_name="apply_gradients", **extra_args):
    """Returns `init` and the jitted training step inside `jax.shard_map`."""
    one_step = STEPS[step_name]

    def train_step(params, state, x, mask):
        value, grads = jax.value_and_grad(loss_fn)(meshes.vary(params), x, mask)
        extra = {"weight": mask.sum(), "value": value, **extra_args}
        return one_step(tx, grads, state, params, **extra)

    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=SPECS)
    data = P("data")
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(P(), SPECS, data, data), out_specs=(P(), SPECS)
    )
    return jax.jit(init), jax.jit(step, donate_argnums=(0, 1))


def prepare(params):
    """Returns parameters of matrix products in a form whose gradients need not be reduced."""
    return jax.tree.map(
        lambda p: jax.reshard(p, P(*[None] * p.ndim, reduced={"data"})) if p.ndim > 1 else p, params
    )


def explicit_step(tx, loss):
    """Returns the jitted training step under explicit sharding."""

    def train_step(params, state, *batch):
        grads = jax.grad(loss)(prepare(params), *batch)
        return apply_gradients(tx, grads, state, params, weight=batch[-1].sum())

    return jax.jit(train_step, donate_argnums=(0, 1))


def replicated(mesh, params=None):
    """Returns new parameters on every device, and a function that divides rows over them."""
    params = jax.tree.map(jnp.copy, PARAMS) if params is None else params
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    return jax.device_put(params, NamedSharding(mesh, P())), place
