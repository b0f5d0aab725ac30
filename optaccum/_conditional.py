"""Conditionals: a value that is known when a program is traced is not asked for when it runs."""

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

from optaccum._mesh_axes import unreduced
from optaccum._trees import ARRAYS, take_apart, where


def both(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """`a & b` that keeps what is known at trace time a Python bool."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def shapes_of_updates(
    update: Callable[..., tuple], grads: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> Any:
    """Returns shapes and dtypes of the updates, by a trace that JAX remembers by its types.

    So a loop without `jax.jit` traces `update` once and not on every hold.
    """
    arrays = {name: x for name, x in extra_args.items() if isinstance(x, ARRAYS)}
    if others := {name: x for name, x in extra_args.items() if name not in arrays}:
        update = functools.partial(update, **others)  # functions and trees are no arguments
    leaves, join = take_apart(params)
    if len(leaves) == len(jax.tree.leaves(params)):
        return jax.eval_shape(update, grads, state, params, **arrays)[0]

    def rejoined(grads, state, leaves, **arrays):
        return update(grads, state, join(leaves), **arrays)

    return jax.eval_shape(rejoined, grads, state, leaves, **arrays)[0]


def hoisted(fun: Callable[..., Any], *example: jax.Array) -> tuple[Callable[..., Any], list, Any]:
    """Returns `fun` as a function `(closed_over, *arrays)`, what it closes over, and its shapes.

    All of it, where `jax.closure_convert` leaves integers: under `jax.vmap` these are tracers too.
    The function itself holds on to none of them.

    Args:
        fun: a function of arrays, which is traced once.
        *example: arrays like those that it will be called with.
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*example)

    def evaluate(closed_over, *arrays):
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, closed_over))(*arrays)

    run = core.jaxpr_as_fun(jax.make_jaxpr(evaluate)(closed.consts, *example))
    tree = jax.tree.structure(shapes)

    def call(closed_over, *arrays):
        return jax.tree.unflatten(tree, run(*closed_over, *arrays))

    return call, list(closed.consts), shapes


def branch(
    due: jax.Array | bool,
    steps: jax.Array | bool,
    step: Callable[..., tuple],
    start: tuple,
    known_shapes: Callable[[], tuple] | None = None,
) -> Any:
    """Returns `step(*start)` where `steps`, else `start` behind zeros.

    A Python bool `due` leaves no conditional: where it is True and the window may yet be dropped,
    the step is taken and selected. Outside `jax.jit` the predicate is a number, and a conditional
    would be compiled anew in every call.

    Args:
        due: whether the window closes, as far as it is known.
        steps: whether it is released.
        step: a function that may close over tracers.
        start: the arguments of `step`, which end its results too. Leaves that are no arrays stay.
        known_shapes: returns shapes and dtypes of the results before these, without a trace of
            `step`: for a hold outside `jax.jit`. None where there are none.
    """
    own = len(start)
    if not isinstance(steps, Tracer):
        if steps or known_shapes is None:
            return step(*start) if steps else start
        traced = isinstance(steps, bool)
        shapes = jax.eval_shape(step, *start)[:-own] if traced else known_shapes()
        return *jax.tree.map(jnp.zeros_like, shapes), *start

    arrays, join = take_apart(start)

    @jax.jit  # traced once, however often it is called
    def run(arrays):
        results = step(*join(arrays))
        return results[:-own], take_apart(results[-own:])[0]

    shapes = () if known_shapes is None else jax.eval_shape(run, arrays)[0]
    if due is True:
        first, arrays = where(steps, run(arrays), _hold(shapes, arrays))
    else:
        first, arrays = conditional(steps, run, arrays, shapes)
    return *first, *join(arrays)


def conditional(
    predicate: jax.Array, step: Callable[[list], tuple], start: list, shapes: tuple
) -> Any:
    """Returns `step(start)` where the predicate holds, else zeros and `start`, in place.

    Which form keeps its operands in their buffers depends on the compiler, so the form is chosen
    when the program is lowered:

    * CPU and TPU: `lax.cond`. A CPU copies the carry of a loop several times.
    * GPU: a loop of no or one trip. XLA:GPU copies everything that enters a conditional, and turns
      one with a cheap branch into a select, so that the branch runs in every call. A loop updates
      its carry in place, if its body reads it from the carry and closes over nothing of it.

    Values that wait to be reduced over devices cannot enter a loop, or XLA would reduce them before
    it, in every call. With them a GPU gets `lax.cond`, and its copies.

    A loop has no reverse mode, so both forms are differentiated as `lax.cond`. That needs a rule of
    its own, which must not close over tracers, so those of `step` become arguments.
    """
    run_step, closed_over, _ = hoisted(lambda *x: step(list(x)), *start)

    def call(start, closed_over):
        return run_step(closed_over, *start)

    def by_cond(predicate, start, closed_over):
        def release():
            return _fence(call(start, closed_over), inwards=False)

        return lax.cond(predicate, release, lambda: _hold(shapes, start))

    def by_loop(predicate, start, closed_over):
        def body(_, carry):
            return _fence(call(_fence(carry[1], inwards=True), closed_over), inwards=False)

        return lax.fori_loop(0, predicate.astype(jnp.int32), body, _hold(shapes, start))

    if any(map(unreduced, jax.tree.leaves((start, closed_over)))):
        return by_cond(predicate, start, closed_over)

    @jax.custom_jvp
    def run(*args):
        return lax.platform_dependent(*args, cuda=by_loop, rocm=by_loop, default=by_cond)

    run.defjvp(functools.partial(jax.jvp, by_cond))
    return run(predicate, start, closed_over)


def _hold(shapes: tuple, start: list) -> tuple:
    return jax.tree.map(jnp.zeros_like, shapes), start


def _fence(tree: Any, *, inwards: bool) -> Any:
    """Returns `tree`, behind a fence that lets shardings into a branch but not out of it.

    Under automatic sharding the carry would lie where the step likes it best: parameters like the
    divided moments that update them, so that every hold would gather them. Behind fences the carry
    lies where it comes from and goes to.
    """
    return jax.tree.map(lambda x: _fence_p.bind(x, inwards=inwards), tree)


def _lower_fence(context: mlir.LoweringRuleContext, x: Any, *, inwards: bool) -> list[Any]:
    aval: Any = context.avals_in[0]
    mesh = aval.sharding.mesh
    typed = not mesh.empty and not mesh.auto_axes  # nothing is left to the compiler
    if typed or not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return [x]
    direction = sdy.PropagationDirection
    return [sdy.propagation_barrier(x, direction.FORWARD if inwards else direction.BACKWARD)]


_fence_p = core.Primitive("shardings_fence")
_fence_p.def_impl(lambda x, **_: x)
_fence_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_fence_p, lambda cotangent, _, **__: [cotangent])
batching.defvectorized(_fence_p)
mlir.register_lowering(_fence_p, _lower_fence)
