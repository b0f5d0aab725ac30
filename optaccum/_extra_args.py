"""Extra arguments of an update: `weight`, `release`, what is averaged, and what `inner` gets.

They are checked when the update is traced. What is known then stays a Python value, so that the
program need not ask.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from optaccum import _reductions, _window
from optaccum._mesh_axes import unreduced
from optaccum._metrics import check_own_names
from optaccum._spelling import OURS, POSITIONAL, check_spelling
from optaccum._trees import ARRAYS, is_none
from optaccum._validate import check_names, check_scalar, describe, leaf_name
from optaccum._window import SMALLEST, Sums


def as_weight(name: str, weight: Any, dtype: Any = jnp.float32) -> float | jax.Array:
    """Returns a float in 0..2**64 if it is known at trace time, else a `dtype`[] to judge later.

    A known weight that is not valid is for the window to judge, too, so that an eager loop and a
    jitted one do the same with it.
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


def as_release(release: Any) -> bool | jax.Array | None:
    """Returns None, a Python bool if it is known at trace time, or a bool[]."""
    if release is None:
        return None
    check_scalar("`release`", release, jnp.bool_)
    return release if isinstance(release, jax.Array) else bool(release)


@dataclasses.dataclass(frozen=True)
class ExtraArgs:
    """Which extra arguments are averaged, and which `inner` gets."""

    averages: dict[str, Any]  # a tree like each of `average_args` and `metrics`; None: parameters
    metrics: dict[str, str]  # reductions of what `inner` does not get
    window_args: tuple[str, ...]
    inner_args: frozenset[str]  # names in the signature of `inner`

    @classmethod
    def named(
        cls, average_args: Any, metrics: Any, window_args: Any, inner_args: frozenset[str]
    ) -> "ExtraArgs":
        """Returns the checked options of `accumulate`."""
        found: dict[str, tuple[str, ...]] = {}
        reductions, likes = _reductions.check_metrics(metrics)
        options = {"average_args": average_args, "metrics": metrics, "window_args": window_args}
        for option, names in options.items():
            if isinstance(names, Mapping):
                names = tuple(names)
            names = check_names(f"`{option}`", names, "a tuple of names like ('value',)")
            if reserved := {*OURS, *POSITIONAL}.intersection(names):
                raise ValueError(
                    f"`{option}` cannot name {min(reserved)!r}: `accumulate` uses that argument "
                    "itself"
                )
            for other, others in found.items():
                if both := set(names).intersection(others):
                    raise ValueError(
                        f"{min(both)!r} is named by `{other}` and by `{option}`; name it in one: "
                        "`inner` gets means of `average_args`, `window_args` as they are, and no "
                        "`metrics`"
                    )
            found[option] = names
        check_own_names(found["metrics"])
        averages: dict[str, Any] = dict.fromkeys(found["average_args"], _reductions.SCALAR) | likes
        if isinstance(average_args, Mapping):
            averages |= average_args
            for name, like in average_args.items():
                _check_floating(f"`average_args[{name!r}]`", like)
        elif "grad" in found["average_args"]:
            averages["grad"] = None
        return cls(averages, reductions, found["window_args"], inner_args)

    @property
    def keys(self) -> dict[str, str]:
        """The keys in `arg_sums` of all that is averaged."""
        return {
            name: _reductions.key_of(name, self.metrics.get(name, _reductions.AVERAGE))
            for name in self.averages
        }

    @property
    def average_args(self) -> list[str]:
        """Names of averages that `inner` gets."""
        return [name for name in self.averages if name not in self.metrics]

    def with_value(self, extra_args: dict[str, Any], loss: Any) -> dict[str, Any]:
        """Returns the arguments with `value`, the loss, if it is asked for and not given."""
        asked = "value" in self.averages or "value" in self.inner_args
        return {"value": loss} | extra_args if asked else extra_args

    def open_sums(self, params: Any, dtypes: Any) -> dict[str, Any]:
        """Returns the `arg_sums` of a fresh state."""
        return {
            key: _window.open_sums(params, dtypes)
            if self.averages[name] is None
            else _reductions.open_sums(_reductions.of_key(key)[0], self.averages[name])
            for name, key in self.keys.items()
        }

    def check_state(self, arg_sums: Any) -> None:
        """Raises unless a state has the sums of these averages."""
        names, wanted = tuple(arg_sums), self.keys
        if sorted(names) != sorted(wanted.values()):
            raise ValueError(
                f"the optimizer state has averages of {names}, but `average_args` and `metrics` "
                f"name {tuple(wanted)}; between two windows, go on with "
                "`state._replace(arg_sums=tx.init(params).arg_sums)`"
            )

    def averaged(self, extra_args: dict[str, Any], sums: Any) -> dict[str, Any]:
        """Returns the arguments to average, trees of floating arrays like their `sums`."""
        check_spelling(extra_args, {*self.inner_args, *self.averages, *self.window_args})
        values = {}
        for name in self.averages:
            owner = "metrics" if name in self.metrics else "average_args"
            if name not in extra_args:
                raise ValueError(
                    f"`{owner}` names {name!r}, but the update was called without it; pass "
                    f"`{name}=` with every microbatch"
                )
            key, value = self.keys[name], extra_args[name]
            title = f"`{name}` (one of `{owner}`)"
            if owner == "metrics":
                value = _reductions.as_floats(title, self.metrics[name], value)
            if getattr(sums[key], "shape", None) != ():
                values[key] = _as_terms(title, value, sums[key])
                continue
            check_scalar(title, value, jnp.floating, jnp.integer)
            dtype = jnp.result_type(value)
            floating = jnp.issubdtype(dtype, jnp.floating)
            values[key] = jnp.asarray(value, dtype if floating else jnp.float32)
        return values

    def for_inner(self, extra_args: dict[str, Any]) -> dict[str, Any]:
        """Returns what `inner` gets for a window of one microbatch."""
        return {name: x for name, x in extra_args.items() if name not in self.metrics}

    def for_window(self, extra_args: dict[str, Any], grads: Any) -> dict[str, Any]:
        """Returns what `inner` gets, but for the means of the window.

        Args:
            extra_args: What the microbatch brings that closes it.
            grads: Its gradients, which stand for the window's until these are known.
        """
        args = self.for_inner(extra_args)
        named = {*self.average_args, *self.window_args}
        if self._is_gradient(args.get("grad")):
            args["grad"] = grads
            named.add("grad")
        others = sorted(set(args) - named)
        if others and "value_fn" in self.window_args:
            raise ValueError(
                f"`{others[0]}` belongs to one microbatch, but a line search uses it with the "
                "`value_fn` of the window (`window_args`); name it in `average_args`, or in "
                "`window_args` if it belongs to the window"
            )
        for name in others:
            if _is_function(args[name]):
                args[name] = _of_one_microbatch(name, args[name])
        return args

    def for_means(self, sums: Sums) -> Sums:
        """Returns the sums of which `inner` gets the means."""
        keys = [self.keys[name] for name in self.average_args]
        return sums._replace(args={key: sums.args[key] for key in keys})

    def with_means(self, args: dict[str, Any], means: dict[str, Any], mean: Any) -> dict[str, Any]:
        """Returns the arguments of `inner` with the means of a released window in them."""
        args = args | {name: means[self.keys[name]] for name in self.average_args}
        return args | {"grad": mean} if self._is_gradient(args.get("grad")) else args

    def _is_gradient(self, grad: Any) -> bool:
        """Returns whether `grad` is what `inner` gets as updates, by Optax's protocol."""
        named = "grad" in (*self.average_args, *self.window_args)
        return grad is not None and not named and not _is_function(grad)


def _check_floating(name: str, tree: Any) -> None:
    """Raises unless all leaves of a tree are floating, so that they have a mean."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        known = isinstance(x, jax.ShapeDtypeStruct) or _is_data(x)
        if not (known and jnp.issubdtype(jnp.result_type(x), jnp.inexact)):
            raise TypeError(
                f"leaf {leaf_name(path)} of {name} must be floating-point, an array or a "
                f"jax.ShapeDtypeStruct like those to average, got {describe(x)}"
            )


def _is_data(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(x, ARRAYS) for x in leaves)


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
        if axes := unreduced(x):
            raise TypeError(
                f"leaf {leaf_name(path)} of {name} is unreduced over {sorted(axes)}; reduce it, "
                "or, if it is the gradient, do not name it: `inner` is given the window's"
            )
        return jnp.asarray(x)

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    try:
        expected = structure.flatten_up_to(sums)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the tree structure {jax.tree.structure(sums)}, got "
            f"{jax.tree.structure(tree)}"
        ) from error
    terms = (term(path, x, s) for (path, x), s in zip(leaves, expected, strict=True))
    return structure.unflatten(terms)


def _is_function(value: Any) -> bool:
    """Returns whether a value is there to be called: gradients can be modules with a `__call__`."""
    is_tree = _is_data(value) and not isinstance(value, jax.tree_util.Partial)
    return callable(value) and not is_tree and not isinstance(value, type)


def _of_one_microbatch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that raises if `inner` calls it. Most optimizers do not."""

    @functools.wraps(function)  # a line search reads its signature
    def refuse(*args, **kwargs):
        raise TypeError(
            f"`inner` calls `{name}`, which is a function of one microbatch, but steps for a "
            "window; take the gradient of the whole batch with optaccum.value_and_grad and step "
            "without `accumulate`, or pass a function of the whole window's data (or of no data) "
            f"and say so: `accumulate(..., window_args=({name!r},))`"
        )

    return refuse
