"""What a loss returns, and whether the rest can be stacked, or handed on as a carry."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaccum import _validate
from optaccum._batch import named_leaves
from optaccum._keys import is_typed_key
from optaccum._trees import ARRAYS


def as_loss(fun: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """Returns `fun`, which raises unless it returns a loss, or with `has_aux` `(loss, aux)`."""

    @functools.wraps(fun)
    def loss_fn(*args, **kwargs):
        loss = fun(*args, **kwargs)
        if not has_aux and isinstance(loss, tuple | list | dict):
            raise TypeError(
                f"`fun` must return a scalar, got a {type(loss).__name__} of {len(loss)}; pass "
                "`has_aux=True` if it returns `(loss, aux)`"
            )
        if has_aux and not (isinstance(loss, tuple | list) and len(loss) == 2):
            got = _validate.describe(loss)
            raise TypeError(f"`fun` must return `(loss, aux)` with `has_aux=True`, got {got}")
        return loss

    return loss_fn


def check_aux(aux: Any) -> None:
    """Raises unless what `fun` returned beside its loss can be stacked."""
    for name, x in named_leaves({"": aux}):
        if not isinstance(x, ARRAYS):
            raise TypeError(
                f"`fun` returned {_validate.describe(x)} as aux leaf {name or '(the only leaf)'}; "
                "return arrays or numbers, which are stacked over the microbatches"
            )


def as_carry_and_aux(aux: Any) -> tuple[Any, Any]:
    """Returns what `fun` returned beside its loss, if it hands on a carry, as a pair."""
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise TypeError(
            "`fun` must return `(loss, (carry, aux))` with `carry_argnum`, where aux may be (), "
            f"got {_validate.describe(aux)} for `(carry, aux)`"
        )
    return aux


def check_carry(new: Any, carry: Any) -> None:
    """Raises unless `fun` returned a carry of the structure, shapes and dtypes that it got."""
    if jax.tree.structure(new) != jax.tree.structure(carry):
        raise TypeError(
            f"`fun` returned a carry of the tree structure {jax.tree.structure(new)}, but it "
            f"began as {jax.tree.structure(carry)}"
        )
    for (name, x), old in zip(named_leaves({"": new}), jax.tree.leaves(carry), strict=True):
        if is_typed_key(x) and is_typed_key(old) and x.shape == old.shape:
            continue
        keys = is_typed_key(x) or is_typed_key(old)
        if jnp.shape(x) != jnp.shape(old) or keys or _widens(x, old):
            raise TypeError(
                f"`fun` returned a carry whose leaf {name or '(the only leaf)'} is "
                f"{_validate.describe(x)}, but it began as {_validate.describe(old)}; begin "
                "with the shape and dtype that it will have"
            )


def _widens(x: Any, old: Any) -> bool:
    """Returns whether `x` would lose bits in the dtype of `old`."""
    with jax.numpy_dtype_promotion("standard"):
        wider = _validate.kind(x) > _validate.kind(old)
        return wider or jnp.result_type(x, old) != jnp.result_type(old)
