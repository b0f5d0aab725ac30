"""Changes in place: refuses a function that changes what is lost afterwards."""

from collections.abc import Callable
import functools
from typing import Any

import jax

from optaccum._batch import is_object, named_leaves


def refuse_changes(
    fun: Callable[..., Any], title: Callable[[int], str], carry: tuple[int, ...] | None
) -> Callable[..., Any]:
    """Returns `fun`, which raises if it changes an object among its arguments in place.

    Each call gets copies of the objects, so a change is lost unless it is returned. Plain
    containers may change: a loss that takes the labels out of its batch does not expect to find
    them missing afterwards.

    Args:
        fun: A function of positional arguments.
        title: Returns what an error calls the argument at a position.
        carry: Position of the carry, which may change; None if there cannot be one.
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
