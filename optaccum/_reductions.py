"""Metrics: how the values of a window's microbatches become one.

The key of a metric in `arg_sums` tells, so that a state can be read without its optimizer.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaccum import _devices, _window
from optaccum._trees import ARRAYS
from optaccum._validate import check_names, describe
from optaccum._window import Microbatch, Sums

AVERAGE, MEAN, SUM, MAX, RATIO = "average", "mean", "sum", "max", "ratio"
# Keys are not names, since `optax.value_and_grad_from_state` looks for the one "value" in a state.
# AVERAGE is MEAN for a scalar metric and for `average_args`, whose trees the log leaves out.
PREFIXES = {
    AVERAGE: "sum_of_",
    MEAN: "mean_of_",
    SUM: "total_of_",
    MAX: "max_of_",
    RATIO: "ratio_of_",
}
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def key_of(name: str, reduction: str) -> str:
    """Returns the key in `arg_sums` of an argument that is reduced so."""
    return PREFIXES[reduction] + name


def of_key(key: str) -> tuple[str, str]:
    """Returns the reduction and the name of an argument."""
    found = (reduction for reduction, prefix in PREFIXES.items() if key.startswith(prefix))
    reduction = next(found, AVERAGE)
    return reduction, key.removeprefix(PREFIXES[reduction])


def names(arg_sums: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of the arguments that a state keeps."""
    return tuple(of_key(key)[1] for key in arg_sums)


def check_metrics(metrics: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns reductions by name, and trees like what is reduced."""
    if not isinstance(metrics, Mapping):
        given = check_names("`metrics`", metrics, "a tuple of names like ('loss',), or a dict")
        return dict.fromkeys(given, AVERAGE), dict.fromkeys(given, SCALAR)
    reductions, likes = {}, {}
    for name, metric in metrics.items():
        reduction, like = (
            metric if isinstance(metric, tuple) and len(metric) == 2 else (metric, None)
        )
        if not isinstance(reduction, str) or reduction not in (MEAN, SUM, MAX, RATIO):
            raise ValueError(
                f"`metrics[{name!r}]` must be 'mean', 'sum', 'max' or 'ratio', or a pair of one "
                f"and a tree like the metric, ('sum', jax.ShapeDtypeStruct((8,), 'float32')), got "
                f"{metric!r}"
            )
        reductions[name] = AVERAGE if reduction == MEAN and like is None else reduction
        like = SCALAR if like is None else jax.tree.map(_as_float, like)
        likes[name] = (like, like) if reduction == RATIO else like
    return reductions, likes


def _as_float(x: Any) -> Any:
    """Returns the type of the sum of a leaf; counts are summed as float32."""
    dtype = jnp.result_type(x)
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.promote_types(dtype, jnp.float32))


def as_floats(name: str, reduction: str, value: Any) -> Any:
    """Returns the value of a metric with counts as floats, or raises if it is half a ratio."""
    if reduction == RATIO and not (isinstance(value, tuple | list) and len(value) == 2):
        raise TypeError(
            f"{name} is a ratio; pass a pair, (numerator, denominator), got {describe(value)}"
        )
    whole = jnp.bool_, jnp.integer
    return jax.tree.map(
        lambda x: (
            jnp.asarray(x, jnp.float32)
            if isinstance(x, ARRAYS) and any(jnp.issubdtype(jnp.result_type(x), k) for k in whole)
            else x
        ),
        tuple(value) if reduction == RATIO else value,
    )


def open_sums(reduction: str, like: Any) -> Any:
    """Returns what a window begins with."""
    zeros = _window.open_sums(like)
    return jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), zeros) if reduction == MAX else zeros


def add(sums: dict[str, Any], values: dict[str, Any], microbatch: Microbatch) -> dict[str, Any]:
    """Returns the `arg_sums` with a microbatch."""
    unweighted = microbatch._replace(summed=True)
    how = {SUM: unweighted, RATIO: unweighted, MAX: unweighted._replace(largest=True)}
    return {
        key: _window.add(sums[key], values[key], how.get(of_key(key)[0], microbatch))
        for key in sorted(sums)
    }


def add_to_first(
    arg_sums: dict[str, Any], values: dict[str, Any], microbatch: Microbatch
) -> dict[str, Any]:
    """Returns `arg_sums` of several devices, along a first axis, with a microbatch of all of them.

    The first device adds it. The others begin a window with nothing.
    """
    first = add(jax.tree.map(lambda x: x[0], arg_sums), values, microbatch)
    resets = jnp.logical_and(microbatch.opens, microbatch.counts)

    def leaf(nothing, x, new):
        return jnp.where(resets, nothing, x).at[0].set(new)

    return {
        key: jax.tree.map(
            functools.partial(leaf, -jnp.inf if of_key(key)[0] == MAX else 0), x, first[key]
        )
        for key, x in arg_sums.items()
    }


def of_all(sums: Sums) -> Sums:
    """Returns what a state keeps, of all devices."""
    maxima = {key: x for key, x in sums.args.items() if of_key(key)[0] == MAX}
    rest = {key: x for key, x in sums.args.items() if key not in maxima}
    maxima = _devices.largest_of_all(maxima, sums.weight)
    sums = _devices.of_all(sums._replace(args=rest))
    return sums._replace(args=sums.args | maxima)


def read(reduction: str, sums: Any, known: jax.Array, mean: Callable[[Any], Any]) -> Any:
    """Returns the value of a metric from its sums, 0 if no microbatch counts."""

    def ratio(x, by):
        return jnp.where(by != 0, x / jnp.where(by != 0, by, 1), 0).astype(x.dtype)

    if reduction == RATIO:
        return jax.tree.map(ratio, *sums)
    if reduction in (SUM, MAX):
        return jax.tree.map(lambda x: jnp.where(known, x, 0).astype(x.dtype), sums)
    return jax.tree.map(mean, sums)
