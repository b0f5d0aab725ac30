"""How much of a difference rounding explains, from the operations of a program and their types."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

EPS = float(np.finfo(np.float32).eps)
COARSE = 0.01  # a bound above which a mistake of a percent is not seen
LARGEST = 0.05  # of all bounds
JAXPRS = ClosedJaxpr | Jaxpr


def bound(eps: float, roundings: int) -> float:
    """Returns the relative error that rounding explains.

    It adds up like a random walk over the program and back (2), in two computations that are
    compared (2), of which the larger of a few draws counts (2): 8 u sqrt(roundings), u = eps.
    """
    return min(8 * eps * float(np.sqrt(roundings)), LARGEST)


def count(program: Any) -> int:
    """Returns at most how many roundings follow each other in a program."""
    found = 0
    for equation, times in equations(program.eqns):
        for x in filter(_eps, equation.outvars):
            found += times
            if equation.primitive.name in ("reduce_sum", "dot_general", "cumsum"):
                ins = max(y.aval.size for y in equation.invars)
                found += times * (ins // max(x.aval.size, 1))
    return max(found, 1)


def narrowest(program: Any) -> float:
    """Returns the eps of the narrowest floating-point type that the results of a program need."""
    needed, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return max((_eps(x) for e, _ in equations(needed.eqns) for x in e.outvars), default=EPS)


def equations(eqns: list[Any], times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yields equations, also inside other equations, and how often each of them runs."""
    for equation in eqns:
        yield equation, times
        inside = times * equation.params.get("length", 1)
        for x in equation.params.values():
            for program in x if isinstance(x, tuple | list) else [x]:
                if isinstance(program, JAXPRS):
                    yield from equations(program.eqns, inside)


def coarsest(tree: Any) -> float:
    """Returns the eps of the narrowest floating-point type of a tree, at least float32's."""
    return max([EPS, *map(_eps, jax.tree.leaves(tree))])


def is_low(tree: Any) -> bool:
    """Returns whether something in a tree has a type of less precision than float32."""
    return coarsest(tree) > EPS


def _eps(x: Any) -> float:
    """Returns the eps of the type of an array or a variable, and 0 for what has none."""
    dtype = getattr(getattr(x, "aval", x), "dtype", None)
    inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return float(jnp.finfo(dtype).eps) if inexact else 0.0
