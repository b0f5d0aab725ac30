"""How a value depends on the rows of a batch, and the arithmetic on that."""

import dataclasses


@dataclasses.dataclass(slots=True, unsafe_hash=True)
class Value:
    """How one value of a program depends on the rows.

    Attributes:
        kind: "const", without data of the batch; "row", each entry of one row; "total", a sum over
            rows; "mixed", anything else that is made of several rows; "unknown".
        degree: the power of the number of rows that multiplies it: 1 for a sum, 0 for a mean.
        active: whether it depends on what is differentiated.
        because: numbers of the findings that it depends on.
        divided: whether a count of the data divides it.
        numbers: whether it holds the positions of rows: 0, 1, 2, ...
        pair: the number that it is with the rows as they are and with twice as many, if known.
        leaves: names of the leaves of the batch that it depends on.
        eps: of the narrowest type on the way to it of what a microbatch rounds otherwise: gradients
            and sums over rows.
    """

    kind: str = "const"
    degree: float = 0
    active: bool = False
    because: frozenset[int] = frozenset()
    divided: bool = False
    numbers: bool = False
    pair: tuple[float, float] | None = None
    leaves: frozenset[str] = frozenset()
    eps: float = 0.0


CONST = Value()
BAD = ("mixed", "unknown")


def merge(values: list[Value], kind: str | None = None, **changes) -> Value:
    """Returns a value that depends on all of `values`, of the least simple kind of theirs."""
    if values and not changes and kind is None and all(v == values[0] for v in values[1:]):
        return dataclasses.replace(values[0], pair=None) if values[0].pair else values[0]
    order = ("const", "row", "total", "mixed", "unknown")
    kinds = {value.kind for value in values}
    if kind is None:
        kind = max(kinds, key=order.index, default="const")
        if {"row", "total"} <= kinds and kind == "total":
            kind = "mixed"
    scaled = [v for v in values if v.kind in ("row", "total")] or values
    fields = {
        "kind": kind,
        "degree": max((v.degree for v in scaled), default=0),
        "active": any(v.active for v in values),
        "because": frozenset().union(*(v.because for v in values)),
        "divided": any(v.divided for v in values),
        "numbers": any(v.numbers for v in values),
        "leaves": frozenset().union(*(v.leaves for v in values)),
        "eps": max((v.eps for v in values), default=0.0),
    }
    return Value(**{**fields, **changes})


class Rules:
    """Arithmetic on values; `report(kind, detail, leaves)` notes a finding, numbers it."""

    def __init__(self, report):
        self.report = report

    def flaw(self, values: list[Value], kind: str, detail: str, result: str = "mixed") -> Value:
        """Returns a value that mixes rows. Only the first flaw on a path is noted."""
        merged = merge(values, result)
        if any(v.kind in BAD for v in values):
            return merged
        return dataclasses.replace(merged, because=merged.because | {self.report(kind, detail)})

    def add(self, values: list[Value]) -> Value:
        """Returns the sum of values."""
        kinds = {v.kind for v in values}
        if kinds & set(BAD):
            return merge(values)
        if kinds == {"const"}:
            degrees = {v.degree for v in values}
            if len(degrees) > 1 and not any(v.numbers for v in values):
                return self.odd(values)
            return merge(values)
        if {"row", "total"} <= kinds:
            return self.flaw(values, "batch_statistic", "a sum over rows flows back into the rows")
        parts = [v for v in values if v.kind != "const"]
        merged = merge(values)
        if len(kinds) > 1:  # a constant beside sums over rows: a regularizer, an epsilon
            constant = any(v.active for v in values if v.kind == "const")
            if not (constant and merged.kind == "total" and (merged.degree or merged.divided)):
                return merged
            if not merged.degree:
                return merged  # a mean over counted rows, which weights put right
            return self.terms(values)
        different = len({(v.degree, v.divided) for v in parts if v.active}) > 1
        return self.terms(values) if different else merged

    def terms(self, values: list[Value]) -> Value:
        """Returns the sum of terms that are divided differently."""
        merged = merge(values)
        number = self.report(
            "terms", "terms are added that are divided by different counts of the batch"
        )
        return dataclasses.replace(merged, because=merged.because | {number})

    def odd(self, values: list[Value]) -> Value:
        """Returns a number that depends on the number of rows, but is no power of it."""
        merged = merge(values, degree=0)
        number = self.report(
            "row_count", "a number depends on how many rows there are, and is not their number"
        )
        return dataclasses.replace(merged, because=merged.because | {number})

    def multiply(self, a: Value, b: Value, sign: int = 1) -> Value:
        """Returns the product of two values, or their quotient with `sign` -1."""
        values = [a, b]
        degree = a.degree + sign * b.degree
        if any(v.kind in BAD for v in values):
            return merge(values)
        kinds = a.kind, b.kind
        if "total" not in kinds:
            if kinds != ("const", "const") and sign < 0 and b.kind == "row" and b.degree:
                return self.curve(values)
            return merge(values, degree=degree)
        if kinds.count("total") == 2 and sign < 0 and not b.active:
            return self.count(values, a, degree)
        total, other = (a, b) if a.kind == "total" else (b, a)
        if other.kind == "const" and not (sign < 0 and b.kind == "total"):
            return merge(values, degree=degree)
        count = total if not total.active else other
        if not count.active and count.kind == "total":
            if (sign < 0 and count is b) or count.degree < 0 or count.divided:
                return self.count(values, other if count is total else total, degree)
            if other.active or total.active:
                return self.flaw(values, "nonlinear", "a statistic of the batch multiplies a sum")
            return merge(values, "total", degree=degree)
        if other.kind == "row":
            return self.flaw(
                values, "batch_statistic", "a sum over rows multiplies or divides the rows"
            )
        return self.curve(values)

    def count(self, values: list[Value], numerator: Value, degree: float) -> Value:
        """Returns a value that was multiplied or divided by a count of the data."""
        merged = merge(values, numerator.kind, degree=degree)
        if numerator.kind == "const":
            return dataclasses.replace(merged, kind="total", divided=True)
        counts = [v for v in values if v is not numerator and v.kind == "total"] or values
        leaves = sorted(frozenset().union(*(v.leaves for v in counts)))
        of = " and ".join(f"`{leaf}`" for leaf in leaves[:3]) or "the data"
        number = self.report(
            "divisor", f"the loss is divided by a count of {of}, not by the number of rows", leaves
        )
        return dataclasses.replace(merged, divided=True, because=merged.because | {number})

    def curve(self, values: list[Value], active: bool | None = None) -> Value:
        """Returns a nonlinear function of values, entry by entry."""
        kinds = {v.kind for v in values}
        active = any(v.active for v in values) if active is None else active
        if kinds & set(BAD):
            return merge(values, active=active)
        if kinds == {"const"}:
            if any(v.degree for v in values) and not any(v.numbers for v in values):
                return self.odd(values)
            return merge(values, active=active)
        if {"row", "total"} <= kinds:
            return self.flaw(values, "batch_statistic", "a sum over rows flows back into the rows")
        merged = merge(values, active=active)
        if not active:
            return merged
        if "total" in kinds:
            return self.flaw(values, "nonlinear", "a nonlinear function of a sum over rows")
        if any(v.divided or v.degree for v in values if v.kind == "row"):
            return self.flaw(
                values, "batch_statistic", "rows that a count of the batch scales are curved"
            )
        return merged

    def sum_rows(self, values: list[Value]) -> Value:
        """Returns a sum over rows."""
        merged = merge(values, degree=sum(v.degree for v in values) + 1)
        if merged.kind in ("row", "total"):
            return dataclasses.replace(merged, kind="total")
        return merged

    def pick(self, values: list[Value], detail: str) -> Value:
        """Returns a statistic of rows that is no sum: a maximum, a rank."""
        if any(v.active for v in values):
            return self.flaw(values, "nonlinear", detail)
        return merge(values, "total", degree=0)
