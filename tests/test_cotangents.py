"""Derivatives of what `value_and_grad` returns, beside microbatches that hold NaN and no weight."""

import collections
import functools
import re

from helpers import meshes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaccum

W = jnp.array([1.0, -0.5, 0.3])
MASK = jnp.where(jnp.arange(8) % 4 == 1, 0.0, jnp.arange(8.0) + 1)
ROWS = np.flatnonzero(MASK)
X = jnp.where(MASK[:, None] > 0, jax.random.normal(jax.random.key(0), (8, 3)), jnp.nan)
BATCH = {"x": X, "mask": MASK}
CLEAN = jax.tree.map(lambda x: x[ROWS], BATCH)


def _loss(w, batch):
    losses = batch["mask"] * w[0] * jnp.tanh(batch["x"] @ w) ** 2
    return jnp.sum(losses) / jnp.maximum(jnp.sum(batch["mask"]), 1)


def _sum(w, batch):
    return jnp.sum(batch["mask"] * w[0] * jnp.tanh(batch["x"] @ w) ** 2)


def _tokens(w, batch):
    return jnp.sum(batch["mask"])


OURS = {
    "mean": optaccum.value_and_grad(_loss, num_microbatches=4, weight_fn=_tokens),
    "sum": optaccum.value_and_grad(
        _sum, num_microbatches=4, weight_fn=_tokens, loss_reduction="sum"
    ),
}


@functools.cache
def _derivatives():
    """Returns the first and second derivatives of the loss of the rows that count."""
    return jax.jit(jax.grad(_loss))(W, CLEAN), jax.jit(jax.hessian(_loss))(W, CLEAN)


both = pytest.mark.parametrize("ours", OURS.values(), ids=OURS)


@both
@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd])
def test_derivatives_are_those_of_the_rows_that_count(ours, mode):
    of_loss, of_gradient = jax.jit(mode(lambda w: ours(w, BATCH)))(W)
    expected, expected_too = _derivatives()
    np.testing.assert_allclose(of_loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_gradient, expected_too, rtol=1e-4, atol=1e-5)


def test_derivatives_outside_of_jit_are_those_of_the_rows_that_count():
    found = jax.jacrev(lambda w: OURS["mean"](w, BATCH)[1])(W)
    np.testing.assert_allclose(found, _derivatives()[1], rtol=1e-4, atol=1e-5)


@both
def test_derivatives_by_rows_that_do_not_count_are_zero(ours):
    def penalty(grad):
        return lambda batch: jnp.sum(grad(W, batch) ** 2)

    found = jax.jit(jax.grad(penalty(lambda w, batch: ours(w, batch)[1])))(BATCH)
    expected = jax.jit(jax.grad(penalty(jax.grad(_loss))))(CLEAN)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[ROWS], e, rtol=1e-4, atol=1e-5)
        assert not np.any(np.delete(a, ROWS, axis=0))


def test_one_microbatch_without_weight_has_derivatives_of_zero():
    ours = optaccum.value_and_grad(_loss, num_microbatches=1, weight_fn=_tokens)
    nothing = {"x": jnp.full((4, 3), jnp.nan), "mask": jnp.zeros(4)}
    np.testing.assert_array_equal(jax.jacrev(lambda w: ours(w, nothing)[1])(W), np.zeros((3, 3)))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_under_vmap_each_member_has_its_own(axes):
    """Which microbatch counts differs between members, or not."""
    members = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 1, axis=0)]), BATCH)
    weights = jnp.stack([W, 2 * W])

    @jax.jit
    def hessian(w, batch):
        return jax.jacrev(lambda w: OURS["mean"](w, batch)[1])(w)

    def member(k, tree, axis):
        return tree if axis is None else jax.tree.map(lambda x: x[k], tree)

    args = weights, members
    args = [x if axis == 0 else member(0, x, 0) for x, axis in zip(args, axes, strict=True)]
    found = jax.jit(jax.vmap(hessian, axes))(*args)
    for k in range(2):
        expected = hessian(*(member(k, x, axis) for x, axis in zip(args, axes, strict=True)))
        assert np.all(np.isfinite(expected))
        np.testing.assert_allclose(found[k], expected, rtol=1e-5, atol=1e-6)


@meshes.needs_reshard
def test_devices_may_differ_in_what_counts():
    """Microbatch 1 of every device but the first has weight."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    more = {"x": jnp.nan_to_num(X, nan=0.5), "mask": jnp.arange(8.0) + 1}
    batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), BATCH, more)
    step = optaccum.value_and_grad(_loss, num_microbatches=4, weight_fn=_tokens, reduce_axes="data")

    def grads(w, batch):
        specs = (jax.P(), jax.P("data"))
        return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=jax.P())(w, batch)[1]

    clean = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), CLEAN, more)
    found = jax.jit(jax.jacrev(lambda w: grads(w, batch)))(W)
    np.testing.assert_allclose(found, jax.hessian(_loss)(W, clean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_the_gradient_alone_costs_nothing_more(n, monkeypatch):
    def operations():
        step = optaccum.value_and_grad(_loss, num_microbatches=n, weight_fn=_tokens)
        text = jax.jit(step).lower(W, BATCH).compile().as_text()
        return collections.Counter(re.findall(r" = (\S+ [a-z-]+)\(", text))

    ours = operations()
    monkeypatch.setattr(optaccum._loop, "drop_unless", lambda valid, tree: tree)
    assert ours == operations()
    assert len(ours) > 10


@both
def test_derivatives_by_what_the_loss_closes_over_are_right(ours):
    def penalty(scale):
        loss = _sum if ours is OURS["sum"] else _loss
        options = {"loss_reduction": "sum"} if ours is OURS["sum"] else {}
        step = optaccum.grad(
            lambda w, batch: loss(scale * w, batch),
            num_microbatches=4,
            weight_fn=_tokens,
            **options,
        )
        return jnp.sum(step(W, BATCH) ** 2)

    def expected(scale):
        return jnp.sum(jax.grad(lambda w: _loss(scale * w, CLEAN))(W) ** 2)

    found, wanted = (jax.jit(jax.grad(fun))(1.5) for fun in (penalty, expected))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
