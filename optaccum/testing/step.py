"""Judge a whole training step: one step on the full batch against a window of microbatches."""

import dataclasses
from typing import Any

import jax
from jax.tree_util import keystr
import numpy as np

from optaccum import _batch, _validate
from optaccum.testing import numbers, rounding
from optaccum.testing.probes import Probe, report_of
from optaccum.testing.report import Report, said
from optaccum.testing.runs import ROUNDING, WINDOWS, Program, Run, StepError, distance, of_means

PARAMS = "pass `get_params`, a function of the state that returns the parameters."
LEARNING_RATE = "raise the learning rate, so that rounding is small beside a step."
COARSE = "check the step in float32, parameters and batch included, where rounding is small."
REPORT = "this is a fault of the check: report it, with the step."
UNMOVED = "make a step move the parameters, or " + PARAMS
RUN = "make `step(state, rows)` run on the full batch and on each microbatch."


def check(program: Program, batch: Any, tolerance: float | None) -> Report:
    """Returns what `optaccum.testing.check_step` does."""
    _validate.check_function("`make_step`", program.make_step, " of parameters and `every_k`")
    if program.get_params is not None:
        _validate.check_function("`get_params`", program.get_params)
    k = _validate.check_count("`every_k`", program.every_k)
    if k == 1:
        raise ValueError("`every_k` must be >= 2 to compare with one step, got 1")
    numbers.check_tolerance(tolerance)
    _batch.check_batch({"argument 2": jax.tree.map(np.asarray, batch)}, k)
    try:
        program = program.located(batch)
        if program.get_params is None:
            return report_of("unknown", "the parameters were not found in the state", PARAMS)
        return _check(program, batch, tolerance)
    except StepError as error:
        cause = error.__cause__
        if "delete" in str(cause) or "donat" in str(cause):
            detail = f"the step reads or donates a buffer that it donated before ({said(cause)})"
            return report_of("donated", detail)
        return report_of("unknown", f"the step could not be run ({said(cause)})", RUN)
    except Exception as error:
        detail = f"the runs could not be compared, though the step ran ({said(error)})"
        return report_of("unknown", detail, REPORT)


def _check(program: Program, batch: Any, tolerance: float | None) -> Report:
    k = program.every_k
    full = program.run(batch, 1)
    turned = program.run(jax.tree.map(lambda x: np.asarray(x)[::-1].copy(), batch), 1)
    window = program.run(batch, k)
    if not full.change(WINDOWS).any():
        return report_of("unknown", "no parameter moves in a step on the full batch", UNMOVED)
    if not np.isfinite(full.params[-1]).all():
        return report_of("unknown", "a step on the full batch is not finite", RUN)
    used = (window if full.hides() else full).shown()
    noise, error = distance(turned, full, used), distance(window, full, used)
    rounded = ROUNDING + _stored(full, used, rounding.EPS)
    bound = min(rounded, rounding.LARGEST)
    # The same rows in another order: what they show beyond 100 times the bound is not rounding.
    ordered = noise > min(100 * bound, rounding.LARGEST)
    bound = bound if ordered else min(max(bound, 8 * noise), rounding.LARGEST)
    bound = bound if tolerance is None else tolerance
    probe = Probe(program, batch, full, window, used, error, bound)
    hidden = error <= max(rounded, bound) and of_means(window, full) <= bound
    if tolerance is None and rounded > rounding.COARSE and hidden:
        # What parameters are rounded by does not change sums of gradients.
        mistake = dataclasses.replace(probe, bound=ROUNDING).of_rows()
        if mistake.kind in ("weights", "coupled", "batch_norm"):
            return dataclasses.replace(mistake, tolerance=bound)
        detail = "a step moves parameters by little more than they are rounded by: a mistake of "
        detail += "this size would not show"
        return probe.report("unknown", detail, LEARNING_RATE)
    if tolerance is None and error > bound and program.is_low_precision(batch):
        stored = _stored(full, used, rounding.coarsest(program.params))
        if error <= max(2 * rounding.LARGEST, stored):
            detail = "a step in low precision may be off by as much without a mistake"
            return probe.report("unknown", detail, COARSE)
    if not error <= bound:
        return probe.find(ordered)
    for path in window.moving():
        x = full.held.get(path)
        if x is not None and full.is_average(path):
            off = np.linalg.norm(x[-1] - window.held[path][-1])
            if off > 8 * bound * (np.linalg.norm(x[-1] - x[0]) or 1e-300):
                detail = f"{keystr(path)} takes in every microbatch, not every release"
                return probe.report("ema", detail)
    return Report(True, error, 1.0, tolerance=bound)


def _stored(full: Run, used: np.ndarray, eps: float) -> float:
    """Returns the error that the rounding of parameters explains.

    A parameter p that moves by d is rounded by u p, which is u p / d of its move, in each of the
    two computations per window.
    """
    return float(2 * WINDOWS * eps * np.linalg.norm(full.params[0][used]) / full.moved(used))
