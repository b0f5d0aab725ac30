"""Gradients of scanned layers are added to the sums inside the backward scan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import stacks
import optaccum
from optaccum import _fold

SIZES, ROWS, N = stacks.Sizes(layers=4, width=32, hidden=64, vocabulary=16), 8, 2
scanned, init = stacks.SCANNED["layers in checkpoints"](SIZES)
PARAMS = init()
IDS = jax.random.randint(jax.random.key(9), (ROWS, 3), 0, SIZES.vocabulary)


def compiled(fun, params, **options) -> Any:
    step = optaccum.value_and_grad(fun, num_microbatches=N, **options)
    return jax.jit(step).lower(params, IDS).compile()


def without_folding(monkeypatch):
    monkeypatch.setattr(_fold, "_plan", lambda jaxpr, targets: ({}, set()))


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


CASES = [(name, True) for name in stacks.SCANNED] + [("layers without", False), ("experts", False)]
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
    fun, init = stacks.SCANNED[name](SIZES)
    params = init()
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


def test_a_scatter_into_ones_is_weighed_whole():
    @jax.custom_vjp
    def look_up(table, ids):
        return table[ids]

    look_up.defvjp(
        lambda table, ids: (table[ids], (table, ids)),
        lambda kept, rows: (jnp.ones_like(kept[0]).at[kept[1]].add(rows), None),
    )
    table, ids = jnp.zeros((5, 2)), jnp.arange(4)
    tx = optaccum.accumulate(2, optax.sgd(1.0))
    step = jax.jit(optaccum.value_and_apply(tx, lambda t, ids: jnp.sum(look_up(t, ids))))
    _, _, state = step(table, tx.init(table), ids, weight=3.0)
    np.testing.assert_array_equal(state.grad_sum, [[6.0] * 2] * 4 + [[3.0] * 2])


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
