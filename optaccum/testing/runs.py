"""Run a user's training step and keep what it leaves behind after every call."""

from collections.abc import Callable
import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr
import numpy as np

from optaccum.testing import layouts, rounding
from optaccum.testing.gradients import apart, flat
from optaccum.testing.layouts import Path, Tree

ROUNDING = rounding.bound(rounding.EPS, 1000)  # of a gradient, relative to its size
WINDOWS = 3  # what cancels in one or two shows in three


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
        if layouts.is_module(self.params):
            return self.make_step(copy.deepcopy(self.params), every_k)
        fresh = jax.tree.map(lambda x: jnp.array(x) if hasattr(x, "shape") else x, self.params)
        return self.make_step(fresh, every_k)

    def run(
        self, batch: Any, every_k: int, windows: int = WINDOWS, starts: list[Tree] | None = None
    ) -> "Run":
        """Runs windows of one batch, each the same: with `every_k` 1 on the batch as a whole.

        `starts` are parts of the state for each window, which every call of it begins with.
        """
        try:
            state, step = self.start(every_k)
            cut = every_k > 1 and not self.inside_step
            rows = [take(batch, i, every_k) for i in range(every_k)] if cut else [batch]
            trained, states = [self._trained(state)], [layouts.named(state)]
            for i, each in enumerate(rows * windows):
                state = layouts.with_values(state, starts[i // len(rows)]) if starts else state
                state = _next(step, state, each)
                trained.append(self._trained(state))
                states.append(layouts.named(state))
            return _make_run(trained, states, len(rows))
        except Exception as error:
            raise StepError from error

    def located(self, batch: Any) -> "Program":
        """Returns a program that knows where in its state the parameters are, if they are found.

        They have the tree that `make_step` got. Of several, such as averages and moments, they are
        the ones with its values and the name "params", on the highest level, that move the most.
        """
        if self.get_params is not None:
            return self
        before = layouts.alike(self.params, self._after(None))
        if not before:
            return self
        after = layouts.alike(self.params, self._after(batch)) if len(before) > 1 else before

        def numbers(tree):
            return flat([*layouts.named(tree).values()])

        def rank(path):
            first, then = (numbers(found[path]) for found in (before, after))
            equal = len(first) == len(wanted) and np.allclose(first, wanted, rtol=0.01, atol=1e-6)
            called = any(keystr((key,), simple=True) == "params" for key in path)
            return equal, called, -len(path), np.linalg.norm(then - first)

        wanted = numbers(layouts.needles(self.params)[0])
        path = max(before, key=rank)
        return dataclasses.replace(
            self, get_params=lambda state: layouts.alike(self.params, state)[path]
        )

    def _after(self, batch: Any) -> Any:
        """Returns the state after a step on the full batch, or of None before it."""
        try:
            state, step = self.start(1)
            return state if batch is None else _next(step, state, batch)
        except Exception as error:
            raise StepError from error

    def _trained(self, state: Any) -> dict[Path, np.ndarray]:
        """Returns the parameters in a state: of a module of `flax.nnx`, its `nnx.Param`."""
        assert self.get_params is not None  # of the user, or of `located`
        found = layouts.named(layouts.plain(self.get_params(state), "Param"))
        return {path: x for path, x in found.items() if x.dtype.kind == "f"}

    def has_statistics(self) -> bool:
        """Returns whether the parameters are a module with statistics of batches."""
        stats = layouts.plain(self.params, "BatchStat")
        return layouts.is_module(self.params) and bool(jax.tree.leaves(stats))

    def is_low_precision(self, batch: Any) -> bool:
        """Returns whether a step computes with less than float32, as far as it can be traced."""
        state, step = self.start(1)
        low = rounding.is_low((layouts.plain(self.params), batch))
        try:
            program = jax.make_jaxpr(lambda rows: step(state, rows))(batch)
        except Exception:  # a step that changes what it is given, or looks at numbers
            return low
        return low or rounding.narrowest(program) > rounding.EPS


@dataclasses.dataclass(frozen=True)
class Run:
    """What a program leaves behind after 0, 1, ... calls."""

    params: np.ndarray  # f64[calls + 1, P]
    held: dict[Path, np.ndarray]  # f64[calls + 1, P] for each parameter, or [calls + 1, size]
    per_window: int  # calls per window
    states: list[Tree]  # of all leaves, after each call
    units: dict[Path, list[Path]]  # the leaves of what is held

    @property
    def holds(self) -> list[int]:
        """The calls that should only accumulate."""
        return [i for i in range(1, len(self.params)) if i % self.per_window]

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

    def moving(self) -> list[Path]:
        """Returns what moves in a hold: beside parameters and accumulators nothing should."""
        return [
            path
            for path, x in self.held.items()
            if any((x[i] != x[i - 1]).any() for i in self.holds)
            and self.names(path)
            and not np.array_equal(x, self.params)
        ]

    def is_average(self, path: Path) -> bool:
        """Returns whether each call takes it a part of the way to the parameters, old or new."""
        x = self.held[path]
        if x.shape != self.params.shape or np.array_equal(x, self.params):
            return False
        return any(_follows(x, targets) for targets in (self.params[1:], self.params[:-1]))

    def sum(self, call: int = 1) -> np.ndarray | None:
        """Returns what the first calls sum up, over their weight, if they are holds that do so."""
        if not np.array_equal(self.params[call], self.params[0]):
            return None
        for path, x in self.held.items():
            if x.shape == self.params.shape and not x[0].any() and x[call].any():
                weight = self.held.get((*path[:-1], GetAttrKey("weight")))
                x = x[call]
                return x if weight is None or not weight[call].all() else x / weight[call]
        return None

    def mean(self) -> np.ndarray | None:
        """Returns what the optimizer keeps of the first window's gradient, if it keeps a mean."""
        means = [x for path, x in self.held.items() if {"mu", "trace"} & {*self.names(path)}]
        whole = flat([x[self.per_window] for x in means])
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
        for x in self.held.values():
            if x.shape == self.params.shape and not x[0].any():
                size = np.abs(x if (x < 0).any() else np.sqrt(x)).max(0)
                shown &= ~((size > 0) & (size <= ROUNDING * size.max()))
        return shown


def _follows(x: np.ndarray, targets: np.ndarray) -> bool:
    went, way = np.diff(x, axis=0), targets - x[:-1]
    part = np.sum(went * way, 1) / np.maximum(np.sum(way * way, 1), 1e-300)
    off = np.linalg.norm(went - part[:, None] * way, axis=1)
    far = np.linalg.norm(way, axis=1) > 1e-6 * np.linalg.norm(x[0])
    follows = (off <= 1e-3 * np.linalg.norm(went, axis=1)) & (part > 0) & (part < 1)
    return bool(far.any() and follows[far].all())


def _make_run(trained: list[Tree], states: list[Tree], per_window: int) -> Run:
    """Returns a run; what a state holds for each parameter is one array, 0 for what it leaves out.

    Its path ends before the parameter's, which may be named "mu" and be no mean of Adam's.
    """
    params = np.stack([flat([*each.values()]) for each in trained])
    sizes = {path: x.size for path, x in trained[0].items()}
    ends = dict(zip(sizes, np.cumsum([*sizes.values()]), strict=True))
    held: Tree = {}
    units: dict[Path, list[Path]] = {}
    for path in states[0]:
        values = np.stack([state[path].ravel() for state in states])
        ways = (path[i:] for i in range(len(path) + 1))
        owner = next((way for way in ways if sizes.get(way) == values.shape[1]), None)
        if owner is None:
            held[path], units[path] = values, [path]
        else:
            start = path[: len(path) - len(owner)]
            units.setdefault(start, []).append(path)
            whole = held.setdefault(start, np.zeros(params.shape))
            whole[:, ends[owner] - sizes[owner] : ends[owner]] = values
    return Run(params, held, per_window, states, units)


def distance(run: Run, full: Run, used: np.ndarray) -> float:
    """Returns how far a run is from the full batch, relative to how far that moves."""
    changes = (run.change(n) - full.change(n) for n in range(1, WINDOWS + 1))
    off = [np.linalg.norm(change[used]) / full.moved(used) for change in changes]
    return float(max(*off, of_means(run, full)))


def of_means(run: Run, full: Run) -> float:
    """Returns how far an optimizer's means of gradients are off, which no parameter rounds."""
    a, b = run.mean(), full.mean()
    if a is None or b is None or len(a) != len(b):
        return 0.0
    return apart(a, b)


def take(batch: Any, i: int, n: int) -> Any:
    """Returns the rows i, i + n, ..."""
    return jax.tree.map(lambda x: jnp.asarray(x)[i::n], batch)


def _next(step: Callable[[Any, Any], Any], state: Any, rows: Any) -> Any:
    """Returns the state in what a step returns: it, a tuple with it, or nothing."""
    result = step(state, jax.tree.map(jnp.array, rows))
    if result is None:
        return state
    wanted = jax.tree.structure(state)
    for found in (result, *(result if isinstance(result, tuple) else ())):
        if jax.tree.structure(found) == wanted:
            return found
    if any(map(layouts.is_module, state if isinstance(state, tuple | list) else [state])):
        return state  # changed in place; what is returned is a loss
    raise TypeError(
        "`step` must return the state that it was given, changed, or a tuple that holds it, "
        f"or None if it changes the state in place; got {type(result).__name__} of the "
        f"structure {str(jax.tree.structure(result))[:200]}"
    )
