"""Which mistake is it? Runs of a training step that one mistake changes and others do not."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.tree_util import GetAttrKey, keystr
import numpy as np

from optaccum.testing import counts, numbers
from optaccum.testing.gradients import Cut, scaled
from optaccum.testing.runs import WINDOWS, Program, Run, StepError, distance, take

FACTOR = (
    "sum against mean: return the mean over rows as the loss, and take the mean of gradients "
    "over the window (`use_grad_mean=True`), or multiply that by {scale:.6g}."
)
WEIGHTED = "drop `weight=` and `weight_fn`: the loss is a mean over rows, which count alike."


class Mistake(NamedTuple):
    """What a probe found, for the report."""

    kind: str
    detail: str
    scale: float | None = None
    weights: np.ndarray | None = None
    left: float | None = None
    remedy: str | None = None  # if the kind has another one


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is known of a step whose microbatches do not give what the full batch gives."""

    program: Program
    batch: Any
    full: Run  # two windows of the batch as a whole
    window: Run  # two windows of its microbatches
    used: np.ndarray  # bool[P], the numbers of the parameters that are compared
    error: float  # of the microbatches
    bound: float  # the error that rounding explains

    def find(self, ordered: bool) -> Mistake:
        """Returns the first mistake that explains the difference.

        `ordered` says whether the order of the rows matters to the full batch.
        """
        if ordered:
            return self._of_noise()
        return self._of_holds() or self._of_state() or self._of_scale() or self.of_rows()

    @functools.cached_property
    def _rows(self) -> Any:
        """A batch whose microbatches have the same rows: what differs is not the rows' doing."""
        k = self.program.every_k
        return jax.tree.map(lambda x: np.repeat(np.asarray(x)[::k], k, axis=0), self.batch)

    @functools.cached_property
    def _alike(self) -> Run:
        return self.program.run(self._rows, self.program.every_k)

    def _of_noise(self) -> Mistake:
        """Says whether microbatches of the same rows would be told apart by their keys."""
        run, off, size = self._alike, np.inf, 1.0
        if run.per_window > 2:
            one, two = _sums(run, 1), _sums(run, 2)
            if len(one) == len(two) > 0:
                # Sums of equal gradients double, and their running mean stays.
                off = min(np.linalg.norm(two - times * one) for times in (1, 2))
                size = np.linalg.norm(two)
        elif self.program.inside_step:
            alone = self.program.run(take(self.batch, 0, self.program.every_k), 1, 1).seen()
            off, size = np.linalg.norm(run.seen() - alone), np.linalg.norm(alone)
        if off <= 1e-4 * size:
            detail = "microbatches of the same rows have the same gradient: they share one key"
            return Mistake("dropout_keys", detail)
        detail = "the gradient depends on the order of the rows: they draw random numbers, or are "
        detail += "mixed by their position"
        return Mistake("stochastic", detail)

    def _of_holds(self) -> Mistake | None:
        """Says whether a hold moves parameters, or lets an optimizer's means decay."""
        for run in (self.window, self._alike):
            for i in range(1, len(run.params)):
                if i % run.per_window == 0:
                    continue
                if not np.array_equal(run.params[i], run.params[i - 1]):
                    return Mistake(
                        "optimizer",
                        f"parameters move in call {i}, which should only accumulate: the "
                        "optimizer steps outside the accumulation",
                    )
                for path, x in run.held.items():
                    if run.names(path) and _decays(x[i - 1], x[i]):
                        detail = f"{keystr(path)} decays in a call that should only accumulate"
                        return Mistake("optimizer", f"{detail}: it is outside the accumulation")
        return None

    def _of_state(self) -> Mistake | None:
        """Says whether something beside the parameters moves in holds, which should not.

        It is tried: does a window that begins each call with what the full batch has of it give
        what the full batch gives?
        """
        candidates = [
            path
            for path in self.window.moving()
            if path in self.full.held
            and self.full.held[path].shape[1] == self.window.held[path].shape[1]
        ]
        off = {path: self._without([path]) for path in candidates}
        if not off:
            return None
        moved = [min(off, key=lambda path: off[path])]
        left = off[moved[0]]
        if left > self.bound:
            # An accumulator or its counter does harm: it has to move.
            moved = [path for path in candidates if off[path] <= 1.5 * self.error]
            left = self._without(moved)
            if len(moved) < 2 or left > self.bound:
                return None
            for path in sorted(moved, key=lambda path: -off[path]):
                rest = [other for other in moved if other != path]
                if len(rest) > 0 and self._without(rest) <= self.bound:
                    moved = rest
        names = " and ".join(map(keystr, moved))
        detail = f"{names} moves in every microbatch, and not once per window"
        kind = "state"
        if all(self.full.is_average(path) for path in moved):
            kind = "ema"
        elif all(x == GetAttrKey("count") for path in moved for x in path[-1:]):
            kind = "schedule"
        return Mistake(kind, detail, left=left)

    def _without(self, moved: list[Any]) -> float:
        """Returns the error if parts of the state move once per window, as with the full batch."""
        leaves = {leaf for path in moved for leaf in self.window.units[path]}
        given = [
            {path: x for path, x in state.items() if path in leaves} for state in self.full.states
        ]
        try:
            run = self.program.run(self.batch, self.program.every_k, given=given)
        except StepError:
            return float("inf")
        return distance(run, self.full, self.used)

    def _of_scale(self) -> Mistake | None:
        """Says whether windows of one microbatch's rows lack a factor."""
        full, k = self.program.run(self._rows, 1), self.program.every_k
        a, b = self._alike.seen(), full.seen()
        if len(a) != len(b) or not a.any() or not b.any():
            return None
        scale = float(a @ b / (a @ a))
        if np.linalg.norm(a - b) <= self.bound * np.linalg.norm(b):
            used = self.used & full.shown()
            a, b = (run.change(WINDOWS)[used] for run in (self._alike, full))
            if np.linalg.norm(a - b) <= 8 * self.bound * np.linalg.norm(b):
                return None
            return self._suspects("the first window is right and a later one is not")
        left = float(np.linalg.norm(scale * a - b) / np.linalg.norm(b))
        if left > self.bound:
            return None
        if abs(scale - k) < 1e-3 * k:
            detail = f"the gradient of a window is 1/{k} of the full batch's: divided by {k} twice"
            return Mistake("divided_twice", detail, scale, left=left)
        if abs(scale * k - 1) > 1e-3 and self.window.moving():
            return self._suspects(f"the gradient of a window of the same rows lacks {scale:.3g}")
        detail = f"the gradient of the full batch is {scale:.6g} times that of a window"
        return Mistake("factor", detail, scale, left=left, remedy=FACTOR.format(scale=scale))

    def _suspects(self, what: str) -> Mistake:
        """Says what moves in holds, if the rows do not make the difference."""
        of_sums = self.full.params.shape[1]
        moving = [p for p in self.window.moving() if self.window.held[p].shape[1] != of_sums]
        if not moving:
            return Mistake("unknown", f"{what}: something counts or keeps what microbatches bring")
        names = " or ".join(map(keystr, moving[:4]))
        return Mistake("state", f"{what}: {names} moves in every microbatch, not once per window")

    def of_rows(self) -> Mistake:
        """Says what it is about the rows: BatchNorm, clipping, weights or coupling."""
        k = self.program.every_k
        paths = map(keystr, self.full.held)
        named = any("batch_stats" in path or "BatchNorm" in path for path in paths)
        if named or self.program.has_statistics():
            detail = "the state has batch statistics, of each microbatch alone"
            return Mistake("batch_norm", detail)
        seen = self._gradients()
        if seen is None:
            detail = "windows of different rows differ; the optimizer hides their gradients"
            return Mistake("unknown", detail)
        whole, parts, mean = seen
        sizes = np.linalg.norm(parts, axis=1)
        largest = (sizes >= (1 - 1e-4) * sizes.max()).sum()
        if largest > 1 and np.linalg.norm(parts.mean(0)) < 0.9999 * sizes.max():
            detail = f"{largest} of {k} microbatches have a gradient of the same norm, the largest"
            return Mistake("clip", f"{detail}: each is clipped by itself")
        verdict, wrong = (self._judge(x, parts) for x in (whole, mean))
        if verdict.kind == "weights" and verdict.weights is not None:
            by = f"`{verdict.source}`" if verdict.source else "a count of their own"
            detail = f"microbatches should count with {by}, and do not"
            mean = (verdict.scale or 1.0) * np.einsum("n,np", verdict.weights, parts)
            left = float(np.linalg.norm(mean - whole) / np.linalg.norm(whole))
            return Mistake("weights", detail, verdict.scale, verdict.weights, left)
        if verdict.kind == "coupled":
            detail = "no weighting of the microbatches gives the full batch: rows are coupled"
            return Mistake("coupled", detail)
        if verdict.kind == "exact" and wrong.kind == "weights" and wrong.weights is not None:
            detail = "microbatches count alike in the full batch, and differently in the window"
            equal = np.full(k, 1 / k)
            return Mistake("weights", detail, 1.0, equal, verdict.error, WEIGHTED)
        return self._suspects("microbatches alone are right and the window is not")

    def _gradients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Returns gradients of the full batch, of microbatches and of the window, if they show.

        An accumulator shows them in a hold. Otherwise the first step of each run does.
        """
        k, window = self.program.every_k, self.window
        rows = [take(self.batch, i, k) for i in range(k)]
        if not self.program.inside_step:
            given = (jax.tree.map(lambda x: np.repeat(x, k, 0), x) for x in (self.batch, *rows))
            sums = [self.program.run(each, k, 1).sum() for each in given]
            shown = [x for x in sums if x is not None]
            if len(shown) == len(sums):
                parts = np.stack(shown[1:])
                return shown[0], parts, parts.mean(0) if window.mean() is None else window.seen()
        if self.full.hides():
            return None
        alone = [self.program.run(each, 1, 1).seen() for each in rows]
        return self.full.seen(), np.stack(alone), window.seen()

    def _judge(self, whole: np.ndarray, parts: np.ndarray) -> numbers.Verdict:
        """Returns how microbatches count in a gradient."""
        k = self.program.every_k
        leaves = jax.tree_util.tree_leaves_with_path(self.batch)
        counted = counts.count({f"batch{keystr(path)}": leaf for path, leaf in leaves}, k)
        cut = Cut(scaled([whole], [parts]), np.ones(k), counted)
        return numbers.judge([cut], 8 * self.bound)


def _sums(run: Run, call: int) -> np.ndarray:
    """Returns what a hold changed in the state: the sums of gradients, or nothing."""
    changed = [x[call] for x in run.held.values() if x.shape[1] > 1 and (x[call] != x[0]).any()]
    return np.concatenate([np.zeros(0), *changed])


def _decays(before: np.ndarray, after: np.ndarray) -> bool:
    """Returns whether a hold has multiplied numbers by a factor in (0, 1)."""
    if before.size < 2 or not before.any():
        return False
    factor = float(np.vdot(after, before) / np.vdot(before, before))
    return 0.01 < factor < 1 - 1e-6 and np.allclose(after, factor * before, rtol=1e-5, atol=0)
