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

from collections.abc import Iterator
import contextlib
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_reshard = getattr(jax, "reshard", None) or jax.sharding.reshard  # not in jax 0.7.2


def check_axes(axes: Any) -> tuple[str, ...]:
    """Returns the names of `reduce_axes` as a tuple."""
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`reduce_axes` must be names of mesh axes, got {axes!r}")
    return tuple(names)


def is_manual(axes: tuple[str, ...]) -> bool:
    """Returns whether the axes are those of a `jax.shard_map`; raises if they are none at all."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for axis in axes:
        if axis not in types:
            raise ValueError(
                f"`reduce_axes` names {axis!r}, but the mesh here has the axes {list(types)}; call "
                "`init` and `update` inside the same jax.shard_map or under jax.set_mesh (and in "
                "jax.pmap, which has no types of parts, reduce at the beginning of `inner`)"
            )
        if types[axis] == AxisType.Auto:
            raise ValueError(
                f"`reduce_axes` names {axis!r}, an Auto axis: jax.jit has summed the gradients "
                "over it; make the axis Explicit, use jax.shard_map (`state_shardings` with "
                "PartitionSpecs), or leave `reduce_axes` out"
            )
    manual = [types[axis] == AxisType.Manual for axis in axes]
    if any(manual) != all(manual):
        raise ValueError(f"`reduce_axes` {axes} mix axes of jax.shard_map with Explicit ones")
    return any(manual)


def manual_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the axes if they are those of a `jax.shard_map`, where scalars are parts too."""
    return axes if axes and is_manual(axes) else ()


def varying(x: Any) -> frozenset[str]:
    """Returns the axes of a `jax.shard_map` over which `x` differs by its type."""
    aval = jax.typeof(x)
    new = getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())
    return getattr(aval, "vma", new)


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


def unreduced(x: Any) -> frozenset[str]:
    """Returns the explicit axes over which `x` waits to be reduced."""
    return getattr(jax.typeof(x).sharding.spec, "unreduced", frozenset())


def open_parts(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns zeros as parts."""
    if not axes:
        return tree
    if is_manual(axes):
        return store(vary(tree, axes), axes)
    return jax.tree.map(lambda x: _unreduce(x, axes), tree)


def store(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns parts as a state keeps them."""
    return jax.tree.map(lambda x: x[None], tree) if manual_axes(axes) else tree


def check_state(weight: jax.Array, axes: tuple[str, ...]) -> None:
    """Raises unless a state has one part for each device, known by its `weight`."""
    if axes and jnp.shape(weight) != (1,):
        raise ValueError(
            "the optimizer state must have one `weight`, and one of each sum, on a device, got "
            f"`weight` of shape {jnp.shape(weight)} there; make it with `init` in a jax.shard_map "
            f"with the axes {axes}, and pass it with the specs of optaccum.state_shardings"
        )


def load(tree: Any, axes: tuple[str, ...]) -> Any:
    """Returns parts that a state keeps, in the shapes of the gradients."""
    return jax.tree.map(lambda x: x[0], tree) if manual_axes(axes) else tree


def check_parts(grads: Any, axes: tuple[str, ...]) -> None:
    """Raises where a gradient is no part though it has to be, or a part though nobody asked."""
    manual, seen = manual_axes(axes), set()
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if not axes and unreduced(g):
            raise TypeError(
                f"gradient leaf {_name(path)} waits to be reduced over {sorted(unreduced(g))}; "
                "name these axes in `reduce_axes`"
            )
        if manual and (missing := set(axes) - varying(g)):
            raise TypeError(
                f"gradient leaf {_name(path)} does not vary over {sorted(missing)} of "
                "`reduce_axes`: it has been summed already, or nothing here tells (jax.shard_map "
                "with `check_vma=False`, jax.pmap); differentiate with respect to "
                "`jax.lax.pcast(params, axes, to='varying')` in a jax.shard_map with "
                "`check_vma=True`, or leave `reduce_axes` out"
            )
        seen |= unreduced(g) | set(jax.tree.leaves(_partitions(g)))
    if axes and not manual and (missing := set(axes) - seen) and jax.tree.leaves(grads):
        raise TypeError(
            f"no gradient leaf waits to be reduced over {sorted(missing)} of `reduce_axes`: all "
            "have been reduced already; differentiate with respect to `jax.reshard(p, "
            "P(..., reduced={axis}))` of parameters in matrix products, or leave `reduce_axes` out"
        )


def check_loss(loss: jax.Array, axes: tuple[str, ...]) -> None:
    """Raises unless the loss is that of one device: a mean over devices would be divided twice."""
    if missing := set(axes) - varying(loss):
        raise TypeError(
            f"`fun` returned a loss that does not vary over {sorted(missing)} of `reduce_axes`: "
            "`fun` has reduced it, or jax.shard_map was told `check_vma=False`; return the loss "
            "of this device's rows, with `check_vma=True`, or leave `reduce_axes` out"
        )


def check_agreed(due: Any, axes: tuple[str, ...]) -> None:
    """Raises if a window may close on some devices only: they would wait for the others."""
    if parts := set(axes) & varying(due):
        raise TypeError(
            f"`release` or `every_k` differs between the devices of {sorted(parts)}, which must "
            "close a window together; let them agree first (jax.lax.pmax)"
        )


def check_placed(grads: Any, sums: Any) -> None:
    """Raises where a gradient and its sum lie on the devices differently, by their types."""

    def check(path, g, s):
        if g is not None and (_partitions(g), unreduced(g)) != (_partitions(s), unreduced(s)):
            raise ValueError(
                f"gradient leaf {_name(path)} is sharded as {jax.typeof(g)}, but its sum in the "
                f"optimizer state as {jax.typeof(s)}; reshard the gradient, or begin with a state "
                "whose `grad_sum` is sharded like it"
            )

    jax.tree_util.tree_map_with_path(check, grads, sums, is_leaf=lambda g: g is None)


@contextlib.contextmanager
def explain_judging(grads: Any) -> Iterator[None]:
    """Says why `should_skip_update_fn` failed, where no device has the gradients whole."""
    try:
        yield
    except Exception as error:
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if axes := unreduced(g):
                raise TypeError(
                    f"`should_skip_update_fn` failed on gradients such as leaf {_name(path)}, "
                    f"which wait to be reduced over {sorted(axes)}: of these only sums and "
                    "multiples can be taken, as optaccum.skip_not_finite does"
                ) from error
        raise


def as_parts(grads: Any, weight: Any, axes: tuple[str, ...]) -> tuple[Any, Any]:
    """Returns gradients, of which some may be reduced, as parts, and a weight that fits them."""
    if not axes:
        return grads, weight
    if not is_manual(axes):
        return jax.tree.map(lambda g: _unreduce(g, axes), grads), weight
    if isinstance(weight, jax.Array) and varying(weight):
        # Only this device sees it: what is no weight counts nothing, and nobody has to agree.
        weight = jnp.where(jnp.isfinite(weight) & (weight > 0), weight, 0)
    return grads, weight


def agree(skip: jax.Array, report: Any, axes: tuple[str, ...]) -> tuple[jax.Array, Any]:
    """Returns whether any device would skip, and the largest of the reports."""
    if not axes:
        return skip, report

    def largest(x):
        x = jnp.asarray(x)
        wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        return lax.pmax(vary(wide, axes), axes).astype(x.dtype)

    return largest(skip), jax.tree.map(largest, report)


def whole(tree: Any, axes: tuple[str, ...], like: Any = None) -> Any:
    """Returns parts reduced over the devices, sharded like `like` where that is given.

    In `jax.shard_map` every device gets the sum of what they all have.
    """
    if not axes:
        return tree
    if is_manual(axes):
        return lax.psum(vary(tree, axes), axes)

    def reduce(x, place):
        return _reshard(x, PartitionSpec(*_partitions(place))) if unreduced(x) else x

    return jax.tree.map(reduce, tree, tree if like is None else like)


def place(sharding: Any, extra: int, x: Any) -> Any:
    """Returns where the leaf `x` of a state lies, with `extra` axes before those of `sharding`."""
    spec = sharding if isinstance(sharding, PartitionSpec) else sharding.spec
    entries: list[Any] = [None] * extra + list(spec)
    mesh = jax.sharding.get_abstract_mesh()
    if parts := [axis for axis in mesh.axis_names if axis in varying(x)]:
        entries[:1] = [parts[0] if len(parts) == 1 else tuple(parts)]  # the axis of a device's own
    waiting = unreduced(x) - set(jax.tree.leaves(tuple(spec)))
    spec = PartitionSpec(*entries, unreduced=waiting) if waiting else PartitionSpec(*entries)
    if isinstance(sharding, PartitionSpec):
        return spec
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(the only leaf)"


def _unreduce(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns `x`, unreduced over the axes but those that it is sharded over: no communication."""
    partitions = _partitions(x)
    waiting = unreduced(x) | (set(axes) - set(jax.tree.leaves(partitions)))
    if waiting == unreduced(x):
        return x
    return _reshard(x, PartitionSpec(*partitions, unreduced=waiting))


def _partitions(x: jax.Array) -> tuple:
    spec = jax.typeof(x).sharding.spec
    return tuple(getattr(spec, "partitions", spec))
