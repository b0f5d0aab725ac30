"""Evaluates the program of a gradient so that scans add slices to sums in their trips."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from optaccum import _scatters, _window
from optaccum._window import Microbatch


class Target(NamedTuple):
    """The sum that a value is added to."""

    total: jax.Array
    seen: jax.Array  # what `_scatters.apart` needs
    apart: bool  # whether it has to keep the value and the sum apart
    path: tuple[Any, ...] = ()  # casts and permutations of the value on its way


Targets = dict[int, Target]  # by the position of a result

_CALLS, _CHECKPOINTS = {"jit", "pjit"}, {"checkpoint", "remat2"}


def evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    targets: Targets,
    microbatch: Microbatch,
) -> list[Any]:
    """Evaluates a jaxpr; returns new sums in place of the results that have targets."""
    env: dict[Any, Any] = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
    )
    plan, skipped = _plan(jaxpr, targets)
    results: dict[int, Any] = {}
    for at, eqn in enumerate(jaxpr.eqns):
        if id(eqn) in skipped:
            continue
        if at not in plan:
            env |= zip(eqn.outvars, _run(eqn, jaxpr, env), strict=True)
            continue
        values = [_read(env, v) for v in eqn.invars]
        within = {j: target for j, (_, target) in plan[at].items()}
        outs = _HANDLERS[eqn.primitive.name](eqn, values, within, microbatch)
        env |= zip(eqn.outvars, outs, strict=True)
        for j, (i, _) in plan[at].items():
            results[i] = jnp.reshape(outs[j], targets[i].total.shape)
    for i, v in enumerate(jaxpr.outvars):
        if i not in results:
            x = _read(env, v)
            results[i] = plus(targets[i], x, microbatch) if i in targets else x
    return [results[i] for i in range(len(jaxpr.outvars))]


def _plan(jaxpr: core.Jaxpr, targets: Targets) -> tuple[dict, set[int]]:
    """Returns which results of which equations to add inside, and the equations that this skips.

    A result is added inside if nothing else reads it, and if only casts, transposes and reshapes
    lie between it and a scan, a lookup or a call.
    """
    made = {v: (at, j) for at, e in enumerate(jaxpr.eqns) for j, v in enumerate(e.outvars)}
    read = [*jaxpr.outvars, *(v for e in jaxpr.eqns for v in e.invars)]
    reads = collections.Counter(v for v in read if isinstance(v, core.Var))
    plan: dict[int, dict[int, tuple[int, Target]]] = {}
    skipped = set()
    for i, target in targets.items():
        v, passed = jaxpr.outvars[i], []
        while isinstance(v, core.Var) and v in made and reads[v] == 1:
            at, j = made[v]
            eqn = jaxpr.eqns[at]
            slices = not target.apart and _can_hold_slices(eqn, j, target)
            if slices or _is_lookup(eqn, target, made, jaxpr):
                plan.setdefault(at, {})[j] = i, target
                skipped |= set(map(id, passed))
                break
            path = target.path
            if eqn.primitive is lax.transpose_p:
                target = target._replace(path=(tuple(eqn.params["permutation"]), *path))
            elif eqn.primitive is lax.convert_element_type_p:
                target = target._replace(path=(eqn.params["new_dtype"], *path))
            elif eqn.primitive is lax.reshape_p and not any(map(_permutes, path)):
                # A reshape of the sum is free.
                before: Any = eqn.invars[0]
                target = target._replace(total=jnp.reshape(target.total, before.aval.shape))
            else:
                break
            passed.append(eqn)
            v = eqn.invars[0]
    return plan, skipped


def _permutes(step: Any) -> bool:
    return isinstance(step, tuple)


def _can_hold_slices(eqn: core.JaxprEqn, j: int, target: Target) -> bool:
    """Returns whether result `j` of an equation may be a stack of slices, or a call that has one.

    Other calls do not get the sum: behind the barrier of a checkpoint, XLA for TPUs would copy it.
    """
    if eqn.effects:
        return False
    if eqn.primitive.name == "scan":
        return eqn.params["length"] > 1 and j >= _carries(eqn)
    if eqn.primitive.name in _CALLS:
        shardings = *eqn.params["in_shardings"], *eqn.params["out_shardings"]
        calls = all(type(s).__name__ == "UnspecifiedValue" for s in shardings)
    else:
        checkpoint = eqn.primitive.name in _CHECKPOINTS
        calls = checkpoint and isinstance(eqn.params["prevent_cse"], bool)
    return calls and bool(_plan(opened(eqn.params["jaxpr"])[0], {j: target})[0])


def _is_lookup(eqn: core.JaxprEqn, target: Target, made: dict, jaxpr: core.Jaxpr) -> bool:
    """Returns whether an equation scatters into zeros, in the dtype of the sum."""
    if eqn.primitive is not lax.scatter_add_p:
        return False
    table, _, rows = eqn.invars
    of_rows: Any = rows.aval
    made_by = jaxpr.eqns[made[table][0]] if isinstance(table, core.Var) and table in made else None
    if made_by is None or made_by.primitive is not lax.broadcast_in_dim_p:
        return False
    value = made_by.invars[0]
    zeros = isinstance(value, core.Literal) and value.val == 0
    # Rows are weighed in the dtype of the sum. A cast behind the weight could overflow.
    dtypes = {target.total.dtype, *(step for step in target.path if not _permutes(step))}
    return zeros and {_window.at_least_float32(of_rows.dtype), of_rows.dtype} == dtypes


def _run(eqn: core.JaxprEqn, jaxpr: core.Jaxpr, env: dict[Any, Any]) -> list[Any]:
    """Returns the results of an equation."""
    reads = [*dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var))]
    part = jaxpr.replace(constvars=[], invars=reads, outvars=eqn.outvars, eqns=[eqn])
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))(*[env[v] for v in reads])


def _read(env: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, core.Literal) else env[v]


def plus(target: Target, x: jax.Array, microbatch: Microbatch) -> jax.Array:
    """Returns the sum with a value that ends up in it."""
    for step in target.path:
        x = jnp.transpose(x, step) if _permutes(step) else x.astype(step)
    if target.apart and microbatch.weight is None:  # otherwise the weight does
        x = _scatters.apart(x, [True], target.seen)
    return _window.add(target.total, x, microbatch)


def _of_slices(path: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
    """Returns the axis along which a sum holds the slices of a stack, and the path of a slice."""
    axis, steps = 0, []
    for step in path:
        if _permutes(step):
            others = [j for j in step if j != axis]
            axis, step = step.index(axis), tuple(j - (j > axis) for j in others)
        steps.append(step)
    return axis, tuple(steps)


def _carries(eqn: core.JaxprEqn) -> int:
    """Returns how many results of a scan are carries: these have the same shape inside."""
    return _scatters.alike(opened(eqn.params["jaxpr"])[0].outvars, eqn.outvars)


def opened(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """Returns a jaxpr and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _scan(eqn: core.JaxprEqn, values: list, targets: Targets, microbatch: Microbatch) -> list:
    """Evaluates a scan that carries the sums and adds a slice to each in every trip."""
    jaxpr, consts = opened(eqn.params["jaxpr"])
    carries = _carries(eqn)
    count = _scatters.alike(jaxpr.invars, eqn.invars) - carries
    shared, carry, xs = values[:count], values[count : count + carries], values[count + carries :]
    places = {j: _of_slices(target.path) for j, target in targets.items()}

    def body(state, x):
        carry, totals = state
        i, x = x
        within = {
            j: targets[j]._replace(
                total=lax.dynamic_index_in_dim(totals[j], i, axis, keepdims=False), path=path
            )
            for j, (axis, path) in places.items()
        }
        outs = evaluate(jaxpr, consts, [*shared, *carry, *x], within, microbatch)
        totals = {
            j: lax.dynamic_update_index_in_dim(total, outs[j], i, places[j][0])
            for j, total in totals.items()
        }
        stacks = {j: outs[j] for j in range(carries, len(outs)) if j not in targets}
        return (outs[:carries], totals), stacks

    length, reverse, unroll = (eqn.params[name] for name in ("length", "reverse", "unroll"))
    start = carry, {j: target.total for j, target in targets.items()}
    xs = jnp.arange(length), xs
    (carry, totals), stacks = lax.scan(body, start, xs, length, reverse=reverse, unroll=unroll)
    results = dict(enumerate(carry)) | totals | stacks
    return [results[j] for j in range(len(eqn.outvars))]


def _call(eqn: core.JaxprEqn, values: list, targets: Targets, microbatch: Microbatch) -> list:
    """Evaluates what `jax.jit` calls, or `jax.checkpoint` computes again, behind its barrier."""
    jaxpr, consts = opened(eqn.params["jaxpr"])
    totals = {j: target.total for j, target in targets.items()}

    def inside(values, totals):
        within = {j: target._replace(total=totals[j]) for j, target in targets.items()}
        return evaluate(jaxpr, consts, values, within, microbatch)

    if eqn.primitive.name not in _CHECKPOINTS:
        return jax.jit(inside)(values, totals)
    closed = jax.make_jaxpr(inside)(values, totals)
    invars = [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    hoisted = closed.jaxpr.replace(constvars=[], invars=invars)
    args = *closed.consts, *jax.tree.leaves((values, totals))
    return eqn.primitive.bind(*args, **(eqn.params | {"jaxpr": hoisted}))


def _scatter(eqn: core.JaxprEqn, values: list, targets: Targets, microbatch: Microbatch) -> list:
    """Weighs the rows of a lookup and not the table. XLA then scatters them into the sum."""
    zeros, ids, rows = values
    table = eqn.primitive.bind(zeros, ids, microbatch.term(rows), **eqn.params)
    # Without a select between, XLA reduces over devices in every trip.
    target = targets[0]._replace(apart=targets[0].apart or microbatch.weight is not None)
    return [plus(target, table, microbatch._replace(weight=None))]


_HANDLERS = {"scan": _scan, "scatter-add": _scatter} | dict.fromkeys(_CALLS | _CHECKPOINTS, _call)
