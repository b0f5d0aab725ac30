"""Where sums are: whole, one part on each device, or unreduced.

Gradients of data-parallel training are parts of a sum, one on each device. Reduced as they come,
they cost one reduction per microbatch. Accumulated as parts they cost one per window, inside the
release branch. A part is known by its type; the page "On many devices" shows how users get one.

Auto axes have no parts: `jax.jit` reduces before anyone sees the gradient.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import optax

from optaccum import _window
from optaccum._conditional import branch
from optaccum._mesh_axes import partitions, unreduce, unreduced, vary, varying
from optaccum._window import Sums


class Replicated:
    """Sums that need no reduction: every method returns what it is given."""

    axes: tuple[str, ...] = ()
    largest: float = _window.LARGEST

    def share(self, tree: Any) -> Any:
        """Returns values that all devices have alike, as each device's own."""
        return tree

    def open(self, sums: Sums) -> Sums:
        """Returns zeros as a state keeps them."""
        return sums

    def store(self, values: Any) -> Any:
        """Returns a microbatch in the shapes that a state keeps."""
        return values

    def load(self, sums: Any) -> Any:
        """Returns sums that a state keeps, in the shapes of a microbatch."""
        return sums

    def as_parts(self, grads: Any) -> Any:
        """Returns gradients, of which some may be reduced, as parts."""
        return grads

    def admit(self, weight: jax.Array, before: jax.Array | float) -> tuple[jax.Array | bool, Any]:
        """Returns whether a microbatch of this weight counts, and the weight to count it with.

        Args:
            weight: f32[].
            before: f32[], the sum of the window's weights so far.
        """
        return _window.fits(weight, before), weight

    def agree(self, skip: jax.Array, report: Any) -> tuple[jax.Array, Any]:
        """Returns whether any device would skip, and the largest of the reports."""
        return skip, report

    def total(self, sums: Sums, due: Any, closes: Any) -> jax.Array:
        """Returns the weight of all devices, where a window closes."""
        return sums.weight

    def reduce(self, grads: Any, scalars: Any, like: Any = None) -> tuple[Any, Any]:
        """Returns both summed over all devices, gradients sharded like `like`, if it is given."""
        return grads, scalars


class PerDevice(Replicated):
    """In `jax.shard_map`: parts *vary* over the axes.

    A device keeps its sums, weights and scalars too, with a leading axis of 1, so that a state made
    by `tx.init` inside of it passes from call to call; all else is the same on all devices. The
    mean is that over all devices' tokens, `psum(sum of w g) / psum(sum of w)`, where each gave its
    own `weight`. A weight that does not count is 0 on its device, so that nobody has to agree.
    """

    def __init__(self, axes: tuple[str, ...]):
        self.axes = axes
        self.largest = _window.LARGEST / lax.psum(1, axes)

    def share(self, tree):
        return vary(tree, self.axes)

    def open(self, sums):
        return self.store(self.share(sums))

    def store(self, values):
        return jax.tree.map(lambda x: x[None], values)

    def load(self, sums):
        return jax.tree.map(lambda x: x[0], sums)

    def admit(self, weight, before):
        own = bool(set(self.axes) & varying(weight))
        accept = True if own else _window.fits(weight, 0)
        valid = _window.counts(weight, before, self.largest)
        return accept, jnp.where(valid, weight, 0)

    def agree(self, skip, report):
        def largest(x):
            # Devices that have different pieces of the gradients, over other axes, agree too.
            x = jnp.asarray(x)
            over = (*self.axes, *sorted((varying(x) | varying(skip)) - set(self.axes)))
            wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
            return lax.pmax(vary(wide, over), over).astype(x.dtype)

        return largest(skip), jax.tree.map(largest, report)

    def total(self, sums, due, closes):
        own = self.load(sums.weight)
        nothing = vary(jnp.zeros([], own.dtype), tuple(varying(own) - set(self.axes)))
        return branch(due, closes, lambda _: (self._psum(own),), (nothing,))[0]

    def reduce(self, grads, scalars, like=None):
        return self._psum((grads, scalars))

    def _psum(self, tree):
        return lax.psum(self.share(tree), self.axes)


class Unreduced(Replicated):
    """Under explicit sharding: gradients are *unreduced* over the axes, scalars are whole.

    A gradient that arrives reduced is made a part that is zero on all devices but one, which costs
    no communication. Sums of parameters that are sharded over an axis stay sharded.
    """

    def __init__(self, axes: tuple[str, ...]):
        self.axes = axes

    def open(self, sums):
        return sums._replace(grads=self.as_parts(sums.grads))

    def as_parts(self, grads):
        return jax.tree.map(lambda x: unreduce(x, self.axes), grads)

    def reduce(self, grads, scalars, like=None):
        def whole(x, place):
            if not unreduced(x):
                return x
            return jax.reshard(x, PartitionSpec(*partitions(place)))

        return jax.tree.map(whole, grads, grads if like is None else like), scalars


def over(axes: tuple[str, ...]) -> Replicated:
    """Returns how sums are kept over these axes of the mesh that is set here."""
    if not axes:
        return Replicated()
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return PerDevice(axes) if types[axes[0]] == AxisType.Manual else Unreduced(axes)


def of_all(sums: Sums) -> Sums:
    """Returns sums of a state, read inside or outside of `jax.shard_map`, over all devices."""
    if not jnp.ndim(sums.weight):
        grads, scalars = Unreduced(()).reduce(sums.grads, sums.scalars)
        return Sums(sums.weight, grads, scalars)
    axes = tuple(varying(sums.weight))  # outside there are none, but all parts along one axis

    def total(x):
        return lax.psum(x.sum(0), axes) if axes else x.sum(0)

    return jax.tree.map(total, sums)


def squared_norm(tree: Any, parts: tuple[str, ...] = ()) -> jax.Array:
    """Returns |tree|^2, f32[], of the pieces on all devices of a `jax.shard_map`.

    Over the axes `parts` a device has a part of a sum and not a piece: there each has its own norm.
    """
    pieces = {}
    for x in map(jnp.asarray, jax.tree.leaves(tree)):
        if jnp.issubdtype(x.dtype, jnp.inexact):  # the others are sums of nothing
            axes = tuple(sorted(varying(x) - set(parts)))
            pieces.setdefault(axes, []).append(x.astype(_window.at_least_float32(x.dtype)))
    total = jnp.zeros([], jnp.float32)
    for axes, leaves in pieces.items():
        square = optax.tree.norm(leaves, squared=True).astype(jnp.float32)
        total += lax.psum(square, axes) if axes else square
    return total


def reduce_like(total: jax.Array, x: jax.Array, kept: Replicated) -> jax.Array:
    """Returns the sum over devices of what each has of `x`, over the axes that `x` is shared on."""
    own = tuple(axis for axis in kept.axes if axis not in varying(x))
    return PerDevice(own).reduce(total, ())[0] if own else total
