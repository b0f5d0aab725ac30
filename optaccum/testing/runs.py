"""Run a user's training step and keep what it leaves behind after every call."""

from collections.abc import Callable, Iterable
import copy
import dataclasses
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum.testing.explain.structure import EPS, MANY

ROUNDING = 8 * EPS * math.sqrt(MANY)  # what it explains of a gradient, relative to its size
MEANS = re.compile(r"\b(mu|trace)\b")  # where optimizers of Optax keep means of gradients
NARROW = re.compile(r"\b(bf16|f16|f8_\w+)\[")  # as a program prints its types
OWN = re.compile(r"(\.|\[')(arg_sums|grad_sum|weight)\b")  # of a window: AccumulateState


class StepError(Exception):
    """The user's step raised, or returned what is no state: the cause says how."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A way to train.

    Attributes:
        make_step: `(params, every_k) -> (state, step)`.
        params: the parameters to begin with: a tree, or a module of `flax.nnx`.
        every_k: microbatches per window.
        inside_step: whether `step` takes the whole batch and cuts it itself.
        get_params: `state -> parameters`, or None to find them.
    """

    make_step: Callable[..., Any]
    params: Any
    every_k: int
    inside_step: bool
    get_params: Callable[[Any], Any] | None


@dataclasses.dataclass(frozen=True)
class Run:
    """What a program leaves behind.

    Attributes:
        params: f64[P] after 0, 1, ... calls.
        states: {path: array} after 0, 1, ... calls.
        per_window: calls per window.
        holders: {path: what holds the leaf}; see `find_holders`.
        trained: {path: size} of the leaves of `params`, in their order.
    """

    params: list[np.ndarray]
    states: list[dict[str, np.ndarray]]
    per_window: int
    holders: dict[str, str]
    trained: dict[str, int]

    def change(self, window: int = 1) -> np.ndarray:
        """Returns by how much the windows so far moved the parameters."""
        return self.params[window * self.per_window] - self.params[0]

    def state(self, window: int = 1) -> dict[str, np.ndarray]:
        """Returns the state after some windows."""
        return self.states[window * self.per_window]

    def mean(self) -> np.ndarray | None:
        """Returns what the optimizer keeps of the first window's gradient, if it keeps a mean."""
        found = [
            x
            for path, x in self.state().items()
            if MEANS.search(self.holders.get(path, "")) and x.dtype.kind == "f"
        ]
        whole = np.concatenate([x.ravel() for x in found]) if found else np.zeros(0)
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
        shown = np.ones(len(self.params[0]), bool)
        for holder in {_holder(path, self.trained) for path in self.states[0]}:
            kept = np.stack([self._kept(state, holder) for state in self.states])
            if not kept[0].any():
                size = np.abs(kept if (kept < 0).any() else np.sqrt(kept)).max(0)
                shown &= ~((size > 0) & (size <= ROUNDING * size.max()))
        return shown

    def _kept(self, state: dict[str, np.ndarray], holder: str) -> np.ndarray:
        """Returns what is held for each number of the parameters, and 0 for the others, f64[P]."""
        found = []
        for own, size in self.trained.items():
            x = state.get(holder + own)
            found.append(x.ravel() if x is not None and x.size == size else np.zeros(size))
        return np.concatenate(found).astype(np.float64)


def run(program: Program, batch: Any, every_k: int, windows: int) -> Run:
    """Runs windows of one batch, each the same: with `every_k` 1 on the batch as a whole."""
    try:
        return _run(program, batch, every_k, windows)
    except Exception as error:
        raise StepError from error


def _run(program: Program, batch: Any, every_k: int, windows: int) -> Run:
    state, step = program.make_step(_fresh(program.params), every_k)
    cut = every_k > 1 and not program.inside_step
    rows = [take(batch, i, every_k) for i in range(every_k)] if cut else [batch]
    params, states = [], []

    def keep(state):
        params.append(flat(find_params(program, state)))
        states.append(named(state))

    keep(state)
    for _ in range(windows):
        for each in rows:
            state = _next(state, step(state, jax.tree.map(jnp.array, each)))
            keep(state)
    trained = _floats(find_params(program, state))
    return Run(
        params,
        states,
        len(rows),
        find_holders(states[0], trained),
        {path: x.size for path, x in trained.items()},
    )


def coarsest(tree: Any) -> float:
    """Returns the eps of the narrowest floating-point type of a tree, at least that of float32."""
    dtypes = [x.dtype for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max(float(jnp.finfo(dtype).eps) for dtype in (jnp.float32, *floats))


def low_precision(program: Program, batch: Any) -> bool:
    """Returns whether a step computes with less than float32, as far as it can be traced."""
    state, step = program.make_step(_fresh(program.params), 1)
    try:
        text = str(jax.make_jaxpr(lambda rows: step(state, rows))(batch))
    except Exception:  # a step that changes what it is given, or looks at numbers
        text = ""
    given = coarsest((program.params, batch))
    return given > float(jnp.finfo(jnp.float32).eps) or NARROW.search(text) is not None


def take(batch: Any, i: int, n: int) -> Any:
    """Returns the rows i, i + n, ..."""
    return jax.tree.map(lambda x: jnp.asarray(x)[i::n], batch)


def find_holders(state: Iterable[str], params: Iterable[str]) -> dict[str, str]:
    """Returns {path: what holds the leaf}: the path without the parameter's own at its end.

    So a parameter named "mu" is no mean of Adam's. What an AccumulateState measures of its window
    is no part of the optimizer and is left out.
    """
    paths, own = {*state}, {*params}
    found = {}
    for path in paths:
        holder = _holder(path, own)
        before = [holder[: match.start()] for match in OWN.finditer(holder)]
        if not any({f"{at}.mini_step", f"{at}['mini_step']"} & paths for at in before):
            found[path] = holder
    return found


def _holder(path: str, own: Iterable[str]) -> str:
    return path[: len(path) - max((len(end) for end in own if path.endswith(end)), default=0)]


def find_params(program: Program, state: Any) -> Any:
    """Returns the parameters in a state: what `get_params` says, `state.params`, or the first."""
    if program.get_params is not None:
        return program.get_params(state)
    if hasattr(state, "params"):
        return state.params
    if isinstance(state, dict) and "params" in state:
        return state["params"]
    return state[0] if type(state) in (tuple, list) else state


def _fresh(params: Any) -> Any:
    """Returns a copy, since a step may donate its buffers or change a module in place."""
    if _nnx() and isinstance(params, _nnx().Module):
        return copy.deepcopy(params)
    return jax.tree.map(lambda x: jnp.array(x) if _is_array(x) else x, params)


def _next(state: Any, result: Any) -> Any:
    """Returns the state in what a step returned: it, a tuple that begins with it, or nothing."""
    if result is None:
        return state
    wanted = jax.tree.structure(state)
    if jax.tree.structure(result) == wanted:
        return result
    if isinstance(result, tuple) and result and jax.tree.structure(result[0]) == wanted:
        return result[0]
    if _nnx() and any(isinstance(x, _nnx().Module) for x in _entries(state)):
        return state  # changed in place; what is returned is a loss
    raise TypeError(
        "`step` must return the state that it was given, changed, or a tuple that begins with it, "
        f"or None where it changes the state in place; got {type(result).__name__} of the "
        f"structure {str(jax.tree.structure(result))[:200]}"
    )


def _entries(state: Any) -> list[Any]:
    return [*state] if isinstance(state, tuple | list) else [state]


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _plain(tree: Any) -> Any:
    """Returns a tree of arrays for modules of `flax.nnx`."""
    nnx = _nnx()
    if nnx is None:
        return tree

    def pure(x):
        return nnx.to_pure_dict(nnx.state(x)) if isinstance(x, nnx.Module | nnx.Optimizer) else x

    def stop(x):
        return isinstance(x, nnx.Module | nnx.Optimizer)

    return jax.tree.map(pure, tree, is_leaf=stop)


def named(tree: Any) -> dict[str, np.ndarray]:
    """Returns {path: array} of a state."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_plain(tree)):
        leaf = jnp.asarray(leaf) if isinstance(leaf, int | float) else leaf
        if _is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            x = np.asarray(leaf)
            inexact = jnp.issubdtype(x.dtype, jnp.floating)
            found[jax.tree_util.keystr(path)] = x.astype(np.float64) if inexact else x.copy()
    return found


def flat(tree: Any) -> np.ndarray:
    """Returns the trained numbers of a tree, f64[P]: those of `nnx.Param` of a module."""
    numbers = [x.ravel() for x in _floats(tree).values()]
    return np.concatenate(numbers) if numbers else np.zeros(0)


def _floats(tree: Any) -> dict[str, np.ndarray]:
    """Returns {path: array} of what is trained: of a module of `flax.nnx`, its `nnx.Param`."""
    nnx = _nnx()
    if nnx is not None and isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree, nnx.Param))
    return {path: x for path, x in named(tree).items() if x.dtype.kind == "f"}
