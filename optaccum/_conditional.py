"""Conditionals, resolved at trace time if the predicate is known."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.extend import core
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp
import optax

from optaccum._mesh_axes import unreduced
from optaccum._trees import take_apart


def both(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """`a & b`; a Python bool if one of them decides it."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def select(predicate: jax.Array | bool, on_true: jax.Array, on_false: jax.Array) -> jax.Array:
    """`lax.select`; a Python bool chooses at trace time."""
    if isinstance(predicate, bool):
        return on_true if predicate else on_false
    return lax.select(predicate, on_true, on_false)


def branch(
    predicate: jax.Array | bool,
    step: Callable[..., tuple],
    start: tuple,
    *,
    makes_more: bool = False,
    by_select: bool = False,
) -> Any:
    """Returns `step(*start)` if the predicate holds, else `(zeros, *start)`.

    A Python bool leaves no conditional in the program. Nor is there one outside `jax.jit`, where
    the predicate is a number: JAX would compile a conditional anew in every call.

    Args:
        predicate: bool[].
        step: Returns `(..., *start)`. It may close over tracers.
        start: Its arguments. Non-array leaves pass through.
        makes_more: Whether `step` returns more than `start`, which is zeros on a hold.
        by_select: Whether to take the step always, and select.
    """
    known = not isinstance(predicate, Tracer)
    if known and predicate:
        return step(*start)
    arrays, join = take_apart(start)

    @jax.jit  # traced once, however often it is called
    def run(arrays):
        results = step(*join(arrays))
        return results[: -len(start)], take_apart(results[-len(start) :])[0]

    like = jax.eval_shape(run, arrays)[0] if makes_more else ()
    if known:
        zeros, arrays = _hold(like, arrays)
    elif by_select:
        zeros, arrays = optax.tree.where(predicate, run(arrays), _hold(like, arrays))
    else:
        zeros, arrays = conditional(predicate, run, arrays, like)
    return *zeros, *join(arrays)


def conditional(
    predicate: jax.Array, step: Callable[[list], tuple], start: list, like: tuple
) -> Any:
    """Returns `step(start)` if the predicate holds, else zeros and `start`, in place.

    Which form keeps its operands in their buffers depends on the compiler, so the form is chosen
    when the program is lowered:

    * CPU and TPU: `lax.cond`. XLA:CPU copies the carry of a loop several times.
    * GPU: a loop that runs zero times or once. XLA:GPU copies all operands of a conditional, and
      turns one with a cheap branch into a select, so that the branch runs in every call. It updates
      the carry of a loop in place, if the body reads nothing of it from outside.

    Unreduced values cannot enter a loop: XLA would reduce them before it, in every call. With them
    a GPU gets `lax.cond`, and its copies.
    """
    call, closed_over, _ = hoisted(lambda *x: step(list(x)), *start)

    def by_cond(predicate, start, closed_over):
        def release():
            return _fence(call(closed_over, *start), inwards=False)

        return lax.cond(predicate, release, lambda: _hold(like, start))

    def by_loop(predicate, start, closed_over):
        def body(_, carry):
            return _fence(call(closed_over, *_fence(carry[1], inwards=True)), inwards=False)

        return lax.fori_loop(0, predicate.astype(jnp.int32), body, _hold(like, start))

    if any(map(unreduced, jax.tree.leaves((start, closed_over)))):
        return by_cond(predicate, start, closed_over)

    # A loop has no reverse mode. A rule of differentiation must not close over tracers, so those
    # of `step` have become arguments.
    @jax.custom_jvp
    def run(*args):
        return lax.platform_dependent(*args, cuda=by_loop, rocm=by_loop, default=by_cond)

    run.defjvp(functools.partial(jax.jvp, by_cond))
    return run(predicate, start, closed_over)


def _hold(like: tuple, start: list) -> tuple:
    with jax.named_scope("optaccum.hold"):
        return jax.tree.map(jnp.zeros_like, like), start


def hoisted(fun: Callable[..., Any], *example: jax.Array) -> tuple[Callable[..., Any], list, Any]:
    """Traces `fun`: returns it as `(closed_over, *arrays)`, what it closes over, and its shapes.

    `jax.closure_convert` leaves integers in the closure, which are tracers under `jax.vmap`.
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*example)

    def evaluate(closed_over, *arrays):
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, closed_over))(*arrays)

    # Traced again, since in newer JAX the first program still refers to the tracers.
    run = core.jaxpr_as_fun(jax.make_jaxpr(evaluate)(closed.consts, *example))
    tree = jax.tree.structure(shapes)

    def call(closed_over, *arrays):
        return jax.tree.unflatten(tree, run(*closed_over, *arrays))

    return call, list(closed.consts), shapes


def _fence(tree: Any, *, inwards: bool) -> Any:
    """Lets shardings propagate into a branch but not out of it.

    Otherwise sharding propagation gives the carry the step's sharding, for example parameters the
    sharding of divided moments, and every hold all-gathers.
    """
    return jax.tree.map(lambda x: _fence_p.bind(x, inwards=inwards), tree)


def _lower_fence(context: mlir.LoweringRuleContext, x: Any, *, inwards: bool) -> list[Any]:
    aval: Any = context.avals_in[0]
    mesh = aval.sharding.mesh
    explicit = not mesh.empty and not mesh.auto_axes  # nothing propagates
    if explicit or not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return [x]
    direction = sdy.PropagationDirection
    return [sdy.propagation_barrier(x, direction.FORWARD if inwards else direction.BACKWARD)]


_fence_p = core.Primitive("shardings_fence")
_fence_p.def_impl(lambda x, **_: x)
_fence_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_fence_p, lambda cotangent, _, **__: [cotangent])
batching.defvectorized(_fence_p)
mlir.register_lowering(_fence_p, _lower_fence)
