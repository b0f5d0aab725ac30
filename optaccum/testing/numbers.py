"""The verdict of the numbers: is the full batch's gradient a mean over microbatches, and which?"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from optaccum._check import arguments
from optaccum.testing.gradients import Point

LARGEST_TOLERANCE = 0.05
COARSE = 0.01  # a tolerance above which a mistake of a percent is not seen


def check_tolerance(tolerance: float | None) -> None:
    """Raises unless the tolerance is None or a number between 0 and 1."""
    if tolerance is None:
        return
    arguments.check_scalar("`tolerance`", tolerance, jnp.floating, jnp.integer)
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must lie between 0 and 1, got {tolerance}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the gradients say.

    Attributes:
        kind: "exact", "factor", "weights", "coupled", "not_finite" or "unknown".
        error: of the mean as it is taken now.
        scale: the factor it lacks, or None.
        weights: f64[n], the right shares, or None.
        source: the expression of the batch that counts so, or None.
        nonlinear: whether microbatches fit at each value of the parameters, with other shares.
    """

    kind: str
    error: float
    scale: float | None = None
    weights: np.ndarray | None = None
    source: str | None = None
    nonlinear: bool = False


def judge(
    points: list[Point], given: np.ndarray, counts: dict[str, np.ndarray], tolerance: float
) -> Verdict:
    """Returns the verdict.

    The right weights depend on the data alone, so one set of them has to fit at all values of the
    parameters. The gradient of f(mean of rows), such as that of a root of a mean, fits microbatches
    at each value with other shares: it is no mean.

    Args:
        points: gradients at several values of the parameters, the caller's first.
        given: f64[n], the weights that the caller uses.
        counts: {expression: f64[n]}, what the batch's leaves hold per microbatch.
        tolerance: the error that rounding explains.
    """
    n = len(given)
    error = off(points, given)
    if not np.isfinite(points[0].full).all():
        return Verdict("not_finite", float("nan"))
    if error <= tolerance:
        return Verdict("exact", error, 1.0, _shares(given))
    scale = _factor(points, given, tolerance)
    if scale is not None:
        return Verdict("factor", error, scale, _shares(given))
    candidates = {"": np.ones(n), **counts}
    for source, weights in candidates.items():
        if off(points, weights) <= tolerance:
            return Verdict("weights", error, 1.0, _shares(weights), source)
    for source, weights in candidates.items():
        scale = _factor(points, weights, tolerance)
        if scale is not None:
            return Verdict("weights", error, scale, _shares(weights), source)
    fitted = _fit(points, given, tolerance)
    if fitted is not None and (fitted > -tolerance).all():
        total = float(fitted.sum())
        return Verdict("weights", error, total, fitted / total)
    finite = [np.isfinite(point.parts).all() for point in points]
    if not all(finite):
        return Verdict("not_finite", error)
    equations = len(points[0].full)
    if equations * len(points) <= n:
        return Verdict("unknown", error)
    alone = equations > n and all(_fit([point], given, tolerance) is not None for point in points)
    return Verdict("coupled", error, nonlinear=alone)


def off(points: list[Point], weights: np.ndarray) -> float:
    """Returns how far the weighted means are from the full batch's gradients."""
    return max(_error(point, weights) for point in points)


def off_first(points: list[Point], gradient: np.ndarray) -> float:
    """Returns how far a gradient at the caller's parameters is from the full batch's."""
    return float(np.linalg.norm(gradient - points[0].full)) / points[0].size


def _shares(weights: np.ndarray) -> np.ndarray | None:
    counts = np.where(np.isfinite(weights) & (weights >= 0), weights, 0)
    total = counts.sum()
    return counts / total if total > 0 else None


def _mean(point: Point, weights: np.ndarray) -> np.ndarray | None:
    """Returns the weighted mean; a microbatch that counts 0 adds nothing, not even a NaN."""
    shares = _shares(weights)
    if shares is None:
        return None
    parts = np.where((shares > 0)[:, None], point.parts, 0.0)
    return shares @ parts


def _error(point: Point, weights: np.ndarray, scale: float = 1.0) -> float:
    mean = _mean(point, weights)
    if mean is None or not np.isfinite(mean).all():
        return float("inf")
    return float(np.linalg.norm(scale * mean - point.full)) / point.size


def _factor(points: list[Point], weights: np.ndarray, tolerance: float) -> float | None:
    """Returns the one factor with which the weighted means are the full batch's gradients."""
    means = [_mean(point, weights) for point in points]
    if not all(mean is not None and np.isfinite(mean).all() for mean in means):
        return None
    a = np.concatenate([m / p.size for m, p in zip(means, points, strict=True) if m is not None])
    b = np.concatenate([point.full / point.size for point in points])
    if a @ a == 0 or len(b) < 2:
        return None
    scale = float(a @ b / (a @ a))
    off = max(
        float(np.linalg.norm(scale * mean - point.full))
        / max(point.size, abs(scale) * float(np.linalg.norm(mean)))
        for mean, point in zip(means, points, strict=True)
        if mean is not None
    )
    # A factor near 0 fits whatever is near 0: it has to be told from none.
    return scale if off <= tolerance and scale > 8 * tolerance else None


def _fit(points: list[Point], given: np.ndarray, tolerance: float) -> np.ndarray | None:
    """Returns factors with which the microbatches sum to the full batch, or None.

    Of all that fit, those nearest to `given`: a microbatch without a gradient keeps its share.
    """
    used = np.all([np.isfinite(point.parts).all(1) for point in points], axis=0)
    a = np.concatenate([np.where(used[:, None], p.parts, 0.0).T / p.size for p in points])
    b = np.concatenate([p.full / p.size for p in points])
    if len(b) <= used.sum():
        return None
    shares = _shares(given)
    start = np.where(used, 1 / len(given) if shares is None else shares, 0.0)
    change = np.linalg.lstsq(a, b - a @ start, rcond=tolerance)[0]
    fitted = start + change
    off = np.linalg.norm(a @ fitted - b) / np.sqrt(len(points))
    return fitted if off <= tolerance else None
