"""Mesh axes in the type of an array: it varies, is sharded or is unreduced over them."""

from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec


def unreduced(x: Any) -> frozenset[str]:
    """Returns the explicit axes over which `x` is unreduced."""
    return getattr(jax.typeof(x).sharding.spec, "unreduced", frozenset())


def unreduce(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Casts `x` to unreduced over the `axes` that do not shard it; needs no communication."""
    sharded = partitions(x)
    wanted = unreduced(x) | (set(axes) - set(jax.tree.leaves(sharded)))
    if wanted == unreduced(x):
        return x
    return jax.reshard(x, PartitionSpec(*sharded, unreduced=wanted))


def partitions(x: Any) -> tuple:
    """Returns the axes that shard each dimension of `x`."""
    spec = jax.typeof(x).sharding.spec
    return tuple(getattr(spec, "partitions", spec))


def varying(x: Any) -> frozenset[str]:
    """Returns the manual axes of `jax.shard_map` over which `x` varies."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    new = getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())
    return getattr(aval, "vma", new) or frozenset()


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """Casts the replicated values of a `jax.shard_map` to device-varying."""

    def cast(x):
        missing = tuple(axis for axis in axes if axis not in varying(x))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return getattr(lax, "pvary")(x, missing)  # noqa: B009  (jax 0.7.2)

    return jax.tree.map(cast, tree)
