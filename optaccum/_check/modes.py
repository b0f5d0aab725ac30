"""Modes of differentiation: those that a rule for reverse mode cannot serve."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from optaccum._check.arguments import describe


def check_closed_over(value: Any, differentiated: bool) -> None:
    """Raises if a value that `fun` closes over is differentiated."""
    if differentiated:
        raise TypeError(
            f"`fun` closes over a value, {describe(value)}, that is being differentiated, but only "
            "its arguments have gradients here; pass it as an argument"
        )


def check_reverse(tree: Any) -> Any:
    """Returns `tree`, of which forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) raises.

    A tangent passes through a primitive that can be transposed, which reverse mode does before
    anything runs, and neither evaluated nor lowered, which forward mode would have to.
    """

    def leaf(x):
        return _reverse_only_p.bind(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(leaf, tree)


def _refuse(*_, **__):
    raise TypeError(
        "optaccum.microbatched has no forward mode (jax.jvp, jax.jacfwd, jax.linearize, and "
        "jax.hessian, which needs it): it would have to run each microbatch with its tangents; "
        "differentiate in reverse (jax.grad, jax.vjp, jax.jacrev), or call `fun` itself"
    )


_reverse_only_p = Primitive("reverse_only")
_tangent_p = Primitive("reverse_only_tangent")
_reverse_only_p.def_impl(lambda x: x)
_reverse_only_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_reverse_only_p, lambda _, x: [x])
batching.defvectorized(_reverse_only_p)
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_tangent_p, _refuse)
batching.primitive_batchers[_tangent_p] = _refuse
ad.defjvp(_reverse_only_p, lambda tangent, _: _tangent_p.bind(tangent))
ad.deflinear2(_tangent_p, lambda cotangent, _: [cotangent])
