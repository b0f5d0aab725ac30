"""Which mistake is it? Runs of a training step that one mistake changes and others do not."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from optaccum.testing import counts, numbers, runs
from optaccum.testing.gradients import Point
from optaccum.testing.report import Finding, Report
from optaccum.testing.runs import Program, Run

INSIDE = (
    "put everything that acts on every call inside: `optaccum.accumulate(every_k, "
    "optax.chain(...))`, and keep averages of parameters by `has_released`."
)
DONATED = (
    "use what the step returned, and copy with `jnp.copy` what you keep of a donated argument or "
    "hold twice in the state."
)
LEARNING_RATE = "raise the learning rate, so that rounding is small beside a step."
COARSE = "check the step in float32, parameters and batch included, where rounding is small."
REPORT = "this is a fault of the check: report it, with the step."
RUN = "make `step(state, rows)` run on the full batch and on each microbatch."
REMEDIES = {
    "optimizer": INSIDE,
    "schedule": INSIDE,
    "clip": "clip the mean, not each microbatch: `optaccum.accumulate(every_k, "
    "optax.chain(optax.clip_by_global_norm(...), ...))`.",
    "divided_twice": "do not divide the loss by `every_k`: the window's mean divides already.",
    "factor": "sum against mean: return the mean over rows as the loss, and `use_grad_mean=True`.",
    "dropout_keys": "give each microbatch a key of its own: `jax.random.fold_in(key, i)`, or "
    "`rng_argnums` of `optaccum.value_and_grad`.",
    "stochastic": "check in a deterministic mode, without dropout.",
    "batch_norm": "BatchNorm sees microbatches: use GroupNorm or LayerNorm, "
    "`optaccum.microbatched`, or accept it.",
    "coupled": "`optaccum.microbatched`; `optaccum.testing.check_loss` of the loss names the line.",
    "unknown": "`optaccum.testing.check_loss` of the loss tells whether it or the optimizer "
    "differs.",
}


@dataclasses.dataclass
class Probe:
    """What is known of a step whose microbatches do not give what the full batch gives."""

    program: Program
    batch: Any
    full: Run
    window: Run
    used: np.ndarray
    bound: float

    def report(self, error: float, ordered: bool) -> Report:
        """Returns the report: the first mistake that explains the difference.

        Args:
            error: how far microbatches are off.
            ordered: whether the order of the rows matters to the full batch.
        """
        k = self.program.every_k
        rows = jax.tree.map(lambda x: np.repeat(np.asarray(x)[::k], k, axis=0), self.batch)
        alike = runs.run(self.program, rows, k, 2)
        finding = self._of_noise(alike) if ordered else None
        scale = weights = None
        if finding is None:
            finding = self._of_holds(alike) or self._of_counts()
        if finding is None:
            # Microbatches of the same rows: what still differs is not the rows' doing.
            finding, scale = self._of_scale(alike, runs.run(self.program, rows, 1, 2))
        if finding is None:
            finding, scale, weights = self._of_rows()
        kind = finding.kind
        remedy = REMEDIES.get(kind)
        if kind == "weights":
            remedy = (
                "pass what each microbatch counts, as the detail says, as `weight=` to "
                "`optaccum.accumulate` or `weight_fn` to `optaccum.value_and_grad`."
            )
        exact = None if kind in ("stochastic", "unknown") else False
        return Report(exact, error, scale, weights, (finding,), remedy, self.bound)

    def _of_noise(self, alike: Run) -> Finding:
        """Says whether microbatches of the same rows and another key would be told apart."""
        reused = False
        if alike.per_window > 2:
            one, two = _sums(alike, 1), _sums(alike, 2)
            if one is not None and two is not None and len(one) == len(two):
                size = max(np.linalg.norm(two), 1e-300)
                # Sums of equal gradients double, and their running mean stays.
                off = min(np.linalg.norm(two - times * one) for times in (1, 2))
                reused = bool(off <= 1e-4 * size)
        elif self.program.inside_step:
            rows = runs.take(self.batch, 0, self.program.every_k)
            a, b = alike.seen(), runs.run(self.program, rows, 1, 1).seen()
            reused = bool(np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b))
        if reused:
            detail = "microbatches of the same rows have the same gradient: they share one key"
            return Finding("dropout_keys", None, detail)
        detail = "the gradient depends on the order of the rows: they draw random numbers"
        return Finding("stochastic", None, detail)

    def _of_holds(self, alike: Run) -> Finding | None:
        """Says whether a hold moves parameters, or lets an optimizer's means decay."""
        for run in (self.window, alike):
            for i in range(1, len(run.params)):
                if i % run.per_window == 0:
                    continue
                if np.linalg.norm(run.params[i] - run.params[i - 1]) > 0:
                    detail = (
                        f"parameters move in call {i}, which should only accumulate: the "
                        "optimizer steps outside the accumulation"
                    )
                    return Finding("optimizer", None, detail)
                path = _decays(run.states[i - 1], run.states[i])
                if path is not None:
                    detail = f"{path} decays in a call that should only accumulate"
                    return Finding("optimizer", None, f"{detail}: it is outside the accumulation")
        return None

    def _of_counts(self) -> Finding | None:
        """Says whether a schedule counts microbatches."""
        a, b = self.full.state(2), self.window.state(2)
        for path, count in b.items():
            holder = self.window.holders.get(path, "")
            if not re.search(r"\bcount\b", holder) or path not in a or count.shape != ():
                continue
            if a[path] == 2 and count == 2 * self.window.per_window > 2:
                detail = f"{path} is {count} after two windows: it counts microbatches"
                return Finding("schedule", None, detail)
        return None

    def _of_scale(self, alike: Run, full: Run) -> tuple[Finding | None, float | None]:
        """Says whether windows of one microbatch's rows lack a factor."""
        a, b = alike.seen(), full.seen()
        if len(a) != len(b) or not a.any() or not b.any():
            return None, None
        k, scale = self.program.every_k, float(a @ b / (a @ a))
        if np.linalg.norm(a - b) <= self.bound * np.linalg.norm(b):
            used = self.used & full.shown()
            a, b = (run.change(2)[used] for run in (alike, full))
            if np.linalg.norm(a - b) <= 8 * self.bound * np.linalg.norm(b):
                return None, None
            detail = (
                "the first window is right and the second is not: something counts microbatches"
            )
            return Finding("schedule", None, detail), None
        if np.linalg.norm(scale * a - b) > self.bound * np.linalg.norm(b):
            return None, None
        if abs(scale - k) < 1e-3 * k:
            detail = f"the gradient of a window is 1/{k} of the full batch's: divided by {k} twice"
            return Finding("divided_twice", None, detail), scale
        detail = f"the gradient of the full batch is {scale:.6g} times that of a window"
        return Finding("factor", None, detail), scale

    def _of_rows(self) -> tuple[Finding, float | None, np.ndarray | None]:
        """Says what it is about the rows: clipping, BatchNorm, weights or coupling."""
        k = self.program.every_k
        if any("batch_stats" in path or "BatchNorm" in path for path in self.full.state()):
            detail = "the state has batch statistics, which are those of each microbatch"
            return Finding("batch_norm", None, detail), None, None
        own = [runs.take(self.batch, i, k) for i in range(k)]
        parts = np.stack([runs.run(self.program, rows, 1, 1).seen() for rows in own])
        whole, mean = self.full.seen(), self.window.seen()
        sizes = np.linalg.norm(parts, axis=1)
        averaged = np.linalg.norm(parts.mean(0) - mean) <= 8 * self.bound * np.linalg.norm(mean)
        largest = sizes >= (1 - 1e-4) * sizes.max()
        stats = self._has_statistics()
        if self.full.hides():
            detail = "windows of different rows differ; the optimizer hides their gradients"
            return Finding("unknown", None, detail), None, None
        if averaged and largest.sum() > 1 and np.linalg.norm(mean) < 0.9999 * sizes.max():
            detail = (
                f"{largest.sum()} of {k} microbatches have a gradient of the same norm, the largest"
                ": each is clipped by itself"
            )
            return Finding("clip", None, detail), None, None
        if stats:
            detail = "the state has batch statistics, which are those of each microbatch"
            return Finding("batch_norm", None, detail), None, None
        leaves = {
            f"batch{jax.tree_util.keystr(path)}": leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.batch)
        }
        points = [Point(whole, parts, 0.0)]
        verdict = numbers.judge(points, np.ones(k), counts.count(leaves, k), 8 * self.bound)
        if verdict.kind == "weights" and verdict.weights is not None:
            by = f"`{verdict.source}`" if verdict.source else "a count of their own"
            detail = f"microbatches should count with {by}, and do not"
            return Finding("weights", None, detail), verdict.scale, verdict.weights
        if verdict.kind == "coupled":
            detail = "no weighting of the microbatches gives the full batch: rows are coupled"
            return Finding("coupled", None, detail), None, None
        if verdict.kind == "exact":
            detail = "microbatches count alike in the full batch, and differently in the window"
            return Finding("weights", None, detail), 1.0, np.full(k, 1 / k)
        detail = "windows of different rows differ, and nothing tried explains it"
        return Finding("unknown", None, detail), None, None

    def _has_statistics(self) -> bool:
        nnx = runs._nnx()
        if nnx is None:
            return False
        params = self.program.params
        return isinstance(params, nnx.Module) and bool(
            jax.tree.leaves(nnx.to_pure_dict(nnx.state(params, nnx.BatchStat)))
        )


def _sums(run: Run, call: int) -> np.ndarray | None:
    """Returns what a hold changed in the state: the sums of gradients."""
    before, after = run.states[0], run.states[call]
    changed = [
        after[path].ravel()
        for path in after
        if after[path].dtype.kind == "f"
        and after[path].size > 1
        and path in before
        and not np.array_equal(after[path], before[path])
    ]
    return np.concatenate(changed) if changed else None


def _decays(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> str | None:
    """Returns the path of a leaf that a hold has multiplied by a number in (0, 1)."""
    for path, x in after.items():
        if re.search("grad_sum|acc", path):
            continue  # sums, which a window overwrites
        y = before.get(path)
        if y is None or x.shape != y.shape or x.dtype.kind != "f" or x.size < 2 or not y.any():
            continue
        factor = float((x * y).sum() / (y * y).sum())
        if 0.01 < factor < 1 - 1e-6 and np.allclose(x, factor * y, rtol=1e-5, atol=0):
            return path
    return None
