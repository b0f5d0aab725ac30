"""`reduce_axes`: whether gradients, by their types, are those of one device's rows."""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from optaccum._devices import Automatic, PerDevice, Replicated, Unreduced
from optaccum._mesh_axes import partitions, unreduced, varying
from optaccum._trees import is_none
from optaccum._validate import leaf_name

# Where sums are kept, by the type of the axes over which they are reduced.
BY_TYPE = {
    AxisType.Manual: PerDevice,
    AxisType.Explicit: Unreduced,
    AxisType.Auto: Automatic,
}


class AxisError(ValueError):
    """Gradients cannot be unreduced over these axes here."""


def check_mesh(axes: tuple[str, ...]) -> Replicated:
    """Returns where sums are kept, or raises if the current mesh has no such axes for them."""
    if not axes:
        return Replicated()
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    for axis in axes:
        if axis not in types:
            raise AxisError(
                f"`reduce_axes` names {axis!r}, but the mesh here has the axes {list(types)}; call "
                "`init` and all steps under one jax.set_mesh, or inside the same jax.shard_map "
                "(and in jax.pmap, whose arrays do not show what they vary over, reduce at the "
                "beginning of `inner`)"
            )
        if types[axis] == AxisType.Explicit and not hasattr(jax, "reshard"):
            raise AxisError(
                f"`reduce_axes` names {axis!r}, an Explicit axis, but this JAX cannot compute with "
                "unreduced arrays; update JAX, or use jax.shard_map"
            )
    if len(kinds := {types[axis] for axis in axes}) > 1:
        raise AxisError(f"`reduce_axes` {axes} mix axes of the kinds {sorted(map(str, kinds))}")
    return BY_TYPE[kinds.pop()](axes)


def check_sums(params: Any, axes: tuple[str, ...]) -> Replicated:
    """Returns where sums of gradients of `params` are kept, or raises if they cannot be."""
    devices = check_mesh(axes)
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(devices, PerDevice) and (sharded := set(axes) & varying(p)):
            raise TypeError(
                f"parameter leaf {leaf_name(path)} varies over {sorted(sharded)} of `reduce_axes`, "
                "so each device has the gradient of another piece; train such parameters with a "
                "second `accumulate` without these axes, on gradients and weights that you reduce, "
                "and pass replicated parameters as they came in, before jax.lax.pcast"
            )
        if isinstance(devices, Unreduced) and jnp.iscomplexobj(p):
            raise TypeError(
                f"parameter leaf {leaf_name(path)} is complex, and JAX cannot make unreduced "
                "complex arrays; use jax.shard_map, or leave `reduce_axes` out"
            )
    return devices


def check_in_shard_map(axes: tuple[str, ...]) -> Replicated:
    """Returns where the devices of a `jax.shard_map` keep sums, or raises elsewhere."""
    devices = check_mesh(axes)
    if isinstance(devices, Automatic):
        raise AxisError(
            f"`reduce_axes` names {axes[0]!r}, an Auto axis, over which only "
            "optaccum.value_and_grad and optaccum.value_and_apply reduce once; use jax.shard_map, "
            "or leave `reduce_axes` out"
        )
    if isinstance(devices, Unreduced):
        raise AxisError(
            f"`reduce_axes` names {axes}, Explicit axes, over which gradients with respect to "
            "`jax.reshard(p, P(..., reduced={axis}))` are reduced by JAX; leave `reduce_axes` out"
        )
    if missing := set(axes) - varying(devices.vary(jnp.zeros(()))):
        raise TypeError(
            f"`reduce_axes` names {sorted(missing)}, but nothing can be told to vary over them in "
            "a jax.shard_map with `check_vma=False`; leave `check_vma` True, or `reduce_axes` out"
        )
    return devices


def check_unreduced(grads: Any, devices: Replicated) -> None:
    """Raises if a gradient is reduced over `reduce_axes` already, or unreduced over other axes."""
    if isinstance(devices, Automatic):
        raise AxisError(
            f"`reduce_axes` names {devices.axes[0]!r}, an Auto axis: jax.jit has summed the "
            "gradients over it; let optaccum.value_and_apply compute them, use jax.shard_map "
            "(`state_shardings` with PartitionSpecs), make the axis Explicit, or leave "
            "`reduce_axes` out"
        )
    axes, seen = devices.axes, set()
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if not axes and unreduced(g):
            raise TypeError(
                f"gradient leaf {leaf_name(path)} is unreduced over {sorted(unreduced(g))}; "
                "name these axes in `reduce_axes`"
            )
        if isinstance(devices, PerDevice) and (missing := set(axes) - varying(g)):
            raise TypeError(
                f"gradient leaf {leaf_name(path)} does not vary over {sorted(missing)} of "
                "`reduce_axes`: it has been summed already, or nothing here tells (jax.shard_map "
                "with `check_vma=False`, jax.pmap); differentiate with respect to "
                "`jax.lax.pcast(params, axes, to='varying')` in a jax.shard_map with "
                "`check_vma=True`, or leave `reduce_axes` out"
            )
        if isinstance(devices, Unreduced):
            seen |= unreduced(g) | set(jax.tree.leaves(partitions(g)))
    unseen = set(axes) - seen if isinstance(devices, Unreduced) else ()
    if unseen and jax.tree.leaves(grads):
        raise TypeError(
            f"no gradient leaf is unreduced over {sorted(unseen)} of `reduce_axes`: all "
            "have been reduced already; differentiate with respect to `jax.reshard(p, "
            "P(..., reduced={axis}))` of parameters in matrix products, or leave `reduce_axes` out"
        )


def check_placed(grads: Any, sums: Any) -> None:
    """Raises if a gradient, as it is stored, is not sharded like its sum."""

    def check(path, g, s):
        if g is None or jax.typeof(g).sharding.mesh.empty:  # JAX moves it to where the sum is
            return
        if (partitions(g), unreduced(g)) != (partitions(s), unreduced(s)):
            raise ValueError(
                f"gradient leaf {leaf_name(path)} is sharded as {jax.typeof(g)}, but its sum in "
                f"the optimizer state as {jax.typeof(s)}; reshard the gradient, or begin with a "
                "state whose `grad_sum` is sharded like it"
            )

    jax.tree_util.tree_map_with_path(check, grads, sums, is_leaf=is_none)


def check_state(axes: tuple[str, ...], weight: jax.Array) -> Replicated:
    """Returns where the sums of a state are kept, which its `weight` shows, or raises."""
    devices = check_mesh(axes)
    if isinstance(devices, PerDevice) and jnp.shape(weight) != (1,):
        raise ValueError(
            "the optimizer state must have one `weight`, and one of each sum, on a device, got "
            f"`weight` of shape {jnp.shape(weight)} there; make it with `init` in a jax.shard_map "
            f"with the axes {devices.axes}, and pass it with the specs of optaccum.state_shardings"
        )
    if isinstance(devices, Automatic) and jnp.shape(weight) != (devices.count,):
        raise ValueError(
            f"the optimizer state must have one `weight`, and one of each sum, for each of the "
            f"{devices.count} devices along {devices.axes}, got `weight` of shape "
            f"{jnp.shape(weight)}; make it with `init` under the same jax.set_mesh"
        )
    return devices


def check_agreed(closes: Any, devices: Replicated) -> None:
    """Raises if a window may close on some devices only: they would wait for the others."""
    if isinstance(devices, PerDevice) and (axes := set(devices.axes) & varying(closes)):
        raise TypeError(
            f"`release` or `every_k` differs between the devices of {sorted(axes)}, which must "
            "close a window together; let them agree first (jax.lax.pmax)"
        )


@contextlib.contextmanager
def explain_varying(grads: Any, params: Any) -> Iterator[None]:
    """Says why a step failed whose gradients vary over axes on which a parameter is replicated."""
    try:
        yield
    except TypeError as error:
        if params is not None and ("manual axis" in str(error) or "varying" in str(error)):
            leaves, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_none)
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


def check_gradients(loss: jax.Array, grads: Any, weight: Any, devices: Replicated) -> None:
    """Raises unless loss, gradients and weight of a microbatch are of the same rows.

    A loss that is a mean over devices would be divided twice. A gradient that JAX has summed over
    another axis of the rows would be as many times too large.
    """
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    if isinstance(devices, PerDevice):
        if missing := set(devices.axes) - varying(loss):
            raise TypeError(
                f"`fun` returned a loss that does not vary over {sorted(missing)} of "
                "`reduce_axes`: `fun` has reduced it, or jax.shard_map was told "
                "`check_vma=False`; return the loss of this device's rows, with "
                "`check_vma=True`, or leave `reduce_axes` out"
            )
        for path, g in leaves:
            if summed := varying(loss) - varying(g):
                raise TypeError(
                    f"`fun` returned a loss that varies over {sorted(summed)}, over which gradient "
                    f"leaf {leaf_name(path)} has been summed; name these axes in `reduce_axes` "
                    "too, or reduce the loss over them in `fun`"
                )
    if devices.axes:
        check_unreduced(grads, devices)
    for path, g in leaves:
        if weight is not None and (axes := varying(weight) - varying(g)):
            raise TypeError(
                f"`weight_fn(...)` differs between the devices of {sorted(axes)}, but gradient "
                f"leaf {leaf_name(path)} has been summed over them; differentiate with respect to "
                "`jax.lax.pcast(params, axes, to='varying')` and reduce weighted sums yourself, or "
                "return one weight for all devices"
            )
