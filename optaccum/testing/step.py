"""Judge a whole training step: one step on the full batch against a window of microbatches."""

from collections.abc import Callable
import re
from typing import Any

import jax
import numpy as np

from optaccum._check import arguments, batch as check_batch
from optaccum.testing import numbers, probes, runs
from optaccum.testing.explain.structure import EPS
from optaccum.testing.numbers import LARGEST_TOLERANCE
from optaccum.testing.report import Finding, Report
from optaccum.testing.runs import Program, Run

WINDOWS = 2
AVERAGES = re.compile(r"ema|averag|avg|shadow|polyak", re.IGNORECASE)


def check(
    make_step: Callable[..., Any],
    params: Any,
    batch: Any,
    every_k: int,
    inside_step: bool,
    get_params: Callable[[Any], Any] | None,
    tolerance: float | None,
) -> Report:
    """Returns what `optaccum.testing.check_step` does."""
    arguments.check_function("`make_step`", make_step, " of parameters and `every_k`")
    if get_params is not None:
        arguments.check_function("`get_params`", get_params)
    k = arguments.check_count("`every_k`", every_k)
    if k == 1:
        raise ValueError("`every_k` must be >= 2 to compare with one step, got 1")
    numbers.check_tolerance(tolerance)
    check_batch.check_batch({"argument 2": jax.tree.map(np.asarray, batch)}, k)
    program = Program(make_step, params, k, inside_step, get_params)
    try:
        return _check(program, batch, tolerance)
    except runs.StepError as error:
        return _failed(error.__cause__)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:300]}"
        detail = f"the runs could not be compared, though the step ran ({text})"
        return Report(None, findings=(Finding("unknown", None, detail),), remedy=probes.REPORT)


def _failed(error: BaseException | None) -> Report:
    text = f"{type(error).__name__}: {str(error)[:300]}"
    if "delete" in str(error) or "donat" in str(error):
        detail = f"the step reads or donates a buffer that it donated before ({text})"
        return Report(None, findings=(Finding("donated", None, detail),), remedy=probes.DONATED)
    detail = f"the step could not be run ({text})"
    return Report(None, findings=(Finding("unknown", None, detail),), remedy=probes.RUN)


def _check(program: Program, batch: Any, tolerance: float | None) -> Report:
    k = program.every_k
    full = runs.run(program, batch, 1, WINDOWS)
    turned = runs.run(
        program, jax.tree.map(lambda x: np.asarray(x)[::-1].copy(), batch), 1, WINDOWS
    )
    window = runs.run(program, batch, k, WINDOWS)
    if not np.linalg.norm(full.change(WINDOWS)):
        finding = Finding("unknown", None, "no parameter moves in a step on the full batch")
        return Report(None, findings=(finding,), remedy=probes.RUN)
    if not np.isfinite(full.params[-1]).all():
        finding = Finding("unknown", None, "a step on the full batch is not finite")
        return Report(None, findings=(finding,), remedy=probes.RUN)
    used = _determined(full, turned) & (window if full.hides() else full).shown()
    noise = distance(turned, full, used)
    rounding = _rounding(full, used)
    bound = min(rounding, LARGEST_TOLERANCE)
    # The same rows in another order: what they show beyond 100 times the bound is not rounding.
    ordered = noise > min(100 * bound, LARGEST_TOLERANCE)
    bound = bound if ordered else min(max(bound, 8 * noise), LARGEST_TOLERANCE)
    bound = bound if tolerance is None else tolerance
    error = distance(window, full, used)
    hidden = error <= max(rounding, bound) and _of_means(window, full) <= bound
    if tolerance is None and rounding > numbers.COARSE and hidden:
        detail = "a step moves parameters by little more than they are rounded by"
        finding = Finding("unknown", None, f"{detail}: a mistake of this size would not show")
        return Report(
            None, error, findings=(finding,), remedy=probes.LEARNING_RATE, tolerance=bound
        )
    low = tolerance is None and error > bound and runs.low_precision(program, batch)
    if low and error <= max(
        2 * LARGEST_TOLERANCE, _stored(full, used, runs.coarsest(program.params))
    ):
        detail = "a step in low precision may be off by as much without a mistake"
        finding = Finding("unknown", None, detail)
        return Report(None, error, findings=(finding,), remedy=probes.COARSE, tolerance=bound)
    if not error <= bound:
        return probes.Probe(program, batch, full, window, used, bound).report(error, ordered)
    average = _average_that_differs(full, window, bound)
    if average is not None:
        detail = f"{average} takes in every microbatch, not every release"
        return Report(
            False,
            error,
            findings=(Finding("ema", None, detail),),
            remedy=probes.INSIDE,
            tolerance=bound,
        )
    return Report(True, error, 1.0, tolerance=bound)


def _rounding(full: Run, used: np.ndarray) -> float:
    """Returns the error that rounding explains.

    Gradients are off by 8 u sqrt(roundings), as those of a loss. A parameter p that moves by d
    is rounded by u p, which is u p / d of its move, in each of the two computations per window.
    """
    return runs.ROUNDING + _stored(full, used, EPS)


def _stored(full: Run, used: np.ndarray, eps: float) -> float:
    moved = max(np.linalg.norm(full.change(n)[used]) for n in range(1, WINDOWS + 1))
    return float(2 * WINDOWS * eps * np.linalg.norm(full.params[0][used]) / max(moved, 1e-300))


def _determined(full: Run, turned: Run) -> np.ndarray:
    """Returns which entries the order of the rows does not decide, bool[P].

    An entry whose gradient is zero but for rounding moves by its sign with Adam: either way.
    """
    used = np.ones(len(full.params[0]), bool)
    for number in range(1, WINDOWS + 1):
        a, b = full.change(number), turned.change(number)
        used &= np.abs(a - b) <= 1e-2 * np.maximum(np.abs(a), np.sqrt(np.mean(a**2)))
    return used if used.mean() > 0.5 else np.ones_like(used)


def distance(run: Run, full: Run, used: np.ndarray) -> float:
    """Returns how far a run is from the full batch, relative to how far that moves."""
    size = max(np.linalg.norm(full.change(n)[used]) for n in range(1, WINDOWS + 1))
    off = [
        np.linalg.norm((run.change(n) - full.change(n))[used]) / max(size, 1e-300)
        for n in range(1, WINDOWS + 1)
    ]
    return float(max(*off, _of_means(run, full)))


def _of_means(run: Run, full: Run) -> float:
    """Returns how far an optimizer's means of gradients are off, which no parameter rounds."""
    a, b = run.mean(), full.mean()
    if a is None or b is None or len(a) != len(b):
        return 0.0
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _average_that_differs(full: Run, window: Run, bound: float) -> str | None:
    """Returns the path of an average of parameters that microbatches change otherwise."""
    before, a, b = full.states[0], full.state(WINDOWS), window.state(WINDOWS)
    for path in a:
        held = AVERAGES.search(full.holders.get(path, ""))
        if not held or path not in b or a[path].dtype.kind != "f":
            continue
        moved = np.linalg.norm(a[path] - before.get(path, 0))
        if np.linalg.norm(a[path] - b[path]) > 8 * bound * max(moved, 1e-300):
            return path
    return None
