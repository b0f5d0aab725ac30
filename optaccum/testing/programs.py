"""Programs of JAX taken apart: calls written out, types widened, a part of one by itself."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from optaccum._fold import opened
from optaccum.testing import rounding
from optaccum.testing.gradients import Loss, apart

CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"}
CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


def part(jaxpr: Any, eqns: list[Any], inputs: list[Any], outputs: list[Any]) -> Callable[..., list]:
    """Returns the function of some equations of a program."""
    program = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=eqns)
    return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))


def trace(loss: Loss, rows: int) -> core.ClosedJaxpr:
    """Returns the program of a loss for a number of rows."""

    def resize(x):
        return jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), jnp.result_type(x))

    return jax.make_jaxpr(loss)(loss.arrays | jax.tree.map(resize, loss.some(*loss.rows)))


def flat(loss: Loss, rows: int) -> core.ClosedJaxpr:
    """Returns the program of a loss for a number of rows, without calls of programs in it."""
    closed = trace(loss, rows)

    def written_out(*args):
        return evaluate(closed.jaxpr, closed.consts, args)

    return jax.make_jaxpr(written_out)(*closed.in_avals)


def in_float32(loss: Loss) -> Loss:
    """Returns the loss in float32, if its program can be had in it and has the same gradient.

    What microbatches do to a loss does not depend on its precision, and rounding hides it.
    """
    dtypes = jax.tree.map(jnp.result_type, loss.arrays)

    def fun(*args):
        arrays = {j: args[j] for j in loss.arrays}
        narrow = jax.tree.map(lambda x, t: jax.ShapeDtypeStruct(jnp.shape(x), t), arrays, dtypes)
        closed = jax.make_jaxpr(loss)(narrow)
        (value,) = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arrays), wide=True)
        return value

    try:
        args = loss.args | jax.tree.map(_wide, loss.arrays)
        wide = dataclasses.replace(loss, fun=fun, args=args)
        return wide if apart(loss.gradient({}), wide.gradient({})) <= 0.5 else loss
    except Exception:  # a primitive that takes no other types
        return loss


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], wide: bool = False) -> list:
    """Evaluates a program, with calls written out, and `wide`, with float32 for narrower types."""
    values = [_wide(x) if wide else x for x in (*consts, *args)]
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(v):
        if isinstance(v, core.Literal):
            return _wide(v.val) if wide else v.val
        return env[v]

    for eqn in jaxpr.eqns:
        ins, narrow = [read(v) for v in eqn.invars], wide and _is_narrow(eqn)
        if eqn.primitive.name in (CALLS | CUSTOM if narrow else CALLS):
            inner = next(x for x in eqn.params.values() if isinstance(x, rounding.JAXPRS))
            outs = evaluate(*opened(inner), ins, wide)
        elif narrow:
            params = jax.tree.map(_widened, eqn.params)
            outs = eqn.primitive.bind(*ins, **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        else:
            needed = dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal))
            outs = part(jaxpr, [eqn], [*needed], eqn.outvars)(*(env[v] for v in needed))
        env |= zip(eqn.outvars, outs, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _wide(x: Any) -> Any:
    return jnp.asarray(x, np.float32) if rounding.is_low(x) else x


def _is_narrow(eqn: Any) -> bool:
    inside = [x for e, _ in rounding.equations([eqn]) for x in (*e.invars, *e.outvars)]
    return rounding.is_low(inside)


def _widened(param: Any) -> Any:
    """Returns a parameter of an equation: types and programs in it are widened."""
    if isinstance(param, np.dtype) and rounding.is_low(jax.ShapeDtypeStruct((), param)):
        return np.dtype(np.float32)
    if not isinstance(param, rounding.JAXPRS):
        return param
    jaxpr, consts = opened(param)
    types: list[Any] = [x.aval for x in jaxpr.invars]
    shapes = [
        jax.ShapeDtypeStruct(x.shape, np.float32 if rounding.is_low(x) else x.dtype) for x in types
    ]
    closed = jax.make_jaxpr(lambda *args: evaluate(jaxpr, consts, args, wide=True))(*shapes)
    return closed if isinstance(param, core.ClosedJaxpr) else closed.jaxpr
