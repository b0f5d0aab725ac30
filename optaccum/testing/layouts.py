"""States of any layout: which part of one looks like the parameters, and its arrays by path."""

from collections.abc import Mapping
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaccum._batch import is_typed_key
from optaccum._trees import ARRAYS

Path = tuple[Any, ...]
Tree = dict[Path, np.ndarray]


def needles(params: Any) -> list[Any]:
    """Returns what the parameters may be in a state: all, or what Flax calls "params" of them."""
    if is_module(params):
        nnx = sys.modules["flax.nnx"]
        return [params, nnx.state(params), nnx.state(params, nnx.Param)]
    inner = params["params"] if isinstance(params, Mapping) and "params" in params else None
    return [params] if inner is None else [inner, params]


def alike(params: Any, state: Any) -> dict[Path, Any]:
    """Returns the parts of a state that look like the parameters."""

    def looks(x, wanted):
        if is_module(wanted):
            return type(x) is type(wanted)
        return _form(x) == _form(wanted)

    for wanted in needles(params):
        is_leaf = functools.partial(looks, wanted=wanted)
        leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_leaf)
        found = {path: x for path, x in leaves if is_leaf(x)}
        if found:
            return found
    named = getattr(state, "params", state.get("params") if isinstance(state, Mapping) else None)
    return {} if named is None else {(): named}


def with_values(state: Any, values: Tree) -> Any:
    """Returns a state with some of its leaves replaced."""

    def put(path, x):
        if is_module(x):
            nnx = sys.modules["flax.nnx"]
            variables = nnx.state(x)
            new = jax.tree_util.tree_map_with_path(
                lambda inner, leaf: put((*path, *inner), leaf), nnx.to_pure_dict(variables)
            )
            nnx.replace_by_pure_dict(variables, new)
            nnx.update(x, variables)
            return x
        return jnp.asarray(values[path], jnp.result_type(x)) if path in values else x

    return jax.tree_util.tree_map_with_path(put, state, is_leaf=is_module)


def _form(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [*map(np.shape, leaves)]


def is_module(x: Any) -> bool:
    """Returns whether it is an object of `flax.nnx`, which a step changes in place."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, (nnx.Module, nnx.Optimizer))


def plain(tree: Any, kind: str | None = None) -> Any:
    """Returns a tree of arrays for modules of `flax.nnx`, of one kind of their variables."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    kinds = ... if kind is None else getattr(nnx, kind)

    def pure(x):
        return nnx.to_pure_dict(nnx.state(x, kinds)) if is_module(x) else x

    return jax.tree.map(pure, tree, is_leaf=is_module)


def named(tree: Any) -> dict[Path, np.ndarray]:
    """Returns {path: array} of a state, floating-point numbers as f64."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain(tree)):
        if isinstance(leaf, ARRAYS) and not is_typed_key(leaf):
            inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            found[path] = np.array(leaf, np.float64 if inexact else None)
    return found
