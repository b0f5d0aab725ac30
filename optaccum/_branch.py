"""Conditionals: what is known when a program is traced is not asked when it runs."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp


def branch(due: Any, steps: Any, step: Callable[..., Any], hold: Callable[[], Any]) -> Any:
    """Returns `step(*hold())` where `steps`, else the tuple `hold()`.

    A Python bool `due` leaves no conditional: where it is True and the window may yet be dropped,
    the step is taken and selected. Outside `jit` the predicate is a number, and a conditional
    would be compiled anew in every call.
    """
    if due is True and steps is not True:
        carry = hold()
        return jax.tree.map(functools.partial(jnp.where, steps), step(*carry), carry)
    if isinstance(steps, Tracer):
        return conditional(steps, step, hold())
    return step(*hold()) if steps else hold()


def conditional(predicate: jax.Array, step: Callable[..., Any], carry: tuple[Any, ...]) -> Any:
    """Returns `step(*carry)` where the predicate holds, else the carry, updated in place.

    Which form keeps the carry in its buffers depends on the compiler, so the form is chosen when
    the program is lowered:

    * CPU and TPU: `lax.cond`. A CPU copies the carry of a loop several times.
    * GPU: a loop of no or one trip. XLA:GPU copies everything that enters a conditional, and turns
      one with a cheap branch into a select, so that the branch runs in every call. A loop updates
      its carry in place, if its body reads it from the carry and closes over nothing of it.

    A loop has no reverse mode, so both forms are differentiated as `lax.cond`. The closure is
    traced once: `jax.jit` remembers it.
    """
    step, closed_over = jax.closure_convert(jax.jit(step), *carry)

    def by_cond(predicate, carry, closed_over):
        def release():
            return _fence(step(*carry, *closed_over), inwards=False)

        return lax.cond(predicate, release, lambda: carry)

    def by_loop(predicate, carry, closed_over):
        def body(_, carry):
            return _fence(step(*_fence(carry, inwards=True), *closed_over), inwards=False)

        return lax.fori_loop(0, predicate.astype(jnp.int32), body, carry)

    @jax.custom_jvp
    def run(*args):
        return lax.platform_dependent(*args, cuda=by_loop, rocm=by_loop, default=by_cond)

    run.defjvp(functools.partial(jax.jvp, by_cond))
    return run(predicate, carry, closed_over)


def both(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """`a & b` that keeps what is known at trace time a Python bool."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def _fence(tree: Any, *, inwards: bool) -> Any:
    """Returns `tree`, behind a fence that lets shardings into a branch but not out of it.

    Under automatic sharding the carry would lie where the step likes it best: parameters like the
    divided moments that update them, so that every hold would gather them. Behind fences the carry
    lies where it comes from and goes to.
    """
    return jax.tree.map(lambda x: _fence_p.bind(x, inwards=inwards), tree)


def _lower_fence(context: mlir.LoweringRuleContext, x: Any, *, inwards: bool) -> list[Any]:
    (aval,) = context.avals_in
    mesh = aval.sharding.mesh
    typed = not mesh.empty and not mesh.auto_axes  # nothing is left to the compiler
    if typed or not jax.config.jax_use_shardy_partitioner:
        return [x]
    direction = sdy.PropagationDirection
    return [sdy.propagation_barrier(x, direction.FORWARD if inwards else direction.BACKWARD)]


_fence_p = Primitive("shardings_fence")
_fence_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_fence_p, lambda cotangent, _, **__: [cotangent])
batching.defvectorized(_fence_p)
mlir.register_lowering(_fence_p, _lower_fence)
