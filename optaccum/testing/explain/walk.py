"""Where a loss makes one value of several rows: its program, traced for two batch sizes."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from jax.extend.core import Literal
import jax.numpy as jnp

from optaccum._scatters import alike
from optaccum.testing import programs
from optaccum.testing.explain.lines import find_line
from optaccum.testing.explain.primitives import Equation, apply
from optaccum.testing.explain.values import Value, flaw, merge, of_number, select
from optaccum.testing.gradients import Loss
from optaccum.testing.report import Finding, said

COUPLING = ("pairwise", "batch_statistic", "nonlinear", "order")
# Primitives by which a model's parameters act on rows, more than entry by entry.
LAYERS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
ROUNDS = 6  # of a loop, until what it carries stays as it is


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the program of a loss says."""

    value: Value | None  # the loss, if the program could be followed
    findings: tuple[Finding, ...]  # what makes it so, in the order of the program
    traced: bool = True  # whether it could be traced, also with twice the rows
    leaves: tuple[str, ...] = ()  # of the batch that it uses, first what divisors count


def read(loss: Loss) -> Structure:
    """Returns the structure of a loss: two traces of it and a walk."""
    try:
        once, twice = (programs.trace(loss, times * loss.num_rows) for times in (1, 2))
    except Exception as error:
        detail = f"it could not be traced with twice the rows ({said(error)})"
        return Structure(None, (Finding("unknown", None, detail),), traced=False)
    walk = Walk(loss.num_rows)
    try:
        (value,) = walk.run(once.jaxpr, twice.jaxpr, inputs(loss))
    except Exception as error:  # a primitive with unknown parameters
        detail = f"the program could not be followed ({str(error)[:200]})"
        return Structure(None, (Finding("unknown", None, detail),))
    shown = tuple(f for f in walk.findings if value.active and f in value.findings)
    leaves = dict.fromkeys([*sorted(value.counted), *sorted(value.leaves)])
    return Structure(value, shown, leaves=tuple(leaves))


def inputs(loss: Loss) -> list[Value]:
    """Returns what is known of the arrays that a loss gets."""
    found = []
    for j in loss.arrays:
        for name in loss.leaves(loss.some(j)):
            row = Value("row", leaves=frozenset({name}))
            found.append(row if j in loss.rows else Value(active=j in loss.argnums))
    return found


class Walk:
    """Follows the rows through two programs at once, for `rows` and for another number.

    With `hoist` it takes what the data alone make of several rows as given, as if that were
    computed before the batch is cut, and every value that comes of what is trained as trained.
    """

    def __init__(self, rows: int, hoist: bool = False):
        self.rows, self.hoist = rows, hoist
        self.findings: dict[Finding, None] = {}
        self.hoisted: dict[Any, tuple[int, ...]] = {}  # and the axes of their rows
        self.known: dict[Any, Value] = {}  # of the outermost program
        self.inside = False  # whether a layer of the model works on what is made of several rows

    def run(self, one: Any, two: Any, inputs: list[Value], outer: tuple = ()) -> list[Value]:
        """Returns the values of the results of a program inside the equations `outer`."""
        one, two = (getattr(program, "jaxpr", program) for program in (one, two))
        if [e.primitive for e in one.eqns] != [e.primitive for e in two.eqns]:
            raise ValueError("the program for twice the rows has other operations")
        known = dict.fromkeys(one.constvars, Value())
        known |= zip(one.invars, inputs, strict=True)
        for a, b in zip(one.eqns, two.eqns, strict=True):
            at = (*outer, a)
            values = _read(known, a.invars, b.invars)
            results = self._results(a, b, values, functools.partial(self.run, outer=at))
            for x, y, value in zip(a.outvars, b.outvars, results, strict=True):
                value = self._unpaired(x, y, value)
                if self.hoist and not outer and self._can_be_hoisted(a, x, y, value):
                    self.hoisted[x] = axes(x, y)
                    value = Value("row" if axes(x, y) else "const", leaves=value.leaves)
                known[x] = self._located(value, at)
        self.known = known
        return _read(known, one.outvars, two.outvars)

    def _results(self, a: Any, b: Any, values: list[Value], follow: "Follow") -> list[Value]:
        """Returns the values of the results of an equation; `follow` walks a program inside it."""
        if a.primitive.name == "cond":
            return _cond(follow, a, b, values)
        if a.primitive.name == "scan":
            return _scan(follow, a, b, values)
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            inner = a.params.get(name)
            if inner is not None and not {"reduce", "pallas"} & {*a.primitive.name.split("_")}:
                return follow(inner, b.params[name], values)
        shapes = [x.aval.shape for x in a.invars]
        before = [axes(x, y) for x, y in zip(a.invars, b.invars, strict=True)]
        if a.primitive.name in LAYERS and any(v.kind == "const" and v.active for v in values):
            pairs = zip(values, before, strict=True)
            self.inside |= any(v.kind == "mixed" and of_rows for v, of_rows in pairs)
        flat = [dataclasses.replace(v, active=False) for v in values]
        results = []
        for x, y in zip(a.outvars, b.outvars, strict=True):
            real = self.hoist or jnp.issubdtype(x.aval.dtype, jnp.inexact)
            equation = Equation(
                a.primitive.name, a.params, values if real else flat, shapes, before,
                x.aval.shape, axes(x, y), self.rows,
            )  # fmt: skip
            results.append(apply(equation))
        return results

    def _unpaired(self, once: Any, twice: Any, value: Value) -> Value:
        """Returns a value that is mixed if it has an entry for every pair of rows."""
        if value.kind != "row" or len(axes(once, twice)) < 2:
            return value
        shape = f"{[*once.aval.shape]} for {self.rows} rows"
        detail = f"a value has an entry for every pair of rows, {shape}"
        return flaw([value], "pairwise", detail)

    def _can_be_hoisted(self, a: Any, x: Any, y: Any, value: Value) -> bool:
        """Returns whether data alone make x of several rows, and it can be cut like rows."""
        several = value.kind in ("total", "mixed") or any(
            not isinstance(v, Literal) and v in self.hoisted for v in a.invars
        )
        return several and not value.active and len(axes(x, y)) < 2

    def _located(self, value: Value, at: tuple) -> Value:
        findings = frozenset(
            finding if finding.where else dataclasses.replace(finding, where=find_line(at))
            for finding in value.findings
        )
        self.findings |= dict.fromkeys(findings)
        return dataclasses.replace(value, findings=findings)


def _read(known: dict[Any, Value], once: list[Any], twice: list[Any]) -> list[Value]:
    return [
        known[a] if not isinstance(a, Literal) else of_number(float(a.val), float(b.val))
        for a, b in zip(once, twice, strict=True)
    ]


def axes(once: Any, twice: Any) -> tuple[int, ...]:
    """Returns the axes of rows, which grow with them."""
    sizes = enumerate(zip(once.aval.shape, twice.aval.shape, strict=True))
    return tuple(i for i, (x, y) in sizes if x != y)


Follow = Callable[[Any, Any, list[Value]], list[Value]]


def _cond(follow: Follow, one: Any, two: Any, values: list[Value]) -> list[Value]:
    pairs = zip(one.params["branches"], two.params["branches"], strict=True)
    branches = [follow(a, b, values[1:]) for a, b in pairs]
    return [select(values[0], [*cases]) for cases in zip(*branches, strict=True)]


def _scan(follow: Follow, one: Any, two: Any, values: list[Value]) -> list[Value]:
    body = one.params["jaxpr"], two.params["jaxpr"]
    # What is scanned over has one axis less in the body. JAX names these numbers in several ways.
    carried = alike(body[0].jaxpr.outvars, one.outvars)
    consts = alike(body[0].jaxpr.invars, one.invars) - carried
    fixed, carry, xs = values[:consts], values[consts:][:carried], values[consts + carried :]
    over_rows = one.params["length"] != two.params["length"]
    results: list[Value] = []
    for _ in range(ROUNDS):
        results = follow(*body, [*fixed, *carry, *xs])
        new = [merge([*pair]) for pair in zip(carry, results, strict=False)]
        for i, (before, after) in enumerate(zip(carry, new, strict=True)):
            if over_rows and before.kind != "row" and after.kind == "row":
                new[i] = flaw([after], "unknown", "a loop over rows carries them")
        if new == carry:
            break
        carry = new
    return [*carry, *results[carried:]]
