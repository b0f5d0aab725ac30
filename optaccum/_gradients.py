"""Gradients: whether they fit the sums that they are to be added to."""

from typing import Any

import jax
import jax.numpy as jnp

from optaccum._trees import is_none
from optaccum._validate import check_dtype, is_function, leaf_name

_REMEDY = "pass the gradient of the same parameters that `init` was given"


def dtypes_of_sums(params: Any, accumulator_dtype: Any) -> list[Any]:
    """Returns the dtype asked for the sum of each leaf, or None, or raises.

    Args:
        params: A pytree of parameters.
        accumulator_dtype: What `check_accumulator_dtype` returned.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    if is_function(accumulator_dtype):
        wanted = [check_dtype(accumulator_dtype(path, p), path) for path, p in leaves]
    elif jax.tree_util.all_leaves([accumulator_dtype], is_none):
        wanted = [accumulator_dtype] * len(leaves)
    else:
        try:
            wanted = structure.flatten_up_to(
                jax.tree.broadcast(accumulator_dtype, params, is_leaf=is_none)
            )
        except ValueError as error:
            raise ValueError(
                "`accumulator_dtype` must be a tree like the parameters, or a prefix of it, got "
                f"{jax.tree.structure(accumulator_dtype)} for {structure}"
            ) from error
    for (path, p), asked in zip(leaves, wanted, strict=True):
        dtype = _dtype("parameter", path, p)
        real = asked is not None and not jnp.issubdtype(asked, jnp.complexfloating)
        if real and jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"`accumulator_dtype` {asked} would drop the imaginary part of the {dtype} leaf "
                f"{leaf_name(path)}; pass a complex dtype or leave it None"
            )
    return wanted


def check_fits(grads: Any, like: Any) -> None:
    """Raises if `grads` cannot be summed in, or applied to, a tree `like`.

    Args:
        grads: A pytree of gradients. A None, for no gradient, fits anything.
        like: The sums (or the parameters) that the gradients belong to.

    Raises:
        ValueError: if the trees, the shapes, or real and complex leaves differ.
        TypeError: if a gradient leaf is an integer, a boolean, a float0, or no array, or if all
            gradients are one None.
    """
    if grads is None and jax.tree.leaves(like):
        raise TypeError("the gradients are None; pass a tree like the parameters")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_none)
    try:
        expected = treedef.flatten_up_to(like)
    except ValueError as error:
        raise ValueError(_mismatch(grads, like)) from error
    for (path, g), x in zip(leaves, expected, strict=True):
        if g is None:
            continue
        if not jax.tree_util.all_leaves([x]):
            raise ValueError(_mismatch(grads, like))
        _check_leaf(path, g, x)


def check_trained(params: Any, sums: Any, *, applied: bool) -> None:
    """Raises if `params` are not what the sums were opened for; a None fits anything.

    Without `applied` a tree of another structure passes: only `inner` could read it, and some
    optimizers do not.
    """
    remedy = "pass the parameters that `init` was given; the order is (grads, state, params)"
    leaves, treedef = jax.tree_util.tree_flatten_with_path(sums, is_leaf=is_none)
    try:
        found = treedef.flatten_up_to(params)
    except ValueError as error:
        if not applied:
            return
        raise ValueError(
            f"`params` have the tree structure {jax.tree.structure(params)}, but the optimizer "
            f"was initialised with {jax.tree.structure(sums)}; {remedy}"
        ) from error
    for (path, s), p in zip(leaves, found, strict=True):
        if s is not None and p is not None and jnp.shape(p) != jnp.shape(s):
            raise ValueError(
                f"parameter leaf {leaf_name(path)} has shape {jnp.shape(p)}, but the optimizer was "
                f"initialised with shape {jnp.shape(s)}; {remedy}"
            )


def _check_leaf(path: Any, g: Any, like: Any) -> None:
    float0 = getattr(g, "dtype", None) == jax.dtypes.float0
    dtype = jax.dtypes.float0 if float0 else _dtype("gradient", path, g)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"gradient leaf {leaf_name(path)} has dtype {'float0' if float0 else dtype}, which "
            "cannot be accumulated; differentiate floating-point parameters only, or replace this "
            "leaf by None (optax.masked, equinox.filter)"
        )
    if jnp.shape(g) != jnp.shape(like):
        raise ValueError(
            f"gradient leaf {leaf_name(path)} has shape {jnp.shape(g)}, but the optimizer was "
            f"initialised with shape {jnp.shape(like)}; {_REMEDY}"
        )
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if is_complex != jnp.issubdtype(jnp.result_type(like), jnp.complexfloating):
        raise ValueError(
            f"gradient leaf {leaf_name(path)} is {dtype}, but the optimizer was initialised with "
            f"{jnp.result_type(like)}; real and complex do not mix"
        )


def _dtype(kind: str, path: Any, leaf: Any) -> jnp.dtype:
    try:
        if isinstance(leaf, str | type):  # JAX takes the name of a dtype for one
            raise TypeError
        return jnp.result_type(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{kind} leaf {leaf_name(path)} is not an array but {leaf!r}; pass arrays only "
            "(equinox.filter, flax.nnx.split)"
        ) from error


def _mismatch(grads: Any, like: Any) -> str:
    """Returns what an error says of two trees that differ."""
    found, expected = (
        [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (grads, like)
    )
    for name in found:
        if name not in expected:
            return f"gradient leaf {name} has no counterpart in the optimizer state; {_REMEDY}"
    for name in expected:
        if name not in found:
            return f"the gradients have no leaf {name}, which the optimizer state has; {_REMEDY}"
    return (
        f"the gradients have the tree structure {jax.tree.structure(grads)}, but the optimizer "
        f"was initialised with {jax.tree.structure(like)}; {_REMEDY}"
    )
