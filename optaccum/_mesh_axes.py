"""Types of arrays on a mesh: the axes over which they vary, are sharded or wait to be reduced."""

from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec


def unreduced(x: Any) -> frozenset[str]:
    """Returns the explicit axes over which `x` waits to be reduced."""
    return getattr(jax.typeof(x).sharding.spec, "unreduced", frozenset())


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns values that the devices of a `jax.shard_map` share as each device's own."""

    def cast(x):
        missing = tuple(axis for axis in axes if axis not in varying(x))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return getattr(lax, "pvary")(x, missing)  # noqa: B009  (jax 0.7.2)

    return jax.tree.map(cast, tree)


def varying(x: Any) -> frozenset[str]:
    """Returns the axes of a `jax.shard_map` over which `x` differs by its type."""
    aval = jax.typeof(x)
    new = getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())
    return getattr(aval, "vma", new)


def partitions(x: Any) -> tuple:
    """Returns by which axes each dimension of `x` is sharded."""
    spec = jax.typeof(x).sharding.spec
    return tuple(getattr(spec, "partitions", spec))


def unreduce(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns `x`, unreduced over the axes but those that it is sharded over: no communication."""
    placed = partitions(x)
    waiting = unreduced(x) | (set(axes) - set(jax.tree.leaves(placed)))
    if waiting == unreduced(x):
        return x
    return jax.reshard(x, PartitionSpec(*placed, unreduced=waiting))
