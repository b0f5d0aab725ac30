"""Extra arguments: what may be passed to an update, brought into one form.

They are checked when the update is traced. What is known then stays a Python value, so that the
program need not ask.
"""

from collections.abc import Iterable
import difflib
import functools
import inspect
import math
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from optaccum._check.arguments import Options, check_denominator, check_names, check_scalar
from optaccum._check.metrics import check_own_names
from optaccum._core.window import SMALLEST

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
) -> tuple[float | jax.Array | None, bool | jax.Array | None, dict[str, jax.Array]]:
    """Returns `weight`, `release` and the arguments to average, each in one form."""
    known = *options.inner_args, *options.average_args, *options.metrics
    check_spelling(extra_args, known)
    check_denominator("`weight`", options.needs_weight and weight is None)
    weight = None if weight is None else as_weight("`weight`", weight)
    release = as_release(release, alone=alone)
    return weight, release, averaged(options.average_args, options.metrics, extra_args)


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


def check_averages(average_args: Any, metrics: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the averaged extra arguments, those for `inner` and the others."""
    found = []
    for owner, names in (("average_args", average_args), ("metrics", metrics)):
        names = check_names(f"`{owner}`", names, "a tuple of names like ('value',)")
        if reserved := {*OURS, *POSITIONAL}.intersection(names):
            raise ValueError(
                f"`{owner}` cannot name {min(reserved)!r}: `accumulate` uses that argument itself"
            )
        found.append(names)
    if both := set(found[0]).intersection(found[1]):
        raise ValueError(
            f"{min(both)!r} is named by `average_args` and by `metrics`; `inner` gets the first, "
            "and not the second: name it in one"
        )
    check_own_names(found[1])
    return found[0], found[1]


def check_read(
    tx: Any,
    microbatch: tuple,
    extra_args: dict[str, Any],
    owner: type,
    fields: Iterable[str],
) -> None:
    """Raises where an extra argument is read by nothing in a transformation, and so is a slip.

    What a transformation reads shows in its program: most of Optax's take any argument, also those
    that none of their links names. Arguments that are no arrays, such as functions, cannot be seen
    there; they are refused only where they are almost a field.

    Args:
        tx: the transformation.
        microbatch: gradients, state and parameters.
        extra_args: all extra arguments.
        owner: the train state that they were passed to.
        fields: the names of its fields.
    """
    unknown = set(extra_args).difference(OURS, OPTAX, named_by(tx.update))
    if not unknown:
        return
    arrays = {name: x for name, x in extra_args.items() if name != "release" and _is_data(x)}
    given = {name: extra_args[name] for name in unknown.difference(arrays)}
    try:
        program = jax.make_jaxpr(functools.partial(tx.update, **given) if given else tx.update)(
            *microbatch, **arrays
        ).jaxpr
    except jax.errors.ConcretizationTypeError:  # a transformation that cannot be traced
        return
    read = {id(x) for x in program.outvars}.union(*(map(id, e.invars) for e in program.eqns))
    leaves, structure = jax.tree.flatten(arrays)
    flags = [id(x) in read for x in program.invars[len(program.invars) - len(leaves) :]]
    for name, found in jax.tree.unflatten(structure, flags).items():
        if any(jax.tree.leaves(found)):
            unknown.discard(name)
    for name in sorted(unknown):
        meant = nearest(name, [*fields, *OURS])
        if name in arrays or meant:
            hint = f", did you mean `{meant}`?" if meant else ""
            raise TypeError(
                f"`{name}` is no field of {owner.__name__}, and nothing in `tx` reads it{hint}; to "
                f"keep it in the state, subclass it, `class State({owner.__name__}): {name}: Any`"
            )


def _is_data(value: Any) -> bool:
    kinds = jax.Array | np.ndarray | np.generic | int | float | complex
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(x, kinds) for x in leaves)


def averaged(
    average_args: Iterable[str], metrics: Iterable[str], extra_args: dict[str, Any]
) -> dict[str, jax.Array]:
    """Returns the extra arguments to average, as floating scalars."""
    owners = dict.fromkeys(metrics, "metrics") | dict.fromkeys(average_args, "average_args")
    values = {}
    for name, owner in owners.items():
        if name not in extra_args:
            raise ValueError(
                f"`{owner}` names {name!r}, but the update was called without it; pass `{name}=` "
                "with every microbatch"
            )
        value = extra_args[name]
        check_scalar(f"`{name}` (one of `{owner}`)", value, jnp.floating, jnp.integer)
        dtype = jnp.result_type(value)
        floating = jnp.issubdtype(dtype, jnp.floating)
        values[name] = jnp.asarray(value, dtype if floating else jnp.float32)
    return values


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
