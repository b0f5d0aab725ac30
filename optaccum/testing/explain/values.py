"""How a value of a program depends on the rows of the batch, and the arithmetic on that."""

import dataclasses
import math
from typing import Any, NamedTuple

KINDS = ("const", "row", "total", "mixed")


class Mark(NamedTuple):
    """A finding whose line is not known yet; `leaves` are the counted ones of a divisor."""

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
            if it depends on the number of rows otherwise.
        active: whether it depends on what is differentiated.
        divided: whether a count of the data divides it.
        positions: whether it holds the positions of rows: 0, 1, 2, ...
        number: the number that it is with the rows as they are and with twice as many, if known.
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


CONST = Value()


def number(once: float, twice: float) -> Value:
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
        kind = max(kinds, key=KINDS.index, default="const")
        if kinds >= {"row", "total"} and kind == "total":
            kind = "mixed"
            marks |= {Mark("batch_statistic", "a sum over rows flows back into the rows")}
    scaled = [v for v in values if v.kind in ("row", "total")] or values
    fields = {
        "degree": max((v.degree for v in scaled), default=0.0),
        "active": any(v.active for v in values),
        "divided": any(v.divided for v in values),
        "positions": any(v.positions for v in values),
        "leaves": frozenset().union(*(v.leaves for v in values)),
        "marks": marks,
    }
    return Value(kind, **(fields | changes))


def mark(value: Value, *marks: Any) -> Value:
    """Returns a value that depends on findings, too."""
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
    # A regularizer beside a mean over counted rows is right, since weights put the mean right.
    constant = any(v.active and v.kind == "const" for v in values)
    if len(scales) > 1 or (constant and merged.kind == "total" and merged.degree):
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
    values, degree = [a, b], a.degree + sign * b.degree
    kinds = [a.kind, b.kind]
    if "total" not in kinds or (kinds.count("const") and not (sign < 0 and b.kind == "total")):
        return _counted_rows(values, merge(values, degree=degree))
    for count, other in ((b, a), (a, b)):
        below = sign < 0 and count is b
        if count.kind == "total" and not count.active and (below or count.divided):
            return _divided(values, count, other, degree)
    if all(v.active for v in values if v.kind == "total"):
        if "row" in kinds:
            detail = "a sum over rows multiplies or divides the rows"
            return flaw(values, "batch_statistic", detail)
        return curve(values)
    if a.active or b.active:
        return flaw(values, "nonlinear", "a statistic of the batch multiplies a sum")
    return merge(values, "total", degree=degree)


def _counted_rows(values: list[Value], product: Value) -> Value:
    """Marks a product with a number that depends on the number of rows, and is no power of it."""
    odd = [v for v in values if v.kind == "const" and not _is_power(v.degree)]
    if not odd or product.kind == "const":
        return product
    detail = "a number depends on how many rows there are, and is not their number"
    return mark(product, Mark("row_count", detail))


def _is_power(degree: float) -> bool:
    return math.isfinite(degree) and abs(2 * degree - round(2 * degree)) < 1e-5


def _divided(values: list[Value], count: Value, other: Value, degree: float) -> Value:
    """Returns a value that a count of the data divides."""
    if other.kind == "const":
        return merge(values, "total", degree=degree, divided=True)
    leaves = tuple(sorted(count.leaves))
    of = " and ".join(f"`{leaf}`" for leaf in leaves[:3]) or "the data"
    detail = f"the loss is divided by a count of {of}, not by the number of rows"
    merged = merge(values, other.kind, degree=degree, divided=True)
    return mark(merged, Mark("divisor", detail, leaves))


def curve(values: list[Value], has_gradient: bool = True) -> Value:
    """Returns a nonlinear function of values, entry by entry."""
    merged = merge(values, active=has_gradient and any(v.active for v in values))
    if merged.kind == "const" and any(v.degree for v in values):
        return dataclasses.replace(merged, degree=math.nan)
    if not merged.active or merged.kind == "mixed":
        return merged
    if merged.kind == "total":
        return flaw(values, "nonlinear", "a nonlinear function of a sum over rows")
    if any(v.kind == "row" and (v.divided or v.degree) for v in values):
        return flaw(values, "batch_statistic", "rows that a count of the batch scales are curved")
    return merged


def sum_rows(value: Value) -> Value:
    """Returns a sum over rows."""
    kind = "total" if value.kind == "row" else value.kind
    degree = math.nan if value.kind == "const" and value.positions else value.degree + 1
    return dataclasses.replace(value, kind=kind, degree=degree, number=None)
