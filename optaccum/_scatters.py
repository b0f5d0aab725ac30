"""Scatters: keeps gradients of lookups right on compilers that lose them.

The gradient of `table[ids]` is a scatter. If a loop adds scatters up, XLA for GPUs and TPUs moves
their reduction over devices behind the loop. The versions of `AFFECTED` then forget, in each trip,
what all devices but the first have summed (openxla/xla issue 49143). Two forms prevent that:

* `apart`, a select between scatter and sum: one reduction behind the loop, and a temporary of the
  scatter's size. Our loops use it.
* `fence`, a barrier around the sum: one reduction per trip, in place. The loops of a loss get it.

Programs for CPUs, and those that XLA does not divide, stay as they are.
"""

from collections.abc import Callable, Iterable, Sequence
import importlib.metadata
import itertools
import math
import re
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from optaccum._cotangents import flat_jaxpr
from optaccum._trees import tracing

# The first version of jaxlib with the fault, and the first without it.
AFFECTED = (0, 10, 1), (0, 12, 0)
VERSION = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3]))

_JAXPRS = core.Jaxpr | core.ClosedJaxpr
_OF_ELEMENTS = "update_jaxpr"  # a scatter's parameter: how it adds two elements


def trace(fun: Callable[[], Any]) -> tuple[Any, list[bool]]:
    """Returns `fun()`, with fences in its loops, and which of its leaves hold a scatter.

    Outside of `AFFECTED` it returns `fun()` and []. So it does if nothing is traced (one microbatch
    outside `jax.jit`, or `jax.disable_jit`): `fun` may read its arguments.
    """
    if not (_affected() and tracing()):
        return fun(), []
    closed, structure = flat_jaxpr(fun)
    closed, holds = with_fences(closed)
    return structure.unflatten(core.jaxpr_as_fun(closed)()), holds


def with_fences(closed: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, list[bool]]:
    """Returns a program with fences in its loops, and which of its results hold a scatter.

    Outside of `AFFECTED` it returns the same program, and False for each.
    """
    if not _affected():
        return closed, [False] * len(closed.jaxpr.outvars)
    jaxpr, holds = _with_fences(closed.jaxpr, [])
    return core.ClosedJaxpr(jaxpr, closed.consts), holds


def apart(tree: Any, holds: list[bool], seen: Any) -> Any:
    """Returns a tree that is about to be summed, with a select behind each scatter in it.

    The tree is the last part of a result of `trace`, which returned `holds` with it. `seen`, f32[]
    >= 0, changes from trip to trip: no compiler knows that it is not negative.
    """
    leaves, structure = jax.tree.flatten(tree)
    holds = holds[len(holds) - len(leaves) :]
    if not any(holds):
        return tree
    always = _unknown_p.bind(seen >= 0)
    return structure.unflatten(
        lax.select(always, x, jnp.full_like(x, -0.0)) if holds_one else x
        for x, holds_one in zip(leaves, holds, strict=True)
    )


def fence(tree: Any) -> Any:
    """Returns a tree that a loop carries, behind a fence."""
    return jax.tree.map(_fence_p.bind, tree) if _affected() else tree


def _affected() -> bool:
    return AFFECTED[0] <= VERSION < AFFECTED[1]


def _with_fences(jaxpr: core.Jaxpr, holds: list[bool]) -> tuple[core.Jaxpr, list[bool]]:
    """Returns a jaxpr with fences in its loops, and which of its results hold a scatter.

    `holds` says which of its arguments do.
    """
    holding = set(itertools.compress(jaxpr.invars, holds))
    eqns = []
    for eqn in jaxpr.eqns:
        inputs = _among(eqn.invars, holding)
        params, within = dict(eqn.params), []
        for key, value in params.items():
            leaves, structure = jax.tree.flatten(value)  # the branches of a conditional are several
            if key != _OF_ELEMENTS and any(isinstance(x, _JAXPRS) for x in leaves):
                inner = [_inside(x, eqn, inputs) for x in leaves]
                params[key] = structure.unflatten(x for x, _ in inner)
                within += [results for _, results in inner]
        if within:
            for results in within:
                holding.update(itertools.compress(eqn.outvars, results))
        elif eqn.primitive is lax.scatter_add_p or (any(inputs) and not _mixes(eqn)):
            holding.update(eqn.outvars)
        eqns.append(eqn.replace(params=params))
    return jaxpr.replace(eqns=eqns), _among(jaxpr.outvars, holding)


def _among(values: Iterable[Any], holding: set[Any]) -> list[bool]:
    return [isinstance(v, core.Var) and v in holding for v in values]


def _mixes(eqn: core.JaxprEqn) -> bool:
    """Returns whether an equation adds several elements up. XLA sees a scatter through all others.

    It turns a sum over an axis of length 1 into a reshape, and such a product into one of elements.
    """
    if eqn.primitive is lax.reduce_sum_p:
        axes = eqn.params["axes"]
    elif eqn.primitive is lax.dot_general_p:
        axes = eqn.params["dimension_numbers"][0][0]
    else:
        return eqn.primitive is lax.conv_general_dilated_p
    summed: Any = eqn.invars[0].aval
    return any(summed.shape[axis] != 1 for axis in axes)


def _inside(inner: Any, eqn: core.JaxprEqn, inputs: list[bool]) -> tuple[Any, list[bool]]:
    """Does what `_with_fences` does with a jaxpr in an equation, whose `inputs` hold scatters."""
    jaxpr = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    count = len(jaxpr.invars)  # the last inputs; what comes before them is for another jaxpr
    holds = ([False] * count + inputs)[len(inputs) :]
    carries = _carries(jaxpr, eqn)
    fenced, results = _with_fences(jaxpr, holds)
    while any(results[k] and not holds[j] for k, j in carries.items()):
        for k, j in carries.items():  # what a trip carries, the next one gets
            holds[j] |= results[k]
        fenced, results = _with_fences(jaxpr, holds)
    fenced = _fence_results(fenced, [k for k in carries if results[k]])
    closed = isinstance(inner, core.ClosedJaxpr)
    return core.ClosedJaxpr(fenced, inner.consts) if closed else fenced, results


def _carries(jaxpr: core.Jaxpr, eqn: core.JaxprEqn) -> dict[int, int]:
    """Returns {result: argument} of a loop's jaxpr for what a trip hands on to the next."""
    if eqn.primitive.name not in ("scan", "while") or len(jaxpr.outvars) != len(eqn.outvars):
        return {}
    # Consts and carries come into a loop in the shape that they have outside, slices do not.
    carries = alike(jaxpr.outvars, eqn.outvars)
    first = alike(jaxpr.invars, eqn.invars[len(eqn.invars) - len(jaxpr.invars) :]) - carries
    return {k: first + k for k in range(carries)}


def alike(inside: Sequence[Any], outside: Sequence[Any]) -> int:
    """Returns how many values have the same shape inside of a loop and outside."""
    return sum(jnp.shape(a.aval) == jnp.shape(b.aval) for a, b in zip(inside, outside, strict=True))


def _fence_results(jaxpr: core.Jaxpr, which: list[int]) -> core.Jaxpr:
    """Returns a jaxpr with fences behind some of its results, if it does not just pass them on."""
    eqns, outvars = list[Any](jaxpr.eqns), list[Any](jaxpr.outvars)
    made = {v: eqn for eqn in eqns for v in eqn.outvars}
    for k in which:
        if eqn := made.get(outvars[k]):
            result, outvars[k] = outvars[k], core.Var(outvars[k].aval)
            fence = {"primitive": _fence_p, "params": {}, "effects": frozenset()}
            eqns.append(eqn.replace(invars=[result], outvars=[outvars[k]], **fence))
    return jaxpr.replace(eqns=eqns, outvars=outvars)


def _partitioned(context: mlir.LoweringRuleContext) -> bool:
    """Returns whether XLA will divide this program among devices."""
    axes: Any = context.module_context.axis_context
    if mesh := getattr(axes, "mesh", None):  # in `jax.shard_map`, by the axes that it leaves
        automatic = set(mesh.axis_names) - set(axes.manual_axes)
        return math.prod(mesh.shape[name] for name in automatic) > 1
    return getattr(axes, "num_devices", 1) != 1


def _primitive(name: str, if_partitioned: Callable, otherwise: Callable) -> core.Primitive:
    """Returns an identity that is lowered by one of two functions."""
    primitive = core.Primitive(name)
    primitive.def_impl(_identity)
    primitive.def_abstract_eval(_identity)
    batching.defvectorized(primitive)
    ad.deflinear2(primitive, lambda cotangent, _: [cotangent])
    mlir.register_lowering(primitive, mlir.lower_fun(otherwise, multiple_results=False))

    def on_chip(context, x):
        fun = if_partitioned if _partitioned(context) else otherwise
        return mlir.lower_fun(fun, multiple_results=False)(context, x)

    for platform in ("cuda", "rocm", "tpu"):
        mlir.register_lowering(primitive, on_chip, platform=platform)
    return primitive


def _identity(x: Any) -> Any:
    return x


_fence_p = _primitive("scatters_fence", lax.optimization_barrier, _identity)
_unknown_p = _primitive("scatters_unknown", _identity, jnp.ones_like)  # or it is known: True
