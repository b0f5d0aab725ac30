"""Arguments of public functions: raises, or returns them in one form."""

from collections.abc import Callable
import inspect
import operator
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

INT32_MAX = np.iinfo(np.int32).max


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


def check_takes(name: str, function: Any, args: Any, kwargs: Any) -> None:
    """Raises unless `function` takes the arguments of `fun`, as far as its signature says."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{name} is called with the arguments of `fun`, the parameters first, but its "
            f"signature is {signature}: {error}"
        ) from None


def check_flag(name: str, flag: Any) -> None:
    """Raises unless `flag` is True or False; another value may be a slip."""
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {describe(flag)}")


def check_scalar(name: str, value: Any, *kinds: Any, remedy: str = "") -> None:
    """Raises unless `value` is a scalar of one of these kinds of dtypes."""
    known = isinstance(value, jax.Array | np.ndarray | np.generic | int | float | complex)
    scalar = known and jnp.shape(value) == ()
    if not (scalar and any(jnp.issubdtype(jnp.result_type(value), kind) for kind in kinds)):
        wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise TypeError(f"{name} must be a scalar ({wanted}), got {describe(value)}{remedy}")


def check_count(name: str, count: Any, others: str = "") -> int:
    """Returns `count` as an int in 1..2**31 - 1; `others` says what else it may be."""
    try:
        if isinstance(count, bool | np.bool_):
            raise TypeError
        count = operator.index(count)
    except TypeError:
        raise TypeError(f"{name} must be an integer >= 1{others}, got {describe(count)}") from None
    if not 1 <= count <= INT32_MAX:
        bound = ">= 1" if count < 1 else f"<= {INT32_MAX}"
        raise ValueError(f"{name} must be {bound}, got {count}")
    return count


def check_every_k(every_k: Any) -> int | jax.Array | Callable[[jax.Array], Any]:
    """Returns `every_k` as an int >= 1, an integer `jax.Array` of shape [], or a function."""
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


def check_names(name: str, names: Any, wanted: str) -> tuple[str, ...]:
    """Returns `names` as a tuple of strings."""
    if not isinstance(names, tuple | list) or not all(isinstance(x, str) for x in names):
        raise TypeError(f"{name} must be {wanted}, got {names!r}")
    return tuple(dict.fromkeys(names))


def check_axes(axes: Any) -> tuple[str, ...]:
    """Returns `reduce_axes` as a tuple of names."""
    names = (axes,) if isinstance(axes, str) else axes
    names = check_names("`reduce_axes`", names, "names of mesh axes")
    if "" in names:
        raise ValueError("`reduce_axes` must be names of mesh axes, or () for none, got ''")
    return names


def check_argnums(name: str, argnums: Any) -> tuple[int, ...]:
    """Returns `argnums`, an integer or a sequence of them, as a tuple of ints."""
    several = argnums if isinstance(argnums, tuple | list) else (argnums,)
    try:
        if any(isinstance(argnum, bool | np.bool_) for argnum in several):
            raise TypeError
        return tuple(map(operator.index, several))
    except TypeError:
        raise TypeError(
            f"{name} must be an integer or a tuple of integers, got {argnums!r}"
        ) from None


def check_loss_reduction(reduction: Any) -> str:
    """Returns `loss_reduction`, if it is one."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(
            f"`loss_reduction` must be 'mean' or 'sum', got {reduction!r}; it says whether the "
            "loss is a mean or a sum over the examples or tokens that `weight` counts"
        )
    return reduction


def check_denominator(name: str, is_missing: bool) -> None:
    """Raises if there is nothing to divide sums of losses by."""
    if is_missing:
        raise ValueError(
            f"`loss_reduction` 'sum' needs {name}, the number of examples or tokens in each "
            "microbatch: gradients of sums are divided by the sum of the weights"
        )


def check_decay(name: str, decay: Any) -> float | jax.Array:
    """Returns a float in [0, 1), or an f32[] if it is traced."""
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
            f"{describe(tx)}{hint}"
        )


def is_function(value: Any) -> bool:
    """Returns whether `value` is a function, and neither a type nor a module that is a tree."""
    leaf = jax.tree_util.all_leaves([value])
    return callable(value) and leaf and not isinstance(value, type)


def check_accumulator_dtype(dtype: Any) -> Any:
    """Returns one dtype or a tree of them, checked, or a function that returns one."""
    if is_function(dtype):
        return dtype
    return jax.tree_util.tree_map_with_path(lambda path, x: check_dtype(x, path), dtype)


def check_dtype(dtype: Any, path: Any = ()) -> jnp.dtype | None:
    """Returns an `accumulator_dtype` as a floating or complex `jnp.dtype`, or None."""
    if dtype is None:
        return None
    name = "`accumulator_dtype`" + (f" of leaf {leaf_name(path)}" if path else "")
    try:
        result = jnp.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} {dtype!r} is not a dtype: {error}") from None
    if not jnp.issubdtype(result, jnp.inexact):
        raise TypeError(
            f"{name} must be floating-point or complex, got {result}; leave it None "
            "for each gradient's own dtype promoted to at least float32"
        )
    if jax.dtypes.canonicalize_dtype(result) != result:
        raise ValueError(
            f"{name} {result} needs 64-bit types; enable them with "
            "jax.config.update('jax_enable_x64', True)"
        )
    return result


def rank(x: Any) -> int:
    """Returns the rank of a dtype among keys, booleans, integers, real and complex numbers."""
    kinds = jax.dtypes.prng_key, jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating
    return [jnp.issubdtype(jnp.result_type(x), k) for k in kinds].index(True)


def check_reduce_dtype(dtype: Any, axes: tuple[str, ...]) -> jnp.dtype | None:
    """Returns `dtype` as a floating `jnp.dtype` in which no float32 overflows, or None."""
    if dtype is None:
        return None
    if not axes:
        raise ValueError(f"`reduce_dtype` {dtype} needs `reduce_axes`; name the axes of the rows")
    try:
        result = jnp.dtype(dtype)
        wide = jnp.finfo(result).maxexp >= jnp.finfo(jnp.float32).maxexp
    except (TypeError, ValueError) as error:
        raise TypeError(f"`reduce_dtype` {dtype!r} is not a floating dtype: {error}") from None
    if not wide:
        raise ValueError(f"weighted sums may overflow in `reduce_dtype` {result}; use bfloat16")
    return result
