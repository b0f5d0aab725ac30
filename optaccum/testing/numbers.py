"""The verdict of the numbers: is the full batch's gradient a mean over microbatches, and which?"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from optaccum import _validate
from optaccum.testing.gradients import Gradients


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

    kind: str  # "exact", "factor", "weights", "coupled", "not_finite" or "unknown"
    error: float  # of the mean with the weights in use
    scale: float | None = None  # the factor it lacks
    weights: np.ndarray | None = None  # f64[n], the right shares
    source: str | None = None  # the expression of the batch that counts so


def judge(
    gradients: Gradients, used: np.ndarray, counts: dict[str, np.ndarray], tolerance: float
) -> Verdict:
    """Returns the verdict.

    The right weights depend on the data alone, so one set of them has to fit at all values of the
    parameters. The gradient of a root of a mean fits at each of them, with other weights.

    `used` are the weights in use, f64[n], and `counts` {expression: f64[n]} what the leaves of the
    batch hold per microbatch. `tolerance` is the error that rounding explains.
    """
    m, n, size = gradients.parts.shape
    error = off(gradients, used)
    if not np.isfinite(gradients.full[0]).all():
        return Verdict("not_finite", float("nan"))
    if error <= tolerance:
        return Verdict("exact", error, 1.0, _shares(used))
    scale = _factor(gradients, used, tolerance)
    if scale is not None:
        return Verdict("factor", error, scale, _shares(used))
    candidates = {"": np.ones(n), **counts}
    for source, weights in candidates.items():
        if off(gradients, weights) <= tolerance:
            return Verdict("weights", error, 1.0, _shares(weights), source)
    for source, weights in candidates.items():
        scale = _factor(gradients, weights, tolerance)
        if scale is not None:
            return Verdict("weights", error, scale, _shares(weights), source)
    fitted = _fit(gradients, used, tolerance)
    if fitted is not None and (fitted > -tolerance).all():
        total = float(fitted.sum())
        return Verdict("weights", error, total, fitted / total)
    if not np.isfinite(gradients.parts).all():
        return Verdict("not_finite", error)
    if size * m <= n:
        return Verdict("unknown", error)
    return Verdict("coupled", error)


def off(gradients: Gradients, weights: np.ndarray) -> float:
    """Returns how far the weighted means are from the full batch's gradients."""
    means = _means(gradients, weights)
    if means is None:
        return float("inf")
    return float(np.linalg.norm(means - gradients.full, axis=1).max())


def _shares(weights: np.ndarray) -> np.ndarray | None:
    counts = np.where(np.isfinite(weights) & (weights >= 0), weights, 0)
    return counts / counts.sum() if counts.sum() > 0 else None


def _means(gradients: Gradients, weights: np.ndarray) -> np.ndarray | None:
    """Returns the weighted means; a microbatch that counts 0 adds nothing, not even a NaN."""
    shares = _shares(weights)
    if shares is None:
        return None
    means = np.einsum("n,mnp", shares, np.where((shares > 0)[:, None], gradients.parts, 0.0))
    return means if np.isfinite(means).all() else None


def _factor(gradients: Gradients, weights: np.ndarray, tolerance: float) -> float | None:
    """Returns the one factor with which the weighted means are the full batch's gradients."""
    means = _means(gradients, weights)
    if means is None or not means.any() or means.size < 2:
        return None
    scale = float(np.vdot(means, gradients.full) / np.vdot(means, means))
    sizes = np.maximum(1.0, abs(scale) * np.linalg.norm(means, axis=1))
    error = np.linalg.norm(scale * means - gradients.full, axis=1) / sizes
    # A factor near 0 fits whatever is near 0: it has to be told from none.
    return scale if error.max() <= tolerance and scale > 8 * tolerance else None


def _fit(gradients: Gradients, used: np.ndarray, tolerance: float) -> np.ndarray | None:
    """Returns factors with which the microbatches sum to the full batch, or None.

    Of all that fit, those nearest to `used`: a microbatch without a gradient keeps its share.
    """
    parts, full, n = gradients.parts, gradients.full.ravel(), len(used)
    finite: Any = np.isfinite(parts).all((0, 2))
    a = np.where(finite[:, None], parts, 0.0).swapaxes(1, 2).reshape(-1, n)
    if len(a) <= finite.sum():
        return None
    shares = _shares(used)
    start = np.where(finite, 1 / n if shares is None else shares, 0.0)
    fitted = start + np.linalg.lstsq(a, full - a @ start, rcond=tolerance)[0]
    error = np.linalg.norm(a @ fitted - full) / np.sqrt(len(parts))
    return fitted if error <= tolerance else None
