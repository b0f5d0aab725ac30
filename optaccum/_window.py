"""A window's arithmetic on pytrees: open its sums, add a microbatch, take the mean.

The one place that knows accumulator dtypes, weights and which gradients fit. Sums are kept
unnormalised,

    sums_n = sum_i w_i x_i,        mean_n = sums_n / sum_i w_i,

so a microbatch costs one fused pass (read `x`, read `sums`, write `sums`) and any prefix of a
window is a valid window. The same functions serve gradients, weights and averaged scalars.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def _is_none(x: Any) -> bool:
    return x is None


def _at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Returns `dtype`, or float32 for the narrower floating dtypes (float8 does not promote)."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def _real(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.finfo(dtype).dtype


def _sum_dtype(path: Any, dtype: jnp.dtype, requested: jnp.dtype | None) -> jnp.dtype:
    if requested is None:
        return _at_least_float32(dtype)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if is_complex and not jnp.issubdtype(requested, jnp.complexfloating):
        raise ValueError(
            f"`accumulator_dtype` {requested} would drop the imaginary part of the {dtype} leaf "
            f"{_name(path)}; pass a complex dtype or leave it None"
        )
    return requested if is_complex else _real(requested)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(the only leaf)"


def _dtype(kind: str, path: Any, leaf: Any) -> jnp.dtype:
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{kind} leaf {_name(path)} is not an array but {leaf!r}; pass arrays only "
            "(equinox.filter, flax.nnx.split)"
        ) from error


def open_sums(params: Any, accumulator_dtype: jnp.dtype | None = None) -> Any:
    """Returns zeros that gradients of `params` can be summed in.

    Args:
        params: a pytree of arrays, `jax.ShapeDtypeStruct`s or numbers. Shardings are kept.
        accumulator_dtype: dtype of the sums, or None for each leaf's own dtype promoted to at
            least float32. A complex one means its real counterpart where a leaf is real.

    Returns:
        A pytree like `params`. Integer and boolean leaves, which have no gradient, keep their
        dtype and are never added to.

    Raises:
        ValueError: if `accumulator_dtype` is real and a leaf is complex.
        TypeError: if a leaf is not an array.
    """

    def zeros(path, p):
        dtype = _dtype("parameter", path, p)
        if jnp.issubdtype(dtype, jnp.inexact):
            dtype = _sum_dtype(path, dtype, accumulator_dtype)
        return jnp.zeros_like(p, dtype=dtype)

    return jax.tree_util.tree_map_with_path(zeros, params)


def check_fits(grads: Any, like: Any) -> None:
    """Raises if `grads` cannot be summed in, or applied to, trees shaped `like`.

    Args:
        grads: a pytree of gradients. A None stands for "no gradient here" and fits anything.
        like: the sums (or the parameters) that the gradients belong to.

    Raises:
        ValueError: if the trees, the shapes, or real and complex leaves differ.
        TypeError: if a gradient leaf is an integer, a boolean, a float0, or no array.
    """

    def check(path, g, expected):
        dtype = jax.dtypes.float0 if _is_float0(g) else _dtype("gradient", path, g)
        if not jnp.issubdtype(dtype, jnp.inexact):
            kind = "float0" if _is_float0(g) else dtype
            raise TypeError(
                f"gradient leaf {_name(path)} has dtype {kind}, which cannot be accumulated; "
                "differentiate floating-point parameters only, or replace this leaf by None "
                "(optax.masked, equinox.filter)"
            )
        if jnp.shape(g) != jnp.shape(expected):
            raise ValueError(
                f"gradient leaf {_name(path)} has shape {jnp.shape(g)}, but the optimizer was "
                f"initialised with shape {jnp.shape(expected)}; pass the gradient of the same "
                "parameters that `init` was given"
            )
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        if is_complex != jnp.issubdtype(jnp.result_type(expected), jnp.complexfloating):
            raise ValueError(
                f"gradient leaf {_name(path)} is {dtype}, but the optimizer was initialised with "
                f"{jnp.result_type(expected)}; real and complex do not mix"
            )

    gradient_leaves, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=_is_none)
    try:
        expected_leaves = treedef.flatten_up_to(like)
    except ValueError as error:
        raise ValueError(_describe_mismatch(grads, like)) from error
    for (path, g), expected in zip(gradient_leaves, expected_leaves, strict=True):
        if g is None:
            continue
        if not jax.tree_util.all_leaves([expected]):
            raise ValueError(_describe_mismatch(grads, like))
        check(path, g, expected)


def _is_float0(x: Any) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def _describe_mismatch(grads: Any, like: Any) -> str:
    def names(tree):
        return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    unknown = [name for name in names(grads) if name not in names(like)]
    missing = [name for name in names(like) if name not in names(grads)]
    remedy = "pass the gradient of the same parameters that `init` was given"
    if unknown:
        return f"gradient leaf {unknown[0]} has no counterpart in the optimizer state; {remedy}"
    if missing:
        return f"the gradients have no leaf {missing[0]}, which the optimizer state has; {remedy}"
    return (
        f"the gradients have the tree structure {jax.tree.structure(grads)}, but the optimizer "
        f"was initialised with {jax.tree.structure(like)}; {remedy}"
    )


def add(
    sums: Any,
    values: Any,
    weight: jax.Array | None = None,
    *,
    first: jax.Array | bool,
    accept: jax.Array | bool = True,
) -> Any:
    """Returns `sums` with `weight * values` added, or begun afresh with it.

    Selects throughout, never multiplies by a mask: 0 * NaN is NaN, so a mask would carry one
    bad microbatch into every later window. For the same reason a microbatch of weight 0 adds
    zero whatever its values are.

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
    """

    def leaf(x, s):
        if x is None:
            return jax.tree.map(begin, s)
        s = jnp.asarray(s)
        dtype = _at_least_float32(s.dtype)
        old, term = s.astype(dtype), jnp.asarray(x).astype(dtype)
        if weight is not None:
            # x + -0.0 is x for every x; and of 0.0 XLA:GPU would share, and keep, one large array
            # with the loop of a gradient that is scanned over layers.
            nothing = jnp.full_like(term, -0.0)
            term = lax.select(counts(weight), times(term, weight), nothing)
        new = _select(first, term, old + term)
        return _select(accept, new.astype(s.dtype), s)

    def begin(s):
        """Keeps a sum that gets nothing; that of the last window must still go."""
        if not jnp.issubdtype(s.dtype, jnp.inexact):
            return s
        return _select(accept, _select(first, jnp.zeros_like(s), s), s)

    return jax.tree.map(leaf, values, sums, is_leaf=_is_none)


def counts(weight: jax.Array) -> jax.Array:
    """Returns whether a weight counts: positive and finite."""
    return (weight > 0) & jnp.isfinite(weight)


def mean(sums: Any, weight: jax.Array | None, like: Any) -> Any:
    """Returns `sums / weight` in the dtypes of `like`; the sums themselves if `weight` is None.

    Multiplies by the reciprocal, computed once: for a tree divided by a traced scalar XLA
    materialises the quotient, one temporary as large as the parameters; a product it fuses. A
    weight of zero gives the sums and not a NaN; the caller drops such a window.

    Args:
        sums: a pytree of sums.
        weight: f32[], the sum of the window's weights, or None.
        like: a pytree like `sums` whose dtypes are wanted; where it is None the result is None.
    """
    if weight is not None:
        # In double precision only where a sum is (it cannot be without `jax_enable_x64`).
        wide = any(jnp.finfo(s.dtype).dtype == jnp.float64 for s in _inexact_leaves(sums))
        divisor = lax.select(weight > 0, weight, jnp.ones_like(weight))
        reciprocal = 1 / divisor.astype(jnp.float64 if wide else jnp.float32)

    def leaf(x, s):
        if x is None:
            return None
        dtype = _at_least_float32(s.dtype)
        total = s.astype(dtype)
        if weight is not None:
            total = times(total, reciprocal)
        return total.astype(jnp.result_type(x))

    return jax.tree.map(leaf, like, sums, is_leaf=_is_none)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `x * factor` in the dtype of `x`, which may wait to be reduced over devices."""
    unreduced = getattr(jax.typeof(x).sharding.spec, "unreduced", ())
    if unreduced:
        factor = jax.reshard(factor, jax.P(reduced=unreduced))
    return x * factor.astype(x.dtype)


def _inexact_leaves(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _select(predicate: jax.Array | bool, on_true: jax.Array, on_false: jax.Array) -> jax.Array:
    """`lax.select` that keeps what is known at trace time out of the program."""
    if isinstance(predicate, bool):
        return on_true if predicate else on_false
    return lax.select(predicate, on_true, on_false)
