"""Scatters: keeps the gradients of lookups right on compilers that lose them.

The gradient of `table[ids]` is a scatter. When a loop adds scatters up, XLA for GPUs and TPUs moves
their reduction over devices behind the loop. The versions of `AFFECTED` then forget, in each trip,
what all devices but the first have summed (openxla/xla issue 49143). Two forms prevent that:

* a select between scatter and sum: one reduction behind the loop, and a temporary of the scatter's
  size. Our own loops use it.
* a fence around the sum: one reduction per trip, in place. The loops of a loss get it.

Programs for CPUs, for one device and for `jax.shard_map` are not changed.
"""

from collections.abc import Callable, Sequence
import importlib.metadata
import math
import re
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.extend import core
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

# The first version of jaxlib with the fault, and the first without it.
AFFECTED = (0, 10, 1), (0, 12, 0)
VERSION = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3]))

_JAXPRS = core.Jaxpr | core.ClosedJaxpr
_OF_ELEMENTS = "update_jaxpr"  # a scatter's parameter: how it adds two elements


def trace(fun: Callable[[], Any]) -> tuple[Any, list[bool]]:
    """Returns `fun()`, with fences in its loops, and which of its leaves hold a scatter.

    With a version that is right it returns `fun()` and []. So it does where nothing is traced,
    with one microbatch outside `jax.jit` or under `jax.disable_jit`: `fun` may read its arguments.
    """
    if not (_affected() and isinstance(jnp.zeros([]), Tracer)):
        return fun(), []
    structure: Any = None

    def flat():  # not every class of a pytree can be rebuilt from shapes
        nonlocal structure
        leaves, structure = jax.tree.flatten(fun())
        return leaves

    closed = jax.make_jaxpr(flat)()
    jaxpr, holds = _fenced(closed.jaxpr, [])
    results = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))()
    return structure.unflatten(results), holds


def apart(tree: Any, holds: list[bool], seen: jax.Array) -> Any:
    """Returns a tree that is about to be summed, with a select behind each scatter in it.

    Args:
        tree: a tree of arrays, the last of a result of `trace`.
        holds: which leaves of that result hold a scatter, or [].
        seen: f32[] >= 0 that changes from trip to trip: no compiler knows that it is not negative.
    """
    leaves, structure = jax.tree.flatten(tree)
    last = holds[len(holds) - len(leaves) :]
    if not any(last):
        return tree
    always = _unknown_p.bind(seen >= 0)
    return structure.unflatten(
        lax.select(always, x, jnp.full_like(x, -0.0)) if held else x
        for x, held in zip(leaves, last, strict=True)
    )


def fence(tree: Any) -> Any:
    """Returns a tree that a loop carries, behind a fence."""
    return jax.tree.map(_fence_p.bind, tree) if _affected() else tree


def _affected() -> bool:
    return AFFECTED[0] <= VERSION < AFFECTED[1]


def _fenced(jaxpr: core.Jaxpr, holds: list[bool]) -> tuple[core.Jaxpr, list[bool]]:
    """Returns a jaxpr with fences in its loops, and which of its results hold a scatter.

    Args:
        jaxpr: a jaxpr.
        holds: which of its arguments hold a scatter.
    """
    held = {v for v, holds_one in zip(jaxpr.invars, holds, strict=True) if holds_one}
    eqns = []
    for eqn in jaxpr.eqns:
        inputs = [isinstance(v, core.Var) and v in held for v in eqn.invars]
        params, within = dict(eqn.params), []
        for key, value in params.items():
            leaves, structure = jax.tree.flatten(value)  # the branches of a conditional are several
            if key != _OF_ELEMENTS and any(isinstance(x, _JAXPRS) for x in leaves):
                inner = [_inside(x, eqn, inputs) for x in leaves]
                params[key] = structure.unflatten(x for x, _ in inner)
                within += [out for _, out in inner]
        if within:
            held |= {v for out in within for v, one in zip(eqn.outvars, out, strict=False) if one}
        elif eqn.primitive is lax.scatter_add_p or (any(inputs) and not _mixes(eqn)):
            held |= set(eqn.outvars)
        eqns.append(eqn.replace(params=params))
    results = [isinstance(v, core.Var) and v in held for v in jaxpr.outvars]
    return jaxpr.replace(eqns=eqns), results


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
    """Returns a jaxpr of an equation with fences, and which of its results hold a scatter."""
    jaxpr = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
    count = len(jaxpr.invars)  # the last inputs; those before them are for another jaxpr
    holds = ([False] * count + inputs)[len(inputs) :]
    # Consts and carries come into a loop in the shape that they have outside, slices do not.
    carries = first = 0
    if eqn.primitive.name in ("scan", "while") and len(jaxpr.outvars) == len(eqn.outvars):
        carries = _alike(jaxpr.outvars, eqn.outvars)
        first = _alike(jaxpr.invars, eqn.invars[len(inputs) - count :]) - carries
    while True:  # what a trip carries, the next one is given
        fenced, results = _fenced(jaxpr, holds)
        carried = {first + i for i in range(carries) if results[i]}
        if all(holds[i] for i in carried):
            break
        holds = [one or i in carried for i, one in enumerate(holds)]
    eqns: list[Any] = list(fenced.eqns)
    outvars: list[Any] = list(fenced.outvars)
    made = {v: one for one in eqns for v in one.outvars}
    for i in range(carries):
        if results[i] and outvars[i] in made:
            carry, outvars[i] = outvars[i], core.Var(outvars[i].aval)
            fence = {"primitive": _fence_p, "params": {}, "effects": frozenset()}
            eqns.append(made[carry].replace(invars=[carry], outvars=[outvars[i]], **fence))
    fenced = fenced.replace(eqns=eqns, outvars=outvars)
    closed = isinstance(inner, core.ClosedJaxpr)
    return core.ClosedJaxpr(fenced, inner.consts) if closed else fenced, results


def _alike(inside: Sequence[Any], outside: Sequence[Any]) -> int:
    """Returns how many values have the same shape inside of a loop and outside."""
    return sum(jnp.shape(a.aval) == jnp.shape(b.aval) for a, b in zip(inside, outside, strict=True))


def _partitioned(context: mlir.LoweringRuleContext) -> bool:
    """Returns whether XLA will divide this program among devices."""
    where: Any = context.module_context.axis_context
    if mesh := getattr(where, "mesh", None):  # in `jax.shard_map`, by the axes that it leaves
        automatic = set(mesh.axis_names) - set(where.manual_axes)
        return math.prod(mesh.shape[name] for name in automatic) > 1
    return getattr(where, "num_devices", 1) != 1


def _lower(
    when_partitioned: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    def rule(context, x):
        fun = when_partitioned if _partitioned(context) else otherwise
        return mlir.lower_fun(fun, multiple_results=False)(context, x)

    return rule


def _identity(x: Any) -> Any:
    return x


def _primitive(name: str, when_partitioned: Callable, otherwise: Callable) -> core.Primitive:
    """Returns an identity that chips lower in one way, if devices share the program, or another."""
    primitive = core.Primitive(name)
    primitive.def_impl(_identity)
    primitive.def_abstract_eval(_identity)
    batching.defvectorized(primitive)
    ad.deflinear2(primitive, lambda cotangent, _: [cotangent])
    mlir.register_lowering(primitive, mlir.lower_fun(otherwise, multiple_results=False))
    for platform in ("cuda", "rocm", "tpu"):
        rule = _lower(when_partitioned, otherwise)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


_fence_p = _primitive("scatters_fence", lax.optimization_barrier, _identity)
_unknown_p = _primitive("scatters_unknown", _identity, jnp.ones_like)  # or it is known: True
