"""What a microbatch is given of a whole batch: its rows, and keys of its own."""

import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from optaccum import _arguments, _parts


def split(tree: Any, n: int) -> Any:
    """Returns leaves [rows, ...] as [rows / n, n, ...]: views, sharded as they were.

    Microbatch i is index i of the second axis, so it holds the rows i, i + n, i + 2n, ... Read in
    a loop, it costs its own rows. An axis of microbatches in front, which `lax.scan` slices by
    itself, would cost a copy of the batch before the loop.
    """
    return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:])), tree)


def take(tree: Any, i: jax.Array) -> Any:
    """Returns microbatch i of what :func:`split` returned."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False), tree)


def _is_typed_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_raw_key(x: Any) -> bool:
    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    return isinstance(x, jax.Array | np.ndarray) and x.dtype == jnp.uint32 and x.shape[-1:] == size


def own_keys(tree: Any, i: jax.Array) -> Any:
    """Returns a tree of keys with those of microbatch i."""
    typed = any(map(_is_typed_key, jax.tree.leaves(tree)))

    def fold(x):
        if typed and not _is_typed_key(x):
            return x  # a count of `flax.nnx.RngState`
        each = functools.partial(jax.random.fold_in, data=i)
        for _ in range(x.ndim if typed else x.ndim - 1):
            each = jax.vmap(each)
        return each(x)

    return jax.tree.map(fold, tree)


def _devices_of_rows(x: Any) -> int:
    """Returns over how many devices the rows are sharded, if explicitly: as part of the type."""
    sharding = jax.typeof(x).sharding
    axes = jax.tree.leaves(tuple(sharding.spec)[:1])
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def _named_leaves(trees: dict[Any, Any]) -> list[tuple[str, Any]]:
    return [
        (f"argument {name}{jax.tree_util.keystr(path)}", leaf)
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def check_keys(keys: dict, args: tuple, kwargs: dict, apart: tuple[int, ...]) -> None:
    """Raises where a key is not in `keys`, or what is there is none."""
    for j, tree in keys.items():
        typed = any(map(_is_typed_key, jax.tree.leaves(tree)))
        for name, leaf in _named_leaves({j: tree}):
            if not (typed or _is_raw_key(leaf)):
                raise TypeError(
                    f"`rng_argnums` names {name}, which is no PRNG key but "
                    f"{_arguments.describe(leaf)}; pass one of `jax.random.key`"
                )
            if typed and _is_raw_key(leaf) and "count" not in name:  # `flax.nnx.RngState` has one
                raise TypeError(
                    f"`rng_argnums` names {name}, a raw key beside typed ones; make it one of "
                    "`jax.random.key`, or give it an argument of its own"
                )
    others = {j: arg for j, arg in enumerate(args) if j not in apart}
    for name, leaf in _named_leaves({**others, **{f"`{k}`": v for k, v in kwargs.items()}}):
        if _is_typed_key(leaf):
            raise TypeError(
                f"{name} is a PRNG key, with which every microbatch would draw the same numbers; "
                "pass it by position and name that in `rng_argnums`, and each gets a key of its "
                "own (`carry_argnum`, if `fun` advances and returns it; or close over it, if they "
                "are to share it)"
            )


def check_weight_is_shared(weight: jax.Array, grads: Any) -> None:
    """Raises if the weight differs between devices over which a gradient has been summed."""
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if axes := _parts.varying(weight) - _parts.varying(g):
            raise TypeError(
                f"`weight_fn(...)` differs between the devices of {sorted(axes)}, but gradient "
                f"leaf {jax.tree_util.keystr(path) or '(the only leaf)'} has been summed over "
                "them; differentiate with respect to `jax.lax.pcast(params, axes, to='varying')` "
                "and reduce weighted sums yourself, or return one weight for all devices"
            )


def check_carry(new: Any, carry: Any) -> None:
    """Raises unless `fun` returned a carry that can be kept in the types that it began with."""
    kinds = jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating

    def kind(x):
        return [jnp.issubdtype(jnp.result_type(x), k) for k in kinds].index(True)

    if jax.tree.structure(new) != jax.tree.structure(carry):
        raise TypeError(
            f"`fun` returned a carry of the tree structure {jax.tree.structure(new)}, but it "
            f"began as {jax.tree.structure(carry)}"
        )
    leaves = zip(_named_leaves({"": new}), jax.tree.leaves(carry), strict=True)
    for (name, x), old in leaves:
        if _is_typed_key(x) and _is_typed_key(old) and x.shape == old.shape:
            continue
        if jnp.shape(x) != jnp.shape(old) or _is_typed_key(x) or kind(x) > kind(old):
            raise TypeError(
                f"`fun` returned a carry whose leaf {name.removeprefix('argument ')} is "
                f"{_arguments.describe(x)}, but it began as {_arguments.describe(old)}; begin "
                "with the shape and kind that it will have"
            )


def check_batch(batch: dict[int, Any], n: int) -> None:
    """Raises unless every leaf has one number of rows, which `n` divides on every device."""
    leaves = _named_leaves(batch)
    if not leaves:
        raise ValueError(f"the arguments {(*batch,)} of `batch_argnums` hold no array to split")
    for name, leaf in leaves:
        if not getattr(leaf, "shape", ()):
            raise ValueError(
                f"batch leaf {name} has no leading axis to split, got "
                f"{_arguments.describe(leaf)}; pass it as an argument of its own"
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
                f"leaf {name}; nearest are {' and '.join(map(str, near))}, or pad the batch and "
                "give the padding no weight with `weight_fn`"
            )
