"""Where a loss makes one value of several rows: its program, traced for two batch sizes."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

from optaccum.testing.explain import primitives, values as rules
from optaccum.testing.explain.lines import find_line
from optaccum.testing.explain.values import CONST, Mark, Value
from optaccum.testing.gradients import Loss
from optaccum.testing.report import Finding

ROUNDS = 6  # of a loop, until what it carries stays as it is


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the program of a loss says.

    Attributes:
        value: how the loss depends on rows, or None if the program could not be followed.
        findings: what makes it so, in the order of the program.
        traced: whether the loss ran with these rows and with twice as many.
        leaves: the leaves of the batch that it uses, with those of divisors first.
    """

    value: Value | None
    findings: tuple[Finding, ...]
    traced: bool = True
    leaves: tuple[str, ...] = ()


class Different(Exception):
    """The two programs are not the same but for their sizes; the argument is the equations."""


def read(loss: Loss) -> Structure:
    """Returns the structure of a loss: two traces of it and a walk."""
    try:
        once, twice = (_trace(loss, times) for times in (1, 2))
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:200]}"
        detail = f"it could not be traced with twice the rows ({text})"
        return Structure(None, (Finding("unknown", None, detail),), traced=False)
    leaves = [
        Value("row", leaves=frozenset({name}))
        if j in loss.rows
        else Value(active=j in loss.argnums)
        for j in sorted(loss.arrays)
        for name in loss.leaves(j)
    ]
    walk = Walk(loss.count_rows)
    try:
        (value,) = walk.run(once.jaxpr, twice.jaxpr, leaves)
    except Different as error:
        detail = "the program for twice the rows has other operations"
        return Structure(None, (Finding("unknown", find_line(error.args[0]), detail),))
    except Exception as error:  # a primitive with other parameters than those known here
        detail = f"{type(error).__name__}: {str(error)[:200]}"
        return Structure(None, (Finding("unknown", None, detail),))
    shown = tuple(f for f in walk.findings if value.active and f in value.marks)
    used = [leaf for leaf in walk.counted if leaf in value.leaves]
    return Structure(value, shown, leaves=tuple(dict.fromkeys([*used, *sorted(value.leaves)])))


def _trace(loss: Loss, times: int) -> Any:
    def grow(x):
        return jax.ShapeDtypeStruct((times * np.shape(x)[0], *np.shape(x)[1:]), jnp.result_type(x))

    grown = {j: jax.tree.map(grow, loss.arrays[j]) for j in loss.rows}
    return jax.make_jaxpr(loss)(loss.arrays | grown)


class Walk:
    """Follows the rows through two programs at once.

    Attributes:
        rows: how many rows the first program has.
        findings: what was found, in the order of the program.
        counted: the leaves of the batch that a divisor counts.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self.findings: dict[Finding, None] = {}
        self.counted: list[str] = []

    def run(self, one: Any, two: Any, inputs: list[Value], outer: tuple = ()) -> list[Value]:
        """Returns the values of the results of a program inside the equations `outer`."""
        one, two = (getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in (one, two))
        if len(one.eqns) != len(two.eqns):
            raise Different(outer)
        known = {
            **dict.fromkeys(one.constvars, CONST),
            **dict(zip(one.invars, inputs, strict=True)),
        }
        for a, b in zip(one.eqns, two.eqns, strict=True):
            at = (*outer, a)
            if a.primitive is not b.primitive:
                raise Different(at)
            values = _read(known, a.invars, b.invars)
            if a.primitive.name in CALLS:
                run = functools.partial(self.run, outer=at)
                results = CALLS[a.primitive.name](run, a, b, values)
            else:
                results = [
                    primitives.apply(primitives.Equation(a, b, values, i, self.rows))
                    for i in range(len(a.outvars))
                ]
            for x, y, value in zip(a.outvars, b.outvars, results, strict=True):
                known[x] = self._noted(self._checked(x.aval, y.aval, value), at)
        return _read(known, one.outvars, two.outvars)

    def _checked(self, once: Any, twice: Any, value: Value) -> Value:
        """Returns a value that is mixed if it has pairs of rows, and active if its type may be."""
        if value.active and not jnp.issubdtype(once.dtype, jnp.inexact):
            value = dataclasses.replace(value, active=False)
        growth = np.prod([y / x for x, y in zip(once.shape, twice.shape, strict=True) if x])
        if value.kind != "row" or growth <= 2:
            return value
        shape = f"{[*once.shape]} for {self.rows} rows"
        detail = f"a value has an entry for every pair of rows, {shape}"
        return rules.flaw([value], "pairwise", detail)

    def _noted(self, value: Value, at: tuple) -> Value:
        """Returns a value whose findings have their line."""
        marks = set()
        for each in value.marks:
            if isinstance(each, Mark):
                self.counted += each.leaves
                each = Finding(each.kind, find_line(at), each.detail)
                self.findings[each] = None
            marks.add(each)
        return dataclasses.replace(value, marks=frozenset(marks))


def _read(known: dict[Any, Value], once: list[Any], twice: list[Any]) -> list[Value]:
    """Returns the values of variables and of numbers in the program."""
    found = []
    for a, b in zip(once, twice, strict=True):
        if not isinstance(a, Literal):
            found.append(known[a])
        elif np.ndim(a.val) or not isinstance(b, Literal):
            found.append(CONST)
        else:
            found.append(rules.number(float(a.val), float(b.val)))
    return found


Run = Callable[[Any, Any, list[Value]], list[Value]]


def _call(run: Run, one: Any, two: Any, values: list[Value]) -> list[Value]:
    name = next(name for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in one.params)
    return run(one.params[name], two.params[name], values)


def _cond(run: Run, one: Any, two: Any, values: list[Value]) -> list[Value]:
    pairs = zip(one.params["branches"], two.params["branches"], strict=True)
    branches = [run(a, b, values[1:]) for a, b in pairs]
    return [rules.select(values[0], [*cases]) for cases in zip(*branches, strict=True)]


def _scan(run: Run, one: Any, two: Any, values: list[Value]) -> list[Value]:
    body = one.params["jaxpr"], two.params["jaxpr"]
    inner = getattr(body[0], "jaxpr", body[0])
    # What is scanned over has one axis less in the body. JAX names these numbers in several ways.
    scanned = sum(map(_loses_axis, one.invars, inner.invars))
    carried = len(one.outvars) - sum(map(_loses_axis, one.outvars, inner.outvars))
    consts = len(one.invars) - scanned - carried
    by_row = one.params["length"] != two.params["length"]
    fixed, carry, xs = values[:consts], values[consts:][:carried], values[consts + carried :]
    return _loop(lambda carry: run(*body, [*fixed, *carry, *xs]), carry, by_row)


def _loses_axis(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) > len(inner.aval.shape)


def _loop(step: Callable[[list[Value]], list[Value]], carry: list[Value], by_row: bool) -> Any:
    """Returns what a loop carries, when it stays as it is, and what else a step returns."""
    for _ in range(ROUNDS):
        results = step(carry)
        new = [rules.merge([*pair]) for pair in zip(carry, results, strict=False)]
        if by_row:
            new = [
                rules.flaw([a, b], "unknown", "a loop over rows carries them")
                if a.kind != "row" and b.kind == "row"
                else b
                for a, b in zip(carry, new, strict=True)
            ]
        if new == carry:
            break
        carry = new
    return [*carry, *results[len(carry) :]]


def _while(run: Run, one: Any, two: Any, values: list[Value]) -> list[Value]:
    first, second = one.params["cond_nconsts"], one.params["body_nconsts"]
    body = one.params["body_jaxpr"], two.params["body_jaxpr"]
    fixed = values[first:][:second]
    carry = _loop(lambda carry: run(*body, [*fixed, *carry]), values[first + second :], False)
    test = one.params["cond_jaxpr"], two.params["cond_jaxpr"]
    (goes_on,) = run(*test, [*values[:first], *carry])
    if goes_on.kind in ("const", "row"):
        return carry
    detail = "rows decide how long a loop runs"
    return [v if v.kind == "const" else rules.flaw([goes_on, v], "unknown", detail) for v in carry]


CALLS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
            "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin",
            "shard_map", "xla_call", "run_state",
        ),
        _call,
    ),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}  # fmt: skip
