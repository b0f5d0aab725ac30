"""What is a part of a sum over devices, by its type, and what is refused because it is none."""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


class AxisError(ValueError):
    """Where a program is, nothing can be a part over the axes that were named."""


def check_axes(axes: Any) -> tuple[str, ...]:
    """Returns the names of `reduce_axes` as a tuple."""
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`reduce_axes` must be names of mesh axes, got {axes!r}")
    return tuple(names)


def is_manual(axes: tuple[str, ...]) -> bool:
    """Returns whether the axes are those of a `jax.shard_map`; raises if they have no parts."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for axis in axes:
        if axis not in types:
            raise AxisError(
                f"`reduce_axes` names {axis!r}, but the mesh here has the axes {list(types)}; call "
                "`init` and `update` inside the same jax.shard_map or under jax.set_mesh (and in "
                "jax.pmap, which has no types of parts, reduce at the beginning of `inner`)"
            )
        if types[axis] == AxisType.Auto:
            raise AxisError(
                f"`reduce_axes` names {axis!r}, an Auto axis: jax.jit has summed the gradients "
                "over it; make the axis Explicit, use jax.shard_map (`state_shardings` with "
                "PartitionSpecs), or leave `reduce_axes` out"
            )
        if types[axis] == AxisType.Explicit and not hasattr(jax, "reshard"):
            raise AxisError(
                f"`reduce_axes` names {axis!r}, an Explicit axis, but this JAX cannot compute with "
                "unreduced arrays; update JAX, or use jax.shard_map"
            )
    manual = [types[axis] == AxisType.Manual for axis in axes]
    if any(manual) != all(manual):
        raise AxisError(f"`reduce_axes` {axes} mix axes of jax.shard_map with Explicit ones")
    return any(manual)


def manual_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the axes if they are those of a `jax.shard_map`, where scalars are parts too."""
    return axes if axes and is_manual(axes) else ()


def varying(x: Any) -> frozenset[str]:
    """Returns the axes of a `jax.shard_map` over which `x` differs by its type."""
    aval = jax.typeof(x)
    new = getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())
    return getattr(aval, "vma", new)


def is_part(x: Any, axes: tuple[str, ...]) -> bool:
    """Returns whether `x` differs between the devices of a `jax.shard_map` that reduce."""
    return bool(set(axes) & varying(x))


def unreduced(x: Any) -> frozenset[str]:
    """Returns the explicit axes over which `x` waits to be reduced."""
    return getattr(jax.typeof(x).sharding.spec, "unreduced", frozenset())


def partitions(x: jax.Array) -> tuple:
    """Returns by which axes each dimension of `x` is sharded."""
    spec = jax.typeof(x).sharding.spec
    return tuple(getattr(spec, "partitions", spec))


def check_parts(grads: Any, axes: tuple[str, ...]) -> None:
    """Raises where a gradient is no part though it has to be, or a part though nobody asked."""
    manual, seen = manual_axes(axes), set()
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if not axes and unreduced(g):
            raise TypeError(
                f"gradient leaf {name(path)} waits to be reduced over {sorted(unreduced(g))}; "
                "name these axes in `reduce_axes`"
            )
        if manual and (missing := set(axes) - varying(g)):
            raise TypeError(
                f"gradient leaf {name(path)} does not vary over {sorted(missing)} of "
                "`reduce_axes`: it has been summed already, or nothing here tells (jax.shard_map "
                "with `check_vma=False`, jax.pmap); differentiate with respect to "
                "`jax.lax.pcast(params, axes, to='varying')` in a jax.shard_map with "
                "`check_vma=True`, or leave `reduce_axes` out"
            )
        seen |= unreduced(g) | set(jax.tree.leaves(partitions(g)))
    if axes and not manual and (missing := set(axes) - seen) and jax.tree.leaves(grads):
        raise TypeError(
            f"no gradient leaf waits to be reduced over {sorted(missing)} of `reduce_axes`: all "
            "have been reduced already; differentiate with respect to `jax.reshard(p, "
            "P(..., reduced={axis}))` of parameters in matrix products, or leave `reduce_axes` out"
        )


def check_placed(grads: Any, sums: Any) -> None:
    """Raises where a gradient and its sum lie on the devices differently, by their types."""

    def check(path, g, s):
        if g is None or jax.typeof(g).sharding.mesh.empty:  # JAX puts it where the sum is
            return
        if (partitions(g), unreduced(g)) != (partitions(s), unreduced(s)):
            raise ValueError(
                f"gradient leaf {name(path)} is sharded as {jax.typeof(g)}, but its sum in the "
                f"optimizer state as {jax.typeof(s)}; reshard the gradient, or begin with a state "
                "whose `grad_sum` is sharded like it"
            )

    jax.tree_util.tree_map_with_path(check, grads, sums, is_leaf=lambda g: g is None)


def check_shared(params: Any, axes: tuple[str, ...]) -> None:
    """Raises where a parameter is no device's whole one: gradients of pieces are no parts."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if axes and (parts := set(axes) & varying(p)):
            raise TypeError(
                f"parameter leaf {name(path)} varies over {sorted(parts)} of `reduce_axes`, so "
                "that its gradients belong to different pieces: train pieces by an `accumulate` "
                "of their own, without these axes, on gradients and weights that you have reduced; "
                "and pass what all devices share as it came in, before jax.lax.pcast"
            )


def check_loss(loss: jax.Array, grads: Any, axes: tuple[str, ...]) -> None:
    """Raises unless loss and gradients are of the same rows: those of one device.

    A loss that is a mean over devices would be divided twice, and a gradient that JAX has summed
    over an axis of the rows that was not named would be as many times too large.
    """
    if missing := set(axes) - varying(loss):
        raise TypeError(
            f"`fun` returned a loss that does not vary over {sorted(missing)} of `reduce_axes`: "
            "`fun` has reduced it, or jax.shard_map was told `check_vma=False`; return the loss "
            "of this device's rows, with `check_vma=True`, or leave `reduce_axes` out"
        )
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if axes and (summed := varying(loss) - varying(g)):
            raise TypeError(
                f"`fun` returned a loss that varies over {sorted(summed)}, over which gradient "
                f"leaf {name(path)} has been summed; name these axes in `reduce_axes` too, or "
                "reduce the loss over them in `fun`"
            )


def check_state(weight: jax.Array, axes: tuple[str, ...]) -> None:
    """Raises unless a state has one part for each device, known by its `weight`."""
    if axes and jnp.shape(weight) != (1,):
        raise ValueError(
            "the optimizer state must have one `weight`, and one of each sum, on a device, got "
            f"`weight` of shape {jnp.shape(weight)} there; make it with `init` in a jax.shard_map "
            f"with the axes {axes}, and pass it with the specs of optaccum.state_shardings"
        )


def check_agreed(due: Any, axes: tuple[str, ...]) -> None:
    """Raises if a window may close on some devices only: they would wait for the others."""
    if parts := set(axes) & varying(due):
        raise TypeError(
            f"`release` or `every_k` differs between the devices of {sorted(parts)}, which must "
            "close a window together; let them agree first (jax.lax.pmax)"
        )


@contextlib.contextmanager
def explain_judging(grads: Any) -> Iterator[None]:
    """Says why `should_skip_update_fn` failed, where no device has the gradients whole."""
    try:
        yield
    except Exception as error:
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if axes := unreduced(g):
                raise TypeError(
                    f"`should_skip_update_fn` failed on gradients such as leaf {name(path)}, "
                    f"which wait to be reduced over {sorted(axes)}: of these only sums and "
                    "multiples can be taken, as optaccum.skip_not_finite does"
                ) from error
        raise


def name(path: Any) -> str:
    """Returns what an error calls the leaf at `path`."""
    return jax.tree_util.keystr(path) or "(the only leaf)"
