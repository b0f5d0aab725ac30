"""How a value of a program depends on the rows of the batch, and the arithmetic on that."""

import dataclasses
import math
from typing import Any, NamedTuple

KINDS = ("const", "row", "total", "mixed")


class Mark(NamedTuple):
    """A finding without its line; `leaves` are what a divisor counts."""

    kind: str
    detail: str
    leaves: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """How one value of a program depends on the rows.

    Attributes:
        kind: "const", without data of the batch; "row", each entry of one row; "total", a sum over
            rows; "mixed", anything else that is made of several rows, or unknown.
        degree: the power of the number of rows that multiplies it: 1 for a sum, 0 for a mean, nan
            for another function of the number.
        active: whether it depends on what is differentiated.
        divided: whether a count of the data divides it.
        positions: whether it holds the positions of rows: 0, 1, 2, ...
        number: its value for the rows as they are and for twice as many, if known.
        leaves: the leaves of the batch that it depends on.
        marks: the findings that it depends on.
    """

    kind: str = "const"
    degree: float = 0.0
    active: bool = False
    divided: bool = False
    positions: bool = False
    number: tuple[float, float] | None = None
    leaves: frozenset[str] = frozenset()
    marks: frozenset[Any] = frozenset()


def of_number(once: float, twice: float) -> Value:
    """Returns a number that a program holds."""
    degree = round(math.log2(twice / once), 6) if once * twice > 0 else 0.0
    return Value(number=(once, twice), degree=degree)


def merge(values: list[Value], kind: str | None = None, **changes: Any) -> Value:
    """Returns a value that depends on all of `values`, of the least simple kind among them."""
    if kind is None and not changes and len({*values}) == 1:
        return values[0]
    kinds = {value.kind for value in values}
    marks = frozenset().union(*(v.marks for v in values))
    if kind is None:
        kind = max(kinds, key=KINDS.index)
        if kind == "total" and "row" in kinds:
            kind = "mixed"
            marks |= {Mark("batch_statistic", "a sum over rows flows back into the rows")}
    fields = {
        "degree": max(v.degree for v in values if v.kind != "const" or kinds == {"const"}),
        "active": any(v.active for v in values),
        "divided": any(v.divided for v in values),
        "positions": any(v.positions for v in values),
        "leaves": frozenset().union(*(v.leaves for v in values)),
        "marks": marks,
    }
    return Value(kind, **(fields | changes))


def mark(value: Value, *marks: Any) -> Value:
    """Returns a value that depends on more findings."""
    return dataclasses.replace(value, marks=value.marks | {*marks})


def flaw(values: list[Value], kind: str, detail: str) -> Value:
    """Returns a value that mixes rows."""
    return mark(merge(values, "mixed"), Mark(kind, detail))


def add(values: list[Value]) -> Value:
    """Returns the sum of values."""
    merged = merge(values)
    if merged.kind == "const":
        same = len({v.degree for v in values}) == 1
        return merged if same else dataclasses.replace(merged, degree=math.nan)
    scales = {(v.degree, v.divided) for v in values if v.active and v.kind != "const"}
    # Weights put a mean over counted rows right, and leave a regularizer beside it as it is.
    regularized = merged.degree and any(v.active and v.kind == "const" for v in values)
    if len(scales) > 1 or (regularized and merged.kind == "total"):
        detail = "terms are added that are divided by different counts of the batch"
        return mark(merged, Mark("terms", detail))
    return merged


def select(predicate: Value, cases: list[Value]) -> Value:
    """Returns a choice: a sum of the cases, as far as rows go."""
    chosen = add(cases)
    if predicate.kind == "row":
        return add([predicate, chosen])
    if predicate.kind == "mixed" or chosen.kind == "const":
        return merge([predicate, chosen])
    return mark(chosen, *predicate.marks)


def multiply(a: Value, b: Value, sign: int = 1) -> Value:
    """Returns the product of two values, or their quotient with `sign` -1."""
    values, kinds, degree = [a, b], {a.kind, b.kind}, a.degree + sign * b.degree
    divides = sign < 0 and b.kind == "total"
    if "total" not in kinds or ("const" in kinds and not divides):
        merged = merge(values, degree=degree)
        odd = any(v.kind == "const" and not (2 * v.degree).is_integer() for v in values)
        detail = "a number depends on how many rows there are, and is not their number"
        known = not odd or merged.kind == "const"
        return merged if known else mark(merged, Mark("row_count", detail))
    for count, other in ((b, a), (a, b)):
        below = count.divided or (divides and count is b)
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
    if other.kind == "const":
        return merge([count, other], "total", degree=degree, divided=True)
    leaves = tuple(sorted(count.leaves))
    of = " and ".join(f"`{leaf}`" for leaf in leaves[:3]) or "the data"
    detail = f"the loss is divided by a count of {of}, not by the number of rows"
    merged = merge([count, other], other.kind, degree=degree, divided=True)
    return mark(merged, Mark("divisor", detail, leaves))


def curve(values: list[Value], has_gradient: bool = True) -> Value:
    """Returns a nonlinear function of values, entry by entry."""
    merged = merge(values, active=has_gradient and any(v.active for v in values))
    if merged.kind == "const" and any(v.degree for v in values):
        return dataclasses.replace(merged, degree=math.nan)
    if not merged.active or merged.kind in ("const", "mixed"):
        return merged
    if merged.kind == "total":
        return flaw(values, "nonlinear", "a nonlinear function of a sum over rows")
    if any(v.kind == "row" and (v.divided or v.degree) for v in values):
        return flaw(values, "batch_statistic", "rows that a count of the batch scales are curved")
    return merged


def sum_rows(value: Value) -> Value:
    """Returns a sum over rows."""
    kind = "total" if value.kind == "row" else value.kind
    degree = math.nan if kind == "const" and value.positions else value.degree + 1
    return dataclasses.replace(value, kind=kind, degree=degree, number=None)
