"""Partial sums on many devices: what `reduce_axes=("data",)` means to sums, weights and verdicts.

Gradients of data-parallel training are parts of a sum, one on each device. Reduced as they come,
they cost a reduction a microbatch. Accumulated as parts they cost one a window, inside the release
branch. A part is known by its type; how users get one is in docs/many_devices.md.

**In `jax.shard_map`** it *varies* over the axis. A device keeps its sums, `weight` and `arg_sums`
with a leading axis of 1, so that a state made by `tx.init` inside of it passes from call to call;
all else is the same on all devices. The mean is that over all devices' tokens,
`psum(sum of w g) / psum(sum of w)`, where each gave its own `weight`: one that is negative, inf or
NaN counts as 0 on its device, since nobody has to agree on it. Verdicts on gradients are agreed on.

**Under explicit sharding** it is *unreduced* over the axis. `weight` is a number of the whole
microbatch. A gradient that arrives reduced is made a part that is zero on all devices but one,
which costs no communication. Sums of parameters that are sharded over the axis stay sharded.

Auto axes have no parts: `jax.jit` reduces before anyone sees the gradient.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optaccum import _parts, _window
from optaccum._branch import branch


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns values that the devices of a `jax.shard_map` share as each device's own."""

    def cast(x):
        missing = tuple(axis for axis in axes if axis not in _parts.varying(x))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return getattr(lax, "pvary")(x, missing)  # noqa: B009  (jax 0.7.2)

    return jax.tree.map(cast, tree)


def open_parts(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns zeros as parts."""
    if not axes:
        return tree
    if _parts.is_manual(axes):
        return store(vary(tree, axes), axes)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.iscomplexobj(x):
            raise TypeError(
                f"parameter leaf {_parts.name(path)} is complex, and JAX cannot make unreduced "
                "complex arrays; use jax.shard_map, or leave `reduce_axes` out"
            )
    return jax.tree.map(lambda x: unreduce(x, axes), tree)


def store(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns parts as a state keeps them."""
    return jax.tree.map(lambda x: x[None], tree) if _parts.manual_axes(axes) else tree


def load(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns parts that a state keeps, in the shapes of the gradients."""
    return jax.tree.map(lambda x: x[0], tree) if _parts.manual_axes(axes) else tree


def as_parts(grads: Any, weight: Any, axes: tuple[str, ...]) -> tuple[Any, Any]:
    """Returns gradients, of which some may be reduced, as parts, and a weight that fits them."""
    if not axes:
        return grads, weight
    if not _parts.is_manual(axes):
        return jax.tree.map(lambda g: unreduce(g, axes), grads), weight
    if isinstance(weight, jax.Array) and _parts.is_part(weight, axes):
        # Only this device sees it: what is no weight counts nothing, and nobody has to agree.
        weight = jnp.where(_window.counts(weight), weight, 0)
    return grads, weight


def agree(skip: jax.Array, report: Any, axes: tuple[str, ...]) -> tuple[jax.Array, Any]:
    """Returns whether any device would skip, and the largest of the reports.

    Devices that have different pieces of the gradients, over other axes, agree too.
    """
    if not axes:
        return skip, report

    def largest(x):
        x = jnp.asarray(x)
        over = (*axes, *sorted((_parts.varying(x) | _parts.varying(skip)) - set(axes)))
        wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        return lax.pmax(vary(wide, over), over).astype(x.dtype)

    return largest(skip), jax.tree.map(largest, report)


def weight_where(closes: Any, due: Any, total: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the weight of all devices where a window closes, and else 0."""
    if not axes:
        return total
    own = load(total, axes)
    nothing = vary(jnp.zeros([], own.dtype), tuple(_parts.varying(own) - set(axes)))
    return branch(due, closes, lambda _: (whole(own, axes),), lambda: (nothing,))[0]


def whole(tree: Any, axes: tuple[str, ...], like: Any = None) -> Any:
    """Returns parts reduced over the devices, sharded like `like` where that is given.

    In `jax.shard_map` every device gets the sum of what they all have.
    """
    if not axes:
        return tree
    if _parts.is_manual(axes):
        return lax.psum(vary(tree, axes), axes)

    def reduce(x, place):
        return (
            jax.reshard(x, PartitionSpec(*_parts.partitions(place))) if _parts.unreduced(x) else x
        )

    return jax.tree.map(reduce, tree, tree if like is None else like)


def unreduce(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns `x`, unreduced over the axes but those that it is sharded over: no communication."""
    partitions = _parts.partitions(x)
    waiting = _parts.unreduced(x) | (set(axes) - set(jax.tree.leaves(partitions)))
    if waiting == _parts.unreduced(x):
        return x
    return jax.reshard(x, PartitionSpec(*partitions, unreduced=waiting))
