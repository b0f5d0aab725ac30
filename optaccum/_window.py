"""A window's arithmetic on pytrees: open its sums, add a microbatch, take the mean.

The one place that knows accumulator dtypes and weights. Sums are kept unnormalised,

    sums_n = sum_i w_i x_i,        mean_n = sums_n / sum_i w_i,

so a microbatch costs one fused pass (read `x`, read `sums`, write `sums`) and any prefix of a
window is a valid window. One tree holds all that is summed: the weights themselves (x_i = 1), the
gradients and the averaged arguments.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp

from optaccum._mesh_axes import unreduced


class Sums(NamedTuple):
    """All that is summed in a window, or all that one microbatch adds to it.

    Attributes:
        weight: sum of the weights; 1 in a microbatch.
        grads: weighted sums of the gradients, a tree like the parameters; () where none are kept.
        scalars: a tree of weighted sums of scalars.
    """

    weight: Any
    grads: Any
    scalars: Any


def at_least_float32(dtype: Any) -> jnp.dtype:
    """Returns `dtype`, or float32 for the narrower floating dtypes (float8 does not promote)."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def open_sums(params: Any, accumulator_dtype: Any = None) -> Any:
    """Returns zeros that gradients of `params` can be summed in.

    Args:
        params: a pytree of arrays, `jax.ShapeDtypeStruct`s or numbers. Shardings are kept.
        accumulator_dtype: dtype of the sums, or None for each leaf's own dtype promoted to at
            least float32. A complex one means its real counterpart where a leaf is real.

    Returns:
        A pytree like `params`. Integer and boolean leaves, which have no gradient, keep their
        dtype and are never added to.
    """

    def zeros(p):
        dtype = jnp.result_type(p)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            dtype = accumulator_dtype or dtype
        elif jnp.issubdtype(dtype, jnp.floating):
            wanted = accumulator_dtype or at_least_float32(dtype)
            dtype = jnp.finfo(wanted).dtype
        return jnp.zeros_like(p, dtype=dtype)

    return jax.tree.map(zeros, params)


def select(predicate: jax.Array | bool, on_true: jax.Array, on_false: jax.Array) -> jax.Array:
    """`lax.select` that keeps what is known at trace time out of the program."""
    if isinstance(predicate, bool):
        return on_true if predicate else on_false
    return lax.select(predicate, on_true, on_false)


# Between these a weight and the sum of a window's have reciprocals that are normal in float32.
SMALLEST, LARGEST = 2.0**-100, 2.0**126


def fits(weight: jax.Array, before: Any = 0, largest: float = LARGEST) -> jax.Array:
    """Returns whether a weight is one, and the sum with those `before` at most `largest`."""
    return (weight >= 0) & (before + weight <= largest)


def counts(weight: jax.Array, before: Any = 0, largest: float = LARGEST) -> jax.Array:
    """Returns whether a weight fits, and is not so small that it means 0."""
    return (weight >= SMALLEST) & (before + weight <= largest)


def add(
    sums: Any,
    values: Any,
    weight: jax.Array | None = None,
    *,
    first: jax.Array | bool = False,
    accept: jax.Array | bool = True,
    valid: Any = None,
    summed: bool = False,
) -> Any:
    """Returns `sums` with `weight * values` added, or begun afresh with it.

    Selects throughout, never multiplies by a mask: 0 * NaN is NaN, so a mask would carry one
    bad microbatch into every later window. For the same reason a microbatch whose weight does not
    count adds zero whatever its values are.

    Args:
        sums: a pytree of sums; its dtypes are kept. Narrower than float32, they are added to in
            float32 and rounded once.
        values: a pytree like `sums`; a None adds nothing.
        weight: f32[], or None for 1 without a multiplication. Pass it as it came: XLA for GPUs and
            TPUs moves the reduction of `weight * values` over devices out of a loop, but only where
            nothing was done to the factor.
        first: bool[], whether this microbatch opens the window: then the old sums are
            overwritten, not read.
        accept: bool[], whether this microbatch counts: if not, the sums stay as they are.
        valid: bool[], whether the weight counts, where that is not for the weight alone to say.
        summed: whether `values` are sums already, that of the weights too: then the weight only
            says whether they count.
    """
    if weight is not None and valid is None:
        valid = counts(weight)

    def leaf(x, s):
        if x is None:
            return jax.tree.map(begin, s)
        s = jnp.asarray(s)
        dtype = at_least_float32(s.dtype)
        old, term = s.astype(dtype), jnp.asarray(x).astype(dtype)
        if weight is not None:
            # x + -0.0 is x for every x. With 0.0 XLA:GPU would share, and keep, one large array
            # with the loop of a gradient that is scanned over layers.
            nothing = jnp.full_like(term, -0.0 if term.ndim else 0.0)
            term = lax.select(valid, term if summed else times(term, weight), nothing)
        new = select(accept, select(first, term, old + term).astype(s.dtype), s)
        return jnp.copy(new) if new is x and not isinstance(new, Tracer) else new

    def begin(s):
        """Keeps a sum that gets nothing; that of the last window must still go."""
        if not jnp.issubdtype(s.dtype, jnp.inexact):
            return s
        return select(accept, select(first, jnp.zeros_like(s), s), s)

    return jax.tree.map(leaf, values, sums, is_leaf=lambda x: x is None)


def mean(sums: Sums, like: Sums, *, of_grads: bool = True) -> tuple[Any, Any]:
    """Returns `sums / sums.weight`, gradients and scalars, in the dtypes of `like`.

    Multiplies by the reciprocal, computed once: for a tree divided by a traced scalar XLA
    materialises the quotient, one temporary as large as the parameters; a product it fuses. A
    weight of zero gives the sums and not a NaN; the caller drops such a window.

    Args:
        sums: the sums of a window.
        like: what a microbatch added to it; where it is None the result is None.
        of_grads: whether gradients are averaged too, or their sums returned.
    """
    values = sums.grads, sums.scalars
    # In double precision only where a sum is (it cannot be without `jax_enable_x64`).
    inexact = [x for x in jax.tree.leaves(values) if jnp.issubdtype(x.dtype, jnp.inexact)]
    wide = any(jnp.finfo(x.dtype).dtype == jnp.float64 for x in inexact)
    divisor = lax.select(sums.weight > 0, sums.weight, jnp.ones_like(sums.weight))
    reciprocal = 1 / divisor.astype(jnp.float64 if wide else jnp.float32)

    def cast(x, s, averaged):
        if x is None:
            return None
        total = s.astype(at_least_float32(s.dtype))
        return (times(total, reciprocal) if averaged else total).astype(jnp.result_type(x))

    def tree(like, sums, averaged):
        return jax.tree.map(
            lambda x, s: cast(x, s, averaged), like, sums, is_leaf=lambda x: x is None
        )

    return tree(like.grads, sums.grads, of_grads), tree(like.scalars, sums.scalars, True)


def alone(grads: Any, weight: jax.Array | None, *, summed: bool, of_mean: bool) -> Any:
    """Returns what a window of one microbatch releases, in the gradients' dtypes."""
    if weight is None or summed != of_mean:
        return grads
    if summed:
        return mean(Sums(weight, grads, ()), Sums(None, grads, ()))[0]
    sums = add(open_sums(grads), grads, weight, first=True)
    return jax.tree.map(lambda s, g: s.astype(jnp.result_type(g)), sums, grads)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `x * factor` in the dtype of `x`, which may wait to be reduced over devices."""
    if waiting := unreduced(x):
        factor = jax.reshard(factor, jax.P(reduced=waiting))
    return x * factor.astype(x.dtype)
