"""Gradients of the full batch and of each microbatch, at several parameters, as plain vectors."""

from collections.abc import Callable
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum import _batch, _keys
from optaccum._value_and_grad import value_and_grad
from optaccum.testing import rounding

POINTS = 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """A loss of arguments by position, with their names and roles."""

    fun: Callable[..., Any]
    args: dict[int, Any]
    names: list[str]  # of the arguments in `fun`
    argnums: tuple[int, ...]  # positions of what is differentiated
    rows: tuple[int, ...]  # positions of what is split
    keys: tuple[int, ...]  # positions of random keys
    has_aux: bool
    weight_fn: Callable[..., Any] | None  # of the same arguments

    def some(self, *positions: int) -> dict[int, Any]:
        """Returns the arguments at some positions."""
        return {j: self.args[j] for j in sorted(positions)}

    @property
    def arrays(self) -> dict[int, Any]:
        """The arguments that are traced; the others may be anything."""
        return self.some(*self.argnums, *self.rows, *self.keys)

    def leaves(self, j: int) -> dict[str, Any]:
        """Returns the leaves of argument j by the names that the function would write."""
        leaves = jax.tree_util.tree_leaves_with_path(self.args[j])
        return {self.names[j] + jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def __call__(self, *changed: dict[int, Any]) -> jax.Array:
        """Returns the loss with some arguments replaced."""
        result = self.fun(*functools.reduce(operator.or_, changed, self.args).values())
        return result[0] if self.has_aux else result

    def weight(self, *changed: dict[int, Any]) -> Any:
        """Returns how much a microbatch counts."""
        if self.weight_fn is None:
            return 1.0
        return self.weight_fn(*functools.reduce(operator.or_, changed, self.args).values())

    @functools.cached_property
    def differentiated(self) -> Any:
        """The compiled gradient, a function of what is trained and of the other arrays."""
        return jax.jit(jax.grad(self.__call__))

    def gradient(self, changed: dict[int, Any]) -> np.ndarray:
        """Returns the gradient with some arguments replaced, f64[P]."""
        arrays = self.arrays | changed
        trained = {j: arrays.pop(j) for j in self.argnums}
        with jax.default_matmul_precision("highest"):
            return flat(self.differentiated(trained, arrays))

    def rounding(self) -> float:
        """Returns the relative error of the gradient that rounding explains."""
        rest = self.some(*self.rows, *self.keys)
        program = self.differentiated.trace(self.some(*self.argnums), rest).jaxpr
        depth = rounding.count(jax.make_jaxpr(self)(self.arrays))
        return rounding.bound(rounding.narrowest(program), depth)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients at m values of the parameters, in units of their size.

    The size is the norm of the full batch's gradient, or of a typical microbatch's if it is larger.
    """

    full: np.ndarray  # f64[m, P], of the full batch
    parts: np.ndarray  # f64[m, n, P], of the microbatches
    sizes: np.ndarray  # f64[m], the units


def scaled(full: Any, parts: Any) -> Gradients:
    """Returns gradients in units of their size."""
    full, parts = np.asarray(full), np.asarray(parts)
    finite = np.isfinite(parts).all(2)
    squares = np.where(finite, np.square(parts).sum(2), 0.0).sum(1)
    typical = np.sqrt(squares / np.maximum(finite.sum(1), 1))
    sizes = np.maximum(np.linalg.norm(full, axis=1), typical)
    sizes = np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1.0)
    return Gradients(full / sizes[:, None], parts / sizes[:, None, None], sizes)


def measure(loss: Loss, n: int) -> tuple[Gradients, np.ndarray, float]:
    """Returns gradients at the caller's parameters and near them, the weights, and the noise.

    The noise is how far the full batch's gradient moves if its rows change places. Parameters with
    a gradient that is not finite are left out, but for the caller's.
    """
    rows = jax.tree.map(jnp.asarray, loss.some(*loss.rows))
    # The rows of the last microbatch come first: sums in another order.
    turned = jax.tree.map(lambda x: jnp.flip(x, 0), rows)
    cut = _batch.split(rows, n)
    microbatches = [_batch.take(cut, jnp.asarray(i)) for i in range(n)]
    found = []
    for number in range(POINTS):
        params = nearby(loss.some(*loss.argnums), number)
        full = loss.gradient(params)
        if number and not np.isfinite(full).all():
            continue
        parts = [loss.gradient(params | each) for each in microbatches]
        found.append((full, parts, loss.gradient(params | turned)))
    full, parts, again = (np.stack(each) for each in zip(*found, strict=True))
    gradients = scaled(full, parts)
    noise = np.linalg.norm(again / gradients.sizes[:, None] - gradients.full, axis=1)
    weights = np.array([float(loss.weight(each)) for each in microbatches])
    return gradients, weights, float(noise.max())


def of_loop(loss: Loss, n: int) -> np.ndarray:
    """Returns the gradient that the compiled loop over all microbatches takes, f64[P].

    The arrays lie where the caller put them, so that compilers do here what they do in training.
    """
    keys = loss.some(*loss.keys)
    loop = value_and_grad(
        lambda *arrays: loss(keys, *arrays),
        num_microbatches=n,
        weight_fn=loss.weight_fn and (lambda *arrays: loss.weight(keys, *arrays)),
    )
    rows = jax.tree.map(jnp.asarray, loss.some(*loss.rows))
    with jax.default_matmul_precision("highest"):
        return flat(jax.jit(loop)(loss.some(*loss.argnums), rows)[1])


def depends_on_keys(loss: Loss, tolerance: float) -> bool:
    """Returns whether other random keys give another gradient."""
    others = {j: _keys.fold_in(x, jnp.asarray(1)) for j, x in loss.some(*loss.keys).items()}
    if not others:
        return False
    a, b = loss.gradient({}), loss.gradient(others)
    return not float(np.linalg.norm(a - b)) <= tolerance * max(np.linalg.norm(a), 1e-300)


def flat(tree: Any) -> np.ndarray:
    """Returns the real numbers in a tree, f64[P]."""
    found = (x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))
    leaves: list[Any] = [*map(np.asarray, found)]
    pairs = [np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x for x in leaves]
    return np.concatenate([np.zeros(0), *(x.astype(np.float64).ravel() for x in pairs)])


def nearby(tree: Any, number: int) -> Any:
    """Returns parameters moved at random by about a tenth of their size; 0 leaves them."""
    random = np.random.default_rng(number)

    def move(x):
        x = jnp.asarray(x)
        if not number or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        wide = np.asarray(x).astype(complex if jnp.iscomplexobj(x) else float)
        size = float(np.sqrt(np.mean(np.abs(wide) ** 2))) if x.size else 0.0
        # Zeros are moved too: at a last layer of zeros most gradients vanish.
        step = 0.1 * (size or 0.3) * random.standard_normal(x.shape)
        return jax.device_put((wide + step).astype(x.dtype), x.sharding)

    return jax.tree.map(move, tree)
