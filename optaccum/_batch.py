"""Rows and keys: how microbatches get theirs, how rows are joined again, and what is refused."""

from collections.abc import Callable, Iterator, Mapping
import functools
import math
from typing import Any

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np

from optaccum._validate import describe

PAD = "pad the batch and give the padding no weight with `weight_fn`"


def split(tree: Any, n: int) -> Any:
    """Returns leaves [rows, ...] as [rows / n, n, ...]: views, sharded as they were.

    Microbatch i is index i of the second axis, so it holds the rows i, i + n, i + 2n, ... Reading
    it in a loop costs its rows. For an axis of microbatches in front, which `lax.scan` could slice,
    the batch would be copied before the loop.
    """
    return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:])), tree)


def take(tree: Any, i: jax.Array, axis: int = 1) -> Any:
    """Returns microbatch i, which is on axis 1 behind :func:`split`."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, axis, keepdims=False), tree)


def put(tree: Any, microbatch: Any, i: jax.Array) -> Any:
    """Returns a tree that :func:`split` returned, with microbatch i replaced."""

    def leaf(x, new):
        return lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), i, 1)

    return jax.tree.map(leaf, tree, microbatch)


def join(tree: Any) -> Any:
    """Returns leaves [m, n, ...] as [m n, ...], which undoes :func:`split`."""
    return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])), tree)


def named_leaves(
    trees: dict[str, Any], is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns the leaves of trees with their names, which begin with the titles of the trees."""
    return [
        (f"{title}{jax.tree_util.keystr(path)}", leaf)
        for title, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    ]


def check_stack(batch: dict[str, Any], n: int, devices: int) -> None:
    """Raises unless all leaves are [n, m, ...], and the devices can share m rows."""
    for name, leaf in named_leaves(batch):
        if jnp.ndim(leaf) < 2 or leaf.shape[0] != n:
            raise ValueError(
                f"batch leaf {name} must be [{n}, rows, ...] with `batch_layout` 'stacked', {n} "
                f"microbatches, got {describe(leaf)}"
            )
        check_divided(name, leaf.shape[1], devices)


def check_divided(name: str, rows: int, devices: int, remedy: str = PAD) -> None:
    """Raises unless the devices divide the rows."""
    if rows % devices:
        raise ValueError(
            f"the {rows} rows of batch leaf {name} cannot be divided among the {devices} devices "
            f"of `reduce_axes`; {remedy}"
        )


def check_batch(
    batch: dict[str, Any], n: int, remedy: str = PAD, layout: str | None = None, devices: int = 1
) -> None:
    """Raises unless all leaves have one number of rows, which `n` divides on every device.

    With the `layout` "uneven" they may differ. It is None for a function without that option.
    The rows lie on `devices`, or on more by their types.
    """
    leaves = named_leaves(batch)
    if not leaves:
        raise ValueError(f"the arguments of the batch hold no array to split: {[*batch]}")
    for name, leaf in leaves:
        if not getattr(leaf, "shape", ()):
            raise ValueError(
                f"batch leaf {name} has no leading axis to split, got {describe(leaf)}; pass it as "
                "an argument of its own, and name the batch in `batch_argnums`"
            )
        (first, whole), rows = leaves[0], leaf.shape[0]
        if rows != whole.shape[0] and layout != "uneven":
            split_each = "" if layout is None else "; pass `batch_layout='uneven'` to split each"
            raise ValueError(
                f"batch leaves must have one number of rows, but {first} has {whole.shape[0]} and "
                f"{name} has {rows}{split_each}"
            )
        check_divided(name, rows, devices, remedy)
        local = rows // max(devices, _devices_of_rows(leaf))
        if local % n and export.is_symbolic_dim(local):
            raise ValueError(
                f"`num_microbatches` {n} does not divide the {local} rows in batch leaf {name}; "
                f"export with a multiple, such as `{n}*b`"
            )
        if local % n:
            divisors = [d for d in range(1, local + 1) if local % d == 0]
            near = [d for d in divisors if d < n][-1:] + [d for d in divisors if d > n][:1]
            per_device = "" if local == rows else f" that a device holds of the {rows}"
            raise ValueError(
                f"`num_microbatches` {n} does not divide the {local} rows{per_device} in batch "
                f"leaf {name}; nearest are {' and '.join(map(str, near))}, or {remedy}"
            )


def _devices_of_rows(x: Any) -> int:
    """Returns over how many devices the type of `x` shards its rows."""
    sharding = jax.typeof(x).sharding
    axes = jax.tree.leaves(tuple(sharding.spec)[:1])
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def check_objects(batch: dict[str, Any], cut: Callable[[Any], Any]) -> None:
    """Raises if an object in a batch cannot hold the rows of a microbatch, which `cut` returns."""
    remedy = "pass its arrays (`x.array` of haliax), and build the object inside `fun`"
    for name, x in named_leaves(batch, is_object):
        name = f"{name}, an object of type {type(x).__name__},"
        try:
            shape = stale_shape(x, cut)
        except Exception as error:
            raise ValueError(
                f"{name} cannot be rebuilt with the rows of a microbatch "
                f"({type(error).__name__}: {error}); {remedy}"
            ) from error
        if shape:
            raise ValueError(
                f"{name} keeps the shape of its array, {shape}, in its tree structure, which stays "
                f"when the array is split; {remedy}"
            )


def is_object(x: Any) -> bool:
    """Returns whether `x` is neither None nor one of Python's containers."""
    return not (x is None or isinstance(x, dict | list | tuple))


def stale_shape(x: Any, change: Callable[[Any], Any]) -> tuple[int, ...] | None:
    """Returns the shape of an array in `x`, if `change(x)` keeps it though its arrays changed.

    haliax's NamedArrays keep axes, with their sizes, in their tree structure. Nothing tells them
    that an array was sliced.
    """
    leaves, structure = jax.tree.flatten(x)
    found = []

    def rebuild(leaves):
        nodes = []
        changed = change(structure.unflatten(leaves))
        jax.tree.leaves(changed, is_leaf=lambda node: bool(nodes.append(node)))  # visits all
        shapes = [x.shape for x in leaves]
        found.extend(shape for node in nodes for shape in _kept_shapes(node, shapes))

    if not jax.tree_util.treedef_is_leaf(structure):
        jax.eval_shape(rebuild, leaves)
    return found[0] if found else None


def _kept_shapes(x: Any, shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Yields each of `shapes` that an object has among its attributes."""
    if not is_object(x) or jax.tree_util.all_leaves([x]):
        return
    for name in (*getattr(x, "__dict__", ()), *getattr(type(x), "__slots__", ())):
        shape = _as_shape(getattr(x, name, None))
        # A sparse matrix has the shape of none of its arrays.
        sparse = name == "shape" and hasattr(x, "dtype")
        if shape and (shape in shapes or sparse):
            yield shape


def _as_shape(x: Any) -> tuple[int, ...]:
    """Returns sizes, pairs of names and sizes, or axes that have a size, as a shape; else ()."""
    if isinstance(x, Mapping):
        x = [*x.values()]
    if not isinstance(x, tuple | list):
        return ()
    sizes: list[Any] = [e[1] if isinstance(e, tuple) and len(e) == 2 else e for e in x]
    sizes = [e if hasattr(e, "shape") else getattr(e, "size", e) for e in sizes]
    known = all(isinstance(e, int | np.integer) and not isinstance(e, bool) for e in sizes)
    return tuple(int(size) for size in sizes) if known else ()


def is_typed_key(x: Any) -> bool:
    """Returns whether `x` is a key of `jax.random.key`."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_raw_key(x: Any) -> bool:
    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    return isinstance(x, jax.Array | np.ndarray) and x.dtype == jnp.uint32 and x.shape[-1:] == size


def fold_in(tree: Any, i: jax.Array) -> Any:
    """Returns the keys of microbatch i."""
    typed = any(map(is_typed_key, jax.tree.leaves(tree)))

    def leaf(x):
        if typed and not is_typed_key(x):
            return x  # a count of `flax.nnx.RngState`
        each = functools.partial(jax.random.fold_in, data=i)
        for _ in range(x.ndim if typed else x.ndim - 1):
            each = jax.vmap(each)
        return each(x)

    return jax.tree.map(leaf, tree)


def check_keys(keys: dict[str, Any], others: dict[str, Any], *, may_carry: bool) -> None:
    """Raises if one of `keys` is not a key, or if one of `others` is."""
    for title, tree in keys.items():
        typed = any(map(is_typed_key, jax.tree.leaves(tree)))
        for name, leaf in named_leaves({title: tree}):
            if not (typed or _is_raw_key(leaf)):
                raise TypeError(
                    f"`rng_argnums` names {name}, which is not a PRNG key but {describe(leaf)}; "
                    "pass one of `jax.random.key`"
                )
            if typed and _is_raw_key(leaf) and "count" not in name:  # `flax.nnx.RngState` has one
                raise TypeError(
                    f"`rng_argnums` names {name}, a raw key beside typed ones; make it one of "
                    "`jax.random.key`, or give it an argument of its own"
                )
    carry = "`carry_argnum`, if `fun` advances and returns it; or " if may_carry else ""
    for name, leaf in named_leaves(others):
        if is_typed_key(leaf):
            raise TypeError(
                f"{name} is a PRNG key, with which every microbatch would draw the same numbers; "
                "pass it as a positional argument and name that in `rng_argnums`, so that each "
                f"gets another key ({carry}close over it, if they are to share it)"
            )
