"""Conditionals: what is known when a program is traced is not asked when it runs."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.experimental.shard_alike import shard_alike


def branch(due: Any, steps: Any, step: Callable[..., Any], hold: Callable[[], Any]) -> Any:
    """Returns `step(*hold())` where `steps`, else the tuple `hold()`.

    The sums stay outside the conditional: one fused pass per microbatch, and nothing for the
    branches to copy. A Python bool `due` leaves no conditional: where it is True and the window
    may yet be dropped, the step is taken and selected. Outside `jit` the predicate is a number,
    and a conditional would be compiled anew in every call.
    """
    if due is True and steps is not True:
        carry = hold()
        return jax.tree.map(functools.partial(jnp.where, steps), step(*carry), carry)
    if isinstance(steps, Tracer):
        return _conditional(steps, step, hold())
    return step(*hold()) if steps else hold()


def _conditional(steps: jax.Array, step: Callable[..., Any], carry: tuple[Any, ...]) -> Any:
    step, consts = jax.closure_convert(jax.jit(step), *carry)

    def by_cond(steps, carry, consts):
        return lax.cond(steps, lambda: step(*carry, *consts), lambda: carry)

    def by_loop(steps, carry, consts):
        def body(_, carry):
            return step(*carry, *consts)

        return lax.fori_loop(0, steps.astype(jnp.int32), body, carry)

    @jax.custom_jvp
    def run(steps, carry, consts):
        return lax.platform_dependent(
            steps, carry, consts, cuda=by_loop, rocm=by_loop, default=by_cond
        )

    @run.defjvp
    def _(primals, tangents):
        return jax.jvp(by_cond, primals, tangents)

    return run(steps, carry, consts)


def both(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """`a & b` that keeps what is known at trace time a Python bool."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b
