"""Gradients of the full batch and of each microbatch, at several parameters, as plain vectors."""

from collections.abc import Callable
import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum import _batch
from optaccum._value_and_grad import value_and_grad
from optaccum.testing import counts, rounding

POINTS = 3
LARGEST = 64  # rows that are tried one by one


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """A loss of arguments by position, with their names and roles."""

    fun: Callable[..., Any]  # without `aux`
    args: dict[int, Any]
    names: list[str]  # of the arguments in `fun`
    argnums: tuple[int, ...]  # positions of what is differentiated
    rows: tuple[int, ...]  # positions of what is split
    keys: tuple[int, ...]  # positions of random keys
    weight_fn: Callable[..., Any] | None  # of the same arguments

    def some(self, *positions: int) -> dict[int, Any]:
        """Returns the arguments at some positions."""
        return {j: self.args[j] for j in sorted(positions)}

    @property
    def arrays(self) -> dict[int, Any]:
        """The arguments that are traced; the others may be anything."""
        return self.some(*self.argnums, *self.rows, *self.keys)

    @property
    def num_rows(self) -> int:
        """How many rows the batch has."""
        return len(jax.tree.leaves(self.some(*self.rows))[0])

    def leaves(self, args: dict[int, Any]) -> dict[str, Any]:
        """Returns the leaves of some arguments by the names that the function would write."""
        return dict(_batch.named_leaves({self.names[j]: x for j, x in args.items()}))

    def __call__(self, *changed: Any) -> jax.Array:
        """Returns the loss with some arguments replaced."""
        return self.fun(*functools.reduce(operator.or_, changed, self.args).values())

    def weight(self, *changed: dict[int, Any]) -> Any:
        """Returns how much a microbatch counts."""
        return dataclasses.replace(self, fun=self.weight_fn or (lambda *args: 1.0))(*changed)

    @functools.cached_property
    def differentiated(self) -> Any:
        """The compiled loss and gradient, a function of what is trained and the other arrays."""
        return jax.jit(jax.value_and_grad(self.__call__))

    def value_and_gradient(self, changed: dict[int, Any]) -> tuple[float, np.ndarray]:
        """Returns the loss and its gradient with some arguments replaced, f64[P]."""
        arrays = self.arrays | changed
        trained = {j: arrays.pop(j) for j in self.argnums}
        with jax.default_matmul_precision("highest"):
            value, gradient = self.differentiated(trained, arrays)
        return float(value), flat(gradient)

    def gradient(self, changed: dict[int, Any]) -> np.ndarray:
        """Returns the gradient with some arguments replaced, f64[P]."""
        return self.value_and_gradient(changed)[1]

    def ordered(self, order: np.ndarray) -> dict[int, Any]:
        """Returns the rows in an order, on the devices on which they are."""

        def leaf(x):
            x = jnp.asarray(x)
            if not x.is_fully_addressable or _batch.is_typed_key(x):
                return x[order]
            return jax.device_put(np.asarray(x)[order], x.sharding)

        return jax.tree.map(leaf, self.some(*self.rows))

    def rounding(self) -> float:
        """Returns the relative error of the gradient that rounding explains."""
        rest = self.some(*self.rows, *self.keys)
        program = self.differentiated.trace(self.some(*self.argnums), rest).jaxpr
        depth = rounding.count(jax.make_jaxpr(self)(self.arrays))
        return rounding.bound(rounding.narrowest(program), depth)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Gradients for one order of the rows at m values of the parameters, in units of their size.

    The size is the norm of the full batch's gradient, or of a typical microbatch's if it is larger.
    """

    full: np.ndarray  # f64[m, P], of the full batch
    microbatches: np.ndarray  # f64[m, n, P], of the microbatches
    sizes: np.ndarray  # f64[m], the units
    used: np.ndarray  # f64[n], the weights in use
    counts: dict[str, np.ndarray]  # {expression: f64[n]}, what the leaves of the batch hold


def scaled(full: Any, microbatches: Any, used: np.ndarray, counted: dict[str, Any]) -> Cut:
    """Returns gradients in units of their size, with what the leaves in `counted` hold."""
    full, each = np.asarray(full), np.asarray(microbatches)
    finite = np.isfinite(each).all(2)
    squares = np.where(finite, np.square(each).sum(2), 0.0).sum(1)
    typical = np.sqrt(squares / np.maximum(finite.sum(1), 1))
    sizes = np.maximum(np.linalg.norm(full, axis=1), typical)
    sizes = np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1.0)
    full, each = full / sizes[:, None], each / sizes[:, None, None]
    return Cut(full, each, sizes, used, counts.count(counted, len(used)))


def measure(loss: Loss, n: int, tried: list[np.ndarray], likely: tuple[str, ...]) -> list[Cut]:
    """Returns what the microbatches of each order of the rows have, at several parameters.

    Parameters with a gradient that is not finite are left out, but for the caller's. `likely` are
    the leaves that are counted; of none, all are.
    """
    cuts = []
    for order in tried:
        turned = loss.ordered(order)
        cut = _batch.split(turned, n)
        microbatches = [_batch.take(cut, jnp.asarray(i)) for i in range(n)]
        found = []
        for number in range(POINTS):
            params = nearby(loss.some(*loss.argnums), number)
            full = loss.gradient(params | turned)
            if not number or np.isfinite(full).all():
                found.append((full, [loss.gradient(params | each) for each in microbatches]))
        leaves = loss.leaves(turned)
        counted = {name: leaves[name] for name in likely} or leaves
        used = np.array([float(loss.weight(each)) for each in microbatches])
        full, each = zip(*found, strict=True)
        cuts.append(scaled(full, each, used, counted))
    return cuts


def noise(cuts: list[Cut]) -> float:
    """Returns how far the full batch's gradient moves if its rows change places."""
    first, *others = cuts
    off = [
        np.linalg.norm(a * u - b * v) / v
        for each in others
        for a, u, b, v in zip(each.full, each.sizes, first.full, first.sizes, strict=False)
    ]
    return float(max(off, default=0.0))


def orders(loss: Loss, n: int, count: int) -> list[np.ndarray]:
    """Returns orders of the rows: the caller's, one whose microbatches differ most, and others.

    Losses of single rows, each of them repeated, tell which rows are alike. What fits in one order
    by chance, as the largest half of the rows if each microbatch has as many, fits in no other.
    """
    size, random = loss.num_rows, np.random.default_rng(0)
    found = [np.arange(size), *(random.permutation(size) for _ in range(count - 1))]
    if size <= LARGEST:
        each = [loss.ordered(np.full(size, i)) for i in range(size)]
        singles = [loss.value_and_gradient(rows)[0] for rows in each]
        found[1] = np.argsort(singles, kind="stable").reshape(n, -1).T.ravel()
    return found


def of_loop(loss: Loss, n: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the gradient that the compiled loop over all microbatches takes, f64[P].

    The arrays lie where the caller put them, so that compilers do here what they do in training.
    `weights`, of the microbatches, replace the ones in use.
    """
    keys, rows = loss.some(*loss.keys), jax.tree.map(jnp.asarray, loss.some(*loss.rows))
    weight_fn = loss.weight_fn and (lambda params, batch: loss.weight(keys, params, batch[0]))
    each = np.ones(loss.num_rows)
    if weights is not None:
        each = np.tile(weights * n / len(each), len(each) // n)
        weight_fn = lambda params, batch: batch[1].sum()  # noqa: E731
    loop = value_and_grad(
        lambda params, batch: loss(keys, params, batch[0]),
        num_microbatches=n,
        weight_fn=weight_fn,
    )
    batch = rows, jnp.asarray(each, jnp.float32)
    with jax.default_matmul_precision("highest"):
        return flat(jax.jit(loop)(loss.some(*loss.argnums), batch)[1])


def depends_on_keys(loss: Loss, tolerance: float) -> bool:
    """Returns whether other random keys give another gradient."""
    others = {j: _batch.fold_in(x, jnp.asarray(1)) for j, x in loss.some(*loss.keys).items()}
    if not others:
        return False
    return not apart(loss.gradient(others), loss.gradient({})) <= tolerance


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Returns how far a vector is from another, relative to the other's size if it has one."""
    return float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) or 1.0)


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
