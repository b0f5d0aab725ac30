"""The verdict of the numbers: is the full batch's gradient a mean over microbatches, and which?"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from optaccum import _validate
from optaccum.testing.gradients import Cut


def check_tolerance(tolerance: float | None) -> None:
    """Raises unless the tolerance is None or a number between 0 and 1."""
    if tolerance is None:
        return
    _validate.check_scalar("`tolerance`", tolerance, jnp.floating, jnp.integer)
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must lie between 0 and 1, got {tolerance}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the gradients say."""

    kind: str  # "exact", "coarse", or a kind of `check_loss`
    error: float  # of the mean with the weights in use, of the caller's order if it shows one
    scale: float | None = None  # the factor it lacks
    weights: np.ndarray | None = None  # f64[n], the right shares
    source: str | None = None  # the expression of the batch that counts so


def judge(cuts: list[Cut], tolerance: float) -> Verdict:
    """Returns the verdict, which has to fit all cuts: by chance one may fit.

    The right weights depend on the data alone, so one set of them has to fit at all values of the
    parameters. The gradient of a root of a mean fits at each of them, with other weights.
    `tolerance` is the error that rounding explains.
    """
    first = cuts[0]
    m, n, size = first.microbatches.shape
    errors = [_off(cut, cut.used) for cut in cuts]
    error = errors[0] if errors[0] > tolerance else max(errors)
    if not np.isfinite(first.full[0]).all():
        return Verdict("not_finite", float("nan"))
    if error <= tolerance:
        return Verdict("exact", error, 1.0, _shares(first.used))
    scale = _factor(cuts, [cut.used for cut in cuts], tolerance)
    if scale is not None:
        return Verdict("factor", error, scale, _shares(first.used))
    candidates = {
        source: [cut.counts.get(source, np.ones(n)) for cut in cuts]
        for source in ("", *first.counts)
    }
    for source, weights in candidates.items():
        if all(_off(c, w) <= tolerance for c, w in zip(cuts, weights, strict=True)):
            return Verdict("weights", error, 1.0, _shares(weights[0]), source)
    for source, weights in candidates.items():
        scale = _factor(cuts, weights, tolerance)
        if scale is not None:
            return Verdict("weights", error, scale, _shares(weights[0]), source)
    found = [_fit(cut, tolerance) for cut in cuts]
    fitted = [x for x in found if x is not None and (x > -tolerance).all()]
    if len(fitted) == len(cuts):
        total = float(fitted[0].sum())
        return Verdict("weights", error, total, fitted[0] / total)
    if not all(np.isfinite(cut.microbatches).all() for cut in cuts):
        return Verdict("not_finite", error)
    if size * m <= n:
        return Verdict("unknown", error)
    return Verdict("coupled", error)


def _off(cut: Cut, weights: np.ndarray) -> float:
    means = _means(cut, weights)
    if means is None:
        return float("inf")
    return float(np.linalg.norm(means - cut.full, axis=1).max())


def _shares(weights: np.ndarray) -> np.ndarray | None:
    counts = np.where(np.isfinite(weights) & (weights >= 0), weights, 0)
    return counts / counts.sum() if counts.sum() > 0 else None


def _means(cut: Cut, weights: np.ndarray) -> np.ndarray | None:
    """Returns the weighted means; a microbatch that counts 0 adds nothing, not even a NaN."""
    shares = _shares(weights)
    if shares is None:
        return None
    means = np.einsum("n,mnp", shares, np.where((shares > 0)[:, None], cut.microbatches, 0.0))
    return means if np.isfinite(means).all() else None


def _factor(cuts: list[Cut], weights: list[np.ndarray], tolerance: float) -> float | None:
    """Returns the one factor with which the weighted means are the full batch's gradients."""
    found = [_means(cut, w) for cut, w in zip(cuts, weights, strict=True)]
    means = [x for x in found if x is not None and x.any() and x.size > 1]
    if len(means) < len(cuts):
        return None
    mean, full = np.concatenate(means), np.concatenate([cut.full for cut in cuts])
    scale = float(np.vdot(mean, full) / np.vdot(mean, mean))
    sizes = np.maximum(1.0, abs(scale) * np.linalg.norm(mean, axis=1))
    error = np.linalg.norm(scale * mean - full, axis=1) / sizes
    # A factor near 0 fits whatever is near 0: it has to be told from none.
    return scale if error.max() <= tolerance and scale > 8 * tolerance else None


def _fit(cut: Cut, tolerance: float) -> np.ndarray | None:
    """Returns factors with which the microbatches sum to the full batch, or None.

    Of all that fit, the nearest to those in use: a microbatch without a gradient keeps its share.
    """
    each, full, n = cut.microbatches, cut.full.ravel(), len(cut.used)
    finite: Any = np.isfinite(each).all((0, 2))
    a = np.where(finite[:, None], each, 0.0).swapaxes(1, 2).reshape(-1, n)
    if len(a) <= finite.sum():
        return None
    shares = _shares(cut.used)
    start = np.where(finite, 1 / n if shares is None else shares, 0.0)
    fitted = start + np.linalg.lstsq(a, full - a @ start, rcond=tolerance)[0]
    error = np.linalg.norm(a @ fitted - full) / np.sqrt(len(each))
    return fitted if error <= tolerance else None
