"""Which mistake is it? Runs of a training step that one mistake changes and others do not."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr
import numpy as np

from optaccum.testing import counts, numbers
from optaccum.testing.gradients import scaled
from optaccum.testing.runs import Program, Run, take


class Mistake(NamedTuple):
    """What a probe found, for the report."""

    kind: str
    detail: str
    scale: float | None = None
    weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is known of a step whose microbatches do not give what the full batch gives."""

    program: Program
    batch: Any
    full: Run  # two windows of the batch as a whole
    window: Run  # two windows of its microbatches
    used: np.ndarray  # bool[P], the numbers of the parameters that are compared
    bound: float  # the error that rounding explains

    def find(self, ordered: bool) -> Mistake:
        """Returns the first mistake that explains the difference.

        `ordered` says whether the order of the rows matters to the full batch.
        """
        if ordered:
            return self._of_noise()
        return self._of_holds() or self._of_counts() or self._of_scale() or self._of_rows()

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
        detail = "the gradient depends on the order of the rows: they draw random numbers"
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

    def _of_counts(self) -> Mistake | None:
        """Says whether a schedule counts microbatches."""
        calls = 2 * self.window.per_window
        for path, x in self.window.held.items():
            counts = (
                "count" in self.window.names(path) and x.shape[1] == 1 and path in self.full.held
            )
            if counts and x[-1] == calls > 2 == self.full.held[path][-1]:
                detail = f"{keystr(path)} is {calls} after two windows: it counts microbatches"
                return Mistake("schedule", detail)
        return None

    def _of_scale(self) -> Mistake | None:
        """Says whether windows of one microbatch's rows lack a factor."""
        full, k = self.program.run(self._rows, 1), self.program.every_k
        a, b = self._alike.seen(), full.seen()
        if len(a) != len(b) or not a.any() or not b.any():
            return None
        scale = float(a @ b / (a @ a))
        if np.linalg.norm(a - b) <= self.bound * np.linalg.norm(b):
            used = self.used & full.shown()
            a, b = (run.change(2)[used] for run in (self._alike, full))
            if np.linalg.norm(a - b) <= 8 * self.bound * np.linalg.norm(b):
                return None
            detail = "the first window is right and the second is not: something counts"
            return Mistake("schedule", f"{detail} microbatches")
        if np.linalg.norm(scale * a - b) > self.bound * np.linalg.norm(b):
            return None
        if abs(scale - k) < 1e-3 * k:
            detail = f"the gradient of a window is 1/{k} of the full batch's: divided by {k} twice"
            return Mistake("divided_twice", detail, scale)
        detail = f"the gradient of the full batch is {scale:.6g} times that of a window"
        return Mistake("factor", detail, scale)

    def _of_rows(self) -> Mistake:
        """Says what it is about the rows: BatchNorm, clipping, weights or coupling."""
        k = self.program.every_k
        paths = map(keystr, self.full.held)
        named = any("batch_stats" in path or "BatchNorm" in path for path in paths)
        if named or self.program.has_statistics():
            detail = "the state has batch statistics, which are those of each microbatch"
            return Mistake("batch_norm", detail)
        if self.full.hides():
            detail = "windows of different rows differ; the optimizer hides their gradients"
            return Mistake("unknown", detail)
        alone = (self.program.run(take(self.batch, i, k), 1, 1) for i in range(k))
        parts = np.stack([run.seen() for run in alone])
        whole, mean = self.full.seen(), self.window.seen()
        sizes = np.linalg.norm(parts, axis=1)
        largest = (sizes >= (1 - 1e-4) * sizes.max()).sum()
        size = np.linalg.norm(mean)
        averaged = np.linalg.norm(parts.mean(0) - mean) <= 8 * self.bound * size
        if averaged and largest > 1 and size < 0.9999 * sizes.max():
            detail = f"{largest} of {k} microbatches have a gradient of the same norm, the largest"
            return Mistake("clip", f"{detail}: each is clipped by itself")
        leaves = jax.tree_util.tree_leaves_with_path(self.batch)
        counted = counts.count({f"batch{keystr(path)}": leaf for path, leaf in leaves}, k)
        gradients = scaled([whole], [parts])
        verdict = numbers.judge(gradients, np.ones(k), counted, 8 * self.bound)
        if verdict.kind == "weights":
            by = f"`{verdict.source}`" if verdict.source else "a count of their own"
            detail = f"microbatches should count with {by}, and do not"
            return Mistake("weights", detail, verdict.scale, verdict.weights)
        if verdict.kind == "coupled":
            detail = "no weighting of the microbatches gives the full batch: rows are coupled"
            return Mistake("coupled", detail)
        if verdict.kind == "exact":
            detail = "microbatches count alike in the full batch, and differently in the window"
            return Mistake("weights", detail, 1.0, np.full(k, 1 / k))
        return Mistake("unknown", "windows of different rows differ, and nothing tried explains it")


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
