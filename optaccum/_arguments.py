"""What a caller may pass: checks arguments and brings them into one form.

Static arguments are checked when the transformation is built, extra arguments when an update is
traced. What is known at trace time stays a Python value, so that the program need not ask.
"""

from collections.abc import Callable
import inspect
import operator
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import optax

from optaccum._state import AccumulateState

_INT32_MAX = np.iinfo(np.int32).max
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def check_every_k(every_k: Any) -> int | jax.Array | Callable[[jax.Array], Any]:
    """Returns `every_k` as a Python int >= 1, an integer `jax.Array` of shape [], or a callable."""
    if callable(every_k):
        return every_k
    if isinstance(every_k, jax.Array):
        _check_scalar("`every_k`", every_k, jnp.integer)
        if not isinstance(every_k, Tracer):
            _check_at_least_one(int(every_k))
        return every_k
    others = ", an integer scalar array or a function of the gradient step"
    every_k = check_count("`every_k`", every_k, others)
    _check_at_least_one(every_k)
    return every_k


def check_count(name: str, count: Any, others: str = "") -> int:
    """Returns `count` as a Python int >= 1; `others` says what else the argument may be."""
    try:
        if isinstance(count, bool | np.bool_):
            raise TypeError
        count = operator.index(count)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer >= 1{others}, got {count!r} of type {type(count).__name__}"
        ) from None
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}")
    return count


def _check_at_least_one(every_k: int) -> None:
    if not 1 <= every_k <= _INT32_MAX:
        bound = ">= 1" if every_k < 1 else f"<= {_INT32_MAX}"
        raise ValueError(f"`every_k` must be {bound}, got {every_k}")


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


def positions(roles: dict[str, tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Returns the argnums of each role, none negative, if they name `count` arguments or fewer."""
    taken: dict[int, str] = {}
    for name, argnums in roles.items():
        for argnum in argnums:
            if not -count <= argnum < count:
                raise ValueError(
                    f"{name} names argument {argnum}, but the call has {count} positional "
                    "arguments; pass it by position, keyword arguments go to every microbatch whole"
                )
            if argnum % count in taken:
                raise ValueError(
                    f"{name} names argument {argnum}, which {taken[argnum % count]} names already; "
                    "an argument has one role"
                )
            taken[argnum % count] = name
    return [tuple(argnum % count for argnum in argnums) for argnums in roles.values()]


def window_length(
    every_k: int | jax.Array | Callable[[jax.Array], Any], gradient_step: jax.Array
) -> int | jax.Array:
    """Returns the length of the window that follows `gradient_step` releases."""
    if not callable(every_k):
        return every_k
    length = every_k(gradient_step)
    remedy = "; cast a float schedule with `.astype(int)`"
    _check_scalar("`every_k(gradient_step)`", length, jnp.integer, remedy=remedy)
    if isinstance(length, jax.Array):
        return length
    _check_at_least_one(int(length))
    return int(length)


def check_transformation(name: str, tx: Any) -> None:
    """Raises unless `tx` has the `init` and `update` of a transformation."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        hint = "; call it to build the transformation" if callable(tx) else ""
        raise TypeError(
            f"{name} must be an optax.GradientTransformation such as optax.adam(1e-3), got "
            f"{tx!r} of type {type(tx).__name__}{hint}"
        )


def with_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` accepting extra arguments, and handing them on if it takes any.

    `optax.with_extra_args_support` drops them for all but one class, `optax.MultiSteps` included.
    """
    parameters = inspect.signature(tx.update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def check_function(name: str, function: Any) -> None:
    """Raises unless `function` can be called."""
    if not callable(function):
        raise TypeError(f"{name} must be a function, got {describe(function)}")


def check_skip_fn(should_skip_update_fn: Any) -> None:
    """Raises unless `should_skip_update_fn` is None or can be called."""
    if should_skip_update_fn is not None and not callable(should_skip_update_fn):
        raise TypeError(
            "`should_skip_update_fn` must be a function such as optax.skip_not_finite, got "
            f"{should_skip_update_fn!r}"
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


def check_average_args(names: Any) -> tuple[str, ...]:
    """Returns the names of the averaged extra arguments as a tuple."""
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`average_args` must be a tuple of names like ('value',), got {names!r}")
    reserved = {"weight", "release"}.intersection(names)
    if reserved:
        raise ValueError(
            f"`average_args` cannot name {min(reserved)!r}: `accumulate` uses that argument itself"
        )
    return tuple(dict.fromkeys(names))


def averaged(names: tuple[str, ...], extra_args: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns the extra arguments to average, as floating scalars."""
    values = {}
    for name in names:
        if name not in extra_args:
            raise ValueError(
                f"`average_args` names {name!r}, but the update was called without it; pass "
                f"`{name}=` with every microbatch"
            )
        value = extra_args[name]
        _check_scalar(f"`{name}` (one of `average_args`)", value, jnp.floating, jnp.integer)
        dtype = jnp.result_type(value)
        floating = jnp.issubdtype(dtype, jnp.floating)
        values[name] = jnp.asarray(value, dtype if floating else jnp.float32)
    return values


def as_weight(weight: Any) -> float | jax.Array | None:
    """Returns None, a Python float (known now, finite and >= 0), or an f32[] to judge later."""
    return None if weight is None else check_weight("`weight`", weight)


def check_weight(name: str, weight: Any, dtype: Any = jnp.float32) -> float | jax.Array:
    """Returns a Python float (known now, finite and >= 0), or a `dtype`[] to judge later."""
    _check_scalar(name, weight, jnp.floating, jnp.integer, jnp.bool_)
    if isinstance(weight, jax.Array):
        return weight.astype(dtype)
    if not 0 <= weight <= _FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32 and >= 0, got {weight!r}")
    return float(np.dtype(dtype).type(weight))


def as_release(release: Any) -> bool | jax.Array | None:
    """Returns None, a Python bool (known now) or a bool[]."""
    if release is None:
        return None
    _check_scalar("`release`", release, jnp.bool_)
    return release if isinstance(release, jax.Array) else bool(release)


def as_verdict(result: Any) -> tuple[jax.Array, Any]:
    """Returns what a `should_skip_update_fn` returned as a bool[] and a report."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "`should_skip_update_fn` must return a pair (bool[], report), such as "
            f"`(jnp.any(bad), ())`, got {result!r}"
        )
    should_skip, report = result
    _check_scalar("the first result of `should_skip_update_fn`", should_skip, jnp.bool_)
    return jnp.asarray(should_skip), report


def as_carry_and_aux(aux: Any) -> tuple[Any, Any]:
    """Returns what `fun` returned beside its loss, where it hands on a carry, as a pair."""
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise TypeError(
            "`fun` must return `(loss, (carry, aux))` with `carry_argnum`, where aux may be (), "
            f"got {describe(aux)} for `(carry, aux)`"
        )
    return aux


def check_release_alone(release: bool | jax.Array | None) -> bool:
    """Returns True: a window of one microbatch is always due, and cannot be held open."""
    if release is None or release is True:
        return True
    raise ValueError(
        "`release` must be None or True where `every_k` is 1, which has no accumulator to hold a "
        f"gradient in, got {release}; build with every_k >= 2 (`release` then overrides the count)"
    )


def check_state(state: Any, grads: Any, needs_sums: bool) -> None:
    """Raises unless `state` is what `init` returns, with an accumulator if it needs one."""
    if not isinstance(state, AccumulateState):
        remedy = "the order is update(grads, state, params)"
        if isinstance(state, optax.MultiStepsState):
            remedy = "convert it with optaccum.from_multi_steps"
        elif isinstance(state, dict):
            remedy += ", and a checkpoint is restored into `tx.init(params)`"
        raise TypeError(
            "the optimizer state must be the AccumulateState that `init` returns, got "
            f"{type(state).__name__}; {remedy}"
        )
    no_sums = jax.tree.structure(state.grad_sum) == jax.tree.structure(())
    if needs_sums and no_sums and jax.tree.leaves(grads):
        raise ValueError(
            "the optimizer state has no accumulator: it was made with `every_k=1`; give it one "
            "with `state._replace(grad_sum=tx.init(params).grad_sum)`"
        )


def _check_scalar(name: str, value: Any, *kinds: Any, remedy: str = "") -> None:
    known = isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex)
    fits = known and jnp.shape(value) == ()
    if not (fits and any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds)):
        wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise TypeError(f"{name} must be a scalar ({wanted}), got {describe(value)}{remedy}")


def describe(value: Any) -> str:
    """Returns what an error says of a value: dtype and shape, or the value and its type."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return f"{value.dtype}{list(value.shape)}"
    return f"{value!r} of type {type(value).__name__}"
