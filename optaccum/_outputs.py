"""What `fun` may return: a loss, what can be stacked, a carry; and what it may not change."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaccum import _validate
from optaccum._batch import is_object, is_typed_key, named_leaves
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


def as_carry_and_aux(aux: Any, carry: Any) -> tuple[Any, Any]:
    """Returns `aux`, or raises unless it is `(carry, aux)` with a carry like the old one."""
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise TypeError(
            "`fun` must return `(loss, (carry, aux))` with `carry_argnum`, where aux may be (), "
            f"got {_validate.describe(aux)} for `(carry, aux)`"
        )
    new, _ = aux
    if jax.tree.structure(new) != jax.tree.structure(carry):
        raise TypeError(
            f"`fun` returned a carry of the tree structure {jax.tree.structure(new)}, but it "
            f"began as {jax.tree.structure(carry)}"
        )
    for (name, x), old in zip(named_leaves({"": new}), jax.tree.leaves(carry), strict=True):
        fits = jnp.shape(x) == jnp.shape(old) and is_typed_key(x) == is_typed_key(old)
        if not fits or (not is_typed_key(x) and _widens(x, old)):
            raise TypeError(
                f"`fun` returned a carry whose leaf {name or '(the only leaf)'} is "
                f"{_validate.describe(x)}, but it began as {_validate.describe(old)}; begin "
                "with the shape and dtype that it will have"
            )
    return aux


def _widens(x: Any, old: Any) -> bool:
    """Returns whether `x` would lose bits in the dtype of `old`."""
    with jax.numpy_dtype_promotion("standard"):
        wider = _validate.rank(x) > _validate.rank(old)
        return wider or jnp.result_type(x, old) != jnp.result_type(old)


def refuse_changes(
    fun: Callable[..., Any], title: Callable[[int], str], carry: tuple[int, ...] | None
) -> Callable[..., Any]:
    """Returns `fun`, which raises if it changes an object among its arguments in place.

    Each call gets copies of the objects, so a change is lost unless it is returned. Plain
    containers may change: a loss that takes the labels out of its batch does not expect to find
    them missing afterwards. So may the argument at the position `carry`, which is None if there
    cannot be one. `title` returns what an error calls the argument at a position.
    """
    keep = "let `fun` change a copy (`flax.nnx.clone`) and return what you want of it as an output"
    if carry is not None:
        keep = f"pass what changes as `carry_argnum` and return it, or {keep}, in aux"

    @functools.wraps(fun)
    def call(*args):
        args = jax.tree.map(lambda x: x, args)
        watched = {title(j): x for j, x in enumerate(args) if j not in (carry or ())}
        # Some objects make their leaves anew whenever they are asked for them.
        objects = [
            (name, x, _leaves(x), _leaves(x)) for name, x in named_leaves(watched, is_object)
        ]
        results = fun(*args)
        returned = {id(x) for x in jax.tree.leaves(results)}
        for name, x, before, again in objects:
            for path, leaf in _leaves(x).items():
                stable = before.get(path) is again.get(path)
                if stable and leaf is not before.get(path) and id(leaf) not in returned:
                    raise TypeError(
                        f"`fun` changed {name}{path} in place, in an object of type "
                        f"{type(x).__name__}, but each microbatch is given its own and the change "
                        f"is lost; {keep}"
                    )
        return results

    return call


def _leaves(x: Any) -> dict[str, Any]:
    return dict(named_leaves({"": x}))
