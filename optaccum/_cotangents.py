"""Cotangents: results that do not count have none, whatever led to them."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from optaccum._mesh_axes import varying


def drop_unless(counts: jax.Array, tree: Any) -> Any:
    """Returns `tree`, whose cotangents are zeros unless `counts`, a bool[].

    A select of results is not enough: the program before it multiplies its zeros, and 0 * NaN is
    NaN. So the cotangents that leave that program are selected too. Every program that is not
    transposed stays as it is.

    Leaves without cotangents are returned as they are. So is a leaf that is replicated over an axis
    over which `counts` varies: its cotangent is summed over the devices.
    """

    def leaf(x):
        inexact = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
        if not inexact or varying(counts) - varying(x):
            return x
        return _drop_unless_p.bind(counts, x)

    return jax.tree.map(leaf, tree)


def call_with_drops(counts: jax.Array | None, fun: Callable[[], Any]) -> Any:
    """Returns `fun()`, whose closure has cotangents only if `counts`; None for always."""
    if counts is None:
        return fun()
    closed, structure = flat_jaxpr(fun)
    consts = drop_unless(counts, closed.consts)
    return structure.unflatten(core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))())


def flat_jaxpr(fun: Callable[..., Any], *args: Any) -> tuple[core.ClosedJaxpr, Any]:
    """Returns the jaxpr of `fun(*args)`, and the tree structure of what it returns.

    The structure is taken of the results: not every class can be rebuilt from shapes.
    """
    structures = []

    def flat(*args):
        leaves, structure = jax.tree.flatten(fun(*args))
        structures.append(structure)
        return leaves

    return jax.make_jaxpr(flat)(*args), structures[0]


def _transpose(cotangent: Any, counts: Any, _: Any) -> Any:
    if isinstance(cotangent, ad.Zero):
        return None, cotangent
    if counts.ndim:  # under `jax.vmap`
        counts = lax.broadcast_in_dim(counts, cotangent.shape, tuple(range(counts.ndim)))
    return None, lax.select(counts, cotangent, jnp.zeros_like(cotangent))


def _batch(args: Any, dims: Any) -> Any:
    (counts, x), (at, x_at) = args, dims
    if at is None and not counts.ndim:
        return _drop_unless_p.bind(counts, x), x_at
    (size,) = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
    counts, x = (batching.bdim_at_front(a, d, size) for a, d in zip(args, dims, strict=True))
    return _drop_unless_p.bind(counts, x), 0


_drop_unless_p = core.Primitive("drop_unless")
_drop_unless_p.def_impl(lambda _, x: x)
_drop_unless_p.def_abstract_eval(lambda _, x: x)
mlir.register_lowering(_drop_unless_p, lambda _context, _counts, x: [x])
ad.defjvp(_drop_unless_p, None, lambda tangent, counts, _: _drop_unless_p.bind(counts, tangent))
ad.primitive_transposes[_drop_unless_p] = _transpose
batching.primitive_batchers[_drop_unless_p] = _batch
