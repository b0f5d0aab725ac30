"""Run a user's training step and keep what it leaves behind after every call."""

from collections.abc import Callable, Iterable
import copy
import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr
import numpy as np

from optaccum.testing import rounding

ROUNDING = rounding.bound(rounding.EPS, 1000)  # of a gradient, relative to its size
WINDOWS = 2
Path = tuple[Any, ...]
Tree = dict[Path, np.ndarray]


class StepError(Exception):
    """The user's step raised, or returned something else than a state: the cause says how."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A way to train: the arguments of `optaccum.testing.check_step`, which explains them."""

    make_step: Callable[..., Any]
    params: Any
    every_k: int
    inside_step: bool
    get_params: Callable[[Any], Any] | None

    def start(self, every_k: int) -> tuple[Any, Callable[[Any, Any], Any]]:
        """Returns a state and a step, which may donate its buffers or change a module in place."""
        if _is_module(self.params):
            return self.make_step(copy.deepcopy(self.params), every_k)
        fresh = jax.tree.map(lambda x: jnp.array(x) if _is_array(x) else x, self.params)
        return self.make_step(fresh, every_k)

    def run(self, batch: Any, every_k: int, windows: int = WINDOWS) -> "Run":
        """Runs windows of one batch, each the same: with `every_k` 1 on the batch as a whole."""
        try:
            state, step = self.start(every_k)
            cut = every_k > 1 and not self.inside_step
            rows = [take(batch, i, every_k) for i in range(every_k)] if cut else [batch]
            trained, states = [self._trained(state)], [named(state)]
            for each in rows * windows:
                state = _next(state, step(state, jax.tree.map(jnp.array, each)))
                trained.append(self._trained(state))
                states.append(named(state))
            return _make_run(trained, states, len(rows))
        except Exception as error:
            raise StepError from error

    def _trained(self, state: Any) -> dict[Path, np.ndarray]:
        """Returns the parameters in a state: of a module of `flax.nnx`, its `nnx.Param`."""
        if self.get_params is not None:
            params = self.get_params(state)
        elif hasattr(state, "params"):
            params = state.params
        elif isinstance(state, dict) and "params" in state:
            params = state["params"]
        else:
            params = state[0] if type(state) in (tuple, list) else state
        found = named(plain(params, "Param"))
        return {path: x for path, x in found.items() if x.dtype.kind == "f"}

    def has_statistics(self) -> bool:
        """Returns whether the parameters are a module with statistics of batches."""
        stats = plain(self.params, "BatchStat")
        return _is_module(self.params) and bool(jax.tree.leaves(stats))

    def is_low_precision(self, batch: Any) -> bool:
        """Returns whether a step computes with less than float32, as far as it can be traced."""
        state, step = self.start(1)
        eps = rounding.coarsest((plain(self.params), batch))
        try:
            program = jax.make_jaxpr(lambda rows: step(state, rows))(batch)
        except Exception:  # a step that changes what it is given, or looks at numbers
            return eps > rounding.EPS
        return max(eps, rounding.narrowest(program)) > rounding.EPS


@dataclasses.dataclass(frozen=True)
class Run:
    """What a program leaves behind after 0, 1, ... calls."""

    params: np.ndarray  # f64[calls + 1, P]
    held: dict[Path, np.ndarray]  # f64[calls + 1, P] for each parameter, or [calls + 1, size]
    per_window: int  # calls per window

    def change(self, window: int = 1) -> np.ndarray:
        """Returns by how much the windows so far moved the parameters."""
        return self.params[window * self.per_window] - self.params[0]

    def moved(self, used: np.ndarray) -> float:
        """Returns the largest of the moves, of the numbers in `used`."""
        moves = (np.linalg.norm(self.change(n + 1)[used]) for n in range(WINDOWS))
        return float(max(moves)) or 1e-300

    def names(self, path: Path) -> tuple[str, ...]:
        """Returns the names in a path; what an accumulator keeps of its window has none."""
        names = tuple(keystr((key,), simple=True) for key in path)
        for i, name in enumerate(names):
            beside = {keystr(p[i:], simple=True) for p in self.held if p[:i] == path[:i]}
            if "mini_step" in beside and not name.startswith("inner"):
                return ()
        return names

    def mean(self) -> np.ndarray | None:
        """Returns what the optimizer keeps of the first window's gradient, if it keeps a mean."""
        means = [x for path, x in self.held.items() if {"mu", "trace"} & {*self.names(path)}]
        whole = _flat(x[self.per_window] for x in means)
        return whole if whole.any() else None

    def seen(self) -> np.ndarray:
        """Returns the first window's gradient, up to a factor, as far as the optimizer shows it."""
        mean = self.mean()
        return self.change() if mean is None else mean

    def hides(self) -> bool:
        """Returns whether all that moves moves as far, and no mean tells what the gradient was."""
        moved = np.abs(self.change()[self.shown()])
        moved = moved[moved > 1e-12]
        alike = len(moved) > 2 and np.ptp(moved) <= 1e-2 * moved.mean()
        return bool(alike) and self.mean() is None

    def shown(self) -> np.ndarray:
        """Returns which numbers have a gradient that is more than rounding, bool[P].

        Rounding has either sign, and an optimizer that divides by the size of a gradient steps as
        far by it as by any other: a bias in front of BatchNorm moves, and differently in each run.
        What begins at zero and is kept for each number shows the gradients: sums, means, or, if
        nowhere negative, means of squares.
        """
        shown = np.ones(self.params.shape[1], bool)
        for kept in self.held.values():
            if kept.shape == self.params.shape and not kept[0].any():
                size = np.abs(kept if (kept < 0).any() else np.sqrt(kept)).max(0)
                shown &= ~((size > 0) & (size <= ROUNDING * size.max()))
        return shown


def _make_run(trained: list[Tree], states: list[Tree], per_window: int) -> Run:
    """Returns a run; what a state holds for each parameter is one array, 0 for what it leaves out.

    Its path ends before the parameter's, which may be named "mu" and be no mean of Adam's.
    """
    params = np.stack([_flat(each.values()) for each in trained])
    sizes = {path: x.size for path, x in trained[0].items()}
    ends = dict(zip(sizes, np.cumsum([*sizes.values()]), strict=True))
    held: Tree = {}
    for path in states[0]:
        values = np.stack([state[path].ravel() for state in states])
        ways = (path[i:] for i in range(len(path) + 1))
        owner = next((way for way in ways if sizes.get(way) == values.shape[1]), None)
        if owner is None:
            held[path] = values
        else:
            whole = held.setdefault(path[: len(path) - len(owner)], np.zeros(params.shape))
            whole[:, ends[owner] - sizes[owner] : ends[owner]] = values
    return Run(params, held, per_window)


def take(batch: Any, i: int, n: int) -> Any:
    """Returns the rows i, i + n, ..."""
    return jax.tree.map(lambda x: jnp.asarray(x)[i::n], batch)


def _next(state: Any, result: Any) -> Any:
    """Returns the state in what a step returned: it, a tuple that begins with it, or nothing."""
    if result is None:
        return state
    wanted = jax.tree.structure(state)
    for found in (result, result[0] if isinstance(result, tuple) and result else None):
        if jax.tree.structure(found) == wanted:
            return found
    if any(map(_is_module, state if isinstance(state, tuple | list) else [state])):
        return state  # changed in place; what is returned is a loss
    raise TypeError(
        "`step` must return the state that it was given, changed, or a tuple that begins with it, "
        f"or None if it changes the state in place; got {type(result).__name__} of the "
        f"structure {str(jax.tree.structure(result))[:200]}"
    )


def _is_module(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def plain(tree: Any, kind: str | None = None) -> Any:
    """Returns a tree of arrays for modules of `flax.nnx`, of one kind of their variables."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    kinds = (nnx.Module, nnx.Optimizer)
    kept = ... if kind is None else getattr(nnx, kind)

    def pure(x):
        return nnx.to_pure_dict(nnx.state(x, kept)) if isinstance(x, kinds) else x

    return jax.tree.map(pure, tree, is_leaf=lambda x: isinstance(x, kinds))


def named(tree: Any) -> dict[Path, np.ndarray]:
    """Returns {path: array} of a state, floating-point numbers as f64."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain(tree)):
        leaf = jnp.asarray(leaf) if isinstance(leaf, int | float) else leaf
        if _is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            inexact = jnp.issubdtype(leaf.dtype, jnp.floating)
            found[path] = np.array(leaf, np.float64 if inexact else None)
    return found


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(x.ravel() for x in arrays)])
