"""What a window means, in plain loops: the oracle that the tests compare `accumulate` with.

NumPy only, float64 or complex128 throughout, one microbatch after the other and one leaf after
the other. Nothing here is shared with the library.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np

# A weight below the first is 0; the sum of a window's weights is not above the second.
SMALLEST, LARGEST = 2.0**-100, 2.0**126

Leaves = list[np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One call of `update`.

    Attributes:
        gradient: leaves of the gradient, None where there is none.
        weight: how much the microbatch counts.
        release: None for "count", True for "close now", False for "keep open".
        rejected: whether the skip function turns it down.
        args: values of the averaged extra arguments.
    """

    gradient: Sequence[np.ndarray | None]
    weight: float = 1.0
    release: bool | None = None
    rejected: bool = False
    args: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """What one call of `update` leaves behind.

    Attributes:
        released: whether the call released a window.
        gradient: leaves that the inner optimizer saw, None where no microbatch of the window had
            one; or None on a hold.
        args: averaged extra arguments that it saw, or None on a hold.
        error_scale: leaves of sum |w_i g_i|, divided like `gradient`: rounding is relative to it.
        terms: microbatches in the window.
        mini_step: microbatches accepted in the open window after the call.
        gradient_step: windows released so far.
        skipped: microbatches rejected so far.
        weight: sum of the weights of the window.
        grad_sum: leaves of the weighted sum of the gradients of the window.
    """

    released: bool
    gradient: Leaves | None
    args: dict[str, float] | None
    error_scale: Leaves | None
    terms: int
    mini_step: int
    gradient_step: int
    skipped: int
    weight: float
    grad_sum: Leaves


def simulate(
    microbatches: Sequence[Microbatch],
    every_k: int | Callable[[int], int],
    *,
    use_grad_mean: bool = True,
) -> list[Record]:
    """Runs every microbatch through the definition of a window.

    Args:
        microbatches: the calls, in order.
        every_k: microbatches in a window, or a function of the windows released so far.
        use_grad_mean: whether to release the weighted mean or the weighted sum.

    Returns:
        One record per call.
    """
    records = []
    window: list[Microbatch] = []
    last: list[Microbatch] = []
    mini_step = gradient_step = skipped = 0
    for microbatch in microbatches:
        released, gradient, args, error_scale = False, None, None, None
        if microbatch.weight < SMALLEST:
            microbatch = dataclasses.replace(microbatch, weight=min(microbatch.weight, 0.0))
        before = sum(m.weight for m in window) if mini_step else 0.0
        is_weight = microbatch.weight >= 0 and before + microbatch.weight <= LARGEST
        if microbatch.rejected or not is_weight:
            skipped += 1
        else:
            window = [*window, microbatch] if mini_step else [microbatch]
            mini_step += 1
            length = every_k(gradient_step) if callable(every_k) else every_k
            full = mini_step >= length
            closes = full if microbatch.release is None else microbatch.release
            if closes:
                mini_step = 0
                total = sum(m.weight for m in window)
                if total > 0:
                    released = True
                    gradient_step += 1
                    divisor = total if use_grad_mean else 1.0
                    gradient = _divided(_weighted_sum(window), divisor)
                    error_scale = _divided(_weighted_sum(window, magnitude=True), divisor)
                    args = {
                        name: sum(m.weight * m.args[name] for m in window if m.weight > 0) / total
                        for name in microbatch.args
                    }
            last = window
        records.append(
            Record(
                released=released,
                gradient=gradient,
                args=args,
                error_scale=error_scale,
                terms=len(last),
                mini_step=mini_step,
                gradient_step=gradient_step,
                skipped=skipped,
                weight=sum(m.weight for m in last),
                grad_sum=_weighted_sum(last) if last else _zeros(microbatch.gradient),
            )
        )
    return records


def noise_scale(
    windows: Sequence[Sequence[Microbatch]], decay: float = 0.99
) -> tuple[float, float, float]:
    """Returns trace, signal and their ratio after windows that were all released.

    Args:
        windows: their microbatches, or the parts of these on all devices.
        decay: how much of the averages a window keeps.
    """
    trace_sum = signal_sum = mass = 0.0
    for window in windows:
        held = [m for m in window if m.weight > 0 and not m.rejected]
        if len(held) > 1:
            total = sum(m.weight for m in held)
            mean = _square(_divided(_weighted_sum(held), total))
            squares = sum(m.weight * _square(m.gradient) for m in held)
            trace = (squares - total * mean) / (len(held) - 1)
            trace_sum = decay * trace_sum + (1 - decay) * trace
            signal_sum = decay * signal_sum + (1 - decay) * (mean - trace / total)
            mass = decay * mass + (1 - decay)
    if not mass:
        return 0.0, 0.0, np.inf
    ratio = trace_sum / signal_sum if signal_sum > 0 else np.inf
    return trace_sum / mass, signal_sum / mass, ratio


def weighted_mean(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns sum_i w_i x_i / sum_i w_i."""
    total = np.zeros_like(_wide(values[0]))
    for value, weight in zip(values, weights, strict=True):
        total = total + weight * _wide(value)
    return total / sum(weights)


def reduced_metric(
    reduction: str, values: Sequence[np.ndarray], weights: Sequence[float]
) -> np.ndarray:
    """Returns the value of a metric after the accepted microbatches of a window.

    Args:
        reduction: "mean", "sum", "max", or "ratio" of values [2, ...].
        values: one for each microbatch.
        weights: how much each counts.
    """
    held = [(_wide(x), w) for x, w in zip(values, weights, strict=True) if w > 0]
    if not held:
        return np.zeros_like(_wide(values[0]))[0 if reduction == "ratio" else ...]
    if reduction == "mean":
        return weighted_mean([x for x, _ in held], [w for _, w in held])
    if reduction == "max":
        return np.max([x for x, _ in held], axis=0)
    total = np.sum([x for x, _ in held], axis=0)
    if reduction == "sum":
        return total
    above, below = total
    ratios = [a / b if b else 0.0 for a, b in zip(above.flat, below.flat, strict=True)]
    return np.array(ratios).reshape(above.shape)


def _weighted_sum(window: Sequence[Microbatch], magnitude: bool = False) -> Leaves:
    sums = _zeros(window[0].gradient)
    for microbatch in window:
        for i, (g, total) in enumerate(zip(microbatch.gradient, sums, strict=True)):
            # A microbatch of weight zero adds nothing, even where its gradient is NaN.
            if g is not None and microbatch.weight > 0:
                term = microbatch.weight * _wide(g)
                before = np.zeros_like(term) if total is None else total
                sums[i] = before + (np.abs(term) if magnitude else term)
    return sums


def _square(leaves: Sequence[np.ndarray | None]) -> float:
    return sum(float(np.sum(np.abs(_wide(x)) ** 2)) for x in leaves if x is not None)


def _zeros(gradient: Sequence[np.ndarray | None]) -> Leaves:
    return [None if g is None else np.zeros_like(_wide(g)) for g in gradient]


def _divided(leaves: Leaves, divisor: float) -> Leaves:
    return [None if x is None else x / divisor for x in leaves]


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)
