"""A window of microbatches gives every optimizer what the full batch would have given it."""

from collections.abc import Callable
import functools
import itertools
from typing import Any

from helpers.optimizers import OPTIMIZERS, build
from helpers.steps import STEPS, update_and_apply
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optaccum

# Each window's weights sum to a power of two, and gradients and values are multiples of 2^-6:
# the weighted mean is exact in float32, in whatever order it is summed.
WEIGHTS = np.asarray([[1, 2, 3, 2], [4, 1, 2, 1], [5, 1, 1, 9]], np.float32)
WINDOWS, K = WEIGHTS.shape
# Both sides hand the optimizer the same bits, so all that may differ is how XLA rounds the
# optimizer's own arithmetic (fused multiply-adds) in two programs. Parameters stay below 2 and
# steps below 0.5, so an entry is off by at most half a unit in the last place of 2, that is
# eps, for each of three sums and as much again for what the step itself was off by.
TOLERANCE = 8 * float(np.finfo(np.float32).eps)

Tree = Any


def _params() -> Tree:
    w = 1 + np.arange(32, dtype=np.float32).reshape(8, 4) / 64
    return {"w": jnp.asarray(w), "b": jnp.asarray([0.5, -0.75, 1.0, -1.25])}


def _dyadic(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns multiples of 2^-6 in +-[0.5, 1.5], one sign per entry over all windows.

    So no mean is near zero, where an optimizer that takes signs could flip.
    """
    sign = np.where(rng.random(shape) < 0.5, -1, 1)
    return (sign * rng.integers(32, 97, (WINDOWS, K, *shape)) / 64).astype(np.float32)


RNG = np.random.default_rng(0)
GRADS = {"w": _dyadic(RNG, (8, 4)), "b": _dyadic(RNG, (4,))}
VALUES = np.abs(_dyadic(RNG, ()))


def _full_batch(x: np.ndarray, weights: np.ndarray = WEIGHTS) -> np.ndarray:
    """Returns the weighted mean of each window."""
    means = [reference.weighted_mean(*window) for window in zip(x, weights, strict=True)]
    return np.stack(means).astype(np.float32)


def _objective(params: Tree) -> jax.Array:
    """Returns a loss whose Hessian sophia estimates."""
    return sum((jnp.sum(jnp.cosh(x)) for x in jax.tree.leaves(params)), jnp.zeros([]))


def _loss_around(params: Tree, grads: Tree, value: jax.Array) -> Callable[[Tree], jax.Array]:
    """Returns a loss with this value and gradient at `params`, for line searches."""

    def loss(p, obj_fn=None):
        del obj_fn  # a line search hands on whatever else it is given
        gap = optax.tree.sub(p, params)
        return value + optax.tree.vdot(grads, gap) + 4 * optax.tree.vdot(gap, gap)

    return loss


def _run(step: Callable[..., Any], tx: Any, params: Tree, *calls: Any) -> list[Tree]:
    """Returns the parameters after each call; functions are of the whole window."""

    @jax.jit
    def jitted(p, s, g, window, kw):
        functions = {"obj_fn": _objective, "value_fn": _loss_around(p, *window)}
        return step(tx, g, s, p, grad=g, **functions, **kw)

    grads, values = _full_batches()
    windows = [(g, v["value"]) for g, v in zip(grads, values, strict=True)]
    trajectory, opt_state = [], tx.init(params)
    per_window = len(calls[0]) // WINDOWS
    for i, (grads, kwargs) in enumerate(zip(*calls, strict=True)):
        window = windows[i // per_window]
        params, opt_state = jitted(params, opt_state, grads, window, kwargs)
        trajectory.append(params)
    return trajectory


def _microbatches(weighted: bool = True) -> tuple[list[Tree], list[Tree]]:
    indices = list(np.ndindex(WINDOWS, K))
    grads = [jax.tree.map(lambda x, i=i: x[i], GRADS) for i in indices]
    weights = [{"weight": WEIGHTS[i]} if weighted else {} for i in indices]
    return grads, [{"value": VALUES[i], **w} for i, w in zip(indices, weights, strict=True)]


def _full_batches() -> tuple[list[Tree], list[Tree]]:
    grads, values = jax.tree.map(_full_batch, GRADS), _full_batch(VALUES)
    return (
        [jax.tree.map(lambda x, i=i: x[i], grads) for i in range(WINDOWS)],
        [{"value": v} for v in values],
    )


def _distance(a: Tree, b: Tree) -> float:
    gaps = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y))), a, b)
    return float(max(jax.tree.leaves(gaps)))


def test_every_optimizer_is_found():
    assert len(OPTIMIZERS) >= 43
    assert {"adam", "muon", "polyak_sgd", "schedule_free", "sophia"} <= set(OPTIMIZERS)


def test_the_unweighted_mean_is_another_gradient():
    """Otherwise the tests below could not tell a weighted mean from a mean of means."""
    for x in (GRADS["w"], GRADS["b"], VALUES):
        gap = np.abs(_full_batch(x) - _full_batch(x, np.ones_like(WEIGHTS)))
        assert np.all(np.max(gap.reshape(WINDOWS, -1), axis=1) > 1e-2)


# What is averaged, and the functions that are of the whole window.
NAMED: Any = {"average_args": ("value",), "window_args": ("obj_fn", "value_fn")}
# These run on every version that is supported, the others on one.
FEW = ("sgd", "adamw", "adafactor", "lbfgs", "muon", "polyak_sgd", "schedule_free_adamw")


@pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS],
)
def test_a_window_matches_the_full_batch(name):
    """Three windows of four unequal microbatches are three full batches, for every optimizer."""
    params = _params()
    inner = build(name)
    tx = optaccum.accumulate(K, inner, **NAMED)
    full = _run(update_and_apply, inner, params, *_full_batches())
    assert _distance(full[-1], params) > 100 * TOLERANCE, "nothing moves: nothing is compared"
    # The two forms give an optimizer the same gradients: it runs in both for a few.
    for step in STEPS.values() if name in FEW else [optaccum.apply_gradients]:
        held = _run(step, tx, params, *_microbatches())
        for i, expected in enumerate(full):
            before = params if i == 0 else held[i * K - 1]
            for j in range(K - 1):
                assert _distance(held[i * K + j], before) == 0, "a hold moved the parameters"
            assert _distance(held[i * K + K - 1], expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["sgd", "adam", "momo"])
def test_without_weights_the_result_is_another(name):
    params = _params()
    inner = build(name)
    tx = optaccum.accumulate(K, inner, **NAMED)
    full = _run(update_and_apply, inner, params, *_full_batches())
    means = _run(update_and_apply, tx, params, *_microbatches(weighted=False))
    assert _distance(means[-1], full[-1]) > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "matches"), [("sgd", True), ("sign_sgd", True), ("adam", False)])
def test_the_bare_form_is_right_only_before_stateless_optimizers(name, matches):
    """In `chain(accumulate(k), adam)` the zeros of every hold decay the moments."""
    params = _params()
    inner = build(name)
    tx = optax.chain(optaccum.accumulate(K), inner)
    full = _run(update_and_apply, inner, params, *_full_batches())
    held = _run(update_and_apply, tx, params, *_microbatches())
    distance = _distance(held[-1], full[-1])
    assert distance <= TOLERANCE if matches else distance > 1000 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "adafactor"])
@pytest.mark.usefixtures("x64")
def test_ragged_microbatches_of_a_model_match_its_full_batch(name):
    """A mean loss on uneven slices of a batch, weighted by their sizes, is the whole batch's.

    In double precision, so that what differs is the method and not the rounding: the tolerance
    leaves 10^5 units in the last place for the sums of 17 examples and what Adam's division by
    small second moments makes of them; the mean of means is off by more than 10^10 times that.
    """
    sizes = np.asarray([7, 1, 5, 4])
    edges = np.cumsum([0, *sizes])
    rng = np.random.default_rng(1)
    data = rng.normal(size=(WINDOWS, edges[-1], 6)), rng.normal(size=(WINDOWS, edges[-1], 4))
    params = {"w": jnp.asarray(rng.normal(size=(6, 4))), "b": jnp.zeros(4)}

    def loss(params, x, y):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["w"] + params["b"]) - y))

    grad = jax.jit(jax.grad(loss))

    def train(tx, step, windows):
        p, opt_state, step = params, tx.init(params), jax.jit(functools.partial(step, tx))
        for x, y, kwargs in windows:
            p, opt_state = step(grad(p, x, y), opt_state, p, **kwargs)
        return p

    inner = build(name)
    tx = optaccum.accumulate(len(sizes), inner)
    slices = [slice(*edge) for edge in itertools.pairwise(edges)]
    held, means = (
        train(
            tx,
            optaccum.apply_gradients,
            [
                (x[s], y[s], {"weight": float(size)} if weighted else {})
                for x, y in zip(*data, strict=True)
                for s, size in zip(slices, sizes, strict=True)
            ],
        )
        for weighted in (True, False)
    )
    full = train(inner, update_and_apply, [(x, y, {}) for x, y in zip(*data, strict=True)])
    tolerance = 1e5 * np.finfo(np.float64).eps
    assert _distance(held, full) <= tolerance
    assert _distance(means, full) > 1e-4
