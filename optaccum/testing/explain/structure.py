"""Where a loss makes one value of several rows: its program, traced for two batch sizes."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

from optaccum.testing.explain import primitives
from optaccum.testing.explain.lines import find_line
from optaccum.testing.explain.values import BAD, CONST, Rules, Value
from optaccum.testing.gradients import Loss
from optaccum.testing.report import Finding

EPS = float(np.finfo(np.float32).eps)
MANY = 1000  # roundings on a path, where the program could not be read


@dataclasses.dataclass
class Structure:
    """What the program of a loss says.

    Attributes:
        value: how the loss depends on rows, or None where the program could not be followed.
        findings: what makes it so, in the order of the program.
        roundings: at most how many follow each other on a path through the program.
        eps: that of the narrowest floating-point type on the way of gradients and sums over rows.
        narrowest: that of the narrowest one in the whole program.
        traced: whether the loss ran with these rows and with twice as many.
        leaves: names of the leaves of the batch that it uses, those of divisors first.
    """

    value: Value | None
    findings: list[Finding]
    roundings: int = MANY
    eps: float = EPS
    narrowest: float = EPS
    traced: bool = True
    leaves: list[str] = dataclasses.field(default_factory=list)


class Different(Exception):
    """The two programs are not the same but for their sizes."""


def read(loss: Loss) -> Structure:
    """Returns the structure of a loss: two traces of it and a walk."""
    try:
        once, twice = (_trace(loss, times) for times in (1, 2))
    except Exception as error:
        detail = f"it could not be traced with twice the rows ({type(error).__name__}: "
        finding = Finding("unknown", None, f"{detail}{str(error)[:200]})")
        eps = _narrowest(loss)
        return Structure(None, [finding], eps=eps, narrowest=eps, traced=False)
    leaves = [
        Value("row", leaves=frozenset({name}))
        if j in loss.rows
        else Value(active=True, eps=precision(jnp.result_type(leaf)))
        if j in loss.argnums
        else CONST
        for j, tree in sorted(loss.arrays.items())
        for name, leaf in zip(leaf_names(loss, j), jax.tree.leaves(tree), strict=True)
    ]
    walk = Walk(_rows(loss))
    try:
        (value,) = walk.run(once.jaxpr, twice.jaxpr, leaves, ())
    except Different as error:
        value = None
        walk.findings = [Finding("unknown", find_line(error.args[1]), error.args[0])]
        because = frozenset({0})
    except Exception as error:  # a primitive with other parameters than those known here
        value, because = None, frozenset({0})
        walk.findings = [Finding("unknown", None, f"{type(error).__name__}: {str(error)[:200]}")]
    else:
        because = value.because if value.active else frozenset()
    if value is None:
        eps = _narrowest(loss)
        return Structure(None, walk.findings, eps=eps, narrowest=eps)
    shown = [finding for i, finding in enumerate(walk.findings) if i in because]
    leaves = {leaf: None for i in sorted(because) for leaf in walk.leaves.get(i, ())}
    leaves |= dict.fromkeys(sorted(value.leaves)) if value else {}
    eps = max(value.eps, float(np.finfo(np.float64).eps))
    return Structure(value, shown, max(walk.roundings, 1), eps, walk.eps, leaves=[*leaves])


def leaf_names(loss: Loss, j: int) -> list[str]:
    """Returns the names of the leaves of argument j, as the function would write them."""
    paths = jax.tree_util.tree_leaves_with_path(loss.args[j])
    return [loss.names[j] + jax.tree_util.keystr(path) for path, _ in paths]


def argument_name(fun: Any, j: int) -> str:
    """Returns the name that the function has for its argument j."""
    try:
        parameter = [*inspect.signature(fun).parameters.values()][j]
    except (TypeError, ValueError, IndexError):
        return f"args[{j}]"
    variadic = parameter.kind is inspect.Parameter.VAR_POSITIONAL
    return f"args[{j}]" if variadic else parameter.name


def _narrowest(loss: Loss) -> float:
    """Returns the eps of the narrowest floating-point type of the arguments."""
    dtypes = {jnp.result_type(x) for x in jax.tree.leaves(loss.arrays)}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floats), default=EPS)


def _rows(loss: Loss) -> int:
    return jax.tree.leaves({j: loss.args[j] for j in loss.rows})[0].shape[0]


def _trace(loss: Loss, times: int) -> Any:
    def grow(x):
        x = jnp.asarray(x)
        return jax.ShapeDtypeStruct((times * x.shape[0], *x.shape[1:]), x.dtype)

    arrays = loss.arrays
    arrays |= {j: jax.tree.map(grow, arrays[j]) for j in loss.rows}
    return jax.make_jaxpr(loss)(arrays)


class Walk:
    """Follows the rows through two programs at once."""

    def __init__(self, rows: int):
        self.rows = rows
        self.findings: list[Finding] = []
        self.leaves: dict[int, list[str]] = {}
        self.rules = Rules(self.report)
        self.roundings = 0
        self.eps = float(np.finfo(np.float64).eps)
        self.at: tuple[Any, ...] = ()

    def report(self, kind: str, detail: str, leaves: list[str] | None = None) -> int:
        """Notes a finding at the current equation and returns its number."""
        finding = Finding(kind, find_line(self.at), detail)
        if finding not in self.findings:
            self.findings.append(finding)
        number = self.findings.index(finding)
        self.leaves[number] = leaves or []
        return number

    def run(self, one: Any, two: Any, inputs: list[Value], outer: tuple[Any, ...]) -> list[Value]:
        """Returns the values of the outputs of a program, given those of its inputs."""
        if len(one.eqns) != len(two.eqns):
            raise Different("the program for twice the rows has other operations", outer)
        known: dict[Any, Value] = dict.fromkeys(one.constvars, CONST)
        known |= dict(zip(one.invars, inputs, strict=True))

        def read(a, b):
            if not isinstance(a, Literal):
                return known[a]
            return self.constant(number_of(a.val, getattr(b, "val", a.val)))

        for a, b in zip(one.eqns, two.eqns, strict=True):
            if a.primitive is not b.primitive:
                raise Different("the program for twice the rows has other operations", (*outer, a))
            self.at = (*outer, a)
            values = [read(x, y) for x, y in zip(a.invars, b.invars, strict=True)]
            self._count(a)
            results = primitives.apply(self, a, b, values)
            self.at = (*outer, a)
            for variable, value, x in zip(a.outvars, results, b.outvars, strict=True):
                if value.active and not precision(variable.aval.dtype):
                    value = dataclasses.replace(value, active=False)
                value = self._paired(variable, x, value)
                known[variable] = _rounded(a, variable, values, value)
        return [read(x, y) for x, y in zip(one.outvars, two.outvars, strict=True)]

    def constant(self, pair: tuple[float, float] | None) -> Value:
        """Returns a number: a power of the number of rows, or one that depends on it otherwise."""
        if pair is None or pair[0] == pair[1] or not pair[0] * pair[1] > 0:
            return Value(pair=pair)
        degree = 2 * float(np.log2(pair[1] / pair[0]))
        if abs(degree - round(degree)) < 1e-6:
            return Value(degree=round(degree) / 2, pair=pair)
        return dataclasses.replace(self.rules.odd([CONST]), pair=pair)

    def _paired(self, a: Any, b: Any, value: Value) -> Value:
        """Returns `value`, or one that mixes rows where it has an entry for each pair of them."""
        if value.kind == "row" and power(a.aval.shape, b.aval.shape) > 1:
            shape = list(a.aval.shape)
            detail = f"a value has an entry for every pair of rows, {shape} for {self.rows} rows"
            return self.rules.flaw([value], "pairwise", detail)
        return value

    def _count(self, equation: Any) -> None:
        for variable in equation.outvars:
            eps = precision(variable.aval.dtype)
            if not eps:
                continue
            self.eps = max(self.eps, eps)
            self.roundings += 1
            if equation.primitive.name in ("reduce_sum", "dot_general", "cumsum"):
                ins = max(x.aval.size for x in equation.invars)
                self.roundings += ins // max(variable.aval.size, 1)

    def nested(self, one: Any, two: Any, values: list[Value]) -> list[Value]:
        """Returns the outputs of a program that is a parameter of the current equation."""
        return self.run(plain(one), plain(two), values, self.at)


def _rounded(equation: Any, variable: Any, values: list[Value], value: Value) -> Value:
    """Returns `value` with its eps, which the programs inside an equation have given already."""
    name = equation.primitive.name
    if name in primitives.CALLS:
        return value
    active = value.active and name in primitives.ADD  # what is added has no gradient
    eps = max((v.eps for v in values if v.active or not active), default=0.0)
    if value.active or value.kind in ("total", *BAD):
        eps = max(eps, precision(variable.aval.dtype))
    return value if eps == value.eps else dataclasses.replace(value, eps=eps)


@functools.cache
def precision(dtype: Any) -> float:
    """Returns the eps of a floating-point type, or 0 for another type."""
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def plain(jaxpr: Any) -> Any:
    """Returns a program without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def power(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Returns the power of the number of rows with which a value grows."""
    if a == b:
        return 0.0
    return round(float(sum(np.log2(y / x) for x, y in zip(a, b, strict=True) if x and y)), 3)


def number_of(a: Any, b: Any) -> tuple[float, float] | None:
    """Returns a number of the two programs, or None."""
    try:
        return float(a), float(b)
    except (TypeError, ValueError):
        return None
