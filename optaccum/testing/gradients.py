"""Gradients of the full batch and of each microbatch, at several parameters, as plain vectors."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._core import batch
from optaccum._value_and_grad import value_and_grad


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss of arguments by position with their roles, no position negative, and their names."""

    fun: Callable[..., Any]
    args: list[Any]
    names: list[str]
    argnums: tuple[int, ...]
    rows: tuple[int, ...]
    rngs: tuple[int, ...]
    has_aux: bool
    weight_fn: Callable[..., Any] | None

    @property
    def arrays(self) -> dict[int, Any]:
        """The arguments that are traced; the others may be anything and are closed over."""
        return {j: self.args[j] for j in sorted((*self.argnums, *self.rows, *self.rngs))}

    def __call__(self, arrays: dict[int, Any]) -> jax.Array:
        """Returns the loss with some arguments replaced."""
        args = [arrays.get(j, x) for j, x in enumerate(self.args)]
        result = self.fun(*args)
        return result[0] if self.has_aux else result

    def weight(self, arrays: dict[int, Any]) -> float:
        """Returns how much a microbatch counts."""
        return 1.0 if self.weight_fn is None else float(self.counted(arrays))

    def counted(self, arrays: dict[int, Any]) -> Any:
        """Returns what `weight_fn` does."""
        assert self.weight_fn is not None
        return self.weight_fn(*[arrays.get(j, x) for j, x in enumerate(self.args)])


@dataclasses.dataclass(frozen=True)
class Point:
    """Gradients at one value of the parameters.

    Attributes:
        full: f64[P], of the full batch.
        parts: f64[n, P], of the microbatches.
        noise: how far the full batch's gradient moves when its rows change places.
    """

    full: np.ndarray
    parts: np.ndarray
    noise: float

    @property
    def size(self) -> float:
        """The norm against which errors count: no smaller than that of a typical microbatch."""
        parts = self.parts[np.isfinite(self.parts).all(1)]
        typical = np.sqrt(np.mean(np.sum(parts**2, 1))) if len(parts) else 0.0
        return max(float(np.linalg.norm(self.full)), float(typical), np.finfo(float).tiny)


def measure(loss: Loss, n: int, points: int = 3) -> tuple[list[Point], np.ndarray]:
    """Returns the gradients at the caller's parameters and at others near them, and the weights.

    Points where the full batch's gradient is not finite are left out, but for the first.
    """
    differentiate = jax.jit(jax.grad(lambda trained, rest: loss({**rest, **trained})))
    split = {j: batch.split(jax.tree.map(jnp.asarray, loss.args[j]), n) for j in loss.rows}

    def gradient(trained: Any, rest: Any) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return flat(differentiate(trained, rest))

    trained = {j: loss.args[j] for j in loss.argnums}
    whole = {j: x for j, x in loss.arrays.items() if j not in trained}
    own = [
        {**whole, **{j: batch.take(x, jnp.asarray(i)) for j, x in split.items()}} for i in range(n)
    ]
    # The same rows, those of the last microbatch first: sums in another order.
    turned = {j: jax.tree.map(_reverse, x) for j, x in whole.items() if j in split}
    found = []
    for number in range(points):
        at = trained if not number else nearby(trained, number)
        full = gradient(at, whole)
        if number and not np.isfinite(full).all():
            continue
        parts = np.stack([gradient(at, rest) for rest in own])
        point = Point(full, parts, 0.0)
        noise = float(np.linalg.norm(gradient(at, {**whole, **turned}) - full)) / point.size
        found.append(dataclasses.replace(point, noise=noise))
    weights = np.array([loss.weight({**trained, **rest}) for rest in own])
    return found, weights


def of_loop(loss: Loss, n: int) -> np.ndarray:
    """Returns the gradient that the compiled loop over all microbatches takes, f64[P].

    The arrays lie where the caller put them, so that compilers do here what they do in training.
    """
    trained = {j: loss.args[j] for j in loss.argnums}
    rows = {j: jax.tree.map(jnp.asarray, loss.args[j]) for j in loss.rows}
    keys = {j: loss.args[j] for j in loss.rngs}

    def value(trained, rows):
        return loss({**keys, **trained, **rows})

    def counted(trained, rows):
        return loss.counted({**keys, **trained, **rows})

    weight_fn = None if loss.weight_fn is None else counted
    loop = value_and_grad(value, num_microbatches=n, weight_fn=weight_fn)
    with jax.default_matmul_precision("highest"):
        return flat(jax.jit(loop)(trained, rows)[1])


def depends_on_keys(loss: Loss, tolerance: float) -> bool:
    """Returns whether other keys in `rng_argnums` give another gradient."""
    if not loss.rngs:
        return False
    differentiate = jax.jit(jax.grad(lambda trained, rest: loss({**rest, **trained})))
    trained = {j: loss.args[j] for j in loss.argnums}
    rest = {j: x for j, x in loss.arrays.items() if j not in trained}
    others = {j: batch.own_keys(loss.args[j], jnp.asarray(1)) for j in loss.rngs}
    a, b = (flat(differentiate(trained, x)) for x in (rest, {**rest, **others}))
    return not float(np.linalg.norm(a - b)) <= tolerance * max(np.linalg.norm(a), 1e-300)


def flat(tree: Any) -> np.ndarray:
    """Returns the real numbers in a tree, f64[P]."""
    parts = []
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        x: Any = np.asarray(leaf)
        if np.iscomplexobj(x):
            x = np.stack([x.real, x.imag])
        parts.append(x.astype(np.float64).ravel())
    return np.concatenate(parts) if parts else np.zeros(0)


def nearby(tree: Any, number: int) -> Any:
    """Returns parameters moved at random by about a tenth of their size."""
    random = np.random.default_rng(number)

    def move(x):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        wide = np.asarray(x).astype(complex if jnp.iscomplexobj(x) else float)
        size = float(np.sqrt(np.mean(np.abs(wide) ** 2))) if x.size else 0.0
        # Zeros are moved too: at a last layer of zeros most gradients vanish.
        step = 0.1 * (size or 0.3) * random.standard_normal(x.shape)
        return jax.device_put((wide + step).astype(x.dtype), x.sharding)

    return jax.tree.map(move, tree)


def _reverse(x: Any) -> Any:
    return jnp.flip(jnp.asarray(x), 0)
