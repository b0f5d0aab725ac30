"""Cotangents: derivatives of results that do not count are zero, whatever led to these results."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from optaccum._mesh_axes import varying


def drop_unless(valid: jax.Array, tree: Any) -> Any:
    """Returns `tree`, whose cotangents are zeros unless `valid`.

    A select of results is not enough: its zeros are multiplied with what is NaN in the program
    before it, and 0 * NaN is NaN. So the same is selected where cotangents leave that program. It
    is the identity in every program that is not transposed.

    Args:
        valid: bool[].
        tree: a pytree. Leaves without a cotangent stay, and so does what devices share by its type,
            if they may differ in `valid`: then it has the cotangents of all.
    """

    def leaf(x):
        inexact = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
        if not inexact or varying(valid) - varying(x):
            return x
        return _drop_unless_p.bind(valid, x)

    return jax.tree.map(leaf, tree)


def call_with_drops(valid: jax.Array | None, fun: Callable[[], Any]) -> Any:
    """Returns `fun()`; all that it closes over has no cotangents unless `valid` (None: always)."""
    if valid is None:
        return fun()
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)()
    consts = drop_unless(valid, closed.consts)
    results = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))()
    return jax.tree.structure(shapes).unflatten(results)


def _jvp(primals: Any, tangents: Any) -> Any:
    (valid, x), (_, tangent) = primals, tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _drop_unless_p.bind(valid, tangent)
    return _drop_unless_p.bind(valid, x), tangent


def _transpose(cotangent: Any, valid: Any, _: Any) -> Any:
    if isinstance(cotangent, ad.Zero):
        return None, cotangent
    if valid.ndim:  # under `jax.vmap`
        valid = lax.broadcast_in_dim(valid, cotangent.shape, tuple(range(valid.ndim)))
    return None, lax.select(valid, cotangent, jnp.zeros_like(cotangent))


def _batch(args: Any, dims: Any) -> Any:
    (valid, x), (at, x_at) = args, dims
    if at is None and not valid.ndim:
        return _drop_unless_p.bind(valid, x), x_at
    (size,) = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
    valid, x = (batching.bdim_at_front(a, d, size) for a, d in zip(args, dims, strict=True))
    return _drop_unless_p.bind(valid, x), 0


_drop_unless_p = core.Primitive("drop_unless")
_drop_unless_p.def_impl(lambda _, x: x)
_drop_unless_p.def_abstract_eval(lambda _, x: x)
mlir.register_lowering(_drop_unless_p, lambda _context, _valid, x: [x])
ad.primitive_jvps[_drop_unless_p] = _jvp
ad.primitive_transposes[_drop_unless_p] = _transpose
batching.primitive_batchers[_drop_unless_p] = _batch
