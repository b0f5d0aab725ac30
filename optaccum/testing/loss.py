"""Judge a loss: the numbers decide, the structure explains."""

from collections.abc import Callable
import inspect
from typing import Any

import numpy as np

from optaccum import _batch, _call, _validate
from optaccum.testing import gradients, numbers, programs, remedies, rounding
from optaccum.testing.explain import walk
from optaccum.testing.explain.walk import Structure
from optaccum.testing.gradients import Cut, Loss
from optaccum.testing.numbers import Verdict
from optaccum.testing.remedies import Split
from optaccum.testing.report import Finding, Report, said

# The kinds of lines that explain a kind of loss, if they are not of its own kind.
LINES = {"coupled": walk.COUPLING, "weights": ("divisor",), "factor": ("row_count",)}
DETAILS = {
    "coupled": "rows depend on each other: no weighting of microbatches gives the full batch",
    "terms": "the loss adds terms that are divided by different counts; no one weight fits both",
    "not_finite": "gradients of microbatches are not finite, as 0 / 0 where one counts no token",
    "unknown": "the gradients do not tell: too few parameters for this many microbatches",
    "compiler": "microbatches add up to the full batch, but not in the compiled loop over them",
    "stochastic": "rows draw random numbers, other ones in a microbatch than in the full batch",
    "coarse": "gradients in low precision may be off by as much without a mistake",
}
REMEDIES = {
    "microbatched": "`optaccum.microbatched` around the model, which makes something of each row; "
    "compute the rest with its results for all rows.",
    "statistics": "no accumulation changes it, because layers of the model use what is made of "
    "several rows. Accept it, or use GroupNorm or LayerNorm, or keep statistics over the window by "
    "hand.",
    "hoisted": "compute what the lines above make of several rows before the batch is cut: it "
    "depends on the data alone.",
    "summed": "Counts of the whole batch then divide it, so add up the gradients of microbatches "
    "(`use_grad_mean=False`).",
    "nothing": "nothing that was tried changes it: accept statistics of microbatches, or compute "
    "the loss with all rows at once.",
    "factor": "sum against mean: divide the loss by its number of rows (`jnp.mean`), or multiply "
    "the gradient of the window, the mean over its microbatches, by {scale:.6g}.",
    "rows": "sum against mean: divide the loss by its number of rows (`jnp.mean`).",
    "terms": "return the sum and the count of each term from the model in "
    "`optaccum.microbatched` and divide outside, or accumulate each term apart, with its own "
    "weight.",
    "stochastic": "check in a deterministic mode: without dropout, or with noise that is part "
    "of the batch.",
    "not_finite": "divide by `jnp.maximum(count, 1)`, and pass the count as `weight=` or "
    "`weight_fn`, with which an empty microbatch adds nothing.",
    "compiler": "another version of jaxlib; 'Sharp edges' has the known ones "
    "(openxla/xla issue 49143). Report it if yours is none of them.",
    "coarse": "check it in float32, parameters and batch included, where rounding is small.",
    "doubt": "these rows do not show what the lines above do: take rows that differ more.",
    "failed": "make `fun` run on each microbatch: `batch_argnums` and `batch_argnames` name "
    "all arguments that hold rows, and `weight_fn` takes the arguments of `fun`.",
    "unknown": "pass `num_microbatches`, more parameters or fewer microbatches, so that the "
    "gradients can tell.",
    "divisor": "pass `num_microbatches`.",
}


def check(
    fun: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    n: int | None,
    roles: _call.Argnums,
    has_aux: bool,
    weight_fn: Callable[..., Any] | None,
    tolerance: float | None,
) -> Report:
    """Returns what `optaccum.testing.check_loss` does."""
    _validate.check_function("`fun`", fun)
    if weight_fn is not None:
        _validate.check_function("`weight_fn`", weight_fn)
    if n is not None and _validate.check_count("`num_microbatches`", n, " or None") == 1:
        raise ValueError("`num_microbatches` must be >= 2 to compare with one, got 1")
    numbers.check_tolerance(tolerance)
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise TypeError(f"`kwargs` must be the keyword arguments of `fun`, a dict, got {kwargs!r}")
    call = _call.Call(fun, roles, args, kwargs)
    trained, rows, keys, *_ = call.roles
    _batch.check_batch(call.titled(rows), n or 1)
    # Rows by position that nobody named are for the report to tell.
    _call.check_no_other_rows(call, roles._replace(by_default=False))
    names = _names(fun, call.count) + call.names
    whole, weight_fn = call.by_position(fun), weight_fn and call.by_position(weight_fn)
    scalar = (lambda *args: whole(*args)[0]) if has_aux else whole
    loss = Loss(scalar, dict(enumerate(call.args)), names, trained, rows, keys, weight_fn)
    read = walk.read(loss)
    if read.value is not None and not read.leaves:
        raise ValueError(
            "`fun` does not read the values of its batch, so every microbatch would be the full "
            "batch; if it closes over other arrays, make them its arguments"
        )
    structural = _by_structure(loss, read)
    if n is None:
        return structural
    try:
        return _by_numbers(loss, n, tolerance, read, structural)
    except Exception as error:
        detail = f"the gradients could not be taken ({said(error)})"
        findings = (Finding("unknown", None, detail), *read.findings)
        return Report(None, findings=findings, remedy=REMEDIES["failed"])


def _names(fun: Any, count: int) -> list[str]:
    """Returns the names that a function has for its first arguments, `args[j]` for the others."""
    others = [f"args[{j}]" for j in range(count)]
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):
        return others
    names = [x.name for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    return names[:count] + others[len(names) :]


def _by_structure(loss: Loss, read: Structure) -> Report:
    if not read.traced:
        return Report(None, findings=read.findings, remedy=REMEDIES["failed"])
    weighted = loss.weight_fn is not None
    exact, kind, detail = _judge(read, weighted)
    if kind is None:
        return Report(True)
    found = sorted(read.findings, key=lambda finding: finding.kind not in LINES.get(kind, (kind,)))
    if detail:
        found.insert(0, Finding(kind, _line(read, kind), detail))
    remedy = _remedy(Verdict(kind, float("nan")), _split(loss, kind, 1), loss)
    return Report(exact, findings=tuple(found), remedy=remedy)


def _split(loss: Loss, kind: str, n: int) -> Split | None:
    """Returns the split of a loss that weights do not put right, if its program has one."""
    if kind not in ("coupled", "terms"):
        return None
    try:
        return remedies.split(loss, n, kind == "coupled")
    except Exception:  # a primitive that is not known, or other operations for fewer rows
        return None


def _judge(read: Structure, weighted: bool) -> tuple[bool | None, str | None, str]:
    """Returns whether a loss is exact, its kind, and a detail if no line says enough."""
    value, kinds = read.value, {finding.kind for finding in read.findings}
    if value is None or "unknown" in kinds:
        return None, "unknown", ""
    if value.kind == "mixed" or kinds & {*walk.COUPLING}:
        return False, "coupled", ""
    if value.kind == "row":
        return None, "unknown", "the loss is not a sum over rows"
    if "stochastic" in kinds:
        return None, "stochastic", ""
    if "terms" in kinds:
        return False, "terms", ""
    if "divisor" in kinds:
        detail = "whether `weight_fn` counts as the divisor does, only numbers can tell"
        return (None, "divisor", detail) if weighted else (None, "weights", "")
    if weighted:
        return None, "weights", "`weight_fn` counts, and no count divides the loss"
    if value.kind == "total" and value.degree != 0:
        detail = "the loss is divided by another power of the number of rows than the first"
        return False, "factor", detail
    return True, None, ""


def _by_numbers(
    loss: Loss, n: int, tolerance: float | None, read: Structure, structural: Report
) -> Report:
    bound = loss.rounding()
    if tolerance is None and bound > rounding.COARSE:
        loss = programs.in_float32(loss)
        bound = loss.rounding()
    low = tolerance is None and bound > rounding.COARSE
    doubts = structural.findings if structural.exact is False else ()
    tried = gradients.orders(loss, n, 8 if doubts else 2)
    cuts = gradients.measure(loss, n, tried, read.leaves)
    # A gradient in which rows nearly cancel is less exact than that. Its rows in another order
    # show by how much; what they show beyond 100 times the bound is not rounding.
    noise = 4 * gradients.noise(cuts)
    if noise <= 100 * bound:
        bound = min(max(bound, noise), rounding.LARGEST)
    bound = bound if tolerance is None else tolerance
    verdict = numbers.judge(cuts, bound)
    random = any(finding.kind == "stochastic" for finding in read.findings)
    first = cuts[0]
    if verdict.kind == "exact":
        compiled = _left(gradients.of_loop(loss, n), first)
        if low and not structural.exact:
            verdict = Verdict("coarse", verdict.error)
        elif compiled <= bound:
            remedy = REMEDIES["doubt"] if doubts else None
            return Report(True, verdict.error, 1.0, verdict.weights, doubts, remedy, bound)
        else:
            verdict = Verdict("compiler", compiled)
    elif gradients.depends_on_keys(loss, bound) or (random and verdict.kind == "coupled"):
        verdict = Verdict("stochastic", verdict.error)
    elif low and not doubts and verdict.error <= 4 * rounding.LARGEST:
        verdict = Verdict("coarse", verdict.error)
    return _explain(verdict, read, bound, loss, first)


def _left(gradient: np.ndarray, first: Cut) -> float:
    return float(np.linalg.norm(gradient / first.sizes[0] - first.full[0]))


def _explain(verdict: Verdict, read: Structure, bound: float, loss: Loss, first: Cut) -> Report:
    kinds = {finding.kind for finding in read.findings}
    named = verdict.source is not None and (verdict.source == "" or "divisor" in kinds)
    if verdict.kind in ("weights", "factor") and kinds & {*walk.COUPLING} and not named:
        # The shares of a maximum stay as they are while its row does; some count has them, too.
        verdict = Verdict("coupled", verdict.error)
    if verdict.kind == "coupled" and "terms" in kinds and not kinds & {*walk.COUPLING}:
        verdict = Verdict("terms", verdict.error)
    kind, scale, weights, n = verdict.kind, verdict.scale, verdict.weights, len(first.used)
    left, split = None, _split(loss, kind, n)
    remedy = _remedy(verdict, split, loss)
    if weights is not None:
        left = _left((scale or 1.0) * gradients.of_loop(loss, n, weights), first)
    elif split is not None and split.kind != "statistics":
        remedy, left = _try(split, remedy, first.full[0] * first.sizes[0], bound)
    known = {*kinds} if kind in ("coarse", "stochastic") else {"unknown", *LINES.get(kind, ())}
    others = [f for f in read.findings if f.kind in known - {kind}]
    told = "unknown" if kind == "coarse" else kind
    return Report(
        None if kind in ("unknown", "not_finite", "coarse", "stochastic") else False,
        verdict.error,
        scale,
        weights,
        (Finding(told, _line(read, kind), _detail(verdict)), *others),
        remedy,
        bound,
        left,
    )


def _try(split: Split, remedy: str, full: np.ndarray, bound: float) -> tuple[str, float | None]:
    """Returns a remedy and what it leaves, or that nothing helps if it leaves too much."""
    try:
        left = split.error(full, bound)
        if split.kind == "hoisted" and left > bound:
            summed = split.error(full / split.n, bound)
            if summed < left:
                left, remedy = summed, f"{remedy} {REMEDIES['summed']}"
    except Exception:  # an operation that microbatches have in another form
        return remedy, None
    return (remedy, left) if left <= max(bound, rounding.COARSE) else (REMEDIES["nothing"], None)


def _line(read: Structure, kind: str) -> str | None:
    return next((f.where for f in read.findings if f.kind in LINES.get(kind, (kind,))), None)


def _detail(verdict: Verdict) -> str:
    scale = verdict.scale
    if verdict.kind == "factor":
        return f"the full batch has {scale:.6g} times the mean over microbatches"
    if verdict.kind != "weights":
        return DETAILS[verdict.kind]
    factor = "" if scale is None or abs(scale - 1) < 1e-3 else f", times {scale:.6g}"
    if verdict.source is None:
        return f"microbatches count differently, with no simple count of the batch{factor}"
    if verdict.source:
        return f"microbatches count with `{verdict.source}`{factor}"
    return f"microbatches count alike, and `weight_fn` counts them differently{factor}"


def _remedy(verdict: Verdict, split: Split | None, loss: Loss) -> str:
    weighted = loss.weight_fn is not None
    kind, source, scale = verdict.kind, verdict.source, verdict.scale
    if kind == "coupled" or (split is not None and split.kind != "microbatched"):
        return REMEDIES[split.kind if split is not None else "microbatched"]
    if kind == "factor" and weighted:
        return "return a mean over what `weight_fn` counts, or drop `weight_fn`; sum against mean."
    if kind == "factor":
        return REMEDIES[kind if scale else "rows"].format(scale=scale)
    if kind != "weights":
        return REMEDIES[kind]
    times = f"; then multiply the loss by {scale:.6g}" if scale and abs(scale - 1) > 1e-3 else ""
    if source == "":
        return f"drop `weight_fn`, and `weight=` of `accumulate`{times}."
    counted = f"`{source}`" if source else "the loss's divisor"
    given = f"a function that returns {counted} as `weight_fn`"
    if source and all(map(str.isidentifier, loss.names)):
        given = f"`weight_fn=lambda {', '.join(loss.names)}: {source}`"
    return (
        f"pass {given} to `optaccum.value_and_grad`, "
        f"or its value for each microbatch as `weight=` to `optaccum.accumulate`{times}."
    )
