"""Metrics: whether a state can be read, and each of its numbers has a name of its own."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

KEYS = "gradient_step", "mini_step", "released", "skipped", "weight", "grad_norm"


def check_one_member(caller: str, counter: jax.Array) -> None:
    """Raises where a counter of the state shows several members of `jax.vmap`."""
    if jnp.ndim(counter):
        raise ValueError(
            "`opt_state` is that of several members of jax.vmap, "
            f"{jnp.shape(counter)}; pass that of one: `jax.vmap({caller})(...)`"
        )


def check_readable(grad_sum: Any, grads: Any) -> bool:
    """Returns whether a state has sums, or raises where the gradient's norm cannot be known."""
    has_sums = jax.tree.structure(grad_sum) != jax.tree.structure(())
    if not has_sums and grads is None:
        raise ValueError(
            "`opt_state` has no sums of gradients, since `every_k` is the constant 1; pass "
            "`grads`, those of the update before it, with every k"
        )
    return has_sums


def check_own_names(averages: Iterable[str]) -> None:
    """Raises where an average has the name of another number."""
    if both := sorted(set(averages).intersection(KEYS)):
        raise ValueError(
            f"`average_args` or `metrics` name {both[0]!r}, which `window_metrics` returns itself; "
            "pass it under another name"
        )
