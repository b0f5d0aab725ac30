"""Conditionals: what is known when a program is traced is not asked when it runs."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp


def branch(due: Any, steps: Any, step: Callable[[], Any], hold: Callable[[], Any]) -> Any:
    """Returns `step()` where `steps`, else `hold()`.

    The sums stay outside the conditional: one fused pass a microbatch, and nothing for the
    branches to copy. A Python bool `due` leaves no conditional: where it is True and the window
    may yet be dropped, the step is taken and selected. Outside `jit` the predicate is a number,
    and a conditional would be compiled anew in every call.
    """
    if due is True and steps is not True:
        return jax.tree.map(functools.partial(jnp.where, steps), step(), hold())
    if isinstance(steps, Tracer):
        return lax.cond(steps, step, hold)
    return step() if steps else hold()


def both(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """`a & b` that keeps what is known at trace time a Python bool."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b
