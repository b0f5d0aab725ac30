"""Keys: one for each microbatch, and which arguments cannot be keys."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._batch import named_leaves
from optaccum._validate import describe


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
