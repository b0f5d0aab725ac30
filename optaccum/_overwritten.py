"""Parameters that their gradients replace: scales and histories of Flax's FP8 layers."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optaccum._trees import is_none

NAME = "_overwrite_with_gradient"  # the collection, `flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT`


class Overwritten(NamedTuple):
    """The leaves of a tree like the parameters that are to be replaced, by their places.

    The microbatches of a step compute with the same values, and give new ones for "gradients". If a
    value is used twice, JAX takes the largest, and so does a step of several microbatches.
    """

    places: tuple[int, ...]

    @classmethod
    def among(cls, which: Iterable[bool], axes: tuple[str, ...]) -> "Overwritten":
        """Returns the leaves that are to be replaced, or raises if gradients vary over `axes`."""
        places = tuple(j for j, found in enumerate(which) if found)
        if places and axes:
            raise ValueError(
                f"parameters with the collection {NAME!r} cannot be trained with `reduce_axes`, or "
                "in jax.shard_map, where each device would overwrite it with its own values; leave "
                "`reduce_axes` out and use jax.jit"
            )
        return cls(places)

    def split(self, tree: Any) -> tuple[Any, list[jax.Array]]:
        """Returns a tree with None in these places, and what was there as float32.

        A dtype of Flax's for these values has no arithmetic.
        """
        if not self.places:
            return tree, []
        leaves, structure = jax.tree.flatten(tree)
        values = [lax.convert_element_type(leaves[j], jnp.float32) for j in self.places]
        rest = [None if j in self.places else x for j, x in enumerate(leaves)]
        return structure.unflatten(rest), values

    def join(self, rest: Any, new: list[jax.Array], counts: jax.Array, params: Any) -> Any:
        """Returns `rest`, with None in these places, with the largest of the new values in them.

        Or with those of `params` if none counts. `new` are [n, ...], and `counts` is bool[n].
        """
        leaves = jax.tree.leaves(rest, is_leaf=is_none)
        old, structure = jax.tree.flatten(params)
        for j, x in zip(self.places, new, strict=True):
            counted = counts.reshape(-1, *[1] * (x.ndim - 1))
            largest = jnp.where(counted, x, -jnp.inf).max(0)
            before = lax.convert_element_type(old[j], jnp.float32)
            value = jnp.where(counts.any(), largest, before)
            leaves[j] = lax.convert_element_type(value, jax.typeof(old[j]).dtype)
        return structure.unflatten(leaves)


def overwritten(params: Any) -> list[bool]:
    """Returns which leaves of parameters are in such a collection."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [any(getattr(key, "key", None) == NAME for key in path) for path, _ in leaves]
