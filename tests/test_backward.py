"""Gradients of scanned layers are added to the sums inside the backward scan."""

import functools
from typing import Any

import equinox as eqx
from flax import linen as nn, nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaccum
from optaccum import _fold

LAYERS, WIDTH, HIDDEN, VOCABULARY, ROWS, N = 4, 32, 64, 16, 8, 2


def stack(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape) * 0.1


def layer(h, w):
    return h + jnp.tanh(h @ w["a"]) @ w["b"], None


PARAMS = {
    "table": stack(VOCABULARY, WIDTH),
    "layers": {"a": stack(LAYERS, WIDTH, HIDDEN), "b": stack(LAYERS, HIDDEN, WIDTH)},
}
IDS = jax.random.randint(jax.random.key(9), (ROWS, 3), 0, VOCABULARY)


def loss_of(h, params):
    return jnp.mean((h @ params["table"].T) ** 2)


def through(layer, params, ids):
    return loss_of(lax.scan(layer, params["table"][ids], params["layers"])[0], params)


def scanned(params, ids):
    return through(jax.checkpoint(layer), params, ids)


def cast(fun):
    """All parameters in bfloat16, outside of the scan."""
    return lambda params, ids: fun(
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), ids
    ).astype(jnp.float32)


def along_axis_1(params, ids):
    layers = jax.tree.map(lambda p: jnp.moveaxis(p, 1, 0), params["layers"])
    return scanned({**params, "layers": layers}, ids)


def in_stages(params, ids):
    """The stack is divided into stages, a scan in a scan."""
    stages = jax.tree.map(lambda p: p.reshape(2, 2, *p.shape[1:]), params["layers"])

    def stage(h, w):
        return lax.scan(jax.checkpoint(layer), h, w)[0], None

    return loss_of(lax.scan(stage, params["table"][ids], stages)[0], params)


def experts(params, ids):
    """Every layer has experts, which `vmap` runs; a router weighs them."""

    def mixture(h, w):
        scores = jax.nn.softmax(h @ w["router"])
        outs = jax.vmap(lambda a, b: jnp.tanh(h @ a) @ b)(w["a"], w["b"])
        return h + jnp.einsum("etsd,tse->tsd", outs, scores), None

    return loss_of(lax.scan(mixture, params["table"][ids], params["layers"])[0], params)


@jax.custom_vjp
def kernel(x, w):
    return jnp.tanh(x @ w)


def _kernel_forward(x, w):
    y = kernel(x, w)
    return y, (x, w, y)


def _kernel_backward(kept, cotangent):
    x, w, y = kept
    pre = cotangent * (1 - y * y)
    return pre @ w.T, jnp.einsum("...i,...j->ij", x, pre)


kernel.defvjp(_kernel_forward, _kernel_backward)


def with_kernels(params, ids):
    def block(h, w):
        return h + kernel(kernel(h, w["a"]), w["b"]), None

    return through(block, params, ids)


EXPERTS = {
    "table": PARAMS["table"],
    "layers": {
        "a": stack(LAYERS, 2, WIDTH, HIDDEN),
        "b": stack(LAYERS, 2, HIDDEN, WIDTH),
        "router": stack(LAYERS, WIDTH, 2),
    },
}
ON_AXIS_1 = {**PARAMS, "layers": jax.tree.map(lambda p: jnp.moveaxis(p, 0, 1), PARAMS["layers"])}


class Block(nn.Module):
    @nn.compact
    def __call__(self, h):
        return h + nn.Dense(WIDTH)(nn.tanh(nn.Dense(HIDDEN)(h))), None


def linen(axis):
    layers = nn.scan(
        nn.remat(Block), variable_axes={"params": axis}, split_rngs={"params": True}, length=LAYERS
    )()
    params = layers.init(jax.random.key(0), jnp.ones((1, WIDTH)))

    def loss_fn(params, ids):
        h, _ = layers.apply(params["layers"], params["table"][ids])
        return loss_of(h, params)

    return loss_fn, {"table": PARAMS["table"], "layers": params}


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = (
            nnx.Linear(WIDTH, HIDDEN, rngs=rngs),
            nnx.Linear(HIDDEN, WIDTH, rngs=rngs),
        )

    def __call__(self, h):
        return h + self.down(nnx.tanh(self.up(h)))


def with_nnx():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    blocks = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(keys)
    graph, state = nnx.split(blocks)

    def loss_fn(params, ids):
        run = nnx.scan(lambda h, block: block(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return loss_of(run(params["table"][ids], nnx.merge(graph, params["layers"])), params)

    return loss_fn, {"table": PARAMS["table"], "layers": state}


def with_equinox():
    def make(key):
        return eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, depth=1, key=key)

    blocks = eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), LAYERS))
    arrays, static = eqx.partition(blocks, eqx.is_inexact_array)

    def loss_fn(params, ids):
        def block(h, w):
            return h + jax.vmap(jax.vmap(eqx.combine(w, static)))(h), None

        h = lax.scan(jax.checkpoint(block), params["table"][ids], params["layers"])[0]
        return loss_of(h, params)

    return loss_fn, {"table": PARAMS["table"], "layers": arrays}


LOSSES = {
    "layers in checkpoints": lambda: (scanned, PARAMS),
    "layers without": lambda: (functools.partial(through, layer), PARAMS),
    "the loss in a checkpoint": lambda: (jax.checkpoint(scanned), PARAMS),
    "the loss in jit": lambda: (jax.jit(scanned), PARAMS),
    "all in bfloat16": lambda: (cast(scanned), PARAMS),
    "stacked along axis 1": lambda: (along_axis_1, ON_AXIS_1),
    "stages of layers": lambda: (in_stages, PARAMS),
    "experts": lambda: (experts, EXPERTS),
    "kernels": lambda: (with_kernels, PARAMS),
    "flax.linen": lambda: linen(0),
    "flax.linen along axis 1": lambda: linen(1),
    "equinox": with_equinox,
}
if hasattr(nnx, "as_pure"):  # the scan of Flax 0.12.0 writes into the state that it reads
    LOSSES["flax.nnx"] = with_nnx


def compiled(fun, params, **options) -> Any:
    step = optaccum.value_and_grad(fun, num_microbatches=N, **options)
    return jax.jit(step).lower(params, IDS).compile()


def without_folding(monkeypatch):
    monkeypatch.setattr(_fold, "_plan", lambda jaxpr, targets: ({}, set()))


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


CASES = [(name, True) for name in LOSSES] + [("layers without", False), ("experts", False)]
# On every version: each primitive that is looked into, a transpose, a reshape, and frameworks.
FIRST = "layers in checkpoints", "the loss in jit", "stages of layers", "flax.linen along axis 1"
FIRST += "flax.nnx", "experts"


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        pytest.param(*case, marks=() if case[0] in FIRST and case[1] else pytest.mark.slow)
        for case in CASES
    ],
)
def test_sums_are_the_same_bits_in_less_memory(name, weighted, monkeypatch):
    fun, params = LOSSES[name]()
    options = {"weight_fn": lambda params, ids: jnp.sum(ids > 3)} if weighted else {}
    folded = compiled(fun, params, **options)
    without_folding(monkeypatch)
    plain = compiled(fun, params, **options)
    for x, y in zip(*(jax.tree.leaves(c(params, IDS)) for c in (folded, plain)), strict=True):
        np.testing.assert_array_equal(x, y)
    less = [c.memory_analysis().temp_size_in_bytes for c in (plain, folded)]
    assert less[0] - less[1] > 0.2 * size(params["layers"])


def test_layers_without_a_scan_are_added_as_before(monkeypatch):
    """Behind the barrier of a checkpoint XLA for TPUs would copy sums."""
    params = [{"a": jnp.ones((4, 8)), "b": jnp.ones((8, 4))} for _ in range(2)]

    def loss(params, x):
        for w in params:
            x += jax.checkpoint(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"])(w, x)
        return jnp.mean(x**2)

    def text():
        step = optaccum.value_and_grad(loss, num_microbatches=N)
        return jax.jit(step).lower(params, jnp.ones((2 * N, 4))).as_text()

    folded = text()
    without_folding(monkeypatch)
    assert folded == text()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_weight_does_not_overflow_the_dtype_of_a_table(dtype):
    table, ids = jnp.ones((5, 3), dtype), jnp.arange(4)

    def loss_fn(table, ids):
        return jnp.sum(table.astype(jnp.float32)[ids] * 100.0)

    tx = optaccum.accumulate(4, optax.sgd(1.0))
    step = jax.jit(optaccum.value_and_apply(tx, loss_fn))
    _, _, state = step(table, tx.init(table), ids, weight=1000.0)
    np.testing.assert_array_equal(state.grad_sum[:4], 1e5)


def test_narrow_sums_take_in_a_weighted_table_in_float32():
    tx = optaccum.accumulate(4, optax.sgd(1.0), accumulator_dtype=jnp.float16)
    step = jax.jit(optaccum.value_and_apply(tx, lambda t, ids: jnp.sum(t[ids] * 1e-3)))
    table = jnp.ones((5, 3), jnp.float16)
    _, _, state = step(table, tx.init(table), jnp.arange(4), weight=1e5)
    np.testing.assert_allclose(state.grad_sum[:4], 100.0, rtol=2e-3)


def test_effects_of_a_loss_happen_once_even_if_nothing_can_be_added_inside(monkeypatch):
    seen = []

    def loss_fn(params, ids):
        jax.debug.callback(lambda x: seen.append(float(x)), jnp.sum(ids).astype(jnp.float32))
        return scanned(params, ids)

    def fails(*args):
        raise NotImplementedError

    monkeypatch.setitem(_fold._HANDLERS, "scan", fails)
    run = jax.jit(optaccum.value_and_grad(loss_fn, num_microbatches=N))
    loss, _ = jax.block_until_ready(run(PARAMS, IDS))
    jax.effects_barrier()
    assert len(seen) == N
    np.testing.assert_allclose(loss, scanned(PARAMS, IDS), rtol=1e-5)


def test_a_gradient_of_two_parameters_is_added_to_the_sums_of_both():
    def loss_fn(params, ids):
        layers = jax.tree.map(jnp.add, params["layers"], params["added"])
        return scanned({**params, "layers": layers}, ids)

    params = {**PARAMS, "added": jax.tree.map(jnp.zeros_like, PARAMS["layers"])}
    found = jax.jit(optaccum.grad(loss_fn, num_microbatches=N))(params, IDS)
    expected = jax.jit(jax.grad(loss_fn))(params, IDS)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8)
