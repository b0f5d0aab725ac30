"""Objects that are pytrees: what `fun` changes in them, and shapes that they keep beside arrays."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum import _batch


def unchanged(
    fun: Callable[..., Any], title: Callable[[int], str], carries: tuple[int, ...] | None
) -> Callable[..., Any]:
    """Returns `fun`, which raises where it changes an object among its arguments in place.

    Each call is given objects of its own, so that what changes in them goes nowhere, except for the
    carry and what is returned. Plain containers may change: who takes a label out of a dict does
    not expect to find it missing afterwards.

    Args:
        fun: a function of positional arguments.
        title: returns what an error calls the argument at a position.
        carries: positions of the carry, which may change; None where there can be none.
    """
    keep = "let `fun` change a copy (`flax.nnx.clone`) and return what you want of it as an output"
    if carries is not None:
        keep = f"pass what changes as `carry_argnum` and return it, or {keep}, in aux"

    @functools.wraps(fun)
    def call(*args):
        args = [jax.tree.map(lambda x: x, arg) for arg in args]
        objects = [
            (title(j) + jax.tree_util.keystr(path), x, _leaves(x), _leaves(x))
            for j, arg in enumerate(args)
            if j not in (carries or ())
            for path, x in jax.tree_util.tree_leaves_with_path(arg, is_leaf=_is_object)
        ]
        results = fun(*args)
        returned = {id(x) for x in jax.tree.leaves(results)}
        for name, x, before, again in objects:
            for path, leaf in _leaves(x).items():
                # Some objects make their leaves anew whenever they are asked for them.
                kept = before.get(path) is again.get(path)
                if kept and leaf is not before.get(path) and id(leaf) not in returned:
                    raise TypeError(
                        f"`fun` changed {name}{path} in place, in an object of type "
                        f"{type(x).__name__}, but each microbatch is given its own and the change "
                        f"is lost; {keep}"
                    )
        return results

    return call


def _leaves(x: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(x)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _is_object(x: Any) -> bool:
    """Returns whether `x` is neither None nor one of Python's own containers."""
    return not (x is None or isinstance(x, dict | list | tuple))


def check_slices(rows: dict[str, Any], n: int) -> None:
    """Raises where an object in a batch cannot hold the rows of a microbatch.

    NamedArrays of haliax keep their axes, with their sizes, beside their array. Nothing tells them
    that it was sliced.
    """
    for title, tree in rows.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_object):
            leaves, treedef = jax.tree.flatten(x)
            if n == 1 or jax.tree_util.treedef_is_leaf(treedef):
                continue
            name = title + jax.tree_util.keystr(path)

            def build(leaves, x=x, treedef=treedef, name=name):
                split = _batch.split(leaves, n)
                try:
                    treedef.unflatten(split)
                    own = treedef.unflatten(_batch.take(split, jnp.int32(0)))
                except Exception as error:
                    raise ValueError(
                        f"{name}, {_kind(x)}, cannot be rebuilt with the rows of a microbatch "
                        f"({type(error).__name__}: {error}); {_APART}"
                    ) from error
                if (shape := _stale(x, own)) is not None:
                    raise ValueError(
                        f"{name}, {_kind(x)}, keeps the shape of its array, {shape}, in its "
                        f"tree structure, which stays when the array is split; {_APART}"
                    )
                return leaves

            jax.eval_shape(build, leaves)


_APART = "pass its arrays (`x.array` of haliax), and build the object inside `fun`"


def check_joins(outputs: Any) -> None:
    """Raises where an object among the outputs of a microbatch cannot hold those of all."""
    for path, x in jax.tree_util.tree_leaves_with_path(outputs, is_leaf=_is_object):
        if (shape := _stale(x, x)) is not None:
            name = jax.tree_util.keystr(path) or "(the only one)"
            raise ValueError(
                f"`fun` returned output {name}, {_kind(x)}, which keeps the shape of its array, "
                f"{shape}, in its tree structure, which stays when those of all microbatches are "
                "joined; return its arrays (`x.array` of haliax), and build the object outside"
            )


def _kind(x: Any) -> str:
    return f"an object of type {type(x).__name__}"


def _stale(before: Any, after: Any) -> tuple[int, ...] | None:
    """Returns a shape that an object was told of an array, which it had before it was rebuilt."""
    old, new = (jax.tree.flatten(x, is_leaf=lambda y, x=x: y is not x)[0] for x in (before, after))
    if len(new) == 1 and new[0] is after:
        return None  # a leaf
    arrays = [x.shape for x in old if hasattr(x, "shape") and hasattr(x, "dtype")]
    if _is_object(after):
        names = [*getattr(after, "__dict__", ()), *getattr(type(after), "__slots__", ())]
        for name in names:
            shape = _as_shape(getattr(after, name, None))
            # A sparse matrix has the shape of none of its arrays.
            sparse = name == "shape" and hasattr(after, "dtype")
            if shape and (shape in arrays or sparse):
                return shape
    children = (_stale(a, b) for a, b in zip(old, new, strict=True))
    return next((shape for shape in children if shape is not None), None)


def _as_shape(x: Any) -> tuple[int, ...] | None:
    """Returns sizes, or pairs of names and sizes, or axes that have a size, as a shape."""
    if isinstance(x, Mapping):
        x = [*x.values()]
    if not isinstance(x, tuple | list):
        return None
    sizes: list[Any] = [e[1] if isinstance(e, tuple) and len(e) == 2 else e for e in x]
    sizes = [e if hasattr(e, "shape") else getattr(e, "size", e) for e in sizes]
    known = all(isinstance(e, int | np.integer) and not isinstance(e, bool) for e in sizes)
    return tuple(int(size) for size in sizes) if known else None
