"""Batches: which arguments of a loss are rows, keys and carries, and whether they can be."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._check.arguments import check_argnums, describe, kind
from optaccum._core.batch import is_typed_key

PAD = "pad the batch and give the padding no weight with `weight_fn`"


def check_roles(given: dict[str, Any], has_aux: bool = False) -> dict[str, tuple[int, ...]]:
    """Returns the positions that each role was given, as tuples."""
    roles = {name: check_argnums(name, argnums) for name, argnums in given.items()}
    for name, use in {"`argnums`": "differentiate", "`batch_argnums`": "split"}.items():
        if roles.get(name) == ():
            raise ValueError(f"{name} must name at least one argument to {use}, got ()")
    if roles.get("`carry_argnum`") and not has_aux:
        raise ValueError(
            "`carry_argnum` needs `has_aux=True`: `fun` returns `(loss, (carry, aux))` with it"
        )
    return roles


def check_call(
    roles: dict[str, tuple[int, ...]],
    args: tuple,
    kwargs: dict,
    n: int,
    remedy: str = PAD,
) -> list[tuple[int, ...]]:
    """Returns the positions of each role in a call, none negative, if its arguments fit them.

    `remedy` says how a batch can be made one that `n` divides.
    """
    found = dict(zip(roles, positions(roles, len(args)), strict=True))
    rows, rngs = found["`batch_argnums`"], found["`rng_argnums`"]
    for name, leaf in _named_leaves({j: args[j] for j in found.get("`argnums`", ())}):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise TypeError(
                f"{name} is no array but {describe(leaf)}, and `argnums` names it; take the arrays "
                "out, `params, static = equinox.partition(model, equinox.is_inexact_array)`, and "
                "let `fun` begin with `model = equinox.combine(params, static)`"
            )
    check_batch({j: args[j] for j in rows}, n, remedy)
    apart = (*rows, *rngs, *found.get("`carry_argnum`", ()))
    check_keys({j: args[j] for j in rngs}, args, kwargs, apart, carries="`carry_argnum`" in roles)
    return [*found.values()]


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


def check_keys(
    keys: dict, args: tuple, kwargs: dict, apart: tuple[int, ...], *, carries: bool
) -> None:
    """Raises where a key is not in `keys`, or what is there is none."""
    for j, tree in keys.items():
        typed = any(map(is_typed_key, jax.tree.leaves(tree)))
        for name, leaf in _named_leaves({j: tree}):
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
    others = {j: arg for j, arg in enumerate(args) if j not in apart}
    for name, leaf in _named_leaves({**others, **{f"`{k}`": v for k, v in kwargs.items()}}):
        if is_typed_key(leaf):
            raise TypeError(
                f"{name} is a PRNG key, with which every microbatch would draw the same numbers; "
                "pass it by position and name that in `rng_argnums`, and each gets a key of its "
                f"own ({carry}close over it, if they are to share it)"
            )


def check_carry(new: Any, carry: Any) -> None:
    """Raises unless `fun` returned a carry that can be kept in the types that it began with."""
    if jax.tree.structure(new) != jax.tree.structure(carry):
        raise TypeError(
            f"`fun` returned a carry of the tree structure {jax.tree.structure(new)}, but it "
            f"began as {jax.tree.structure(carry)}"
        )
    leaves = zip(_named_leaves({"": new}), jax.tree.leaves(carry), strict=True)
    for (name, x), old in leaves:
        if is_typed_key(x) and is_typed_key(old) and x.shape == old.shape:
            continue
        keys = is_typed_key(x) or is_typed_key(old)
        if jnp.shape(x) != jnp.shape(old) or keys or _widens(x, old):
            raise TypeError(
                f"`fun` returned a carry whose leaf {name.removeprefix('argument ')} is "
                f"{describe(x)}, but it began as {describe(old)}; begin "
                "with the shape and dtype that it will have"
            )


def _widens(x: Any, old: Any) -> bool:
    """Returns whether `x` would lose bits in the dtype of `old`."""
    with jax.numpy_dtype_promotion("standard"):
        return kind(x) > kind(old) or jnp.result_type(x, old) != jnp.result_type(old)


def check_batch(batch: dict[int, Any], n: int, remedy: str = PAD) -> None:
    """Raises unless every leaf has one number of rows, which `n` divides on every device."""
    leaves = _named_leaves(batch)
    if not leaves:
        raise ValueError(f"the arguments {(*batch,)} of `batch_argnums` hold no array to split")
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


def check_outputs(outputs: Any) -> None:
    """Raises unless every output has a leading axis, along which microbatches can be joined."""
    for name, y in _named_leaves({"": outputs}):
        name = name.removeprefix("argument ") or "(the only leaf)"
        if not isinstance(y, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"`fun` returned {describe(y)} as output leaf {name}; return arrays")
        if not y.shape:
            raise TypeError(
                f"`fun` returned output leaf {name} of shape (), but it is called with one "
                "microbatch at a time and its outputs are joined along their leading axis; return "
                "`x[None]`, of which you get one entry per microbatch, or reduce over all rows "
                "outside of `fun`"
            )


def check_aux(aux: Any) -> None:
    """Raises unless what `fun` returned beside its loss can be stacked."""
    for name, x in _named_leaves({"": aux}):
        name = name.removeprefix("argument ") or "(the only leaf)"
        if not isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise TypeError(
                f"`fun` returned {describe(x)} as aux leaf {name}; return arrays or "
                "numbers, which are stacked over the microbatches"
            )


def check_no_other_rows(args: tuple, batch: int, apart: tuple[int, ...]) -> None:
    """Raises where an argument that nobody named has as many rows as the batch: it would broadcast.

    Args:
        args: the positional arguments.
        batch: the position of the batch.
        apart: the positions of arguments that have another role.
    """
    rows = jax.tree.leaves(args[batch])[0].shape[0]
    others = {j: arg for j, arg in enumerate(args) if j not in (batch, *apart)}
    for name, leaf in _named_leaves(others):
        if getattr(leaf, "shape", None) and leaf.shape[0] == rows:
            j = name.removeprefix("argument ").split("[")[0].split(".")[0]
            raise ValueError(
                f"{name} has {rows} rows, as many as the batch in argument {batch}, but "
                "`batch_argnums` was left out, so that every microbatch would get all of them; "
                f"pass `batch_argnums=({batch}, {j})` to split both, or `batch_argnums={batch}` to "
                "give it to every microbatch whole"
            )


def _is_raw_key(x: Any) -> bool:
    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    return isinstance(x, jax.Array | np.ndarray) and x.dtype == jnp.uint32 and x.shape[-1:] == size


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
