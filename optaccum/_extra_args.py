"""Extra arguments: what may be passed to an update, brought into one form.

They are checked when the update is traced. What is known then stays a Python value, so that the
program need not ask.
"""

from collections.abc import Callable, Iterable, Mapping
import difflib
import functools
import inspect
import math
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from optaccum._mesh_axes import unreduced
from optaccum._metrics import check_own_names
from optaccum._state import key_of
from optaccum._validate import (
    Options,
    check_denominator,
    check_names,
    check_scalar,
    describe,
    leaf_name,
)
from optaccum._window import SMALLEST

OURS = "weight", "release"
POSITIONAL = "updates", "grads", "state", "params"
# Optax's own: given to every optimizer alike, so that one can be exchanged for another.
OPTAX = "value", "grad", "value_fn"


def named_by(update: Any) -> frozenset[str]:
    """Returns the names of arguments that the signature of an `update` shows."""
    return frozenset(inspect.signature(update).parameters)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Returns the one of `names` that somebody who typed `name` may have meant."""
    return next(iter(difflib.get_close_matches(name.lower(), [*names], 1, 0.8)), None)


def check_extra_args(
    options: Options, weight: Any, release: Any, extra_args: dict[str, Any], *, alone: bool
) -> tuple[float | jax.Array | None, bool | jax.Array | None]:
    """Returns `weight` and `release`, each in one form."""
    check_spelling(extra_args, {*options.inner_args, *options.averages, *options.window_args})
    check_denominator("`weight`", options.needs_weight and weight is None)
    weight = None if weight is None else as_weight("`weight`", weight)
    return weight, as_release(release, alone=alone)


def check_spelling(extra_args: Iterable[str], others: Iterable[str]) -> None:
    """Raises where an extra argument is almost one of ours, and none of the `others`.

    Most transformations of Optax take any extra argument and say nothing.
    """
    for name in set(extra_args).difference(others):
        meant = nearest(name, OURS)
        if meant and name.lower().startswith(meant[0]):  # `height` is a word of its own
            raise TypeError(
                f"`{name}` is no argument of `accumulate`; did you mean `{meant}`? (If it is one "
                "of `inner`, wrap `inner` so that the signature of its `update` names it)"
            )


def check_named(
    average_args: Any, metrics: Any, window_args: Any
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Returns the names in each, and a tree like each argument that is to be averaged."""
    found: dict[str, tuple[str, ...]] = {}
    named = {"average_args": average_args, "metrics": metrics, "window_args": window_args}
    for owner, names in named.items():
        if owner == "average_args" and isinstance(names, Mapping):
            names = tuple(names)
        names = check_names(f"`{owner}`", names, "a tuple of names like ('value',)")
        if reserved := {*OURS, *POSITIONAL}.intersection(names):
            raise ValueError(
                f"`{owner}` cannot name {min(reserved)!r}: `accumulate` uses that argument itself"
            )
        for other, others in found.items():
            if both := set(names).intersection(others):
                raise ValueError(
                    f"{min(both)!r} is named by `{other}` and by `{owner}`; name it in one: "
                    "`inner` gets means of `average_args`, `window_args` as they are, and no "
                    "`metrics`"
                )
        found[owner] = names
    check_own_names(found["metrics"])
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    averages: dict[str, Any] = dict.fromkeys((*found["average_args"], *found["metrics"]), scalar)
    if isinstance(average_args, Mapping):
        averages |= average_args
        for name, like in average_args.items():
            _check_floating(f"`average_args[{name!r}]`", like)
    elif "grad" in found["average_args"]:
        averages["grad"] = None
    return found["average_args"], found["metrics"], found["window_args"], averages


def _check_floating(name: str, tree: Any) -> None:
    """Raises unless all leaves of a tree are floating, so that they have a mean."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        known = isinstance(x, jax.ShapeDtypeStruct) or _is_data(x)
        if not (known and jnp.issubdtype(jnp.result_type(x), jnp.inexact)):
            raise TypeError(
                f"leaf {leaf_name(path)} of {name} must be floating-point, an array or a "
                f"jax.ShapeDtypeStruct like those to average, got {describe(x)}"
            )


def check_fields(owner: type, fields: Iterable[str], update: Any, names: Iterable[str]) -> None:
    """Raises where one of `names`, given to a train state, is almost a field or an argument.

    Other names are for links of `update`, which do not show in its signature. Optax's
    transformations ignore what they do not know, so one field has to be known by its name:
    without `batch_stats` BatchNorm would never move.
    """
    known = {*fields, *OPTAX, *named_by(update)}
    for name in sorted(set(names).difference(known, OURS)):
        if name == "batch_stats":
            raise TypeError(
                f"`{name}` is no field of {owner.__name__}; to keep it in the state, subclass it, "
                f"`class State({owner.__name__}): {name}: Any`"
            )
        if meant := nearest(name, known.difference(OURS, POSITIONAL)):
            raise TypeError(
                f"`{name}` is no field of {owner.__name__} and no argument of its `tx`, did you "
                f"mean `{meant}`?"
            )


def _is_data(value: Any) -> bool:
    kinds = jax.Array | np.ndarray | np.generic | int | float | complex
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(x, kinds) for x in leaves)


def averaged(options: Options, extra_args: dict[str, Any], sums: Any) -> dict[str, Any]:
    """Returns the extra arguments to average, trees of floating arrays like their `sums`."""
    values = {}
    for name in options.averages:
        owner = "metrics" if name in options.metrics else "average_args"
        if name not in extra_args:
            raise ValueError(
                f"`{owner}` names {name!r}, but the update was called without it; pass `{name}=` "
                "with every microbatch"
            )
        key, value = key_of(name), extra_args[name]
        title = f"`{name}` (one of `{owner}`)"
        if getattr(sums[key], "shape", None) != ():
            values[key] = _as_terms(title, value, sums[key])
            continue
        check_scalar(title, value, jnp.floating, jnp.integer)
        dtype = jnp.result_type(value)
        floating = jnp.issubdtype(dtype, jnp.floating)
        values[key] = jnp.asarray(value, dtype if floating else jnp.float32)
    return values


def _as_terms(name: str, tree: Any, sums: Any) -> Any:
    """Returns a tree of arrays to add to `sums`; a None adds nothing."""

    def term(path, x, s):
        if x is None:
            return None
        dtype = jnp.result_type(x) if _is_data(x) and jnp.shape(x) == s.shape else None
        floating = jnp.floating if jnp.issubdtype(s.dtype, jnp.floating) else jnp.inexact
        if dtype is None or not jnp.issubdtype(dtype, floating):
            raise ValueError(
                f"leaf {leaf_name(path)} of {name} must fit {describe(s)}, got {describe(x)}"
            )
        if waiting := unreduced(x):
            raise TypeError(
                f"leaf {leaf_name(path)} of {name} waits to be reduced over {sorted(waiting)}; "
                "reduce it, or, if it is the gradient, do not name it: `inner` is given the "
                "window's"
            )
        return jnp.asarray(x)

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    try:
        expected = structure.flatten_up_to(sums)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the tree structure {jax.tree.structure(sums)}, got "
            f"{jax.tree.structure(tree)}"
        ) from error
    return structure.unflatten(
        term(path, x, s) for (path, x), s in zip(leaves, expected, strict=True)
    )


def for_inner(
    options: Options, extra_args: dict[str, Any], grads: Any, *, alone: bool
) -> dict[str, Any]:
    """Returns the extra arguments that `inner` gets, but for the means of a window.

    Args:
        options: of the transformation.
        extra_args: all that were passed.
        grads: of the microbatch; those of the window, for which they stand, have their shapes.
        alone: whether every window has one microbatch, for which all of them stand.
    """
    args = {name: x for name, x in extra_args.items() if name not in options.metrics}
    if alone:
        return args
    named = {*options.average_args, *options.window_args}
    if replaces_grad(options, args):
        args["grad"] = grads
        named.add("grad")
    others = sorted(set(args) - named)
    if others and "value_fn" in options.window_args:
        raise ValueError(
            f"`{others[0]}` is that of one microbatch, but a line search compares it with the "
            "`value_fn` of the window (`window_args`), or calls that with it; name it too, in "
            "`average_args`, or in `window_args` if it is the window's"
        )
    for name in others:
        if _is_function(args[name]):
            args[name] = _of_one_microbatch(name, args[name])
    return args


def replaces_grad(options: Options, args: Mapping[str, Any]) -> bool:
    """Returns whether `grad` is the gradient that `inner` gets as updates, by Optax's protocol."""
    named = "grad" in (*options.average_args, *options.window_args)
    return args.get("grad") is not None and not named and not _is_function(args["grad"])


def _is_function(value: Any) -> bool:
    """Returns whether a value is there to be called: gradients can be modules with a `__call__`."""
    is_tree = _is_data(value) and not isinstance(value, jax.tree_util.Partial)
    return callable(value) and not is_tree and not isinstance(value, type)


def _of_one_microbatch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that raises, but only where `inner` calls it: most optimizers do not."""

    @functools.wraps(function)  # a line search reads its signature
    def refuse(*args, **kwargs):
        raise TypeError(
            f"`inner` calls `{name}`, but steps for a window, for which a function of one "
            "microbatch cannot stand; take the gradient of the whole batch with "
            "optaccum.value_and_grad and step without `accumulate`, or pass a function of the "
            "whole window's data (or of no data) and say so: "
            f"`accumulate(..., window_args=({name!r},))`"
        )

    return refuse


def as_weight(name: str, weight: Any, dtype: Any = jnp.float32) -> float | jax.Array:
    """Returns a Python float, known now, in 0..2**64, or a `dtype`[] to judge later.

    A weight that is no weight is for the window to judge: where it is known, too, so that an eager
    loop and a jitted one do the same with it.
    """
    if export.is_symbolic_dim(weight):
        weight = jnp.asarray(weight)
    check_scalar(name, weight, jnp.floating, jnp.integer, jnp.bool_)
    if isinstance(weight, jax.Array):
        return weight.astype(dtype)
    try:
        weight = float(weight)
    except OverflowError:
        weight = math.inf if weight > 0 else -math.inf
    with np.errstate(over="ignore"):
        rounded = np.dtype(dtype).type(weight)
    if not 0 <= rounded <= 2.0**64:
        return jnp.asarray(rounded)
    return float(rounded) if rounded >= SMALLEST else 0.0


def as_release(release: Any, *, alone: bool) -> bool | jax.Array | None:
    """Returns None, a Python bool (known now) or a bool[].

    Args:
        release: what was passed.
        alone: whether every window has one microbatch, which cannot be held open.
    """
    if release is None:
        return None
    check_scalar("`release`", release, jnp.bool_)
    release = release if isinstance(release, jax.Array) else bool(release)
    if alone and release is not True:
        raise ValueError(
            "`release` must be None or True where `every_k` is 1, which has no accumulator to hold "
            f"a gradient in, got {release}; build with every_k >= 2 (`release` then overrides the "
            "count)"
        )
    return release
