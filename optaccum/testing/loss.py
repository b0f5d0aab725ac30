"""Judge a loss: the numbers decide, the structure explains."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from optaccum._check import arguments, batch as check_batch, roles as check_roles
from optaccum.testing import counts, gradients, numbers
from optaccum.testing.explain import structure
from optaccum.testing.explain.structure import Structure
from optaccum.testing.gradients import Loss
from optaccum.testing.report import Finding, Report

COUPLING = ("pairwise", "batch_statistic", "nonlinear", "order")


def check(
    fun: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    num_microbatches: int | None,
    argnums: int | Sequence[int],
    batch_argnums: int | Sequence[int] | None,
    batch_argnames: str | Sequence[str] | None,
    has_aux: bool,
    weight_fn: Callable[..., Any] | None,
    rng_argnums: int | Sequence[int],
    tolerance: float | None,
) -> Report:
    """Returns what `optaccum.testing.check_loss` does."""
    arguments.check_function("`fun`", fun)
    if weight_fn is not None:
        arguments.check_function("`weight_fn`", weight_fn)
    n = 1
    if num_microbatches is not None:
        n = arguments.check_count("`num_microbatches`", num_microbatches, " or None")
        if n == 1:
            raise ValueError("`num_microbatches` must be >= 2 to compare with one, got 1")
    numbers.check_tolerance(tolerance)
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise TypeError(f"`kwargs` must be the keyword arguments of `fun`, a dict, got {kwargs!r}")
    roles = check_roles.check_roles(
        {
            "`argnums`": argnums,
            "`batch_argnums`": batch_argnums,
            "`rng_argnums`": rng_argnums,
            "`carry_argnum`": (),
        },
        batch_argnames,
        has_aux,
    )
    call = check_roles.Call(fun, roles, args, kwargs)
    trained, rows, rngs, _ = call.roles.values()
    of_batch = {title: jax.tree.map(_array, x) for title, x in call.some(rows).items()}
    check_batch.check_batch(of_batch, n)
    # Rows by position that nobody named are for the report to tell.
    check_roles.check_no_other_rows(call, roles._replace(by_default=False))
    names = [structure.argument_name(fun, j) for j in range(call.count)] + call.names
    if weight_fn is not None:
        weight_fn = call.by_position(weight_fn)
    loss = Loss(call.by_position(fun), call.args, names, trained, rows, rngs, has_aux, weight_fn)
    read = structure.read(loss)
    if num_microbatches is None:
        return _by_structure(read, weight_fn is not None)
    try:
        return _by_numbers(loss, n, read, tolerance)
    except Exception as error:
        detail = f"the gradients could not be taken ({type(error).__name__}: {str(error)[:300]})"
        findings = [Finding("unknown", None, detail), *read.findings]
        return Report(None, findings=tuple(findings), remedy=_remedy("failed"))


def _array(x: Any) -> Any:
    return x if hasattr(x, "shape") else np.asarray(x)


def _by_structure(read: Structure, weighted: bool) -> Report:
    value = read.value
    kinds = {finding.kind for finding in read.findings}

    def report(exact, kind, *wanted, detail=None):
        """Returns a report that begins with the findings of the kinds wanted."""
        found = sorted(read.findings, key=lambda finding: finding.kind not in wanted)
        if detail is not None:
            found.insert(0, Finding(kind, found[0].where if found and wanted else None, detail))
        return Report(exact, findings=tuple(found), remedy=_remedy(kind))

    if not read.traced:
        return Report(None, findings=tuple(read.findings), remedy=_remedy("failed"))
    if value is None or value.kind == "unknown" or "unknown" in kinds:
        detail = None if kinds else "the program could not be followed"
        return report(None, "unknown", "unknown", detail=detail)
    if value.kind == "mixed" or kinds & set(COUPLING):
        return report(False, "coupled", *COUPLING)
    if value.kind == "row":
        return report(None, "unknown", detail="the loss is not a sum over rows")
    if "stochastic" in kinds:
        return report(None, "stochastic", "stochastic")
    if "terms" in kinds:
        return report(False, "terms", "terms")
    if "divisor" in kinds:
        if not weighted:
            return report(None, "weights", "divisor")
        detail = "whether `weight_fn` counts as the divisor does, only numbers can tell"
        return report(None, "divisor", "divisor", detail=detail)
    if weighted:
        return report(None, "weights", detail="`weight_fn` counts, and no count divides the loss")
    if value.kind == "total" and (value.degree or "row_count" in kinds):
        detail = "the loss is divided by another power of the number of rows than the first"
        return report(False, "factor", "row_count", detail=detail)
    return Report(True)


def _by_numbers(loss: Loss, n: int, read: Structure, tolerance: float | None) -> Report:
    points, weights = gradients.measure(loss, n)
    # Rounding adds up like a random walk over the program and back (2), in two computations that
    # are compared (2), of which the larger of a few draws counts (2): 8 u sqrt(roundings), u = eps.
    # A gradient in which rows nearly cancel is less exact than that. Its rows in another order
    # show by how much; what they show beyond 100 times the bound is not rounding.
    bound = min(8 * read.eps * math.sqrt(read.roundings), numbers.LARGEST_TOLERANCE)
    noise = max(point.noise for point in points)
    if 4 * noise <= 100 * bound:
        bound = min(max(bound, 4 * noise), numbers.LARGEST_TOLERANCE)
    bound = bound if tolerance is None else tolerance
    leaves = {
        name: leaf
        for j in loss.rows
        for name, leaf in zip(
            structure.leaf_names(loss, j),
            jax.tree.leaves(loss.args[j]),
            strict=True,
        )
    }
    likely = {name: leaves[name] for name in read.leaves} or leaves
    verdict = numbers.judge(points, weights, counts.count(likely, n), bound)
    weighted = loss.weight_fn is not None
    structural = _by_structure(read, weighted)
    doubts = structural.findings if structural.exact is False else ()
    low = tolerance is None and 8 * read.narrowest * math.sqrt(read.roundings) > numbers.COARSE
    if verdict.kind == "exact":
        # Other weights that would not fit show that these do, however coarse the tolerance.
        told = weighted and numbers.off(points, np.ones(n)) > bound
        if low and bound > numbers.COARSE and not (told or structural.exact):
            return _coarse(verdict, read, bound)
        compiled = numbers.off_first(points, gradients.of_loop(loss, n))
        if not compiled <= bound:
            detail = "microbatches add up to the full batch, but not in the compiled loop over them"
            finding = Finding("compiler", None, detail)
            return Report(
                False, compiled, findings=(finding,), remedy=_remedy("compiler"), tolerance=bound
            )
        remedy = _remedy("doubt") if doubts else None
        return Report(True, verdict.error, 1.0, verdict.weights, doubts, remedy, bound)
    random = any(finding.kind == "stochastic" for finding in read.findings)
    if gradients.depends_on_keys(loss, bound) or (random and verdict.kind == "coupled"):
        where = next((f.where for f in read.findings if f.kind == "stochastic"), None)
        detail = "rows draw random numbers, other ones in a microbatch than in the full batch"
        return Report(
            None,
            verdict.error,
            findings=(Finding("stochastic", where, detail), *_but(read, "stochastic")),
            remedy=_remedy("stochastic"),
            tolerance=bound,
        )
    # A count that fits where the weights in use do not is no rounding; fitted shares may be.
    counted = verdict.kind == "weights" and verdict.source is not None
    proven = doubts or (counted and not structural.exact)
    if bound <= numbers.COARSE:  # low precision is only beside the way of the gradients
        proven = proven or (not structural.exact and verdict.error > numbers.LARGEST_TOLERANCE)
    if low and not proven and verdict.kind not in ("not_finite", "unknown"):
        return _coarse(verdict, read, bound)
    return explain(verdict, read, bound, weighted)


def _coarse(verdict: numbers.Verdict, read: Structure, tolerance: float) -> Report:
    """Returns the report where rounding in low precision hides whether there is a mistake."""
    detail = "gradients in low precision may be off by as much without a mistake"
    findings = (Finding("unknown", None, detail), *read.findings)
    return Report(
        None, verdict.error, findings=findings, remedy=_remedy("coarse"), tolerance=tolerance
    )


def explain(
    verdict: numbers.Verdict, read: Structure, tolerance: float, weighted: bool = False
) -> Report:
    """Returns the report on a verdict, with the lines that explain it."""
    kind = verdict.kind
    kinds = {finding.kind for finding in read.findings}
    unnamed = kind == "weights" and verdict.source is None
    named = verdict.source == "" or "divisor" in kinds
    if kind in ("weights", "factor") and kinds & set(COUPLING) and (unnamed or not named):
        # The shares of a maximum stay as they are while its row does; some count has them, too.
        kind = "coupled"
        verdict = dataclasses.replace(verdict, scale=None, weights=None)
    if kind == "coupled" and "terms" in kinds and not kinds & set(COUPLING):
        kind = "terms"
    wanted = {
        "coupled": COUPLING,
        "terms": ("terms",),
        "weights": ("divisor",),
        "factor": ("row_count",),
    }.get(kind, ())
    first = next((f for f in read.findings if f.kind in wanted), None)
    where = first.where if first else None
    detail = _detail(kind, verdict, weighted)
    others = [f for f in read.findings if f.kind in (*wanted, "unknown") and f.kind != kind]
    return Report(
        None if kind in ("unknown", "not_finite") else False,
        verdict.error,
        verdict.scale,
        verdict.weights,
        (Finding(kind, where, detail), *others),
        _remedy(kind, verdict, weighted),
        tolerance,
    )


def _but(read: Structure, kind: str) -> list[Finding]:
    return [finding for finding in read.findings if finding.kind != kind]


def _detail(kind: str, verdict: numbers.Verdict, weighted: bool) -> str:
    scale = verdict.scale
    if kind == "factor":
        return f"the full batch has {scale:.6g} times the mean over microbatches"
    if kind == "weights":
        if verdict.source == "":
            right = "microbatches count alike, and `weight_fn` counts them differently"
        elif verdict.source:
            right = f"microbatches count with `{verdict.source}`"
        else:
            right = "microbatches count differently, with no simple count of the batch"
        factor = "" if scale is None or abs(scale - 1) < 1e-3 else f", times {scale:.6g}"
        return right + factor
    if kind == "coupled":
        if verdict.nonlinear:
            return "the loss is a nonlinear function of a mean over rows; it is no mean over rows"
        return "rows depend on each other: no weighting of microbatches gives the full batch"
    if kind == "terms":
        return "the loss adds terms that are divided by different counts; no one weight fits both"
    if kind == "not_finite":
        return "gradients of microbatches are not finite, as 0 / 0 where one counts no token"
    return "the gradients do not tell: too few parameters for this many microbatches"


def _remedy(
    kind: str, verdict: numbers.Verdict | None = None, weighted: bool = False
) -> str | None:
    if kind == "weights":
        source = verdict.source if verdict else None
        if source == "":
            return "drop `weight_fn`, and `weight=` of `accumulate`."
        counted = f"`{source}`" if source else "the loss's own divisor"
        return (
            f"pass {counted} as `weight_fn` to `optaccum.value_and_grad`, or per microbatch as "
            "`weight=` to `optaccum.accumulate`."
        )
    if kind == "factor" and weighted:
        return "return a mean over what `weight_fn` counts, or drop `weight_fn`; sum against mean."
    return {
        "coupled": "`optaccum.microbatched`, which keeps the loss whole and only cuts the model in "
        "microbatches; or accept statistics of microbatches.",
        "factor": "sum against mean: divide the loss by its number of rows (`jnp.mean`), or add "
        "up gradients with `use_grad_mean=False`.",
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
    }.get(kind)
