"""Judge a whole training step: one step on the full batch against a window of microbatches."""

import dataclasses
from typing import Any

import jax
from jax.tree_util import keystr
import numpy as np

from optaccum import _batch, _validate
from optaccum.testing import numbers, probes, rounding
from optaccum.testing.report import Finding, Report
from optaccum.testing.runs import (
    ROUNDING,
    WINDOWS,
    NotFoundError,
    Program,
    Run,
    StepError,
    distance,
    of_means,
)

INSIDE = (
    "put everything that acts on every call inside: `optaccum.accumulate(every_k, "
    "optax.chain(...))`, and keep averages of parameters by `has_released`."
)
PARAMS = "pass `get_params`, a function of the state that returns the parameters."
LEARNING_RATE = "raise the learning rate, so that rounding is small beside a step."
COARSE = "check the step in float32, parameters and batch included, where rounding is small."
REPORT = "this is a fault of the check: report it, with the step."
UNMOVED = "make a step move the parameters, or " + PARAMS
RUN = "make `step(state, rows)` run on the full batch and on each microbatch."
REMEDIES = {
    "optimizer": INSIDE,
    "schedule": INSIDE,
    "ema": INSIDE,
    "clip": "clip the mean, not each microbatch: `optaccum.accumulate(every_k, "
    "optax.chain(optax.clip_by_global_norm(...), ...))`.",
    "divided_twice": "do not divide the loss by `every_k`: the window's mean divides already.",
    "factor": "sum against mean: return the mean over rows as the loss, and `use_grad_mean=True`.",
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
        return _check(program.located(batch), batch, tolerance)
    except NotFoundError as error:
        return _report("unknown", str(error), PARAMS)
    except StepError as error:
        text = f"{type(error.__cause__).__name__}: {str(error.__cause__)[:300]}"
        if "delete" in str(error.__cause__) or "donat" in str(error.__cause__):
            detail = f"the step reads or donates a buffer that it donated before ({text})"
            return _report("donated", detail)
        return _report("unknown", f"the step could not be run ({text})", RUN)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:300]}"
        detail = f"the runs could not be compared, though the step ran ({text})"
        return _report("unknown", detail, REPORT)


def _report(kind: str, detail: str, remedy: str | None = None, **fields: Any) -> Report:
    exact = None if kind in ("stochastic", "donated", "unknown") else False
    findings = (Finding(kind, None, detail),)
    return Report(exact, findings=findings, remedy=remedy or REMEDIES[kind], **fields)


def _of_mistake(mistake: probes.Mistake, error: float, bound: float) -> Report:
    fields = {name: getattr(mistake, name) for name in ("scale", "weights", "left")}
    fields |= {"error": error, "tolerance": bound}
    return _report(mistake.kind, mistake.detail, mistake.remedy, **fields)


def _check(program: Program, batch: Any, tolerance: float | None) -> Report:
    k = program.every_k
    full = program.run(batch, 1)
    turned = program.run(jax.tree.map(lambda x: np.asarray(x)[::-1].copy(), batch), 1)
    window = program.run(batch, k)
    if not full.change(WINDOWS).any():
        return _report("unknown", "no parameter moves in a step on the full batch", UNMOVED)
    if not np.isfinite(full.params[-1]).all():
        return _report("unknown", "a step on the full batch is not finite", RUN)
    used = (window if full.hides() else full).shown()
    noise, error = distance(turned, full, used), distance(window, full, used)
    rounded = ROUNDING + _stored(full, used, rounding.EPS)
    bound = min(rounded, rounding.LARGEST)
    # The same rows in another order: what they show beyond 100 times the bound is not rounding.
    ordered = noise > min(100 * bound, rounding.LARGEST)
    bound = bound if ordered else min(max(bound, 8 * noise), rounding.LARGEST)
    bound = bound if tolerance is None else tolerance
    probe = probes.Probe(program, batch, full, window, used, error, bound)
    hidden = error <= max(rounded, bound) and of_means(window, full) <= bound
    if tolerance is None and rounded > rounding.COARSE and hidden:
        # What parameters are rounded by does not change sums of gradients.
        mistake = dataclasses.replace(probe, bound=ROUNDING).of_rows()
        if mistake.kind in ("weights", "coupled", "batch_norm"):
            return _of_mistake(mistake, error, bound)
        detail = "a step moves parameters by little more than they are rounded by: a mistake of "
        detail += "this size would not show"
        return _report("unknown", detail, LEARNING_RATE, error=error, tolerance=bound)
    if tolerance is None and error > bound and program.is_low_precision(batch):
        stored = _stored(full, used, rounding.coarsest(program.params))
        if error <= max(2 * rounding.LARGEST, stored):
            detail = "a step in low precision may be off by as much without a mistake"
            return _report("unknown", detail, COARSE, error=error, tolerance=bound)
    if not error <= bound:
        return _of_mistake(probe.find(ordered), error, bound)
    average = _average_that_differs(full, window, bound)
    if average is not None:
        detail = f"{average} takes in every microbatch, not every release"
        return _report("ema", detail, error=error, tolerance=bound)
    return Report(True, error, 1.0, tolerance=bound)


def _stored(full: Run, used: np.ndarray, eps: float) -> float:
    """Returns the error that the rounding of parameters explains.

    A parameter p that moves by d is rounded by u p, which is u p / d of its move, in each of the
    two computations per window.
    """
    return float(2 * WINDOWS * eps * np.linalg.norm(full.params[0][used]) / full.moved(used))


def _average_that_differs(full: Run, window: Run, bound: float) -> str | None:
    """Returns the path of an average of parameters that microbatches change otherwise."""
    for path in window.moving():
        x = full.held.get(path)
        if x is not None and full.is_average(path):
            moved = np.linalg.norm(x[-1] - x[0]) or 1e-300
            if np.linalg.norm(x[-1] - window.held[path][-1]) > 8 * bound * moved:
                return keystr(path)
    return None
