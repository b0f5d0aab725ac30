"""A window's arithmetic on pytrees: open its sums, add a microbatch, take the mean.

Sums are kept unnormalised::

    sums = sum_i w_i x_i,        mean = sums / sum_i w_i

so that a microbatch costs one fused pass (read x, read the sums, write the sums), and a window may
be closed after any microbatch. The weights are summed like all else, with x = 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp

from optaccum._conditional import select
from optaccum._mesh_axes import unreduced
from optaccum._trees import is_none

# The reciprocals of weights and totals in this range are normal in float32.
SMALLEST, LARGEST = 2.0**-100, 2.0**126


class Sums(NamedTuple):
    """What is summed in a window, or what one microbatch adds to it."""

    weight: Any  # in a microbatch 1, or its weight if its values are sums already
    grads: Any  # a tree like the parameters, or () if none are kept
    args: Any  # a tree of extra arguments


class Microbatch(NamedTuple):
    """How a microbatch is added to its window."""

    # f32[], or None for 1. XLA for GPUs and TPUs moves the psum of `weight * x` out of a loop only
    # if the weight is unmodified.
    weight: jax.Array | None = None
    opens: jax.Array | bool = False  # whether it is the first of its window
    counts: jax.Array | bool = True  # whether it is accepted; if not, the sums stay as they are
    adds: Any = None  # whether it adds more than zeros; None if its weight alone decides
    summed: bool = False  # whether its values are multiplied by the weight already
    largest: bool = False  # whether the window keeps the largest value instead of the sum

    def decided(self) -> "Microbatch":
        """Returns the microbatch with `adds` filled in from its weight."""
        if self.weight is None or self.adds is not None:
            return self
        return self._replace(adds=adds(self.weight))

    def term(self, x: jax.Array) -> jax.Array:
        """Returns what `x` adds to a sum."""
        if self.weight is None:
            return x
        # x + -0.0 is x for every x. With 0.0 XLA:GPU would share, and keep, one large array with
        # the loop of a gradient that is scanned over layers.
        nothing = jnp.full_like(x, -jnp.inf if self.largest else -0.0 if x.ndim else 0.0)
        return lax.select(self.adds, x if self.summed else times(x, self.weight), nothing)


def counts(weight: jax.Array, before: Any) -> jax.Array:
    """Returns whether `weight >= 0` and the running total stays <= `LARGEST`."""
    return (weight >= 0) & (before + weight <= LARGEST)


def adds(weight: jax.Array, before: Any = 0, largest: float = LARGEST) -> jax.Array:
    """Returns whether a weight counts and is large enough not to be taken for 0."""
    return (weight >= SMALLEST) & (before + weight <= largest)


def at_least_float32(dtype: Any) -> jnp.dtype:
    """Returns `dtype`, or float32 if that is wider (float8 does not promote)."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def open_sums(params: Any, dtypes: Sequence[Any] | None = None) -> Any:
    """Returns zeros in which gradients of `params` can be summed, with the same shardings.

    Args:
        params: A pytree of arrays, `jax.ShapeDtypeStruct`s or numbers. Integers and booleans, which
            have no gradient, keep their dtype and are never added to.
        dtypes: The dtype of each leaf's sum, or None for the leaf's dtype promoted to at least
            float32. The sum of a real leaf has the real counterpart of a complex dtype. Without
            `dtypes` every leaf has None.
    """

    def zeros(p, asked):
        dtype = jnp.result_type(p)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            dtype = asked or dtype
        elif jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.finfo(asked or at_least_float32(dtype)).dtype
        return jnp.zeros_like(p, dtype=dtype)

    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(map(zeros, leaves, dtypes or [None] * len(leaves)))


def is_summed(s: jax.Array) -> bool:
    """Returns whether gradients are added to a leaf of `open_sums`."""
    return jnp.issubdtype(s.dtype, jnp.inexact)


UNWEIGHTED = Microbatch()


def add(sums: Any, values: Any, microbatch: Microbatch = UNWEIGHTED) -> Any:
    """Returns `sums + weight * values`, or `weight * values` if the microbatch opens the window.

    Selects, and never multiplies by a mask: 0 * NaN is NaN, and would carry one bad microbatch into
    every later window. So a microbatch that does not add anything adds zero whatever its values.

    Args:
        sums: A pytree, whose dtypes are kept. Sums narrower than float32 are added to in float32
            and rounded once.
        values: A pytree like `sums`; a None adds nothing.
        microbatch: How they are added.
    """
    microbatch = microbatch.decided()
    opens, counts = microbatch.opens, microbatch.counts

    def leaf(x, s):
        if x is None:
            return jax.tree.map(keep, s)
        s = jnp.asarray(s)
        dtype = at_least_float32(s.dtype)
        old, term = s.astype(dtype), microbatch.term(jnp.asarray(x).astype(dtype))
        joined = jnp.maximum(old, term) if microbatch.largest else old + term
        new = select(counts, select(opens, term, joined).astype(s.dtype), s)
        # Outside `jax.jit` the sum must not be the array of the caller, who may donate it.
        return jnp.copy(new) if new is x and not isinstance(new, Tracer) else new

    def keep(s):
        """No gradient: keeps the sum, and zeroes it when a window opens."""
        if not is_summed(s):
            return s
        return select(counts, select(opens, jnp.zeros_like(s), s), s)

    with jax.named_scope("optaccum.add"):
        return jax.tree.map(leaf, values, sums, is_leaf=is_none)


def mean(sums: Sums, like: Sums, *, of_grads: bool = True, cast: bool = True) -> tuple[Any, Any]:
    """Returns `sums / sums.weight`, gradients and arguments, in the dtypes of `like`.

    A weight of zero gives the sums and not a NaN; the caller drops such a window.

    Args:
        sums: The sums of a window.
        like: What the last microbatch added. If it added None, others may have added to the sum:
            then the mean has the dtype of the sum, or is None for an integer leaf.
        of_grads: Whether to average the gradients, too, or to return their sums.
        cast: Whether to cast to the dtypes of `like`, or to keep the dtypes of the sums.
    """
    values = sums.grads, sums.args
    # In double precision only if a sum is (it cannot be without `jax_enable_x64`).
    summed = filter(is_summed, jax.tree.leaves(values))
    wide = any(jnp.finfo(x.dtype).dtype == jnp.float64 for x in summed)
    divisor = lax.select(sums.weight > 0, sums.weight, jnp.ones_like(sums.weight))
    # XLA materialises a tree divided by a traced scalar, but fuses a product.
    reciprocal = 1 / divisor.astype(jnp.float64 if wide else jnp.float32)

    def tree(like, sums, averaged):
        def leaf(x, s):
            if x is None:
                return jax.tree.map(lambda s: leaf(s, s) if is_summed(s) else None, s)
            total = s.astype(at_least_float32(s.dtype))
            total = times(total, reciprocal) if averaged else total
            return total.astype(jnp.result_type(x) if cast else s.dtype)

        return jax.tree.map(leaf, like, sums, is_leaf=is_none)

    return tree(like.grads, sums.grads, of_grads), tree(like.args, sums.args, True)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `x * factor` in the dtype of `x`, which may be unreduced."""
    if axes := unreduced(x):
        factor = jax.reshard(factor, jax.P(reduced=axes))
    return x * factor.astype(x.dtype)
