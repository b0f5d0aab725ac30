"""Batches: which arguments of a loss are rows, keys and carries, and whether they can be."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._batch import is_typed_key
from optaccum._validate import describe, kind

PAD = "pad the batch and give the padding no weight with `weight_fn`"


def check_keys(keys: dict[str, Any], others: dict[str, Any], *, carries: bool) -> None:
    """Raises where one of `keys` is none, or one of `others` is."""
    for title, tree in keys.items():
        typed = any(map(is_typed_key, jax.tree.leaves(tree)))
        for name, leaf in named_leaves({title: tree}):
            if not (typed or _is_raw_key(leaf)):
                raise TypeError(
                    f"`rng_argnums` names {name}, which is no PRNG key but "
                    f"{describe(leaf)}; pass one of `jax.random.key`"
                )
            if typed and _is_raw_key(leaf) and "count" not in name:  # `flax.nnx.RngState` has one
                raise TypeError(
                    f"`rng_argnums` names {name}, a raw key beside typed ones; make it one of "
                    "`jax.random.key`, or give it an argument of its own"
                )
    carry = "`carry_argnum`, if `fun` advances and returns it; or " if carries else ""
    for name, leaf in named_leaves(others):
        if is_typed_key(leaf):
            raise TypeError(
                f"{name} is a PRNG key, with which every microbatch would draw the same numbers; "
                "pass it apart, by position, and name that in `rng_argnums`, and each gets a key "
                f"of its own ({carry}close over it, if they are to share it)"
            )


def check_carry(new: Any, carry: Any) -> None:
    """Raises unless `fun` returned a carry that can be kept in the types that it began with."""
    if jax.tree.structure(new) != jax.tree.structure(carry):
        raise TypeError(
            f"`fun` returned a carry of the tree structure {jax.tree.structure(new)}, but it "
            f"began as {jax.tree.structure(carry)}"
        )
    leaves = zip(named_leaves({"": new}), jax.tree.leaves(carry), strict=True)
    for (name, x), old in leaves:
        name = name or "(the only leaf)"
        if is_typed_key(x) and is_typed_key(old) and x.shape == old.shape:
            continue
        keys = is_typed_key(x) or is_typed_key(old)
        if jnp.shape(x) != jnp.shape(old) or keys or _widens(x, old):
            raise TypeError(
                f"`fun` returned a carry whose leaf {name} is "
                f"{describe(x)}, but it began as {describe(old)}; begin "
                "with the shape and dtype that it will have"
            )


def _widens(x: Any, old: Any) -> bool:
    """Returns whether `x` would lose bits in the dtype of `old`."""
    with jax.numpy_dtype_promotion("standard"):
        return kind(x) > kind(old) or jnp.result_type(x, old) != jnp.result_type(old)


def check_batch(batch: dict[str, Any], n: int, remedy: str = PAD) -> None:
    """Raises unless every leaf has one number of rows, which `n` divides on every device."""
    leaves = named_leaves(batch)
    if not leaves:
        raise ValueError(f"the arguments of the batch hold no array to split: {[*batch]}")
    for name, leaf in leaves:
        if not getattr(leaf, "shape", ()):
            raise ValueError(
                f"batch leaf {name} has no leading axis to split, got "
                f"{describe(leaf)}; pass it as an argument of its own"
            )
        (first, whole), rows = leaves[0], leaf.shape[0]
        if rows != whole.shape[0]:
            raise ValueError(
                f"batch leaves must have one number of rows, but {first} has {whole.shape[0]} and "
                f"{name} has {rows}"
            )
        local = rows // _devices_of_rows(leaf)
        if local % n:
            divisors = [d for d in range(1, local + 1) if local % d == 0]
            near = [d for d in divisors if d < n][-1:] + [d for d in divisors if d > n][:1]
            per_device = "" if local == rows else f" that a device holds of the {rows}"
            raise ValueError(
                f"`num_microbatches` {n} does not divide the {local} rows{per_device} in batch "
                f"leaf {name}; nearest are {' and '.join(map(str, near))}, or {remedy}"
            )


def check_outputs(outputs: Any, rows: int) -> None:
    """Raises unless every output has one entry for each row of its microbatch, or one in all."""
    for name, y in named_leaves({"": outputs}):
        name = name or "(the only leaf)"
        if not isinstance(y, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"`fun` returned {describe(y)} as output leaf {name}; return arrays")
        if not y.shape:
            raise TypeError(
                f"`fun` returned output leaf {name} of shape (), but it is called with one "
                "microbatch at a time and its outputs are joined along their leading axis; return "
                "`x[None]`, of which you get one entry per microbatch, or reduce over all rows "
                "outside of `fun`"
            )
        if y.shape[0] not in (1, rows):
            raise ValueError(
                f"`fun` returned output leaf {name} of shape {y.shape} for the {rows} rows of a "
                "microbatch, and outputs are joined along their leading axis as rows are; return "
                "`x[None]`, of which you get one entry per microbatch, or, with r entries for each "
                f"row, `x.reshape({rows}, r, ...)`"
            )


def check_aux(aux: Any) -> None:
    """Raises unless what `fun` returned beside its loss can be stacked."""
    for name, x in named_leaves({"": aux}):
        name = name or "(the only leaf)"
        if not isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise TypeError(
                f"`fun` returned {describe(x)} as aux leaf {name}; return arrays or "
                "numbers, which are stacked over the microbatches"
            )


def _is_raw_key(x: Any) -> bool:
    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    return isinstance(x, jax.Array | np.ndarray) and x.dtype == jnp.uint32 and x.shape[-1:] == size


def _devices_of_rows(x: Any) -> int:
    """Returns over how many devices the rows are sharded, if explicitly: as part of the type."""
    sharding = jax.typeof(x).sharding
    axes = jax.tree.leaves(tuple(sharding.spec)[:1])
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def named_leaves(trees: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the leaves of trees with their names, which begin with the titles of the trees."""
    return [
        (f"{title}{jax.tree_util.keystr(path)}", leaf)
        for title, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
