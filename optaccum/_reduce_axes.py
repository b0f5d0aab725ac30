"""Devices: whether gradients, by their types, are the parts of a sum that they are taken for."""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optaccum._devices import PerDevice, Replicated, Unreduced, over
from optaccum._mesh_axes import partitions, unreduced, varying
from optaccum._validate import check_names, leaf_name


class AxisError(ValueError):
    """Where a program is, nothing can be a part over the axes that were named."""


def check_axes(axes: Any) -> tuple[str, ...]:
    """Returns the names of `reduce_axes` as a tuple."""
    names = (axes,) if isinstance(axes, str) else axes
    names = check_names("`reduce_axes`", names, "names of mesh axes")
    if "" in names:
        raise ValueError("`reduce_axes` must be names of mesh axes, or () for none, got ''")
    return names


def check_mesh(axes: tuple[str, ...]) -> None:
    """Raises unless gradients can be parts over the axes in the mesh that is set here."""
    if not axes:
        return
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


def check_sums(params: Any, axes: tuple[str, ...]) -> Replicated:
    """Returns where sums of gradients are, or raises if they cannot be there."""
    check_mesh(axes)
    kept = over(axes)
    check_shared(params, kept)
    _check_complex(params, kept)
    return kept


def check_shares(axes: tuple[str, ...]) -> Replicated:
    """Returns how devices share parameters in `jax.shard_map`, or raises if they are elsewhere."""
    check_mesh(axes)
    kept = over(axes)
    if isinstance(kept, Unreduced):
        raise AxisError(
            f"`reduce_axes` names {axes}, Explicit axes, over which gradients with respect to "
            "`jax.reshard(p, P(..., reduced={axis}))` wait to be reduced by themselves; leave "
            "`reduce_axes` out"
        )
    if missing := set(axes) - varying(kept.share(jnp.zeros(()))):
        raise TypeError(
            f"`reduce_axes` names {sorted(missing)}, but nothing can be told to vary over them in "
            "a jax.shard_map with `check_vma=False`; leave `check_vma` True, or `reduce_axes` out"
        )
    return kept


def check_parts(grads: Any, kept: Replicated) -> None:
    """Raises where a gradient is no part though it has to be, or a part though nobody asked."""
    axes, seen = kept.axes, set()
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if not axes and unreduced(g):
            raise TypeError(
                f"gradient leaf {leaf_name(path)} waits to be reduced over {sorted(unreduced(g))}; "
                "name these axes in `reduce_axes`"
            )
        if isinstance(kept, PerDevice) and (missing := set(axes) - varying(g)):
            raise TypeError(
                f"gradient leaf {leaf_name(path)} does not vary over {sorted(missing)} of "
                "`reduce_axes`: it has been summed already, or nothing here tells (jax.shard_map "
                "with `check_vma=False`, jax.pmap); differentiate with respect to "
                "`jax.lax.pcast(params, axes, to='varying')` in a jax.shard_map with "
                "`check_vma=True`, or leave `reduce_axes` out"
            )
        if isinstance(kept, Unreduced):
            seen |= unreduced(g) | set(jax.tree.leaves(partitions(g)))
    unseen = set(axes) - seen if isinstance(kept, Unreduced) else ()
    if unseen and jax.tree.leaves(grads):
        raise TypeError(
            f"no gradient leaf waits to be reduced over {sorted(unseen)} of `reduce_axes`: all "
            "have been reduced already; differentiate with respect to `jax.reshard(p, "
            "P(..., reduced={axis}))` of parameters in matrix products, or leave `reduce_axes` out"
        )


@contextlib.contextmanager
def explain_unreduced(grads: Any, params: Any) -> Iterator[None]:
    """Says why a step failed whose gradients differ between devices that share a parameter."""
    try:
        yield
    except TypeError as error:
        if "manual axis types" in str(error) or "varying" in str(error):
            leaves, treedef = jax.tree_util.tree_flatten_with_path(
                grads, is_leaf=lambda g: g is None
            )
            for (path, g), p in zip(leaves, treedef.flatten_up_to(params), strict=True):
                if g is not None and (axes := varying(g) - varying(p)):
                    raise TypeError(
                        f"gradient leaf {leaf_name(path)} varies over {sorted(axes)} of "
                        "jax.shard_map, but its parameter does not; name these axes in "
                        "`reduce_axes`, or reduce the gradient (jax.lax.pmean); or, if the devices "
                        "are to train models of their own, begin with "
                        "`jax.lax.pcast(params, axes, to='varying')`"
                    ) from error
        raise


def check_placed(grads: Any, sums: Any, kept: Replicated) -> Any:
    """Returns gradients as parts that lie on the devices as their sums, by their types.

    Args:
        grads: the gradients.
        sums: the sums that they are to be added to, or None.
        kept: where the sums are.

    Raises:
        TypeError: where a gradient is no part though it has to be, or the other way round.
        ValueError: where its sum is placed differently.
    """
    check_parts(grads, kept)
    parts = kept.as_parts(grads)

    def check(path, g, s):
        if g is None or jax.typeof(g).sharding.mesh.empty:  # JAX puts it where the sum is
            return
        if (partitions(g), unreduced(g)) != (partitions(s), unreduced(s)):
            raise ValueError(
                f"gradient leaf {leaf_name(path)} is sharded as {jax.typeof(g)}, but its sum in "
                f"the optimizer state as {jax.typeof(s)}; reshard the gradient, or begin with a "
                "state whose `grad_sum` is sharded like it"
            )

    if sums is not None:
        jax.tree_util.tree_map_with_path(check, parts, sums, is_leaf=lambda g: g is None)
    return parts


def check_shared(params: Any, kept: Replicated) -> None:
    """Raises where a parameter is no device's whole one: gradients of pieces are no parts."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(kept, PerDevice) and (parts := set(kept.axes) & varying(p)):
            raise TypeError(
                f"parameter leaf {leaf_name(path)} varies over {sorted(parts)} of `reduce_axes`, "
                "so that its gradients belong to different pieces: train pieces by an `accumulate` "
                "of their own, without these axes, on gradients and weights that you have reduced; "
                "and pass what all devices share as it came in, before jax.lax.pcast"
            )


def _check_complex(params: Any, kept: Replicated) -> None:
    """Raises where sums of gradients cannot be unreduced."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(kept, Unreduced) and jnp.iscomplexobj(x):
            raise TypeError(
                f"parameter leaf {leaf_name(path)} is complex, and JAX cannot make unreduced "
                "complex arrays; use jax.shard_map, or leave `reduce_axes` out"
            )


def check_gradients(loss: jax.Array, grads: Any, weight: Any, kept: Replicated) -> None:
    """Raises unless loss, gradients and weight of a microbatch are of the same rows."""
    if kept.axes:
        _check_loss(loss, grads, kept)
        check_parts(grads, kept)
    if weight is not None:
        _check_weight_is_shared(weight, grads)


def _check_loss(loss: jax.Array, grads: Any, kept: Replicated) -> None:
    """Raises unless loss and gradients are of the same rows: those of one device.

    A loss that is a mean over devices would be divided twice, and a gradient that JAX has summed
    over an axis of the rows that was not named would be as many times too large.
    """
    if not isinstance(kept, PerDevice):
        return
    if missing := set(kept.axes) - varying(loss):
        raise TypeError(
            f"`fun` returned a loss that does not vary over {sorted(missing)} of `reduce_axes`: "
            "`fun` has reduced it, or jax.shard_map was told `check_vma=False`; return the loss "
            "of this device's rows, with `check_vma=True`, or leave `reduce_axes` out"
        )
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if summed := varying(loss) - varying(g):
            raise TypeError(
                f"`fun` returned a loss that varies over {sorted(summed)}, over which gradient "
                f"leaf {leaf_name(path)} has been summed; name these axes in `reduce_axes` too, or "
                "reduce the loss over them in `fun`"
            )


def _check_weight_is_shared(weight: jax.Array, grads: Any) -> None:
    """Raises if the weight differs between devices over which a gradient has been summed."""
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if axes := varying(weight) - varying(g):
            raise TypeError(
                f"`weight_fn(...)` differs between the devices of {sorted(axes)}, but gradient "
                f"leaf {leaf_name(path)} has been summed over them; differentiate with respect to "
                "`jax.lax.pcast(params, axes, to='varying')` and reduce weighted sums yourself, or "
                "return one weight for all devices"
            )


def check_state(axes: tuple[str, ...], weight: jax.Array) -> Replicated:
    """Returns where the sums of a state are, which its `weight` shows, or raises if not there."""
    check_mesh(axes)
    kept = over(axes)
    if isinstance(kept, PerDevice) and jnp.shape(weight) != (1,):
        raise ValueError(
            "the optimizer state must have one `weight`, and one of each sum, on a device, got "
            f"`weight` of shape {jnp.shape(weight)} there; make it with `init` in a jax.shard_map "
            f"with the axes {kept.axes}, and pass it with the specs of optaccum.state_shardings"
        )
    return kept


def check_agreed(due: Any, kept: Replicated) -> None:
    """Raises if a window may close on some devices only: they would wait for the others."""
    if isinstance(kept, PerDevice) and (parts := set(kept.axes) & varying(due)):
        raise TypeError(
            f"`release` or `every_k` differs between the devices of {sorted(parts)}, which must "
            "close a window together; let them agree first (jax.lax.pmax)"
        )
