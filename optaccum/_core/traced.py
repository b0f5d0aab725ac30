"""Conditionals: what is known when a program is traced is not asked when it runs."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp


def both(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """`a & b` that keeps what is known at trace time a Python bool."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def select(predicate: jax.Array | bool, on_true: jax.Array, on_false: jax.Array) -> jax.Array:
    """`lax.select` that keeps what is known at trace time out of the program."""
    if isinstance(predicate, bool):
        return on_true if predicate else on_false
    return lax.select(predicate, on_true, on_false)


def where(predicate: jax.Array, on_true: Any, on_false: Any) -> Any:
    """`jnp.where` of two trees."""
    return jax.tree.map(functools.partial(jnp.where, predicate), on_true, on_false)


def strongly_typed(x: Any) -> Any:
    """Returns a leaf of a fresh state as an array that keeps its dtype in every operation."""
    if isinstance(x, jax.Array | float | int | complex) or hasattr(x, "__array__"):
        x = jnp.asarray(x)
        return x.astype(x.dtype) if jax.typeof(x).weak_type else x
    return x


def cast_like(tree: Any, like: Any) -> Any:
    """Returns `tree` in the dtypes of `like`, strongly typed."""

    def cast(x, y):
        x, dtype = jnp.asarray(x), jnp.result_type(y)
        return x if x.dtype == dtype and not jax.typeof(x).weak_type else x.astype(dtype)

    return jax.tree.map(cast, tree, like)


def hoisted(fun: Callable[..., Any], *example: jax.Array) -> tuple[Callable[..., Any], list, Any]:
    """Returns `fun` as a function `(closed_over, *arrays)`, what it closes over, and its shapes.

    All of it, where `jax.closure_convert` leaves integers: under `jax.vmap` these are tracers too.

    Args:
        fun: a function of arrays, which is traced once.
        *example: arrays like those that it will be called with.
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*example)

    def call(closed_over, *arrays):
        leaves = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, closed_over))(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return call, list(closed.consts), shapes


def branch(
    due: jax.Array | bool,
    steps: jax.Array | bool,
    step: Callable[..., tuple],
    start: tuple,
    idle: Callable[[Callable[..., tuple] | None], tuple] = lambda _: (),
) -> Any:
    """Returns `step(*start)` where `steps`, else `(*idle(step), *start)`.

    A Python bool `due` leaves no conditional: where it is True and the window may yet be dropped,
    the step is taken and selected. Outside `jax.jit` the predicate is a number, and a conditional
    would be compiled anew in every call.

    Args:
        due: whether the window closes, as far as it is known.
        steps: whether it is released.
        step: a function that may close over tracers.
        start: the arguments of `step`, which end its results too.
        idle: `idle(step)` returns constants in place of the results of `step` before these.
            Outside `jax.jit` it is `idle(None)`.
    """
    if not isinstance(steps, Tracer):
        traced = isinstance(steps, bool)
        return step(*start) if steps else (*idle(step if traced else None), *start)
    step = jax.jit(step)  # traced once, however often it is called
    constants = functools.partial(idle, step)
    if due is True:
        return where(steps, step(*start), (*constants(), *start))
    return conditional(steps, step, start, constants)


def conditional(
    predicate: jax.Array, step: Callable[..., tuple], start: tuple, idle: Callable[[], tuple]
) -> Any:
    """Returns `step(*start)` where the predicate holds, else `(*idle(), *start)`, both in place.

    Which form keeps its operands in their buffers depends on the compiler, so the form is chosen
    when the program is lowered:

    * CPU and TPU: `lax.cond`. A CPU copies the carry of a loop several times.
    * GPU: a loop of no or one trip. XLA:GPU copies everything that enters a conditional, and turns
      one with a cheap branch into a select, so that the branch runs in every call. A loop updates
      its carry in place, if its body reads it from the carry and closes over nothing of it.

    A loop has no reverse mode, so both forms are differentiated as `lax.cond`.
    """
    step, closed_over = jax.closure_convert(step, *start)

    def by_cond(predicate, start, closed_over):
        def release():
            return _fence(step(*start, *closed_over), inwards=False)

        return lax.cond(predicate, release, lambda: (*idle(), *start))

    def by_loop(predicate, start, closed_over):
        def body(_, carry):
            start = _fence(carry[constants:], inwards=True)
            return _fence(step(*start, *closed_over), inwards=False)

        carry = (*idle(), *start)
        constants = len(carry) - len(start)
        return lax.fori_loop(0, predicate.astype(jnp.int32), body, carry)

    @jax.custom_jvp
    def run(*args):
        return lax.platform_dependent(*args, cuda=by_loop, rocm=by_loop, default=by_cond)

    run.defjvp(functools.partial(jax.jvp, by_cond))
    return run(predicate, start, closed_over)


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


_fence_p = Primitive("shardings_fence")
_fence_p.def_impl(lambda x, **_: x)
_fence_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_fence_p, lambda cotangent, _, **__: [cotangent])
batching.defvectorized(_fence_p)
mlir.register_lowering(_fence_p, _lower_fence)
