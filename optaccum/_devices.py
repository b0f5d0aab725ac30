"""Where sums are kept: replicated, one on each device, unreduced, or with an axis of devices.

Each device of data-parallel training has the gradient of its rows. Reduced as they come, gradients
cost one reduction per microbatch. Summed on each device, and reduced in the release branch, they
cost one per window. The type of a gradient says which it is; "On many devices" shows how users get
one that is not reduced. Under Auto axes there is none, since `jax.jit` reduces gradients by itself:
there `_device_rows` computes gradients in a `jax.shard_map`.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from optaccum import _window
from optaccum._conditional import branch
from optaccum._mesh_axes import partitions, unreduce, unreduced, vary, varying
from optaccum._window import Sums


class Replicated:
    """Sums that need no reduction."""

    axes: tuple[str, ...] = ()  # over which a release reduces
    largest: float = _window.LARGEST  # total of weights on a device

    def vary(self, tree: Any) -> Any:
        """Casts replicated values to the type that a device's gradients have."""
        return tree

    def store(self, sums: Sums) -> Sums:
        """Returns sums, or what a microbatch adds to them, in the shapes and types of a state."""
        return sums

    def load(self, sums: Any) -> Any:
        """Returns sums of a state in the shapes of a microbatch."""
        return sums

    def weigh(self, weight: jax.Array, before: jax.Array | float) -> tuple[jax.Array, Any]:
        """Returns the weight to add a microbatch with, and whether it counts by it.

        Args:
            weight: f32[].
            before: f32[], the total of the window so far.
        """
        return weight, _window.counts(weight, before)

    def agree(self, skip: jax.Array, report: Any) -> tuple[jax.Array, Any]:
        """Returns whether any device skips, and the largest of the reports."""
        return skip, report

    def total(self, sums: Sums, closes: jax.Array | bool, *, by_select: bool) -> jax.Array:
        """Returns the weight of all devices if the window closes."""
        return sums.weight

    def reduce(self, grads: Any, args: Any, like: Any = None) -> tuple[Any, Any]:
        """Sums gradients and arguments over all devices; gradients get the shardings of `like`."""
        return grads, args

    def reduce_stored(self, sums: Sums, like: Any) -> Sums:
        """Returns what `reduce` does, of the sums of a state."""
        weight, grads, args = self.load(sums)
        return Sums(weight, *self.reduce(grads, args, like))


class PerDevice(Replicated):
    """In `jax.shard_map`: each device has sums and weights, which vary over the axes.

    They have a leading axis of 1 in a state, so that a state from `tx.init` inside `jax.shard_map`
    can leave it and come back. All other leaves are the same on all devices. The mean is that over
    the tokens of all devices, psum(sum w g) / psum(sum w). A weight that is not valid is 0 on its
    device, so no collective is needed to reject the microbatch.
    """

    def __init__(self, axes: tuple[str, ...]):
        self.axes = axes
        self.largest = _window.LARGEST / lax.psum(1, axes)

    def vary(self, tree):
        return vary(tree, self.axes)

    def store(self, sums):
        return jax.tree.map(lambda x: x[None], self.vary(sums))

    def load(self, sums):
        return jax.tree.map(lambda x: x[0], sums)

    def weigh(self, weight, before):
        differs = bool(set(self.axes) & varying(weight))
        counts = True if differs else _window.counts(weight, 0)
        adds = _window.adds(weight, before, self.largest)
        return jnp.where(adds, weight, 0), counts

    def agree(self, skip, report):
        def largest(x):
            # Devices that have other pieces of the gradients, over other axes, agree, too.
            x = jnp.asarray(x)
            axes = (*self.axes, *sorted((varying(x) | varying(skip)) - set(self.axes)))
            wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
            return lax.pmax(vary(wide, axes), axes).astype(x.dtype)

        return largest(skip), jax.tree.map(largest, report)

    def total(self, sums, closes, *, by_select):
        weight = self.load(sums.weight)
        zero = vary(jnp.zeros([], weight.dtype), tuple(varying(weight) - set(self.axes)))
        found = branch(closes, lambda _: (self._psum(weight),), (zero,), by_select=by_select)
        return found[0]

    def reduce(self, grads, args, like=None):
        return self._psum((grads, args))

    def _psum(self, tree):
        return lax.psum(self.vary(tree), self.axes)


class Unreduced(Replicated):
    """Under explicit sharding: gradients are unreduced over the axes, all else is replicated.

    A reduced gradient becomes one that is zero on all devices but one, without communication. Sums
    of parameters that are sharded over an axis stay sharded.
    """

    def __init__(self, axes: tuple[str, ...]):
        self.axes = axes

    def store(self, sums):
        return sums._replace(grads=jax.tree.map(lambda x: unreduce(x, self.axes), sums.grads))

    def reduce(self, grads, args, like=None):
        def whole(x, place):
            if not unreduced(x):
                return x
            return jax.reshard(x, PartitionSpec(*partitions(place)))

        return jax.tree.map(whole, grads, grads if like is None else like), args


class Automatic(Replicated):
    """Under automatic sharding: arrays with an axis in front, along which each device has its sums.

    `PerDevice` adds to them in a `jax.shard_map`. A release adds up the axis.
    """

    def __init__(self, axes: tuple[str, ...]):
        self.axes = axes
        mesh = jax.sharding.get_abstract_mesh()
        self.count = math.prod(mesh.shape[axis] for axis in axes)

    def store(self, sums):  # compiled, so that no device holds all of them
        return jax.jit(functools.partial(jax.tree.map, self._divide))(sums)

    def _divide(self, x):
        repeated = jnp.broadcast_to(x, (self.count, *x.shape))
        spec = PartitionSpec(self.axes, *[PartitionSpec.UNCONSTRAINED] * x.ndim)
        mesh: Any = jax.sharding.get_abstract_mesh()
        return lax.with_sharding_constraint(repeated, NamedSharding(mesh, spec))

    def load(self, sums):
        return jax.tree.map(lambda x: x[0], sums)

    def total(self, sums, closes, *, by_select):
        zero = jnp.zeros([], sums.weight.dtype)
        found = branch(closes, lambda _: (sums.weight.sum(0),), (zero,), by_select=by_select)
        return found[0]

    def reduce_stored(self, sums, like):
        # `jnp.sum` would reduce bfloat16 in float32.
        return jax.tree.map(lambda x: lax.reduce(x, np.zeros((), x.dtype), lax.add, (0,)), sums)


def of_all(sums: Sums) -> Sums:
    """Sums over all devices what a state keeps, read inside or outside of `jax.shard_map`."""
    if not jnp.ndim(sums.weight):
        grads, args = Unreduced(()).reduce(sums.grads, sums.args)
        return Sums(sums.weight, grads, args)
    axes = tuple(varying(sums.weight))  # outside there are none: all devices are along axis 0

    def total(x):
        return lax.psum(x.sum(0), axes) if axes else x.sum(0)

    return jax.tree.map(total, sums)


def largest_of_all(tree: Any, weight: jax.Array) -> Any:
    """Returns the elementwise largest over all devices of what a state with this weight keeps."""
    if not jnp.ndim(weight):
        return tree
    axes = tuple(varying(weight))
    return jax.tree.map(lambda x: lax.pmax(x.max(0), axes) if axes else x.max(0), tree)


def squared_norm(tree: Any, per_device: tuple[str, ...] = ()) -> jax.Array:
    """Returns |tree|^2, f32[], psummed over the axes on which leaves vary, but for `per_device`.

    Leaves that vary are pieces of a model in `jax.shard_map`, except over the axes on which each
    device has a gradient of its rows.
    """
    pieces = {}
    for x in map(jnp.asarray, jax.tree.leaves(tree)):
        if jnp.issubdtype(x.dtype, jnp.inexact):  # integer leaves have no gradient
            axes = tuple(sorted(varying(x) - set(per_device)))
            pieces.setdefault(axes, []).append(x.astype(_window.at_least_float32(x.dtype)))
    total = jnp.zeros([], jnp.float32)
    for axes, leaves in pieces.items():
        square = optax.tree.norm(leaves, squared=True).astype(jnp.float32)
        total += lax.psum(square, axes) if axes else square
    return total


def reduce_like(total: jax.Array, x: jax.Array, devices: Replicated) -> jax.Array:
    """Psums `total` over the axes on which `x` is replicated."""
    axes = tuple(axis for axis in devices.axes if axis not in varying(x))
    return PerDevice(axes).reduce(total, ())[0] if axes else total
