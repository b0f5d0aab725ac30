"""Which mistake is it? Runs of a training step that one mistake changes and others do not."""

import dataclasses
import functools
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr
import numpy as np

from optaccum._batch import named_leaves
from optaccum.testing import numbers
from optaccum.testing.gradients import apart, scaled
from optaccum.testing.report import Finding, Report
from optaccum.testing.runs import WINDOWS, Program, Run, StepError, distance, take

WEIGHTED = "drop `weight=` and `weight_fn`: the loss is a mean over rows, which count alike."
REMEDIES = {
    **dict.fromkeys(
        ("optimizer", "schedule", "ema"),
        "put everything that acts on every call inside: `optaccum.accumulate(every_k, "
        "optax.chain(...))`, and keep averages of parameters by `has_released`.",
    ),
    "clip": "clip the mean, not each microbatch: `optaccum.accumulate(every_k, "
    "optax.chain(optax.clip_by_global_norm(...), ...))`.",
    "divided_twice": "do not divide the loss by `every_k`: the window's mean divides already.",
    "factor": "sum against mean: return the mean over rows as the loss, and take the mean of "
    "gradients over the window (`use_grad_mean=True`), or multiply that by {scale:.6g}.",
    "weights": "pass what each microbatch counts, as the detail says, as `weight=` to "
    "`optaccum.accumulate` or `weight_fn` to `optaccum.value_and_grad`.",
    "dropout_keys": "give each microbatch a key of its own: `jax.random.fold_in(key, i)`, or "
    "`rng_argnums` of `optaccum.value_and_grad`.",
    "stochastic": "check in a deterministic mode, without dropout. If rows are mixed by position, "
    "mix them before the batch is cut.",
    "donated": "use what the step returned, and copy with `jnp.copy` what you keep of a donated "
    "argument or hold twice in the state.",
    "state": "let it change once per window, at the release (`optaccum.has_released`), by what all "
    "rows of the window bring: collect that over the window, for example by `metrics=` of "
    "`optaccum.accumulate`. A counter is `optaccum.get_state(opt_state).gradient_step`.",
    "batch_norm": "no accumulation changes it: accept it, use GroupNorm or LayerNorm, or keep "
    "statistics over the window by hand.",
    "coupled": "`optaccum.testing.check_loss` of the loss names the line, and tries what helps.",
    "unknown": "`optaccum.testing.check_loss` of the loss tells whether it or the optimizer "
    "differs.",
}


def report_of(kind: str, detail: str, remedy: str | None = None, **fields: Any) -> Report:
    """Returns a report of one finding."""
    exact = None if kind in ("stochastic", "donated", "unknown") else False
    findings = (Finding(kind, None, detail),)
    return Report(exact, findings=findings, remedy=remedy or REMEDIES[kind], **fields)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is known of a step whose microbatches do not give what the full batch gives."""

    program: Program
    batch: Any
    full: Run  # windows of the batch as a whole
    window: Run  # windows of its microbatches
    used: np.ndarray  # bool[P], the numbers of the parameters that are compared
    error: float  # of the microbatches
    bound: float  # the error that rounding explains

    def report(self, kind: str, detail: str, remedy: str | None = None, **fields: Any) -> Report:
        """Returns a report of one finding, with the error."""
        return report_of(kind, detail, remedy, error=self.error, tolerance=self.bound, **fields)

    def find(self, ordered: bool) -> Report:
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

    def _of_noise(self) -> Report:
        """Says whether microbatches of the same rows would be told apart by their keys."""
        run, off = self._alike, np.inf
        if run.per_window > 2:
            one, two = run.sum(1), run.sum(2)
            if one is not None and two is not None:
                # Sums of equal gradients double, and their running mean stays.
                off = min(apart(times * one, two) for times in (1, 2))
        elif self.program.inside_step:
            single = self.program.run(take(self.batch, 0, self.program.every_k), 1, 1)
            off = apart(run.seen(), single.seen())
        if off <= 1e-4:
            detail = "microbatches of the same rows have the same gradient: they share one key"
            return self.report("dropout_keys", detail)
        detail = "the gradient depends on the order of the rows: they draw random numbers, or are "
        detail += "mixed by their position"
        return self.report("stochastic", detail)

    def _of_holds(self) -> Report | None:
        """Says whether a hold moves parameters, or lets an optimizer's means decay."""
        for run in (self.window, self._alike):
            for i in run.holds:
                if not np.array_equal(run.params[i], run.params[i - 1]):
                    detail = f"parameters move in call {i}, which should only accumulate: the "
                    detail += "optimizer steps outside the accumulation"
                    return self.report("optimizer", detail)
                for path, x in run.held.items():
                    if run.names(path) and _decays(x[i - 1], x[i]):
                        detail = f"{keystr(path)} decays in a call that should only accumulate"
                        return self.report("optimizer", f"{detail}: it is outside the accumulation")
        return None

    def _of_state(self) -> Report | None:
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
                if rest and self._without(rest) <= self.bound:
                    moved = rest
        names = " and ".join(map(keystr, moved))
        detail = f"{names} moves in every microbatch, and not once per window"
        kind = "state"
        if all(self.full.is_average(path) for path in moved):
            kind = "ema"
        elif all(path[-1:] == (GetAttrKey("count"),) for path in moved):
            kind = "schedule"
        return self.report(kind, detail, left=left)

    def _without(self, moved: list[Any]) -> float:
        """Returns the error if parts of the state move once per window, as with the full batch."""
        leaves = {leaf for path in moved for leaf in self.window.units[path]}
        starts = [
            {path: x for path, x in state.items() if path in leaves} for state in self.full.states
        ]
        try:
            run = self.program.run(self.batch, self.program.every_k, starts=starts)
        except StepError:
            return float("inf")
        return distance(run, self.full, self.used)

    def _of_scale(self) -> Report | None:
        """Says whether windows of one microbatch's rows lack a factor."""
        full, k = self.program.run(self._rows, 1), self.program.every_k
        a, b = self._alike.seen(), full.seen()
        if len(a) != len(b) or not a.any() or not b.any():
            return None
        scale = float(a @ b / (a @ a))
        if apart(a, b) <= self.bound:
            used = self.used & full.shown()
            last = (run.change(WINDOWS)[used] for run in (self._alike, full))
            if apart(*last) <= 8 * self.bound:
                return None
            return self._suspects("the first window is right and a later one is not")
        left = apart(scale * a, b)
        if left > self.bound:
            return None
        if abs(scale - k) < 1e-3 * k:
            detail = f"the gradient of a window is 1/{k} of the full batch's: divided by {k} twice"
            return self.report("divided_twice", detail, scale=scale, left=left)
        if abs(scale * k - 1) > 1e-3 and self.window.moving():
            return self._suspects(f"the gradient of a window of the same rows lacks {scale:.3g}")
        detail = f"the gradient of the full batch is {scale:.6g} times that of a window"
        remedy = REMEDIES["factor"].format(scale=scale)
        return self.report("factor", detail, remedy, scale=scale, left=left)

    def _suspects(self, what: str) -> Report:
        """Says what moves in holds, if the rows do not make the difference."""
        of_sums = self.full.params.shape[1]
        moving = [p for p in self.window.moving() if self.window.held[p].shape[1] != of_sums]
        if not moving:
            detail = f"{what}: something counts or keeps what microbatches bring"
            return self.report("unknown", detail)
        names = " or ".join(map(keystr, moving[:4]))
        detail = f"{what}: {names} moves in every microbatch, not once per window"
        return self.report("state", detail)

    def of_rows(self) -> Report:
        """Says what it is about the rows: BatchNorm, clipping, weights or coupling."""
        k = self.program.every_k
        paths = map(keystr, self.full.held)
        named = any("batch_stats" in path or "BatchNorm" in path for path in paths)
        if named or self.program.has_statistics():
            detail = "the state has batch statistics, of each microbatch alone"
            return self.report("batch_norm", detail)
        seen = self._gradients()
        if seen is None:
            detail = "windows of different rows differ; the optimizer hides their gradients"
            return self.report("unknown", detail)
        whole, singles, mean = seen
        sizes = np.linalg.norm(singles, axis=1)
        largest = (sizes >= (1 - 1e-4) * sizes.max()).sum()
        if largest > 1 and np.linalg.norm(singles.mean(0)) < 0.9999 * sizes.max():
            detail = f"{largest} of {k} microbatches have a gradient of the same norm, the largest"
            return self.report("clip", f"{detail}: each is clipped by itself")
        verdict, wrong = (self._judge(x, singles) for x in (whole, mean))
        if verdict.kind == "weights" and verdict.weights is not None:
            by = f"`{verdict.source}`" if verdict.source else "a count of their own"
            detail = f"microbatches should count with {by}, and do not"
            left = apart((verdict.scale or 1.0) * verdict.weights @ singles, whole)
            fields = {"scale": verdict.scale, "weights": verdict.weights, "left": left}
            return self.report("weights", detail, **fields)
        if verdict.kind == "coupled":
            detail = "no weighting of the microbatches gives the full batch: rows are coupled"
            return self.report("coupled", detail)
        if verdict.kind == "exact" and wrong.kind == "weights" and wrong.weights is not None:
            detail = "microbatches count alike in the full batch, and differently in the window"
            fields = {"scale": 1.0, "weights": np.full(k, 1 / k), "left": verdict.error}
            return self.report("weights", detail, WEIGHTED, **fields)
        return self._suspects("microbatches alone are right and the window is not")

    def _gradients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Returns gradients of the full batch, of microbatches and of the window, if they show.

        An accumulator shows them in a hold. Otherwise the first step of each run does.
        """
        k, window = self.program.every_k, self.window
        rows = [take(self.batch, i, k) for i in range(k)]
        if not self.program.inside_step:
            batches = (jax.tree.map(lambda x: np.repeat(x, k, 0), x) for x in (self.batch, *rows))
            sums = [self.program.run(each, k, 1).sum() for each in batches]
            shown = [x for x in sums if x is not None]
            if len(shown) == len(sums):
                singles = np.stack(shown[1:])
                mean = singles.mean(0) if window.mean() is None else window.seen()
                return shown[0], singles, mean
        if self.full.hides():
            return None
        singles = [self.program.run(each, 1, 1).seen() for each in rows]
        return self.full.seen(), np.stack(singles), window.seen()

    def _judge(self, whole: np.ndarray, singles: np.ndarray) -> numbers.Verdict:
        k = self.program.every_k
        counted = dict(named_leaves({"batch": self.batch}))
        return numbers.judge([scaled([whole], [singles], np.ones(k), counted)], 8 * self.bound)


def _decays(before: np.ndarray, after: np.ndarray) -> bool:
    """Returns whether a hold has multiplied numbers by a factor in (0, 1)."""
    if before.size < 2 or not before.any():
        return False
    factor = float(np.vdot(after, before) / np.vdot(before, before))
    return 0.01 < factor < 1 - 1e-6 and np.allclose(after, factor * before, rtol=1e-5, atol=0)
