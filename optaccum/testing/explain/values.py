"""How a value of a program depends on the rows of the batch, and the arithmetic on that."""

import dataclasses
import math
from typing import Any

from optaccum.testing.report import Finding

KINDS = ("const", "row", "total", "mixed")


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """How one value of a program depends on the rows.

    Its kind is "const", without data of the batch; "row", each entry of one row; "total", a sum
    over rows; or "mixed", anything else that is made of several rows, or unknown.
    """

    kind: str = "const"
    degree: float = 0.0  # the power of the number of rows in it; nan for another function of it
    active: bool = False  # whether it depends on what is differentiated
    positions: bool = False  # whether it holds the positions of rows: 0, 1, 2, ...
    number: tuple[float, float] | None = None  # for the rows, and for twice as many, if known
    leaves: frozenset[str] = frozenset()  # of the batch that it depends on
    counted: frozenset[str] = frozenset()  # leaves that its divisors count, if one divides it
    findings: frozenset[Finding] = frozenset()  # on the way to it


def of_number(once: float, twice: float) -> Value:
    """Returns a number that a program holds."""
    degree = round(math.log2(twice / once), 6) if once * twice > 0 else 0.0
    return Value(number=(once, twice), degree=degree)


def merge(values: list[Value], kind: str | None = None, **changes: Any) -> Value:
    """Returns a value that depends on all of `values`, of the least simple kind among them."""
    if kind is None and not changes and len({*values}) == 1:
        return values[0]
    kinds = {value.kind for value in values}
    least = max(kinds, key=KINDS.index)
    if kind is None and least == "total" and "row" in kinds:
        return flaw(values, "batch_statistic", "a sum over rows flows back into the rows")
    merged = Value(
        kind or least,
        max(v.degree for v in values if v.kind != "const" or kinds == {"const"}),
        active=any(v.active for v in values),
        positions=any(v.positions for v in values),
        leaves=frozenset().union(*(v.leaves for v in values)),
        counted=frozenset().union(*(v.counted for v in values)),
        findings=frozenset().union(*(v.findings for v in values)),
    )
    return dataclasses.replace(merged, **changes)


def found(value: Value, kind: str, detail: str) -> Value:
    """Returns a value with one more finding."""
    return dataclasses.replace(value, findings=value.findings | {Finding(kind, None, detail)})


def flaw(values: list[Value], kind: str, detail: str) -> Value:
    """Returns a value that mixes rows."""
    return found(merge(values, "mixed"), kind, detail)


def add(values: list[Value]) -> Value:
    """Returns the sum of values."""
    merged = merge(values)
    if merged.kind == "const":
        same = len({v.degree for v in values}) == 1
        return merged if same else dataclasses.replace(merged, degree=math.nan)
    scales = {(v.degree, bool(v.counted)) for v in values if v.active and v.kind != "const"}
    # Weights put a mean over counted rows right, and leave a regularizer beside it as it is.
    regularized = merged.degree and any(v.active and v.kind == "const" for v in values)
    if len(scales) > 1 or (regularized and merged.kind == "total"):
        detail = "terms are added that are divided by different counts of the batch"
        return found(merged, "terms", detail)
    return merged


def select(predicate: Value, cases: list[Value]) -> Value:
    """Returns a choice: a sum of the cases, as far as rows go."""
    chosen = add(cases)
    if predicate.kind == "row":
        return add([predicate, chosen])
    if predicate.kind == "mixed" or chosen.kind == "const":
        return merge([predicate, chosen])
    return dataclasses.replace(chosen, findings=chosen.findings | predicate.findings)


def multiply(values: list[Value], sign: int = 1) -> Value:
    """Returns the product of two values, or their quotient with `sign` -1."""
    a, b = values
    kinds, degree = {a.kind, b.kind}, a.degree + sign * b.degree
    divides = sign < 0 and b.kind == "total"
    if "total" not in kinds or ("const" in kinds and not divides):
        merged = merge(values, degree=degree)
        odd = any(v.kind == "const" and not (2 * v.degree).is_integer() for v in values)
        detail = "a number depends on how many rows there are, and is not their number"
        known = not odd or merged.kind == "const"
        return merged if known else found(merged, "row_count", detail)
    for count, other in ((b, a), (a, b)):
        below = count.counted or (divides and count is b)
        if count.kind == "total" and not count.active and below:
            return _divide(count, other, degree)
    if any(v.kind == "total" and not v.active for v in values):
        if a.active or b.active:
            return flaw(values, "nonlinear", "a statistic of the batch multiplies a sum")
        return merge(values, "total", degree=degree)
    if "row" in kinds:
        return flaw(values, "batch_statistic", "a sum over rows multiplies or divides the rows")
    return curve(values)


def _divide(count: Value, other: Value, degree: float) -> Value:
    """Returns a value that a count of the data divides."""
    kind = "total" if other.kind == "const" else other.kind
    counted = count.leaves | count.counted | other.counted
    divided = merge([count, other], kind, degree=degree, counted=counted)
    if other.kind == "const":
        return divided
    of = " and ".join(f"`{leaf}`" for leaf in sorted(count.leaves)[:3])
    detail = f"the loss is divided by a count of {of}, not by the number of rows"
    return found(divided, "divisor", detail)


def curve(values: list[Value]) -> Value:
    """Returns a nonlinear function of values, entry by entry."""
    merged = merge(values, number=None)
    if merged.kind == "const" and any(v.degree for v in values):
        return dataclasses.replace(merged, degree=math.nan)
    if not merged.active or merged.kind in ("const", "mixed"):
        return merged
    if merged.kind == "total":
        return flaw(values, "nonlinear", "a nonlinear function of a sum over rows")
    if any(v.kind == "row" and (v.counted or v.degree) for v in values):
        return flaw(values, "batch_statistic", "rows that a count of the batch scales are curved")
    return merged


def sum_rows(value: Value) -> Value:
    """Returns a sum over rows."""
    kind = "total" if value.kind == "row" else value.kind
    degree = math.nan if kind == "const" and value.positions else value.degree + 1
    return dataclasses.replace(value, kind=kind, degree=degree, number=None)
