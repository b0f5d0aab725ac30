"""Arguments: what may be passed to a factory, brought into one form."""

from collections.abc import Callable
import contextlib
import inspect
import operator
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import optax

from optaccum._mesh_axes import unreduced

INT32_MAX = np.iinfo(np.int32).max


class Options(NamedTuple):
    """The checked arguments of `accumulate` that decide what a microbatch has to look like.

    The fields are named as its arguments are, but for these.

    Attributes:
        averages: for each of `average_args` and `metrics` a tree like it; None for one like the
            parameters.
        inner_args: names of arguments that `inner` shows.
        keeps_sums: whether a state has an accumulator.
        needs_weight: whether a weight must be given.
    """

    every_k: int | jax.Array | Callable[[jax.Array], Any]
    average_args: tuple[str, ...]
    metrics: tuple[str, ...]
    window_args: tuple[str, ...]
    averages: dict[str, Any]
    reduce_axes: tuple[str, ...]
    inner_args: frozenset[str]
    keeps_sums: bool
    needs_weight: bool


def leaf_name(path: Any) -> str:
    """Returns what an error calls the leaf at `path`."""
    return jax.tree_util.keystr(path) or "(the only leaf)"


def describe(value: Any) -> str:
    """Returns what an error says of a value: dtype and shape, or the value and its type."""
    if isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    return f"{value!r} of type {type(value).__name__}"


def check_function(name: str, function: Any, example: str = "") -> None:
    """Raises unless `function` can be called."""
    if not callable(function):
        raise TypeError(f"{name} must be a function{example}, got {describe(function)}")


def check_flag(name: str, flag: Any) -> None:
    """Raises unless `flag` is True or False: the truth of other values may be a slip."""
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {describe(flag)}")


def check_scalar(name: str, value: Any, *kinds: Any, remedy: str = "") -> None:
    """Raises unless `value` is a scalar of one of the kinds of dtypes."""
    known = isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex)
    fits = known and jnp.shape(value) == ()
    if not (fits and any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds)):
        wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise TypeError(f"{name} must be a scalar ({wanted}), got {describe(value)}{remedy}")


def check_count(name: str, count: Any, others: str = "") -> int:
    """Returns `count` as a Python int in 1..2**31 - 1; `others` says what else it may be."""
    try:
        if isinstance(count, bool | np.bool_):
            raise TypeError
        count = operator.index(count)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer >= 1{others}, got {count!r} of type {type(count).__name__}"
        ) from None
    if not 1 <= count <= INT32_MAX:
        bound = ">= 1" if count < 1 else f"<= {INT32_MAX}"
        raise ValueError(f"{name} must be {bound}, got {count}")
    return count


def check_names(name: str, names: Any, wanted: str) -> tuple[str, ...]:
    """Returns `names` as a tuple of strings."""
    if not isinstance(names, tuple | list) or not all(isinstance(x, str) for x in names):
        raise TypeError(f"{name} must be {wanted}, got {names!r}")
    return tuple(dict.fromkeys(names))


def check_argnums(name: str, argnums: Any) -> tuple[int, ...]:
    """Returns `argnums`, an integer or a sequence of them, as a tuple of Python ints."""
    several = argnums if isinstance(argnums, tuple | list) else (argnums,)
    try:
        if any(isinstance(argnum, bool | np.bool_) for argnum in several):
            raise TypeError
        return tuple(map(operator.index, several))
    except TypeError:
        raise TypeError(
            f"{name} must be an integer or a tuple of integers, got {argnums!r}"
        ) from None


def check_every_k(every_k: Any) -> int | jax.Array | Callable[[jax.Array], Any]:
    """Returns `every_k` as a Python int >= 1, an integer `jax.Array` of shape [], or a callable."""
    if is_transformation(every_k):
        raise TypeError(
            "`every_k` comes first and the optimizer second, unlike in optax.MultiSteps: "
            "accumulate(every_k, optimizer)"
        )
    if callable(every_k):
        return every_k
    if isinstance(every_k, jax.Array):
        check_scalar("`every_k`", every_k, jnp.integer)
        if not isinstance(every_k, Tracer):
            check_count("`every_k`", int(every_k))
        return every_k
    others = ", an integer scalar array or a function of the gradient step"
    return check_count("`every_k`", every_k, others)


def check_loss_reduction(reduction: Any) -> str:
    """Returns `loss_reduction`, if it is one."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(
            f"`loss_reduction` must be 'mean' or 'sum', got {reduction!r}; it says what the loss "
            "is of the examples or tokens that `weight` counts"
        )
    return reduction


def check_decay(name: str, decay: Any) -> float | jax.Array:
    """Returns a factor in 0..1, without 1: a Python float, or an f32[] where it may be traced."""
    check_scalar(name, decay, jnp.floating, jnp.integer)
    if not isinstance(decay, Tracer) and not 0 <= float(decay) < 1:
        raise ValueError(f"{name} must be >= 0 and < 1, got {decay}")
    return decay.astype(jnp.float32) if isinstance(decay, jax.Array) else float(decay)


def is_transformation(tx: Any) -> bool:
    """Returns whether `tx` has the `init` and `update` of a transformation."""
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))


def check_transformation(name: str, tx: Any) -> None:
    """Raises unless `tx` is a transformation."""
    if not is_transformation(tx):
        hint = "; call it to build the transformation" if callable(tx) else ""
        raise TypeError(
            f"{name} must be an optax.GradientTransformation such as optax.adam(1e-3), got "
            f"{tx!r} of type {type(tx).__name__}{hint}"
        )


def as_inner(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the inner optimizer, with extra arguments, and with its states checked.

    `optax.with_extra_args_support` drops extra arguments for all but one class, `optax.MultiSteps`
    included.
    """
    check_transformation("`inner`", tx)
    parameters = inspect.signature(tx.update).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        tx = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        updates, new = tx.update(updates, state, params, **extra_args)
        check_same_state("inner", new, state)
        return updates, new

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def as_judge(should_skip_update_fn: Any) -> Callable[..., tuple[jax.Array, Any]] | None:
    """Returns a function that judges a microbatch: whether to skip it, bool[], and the report."""
    if should_skip_update_fn is None:
        return None
    check_function(
        "`should_skip_update_fn`", should_skip_update_fn, " such as optax.skip_not_finite"
    )

    def judge(grads, gradient_step, params, last_report=None):
        with _explain_judging(grads):
            result = should_skip_update_fn(grads, gradient_step, params)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "`should_skip_update_fn` must return a pair (bool[], report), such as "
                f"`(jnp.any(bad), ())`, got {result!r}"
            )
        should_skip, report = result
        check_scalar("the first result of `should_skip_update_fn`", should_skip, jnp.bool_)
        if last_report is not None:
            if jax.tree.structure(report) != jax.tree.structure(last_report):
                raise ValueError(
                    "`should_skip_update_fn` reports a tree of the structure "
                    f"{jax.tree.structure(report)}, but the optimizer state keeps one of "
                    f"{jax.tree.structure(last_report)}: it was made with another function, or "
                    "with none; go on with "
                    "`state._replace(skip_state=tx.init(params).skip_state)`"
                )
            check_same_state("should_skip_update_fn", report, last_report)
        return jnp.asarray(should_skip), report

    return judge


@contextlib.contextmanager
def _explain_judging(grads: Any) -> Any:
    """Says why `should_skip_update_fn` failed, where no device has the gradients whole."""
    try:
        yield
    except Exception as error:
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if axes := unreduced(g):
                raise TypeError(
                    f"`should_skip_update_fn` failed on gradients such as leaf {leaf_name(path)}, "
                    f"which wait to be reduced over {sorted(axes)}: of these only sums and "
                    "multiples can be taken, as optaccum.skip_not_finite does"
                ) from error
        raise


def check_same_state(name: str, tree: Any, like: Any) -> None:
    """Raises unless a state that `name` returned has the structure that it began with."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"`{name}` returned a state of the tree structure {jax.tree.structure(tree)}, but "
            f"began with {jax.tree.structure(like)}; the structure of a state cannot change"
        )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, x), y in zip(leaves, jax.tree.leaves(like), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"`{name}` returned a state whose leaf {leaf_name(path)} has the shape "
                f"{jnp.shape(x)}, but began with {jnp.shape(y)}; a state cannot change its shapes"
            )
        if kind(x) > kind(y):
            raise TypeError(
                f"`{name}` returned a state whose leaf {leaf_name(path)} is "
                f"{jnp.result_type(x)}, but began as {jnp.result_type(y)}, to which it would be "
                f"cut off; begin with {jnp.result_type(x)}"
            )


def kind(x: Any) -> int:
    """Returns the place of a value's dtype among booleans, integers, real and complex numbers."""
    kinds = jax.dtypes.prng_key, jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating
    return [jnp.issubdtype(jnp.result_type(x), k) for k in kinds].index(True)


def check_denominator(name: str, is_missing: bool) -> None:
    """Raises where sums of losses have nothing that they could be divided by."""
    if is_missing:
        raise ValueError(
            f"`loss_reduction` 'sum' needs {name}, the number of examples or tokens in each "
            "microbatch: gradients of sums are divided by the sum of the weights"
        )


def check_accumulator_dtype(dtype: Any) -> jnp.dtype | None:
    """Returns `dtype` as a floating or complex `jnp.dtype`, or None."""
    if dtype is None:
        return None
    try:
        result = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"`accumulator_dtype` {dtype!r} is not a dtype: {error}") from None
    if not jnp.issubdtype(result, jnp.inexact):
        raise TypeError(
            f"`accumulator_dtype` must be floating-point or complex, got {result}; leave it None "
            "for each gradient's own dtype promoted to at least float32"
        )
    if jax.dtypes.canonicalize_dtype(result) != result:
        raise ValueError(
            f"`accumulator_dtype` {result} needs 64-bit types; enable them with "
            "jax.config.update('jax_enable_x64', True)"
        )
    return result


def as_carry_and_aux(aux: Any) -> tuple[Any, Any]:
    """Returns what `fun` returned beside its loss, where it hands on a carry, as a pair."""
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise TypeError(
            "`fun` must return `(loss, (carry, aux))` with `carry_argnum`, where aux may be (), "
            f"got {describe(aux)} for `(carry, aux)`"
        )
    return aux
