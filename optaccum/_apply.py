"""From gradients to parameters in one call, with nothing written on a hold."""

import inspect
from typing import Any

from jax import lax
from jax.core import Tracer
import optax

from optaccum import _arguments
from optaccum._accumulate import apply_updates, find_apply


def apply_gradients(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """Update the parameters: `tx.update` and `optax.apply_updates` in one.

    The result is that of the two calls, for any Optax transformation. If `tx` is an
    :func:`accumulate`, the parameters are updated inside its release branch, so that a hold
    neither writes zeros nor touches the parameters. If one is the last link of `tx`, an
    `optax.chain`, the addition is skipped on hold. A parameter whose update is None is kept.

    Donate `params` and `opt_state`, and return them in the order in which they are taken: XLA
    pairs donated inputs with outputs of the same shape in order, and copies where they cross.

    >>> import jax, jax.numpy as jnp, optax
    >>> from optaccum import accumulate, apply_gradients
    >>> tx = accumulate(2, optax.sgd(0.125))
    >>> @jax.jit
    ... def step(params, opt_state, x):
    ...     grads = jax.grad(lambda params: jnp.sum((params - x) ** 2))(params)
    ...     return apply_gradients(tx, grads, opt_state, params)
    >>> params = jnp.zeros(2)
    >>> opt_state = tx.init(params)
    >>> for x in (1.0, 3.0):
    ...     params, opt_state = step(params, opt_state, x)
    ...     print(params)
    [0. 0.]
    [0.5 0.5]

    Args:
        tx: any Optax transformation.
        grads: gradients, a tree like `params`.
        opt_state: the state of `tx`.
        params: parameters. Their dtypes are kept.
        **extra_args: passed on to `tx.update`; `weight=` and `release=` for :func:`accumulate`.

    Returns:
        `(params, opt_state)`.

    Raises:
        TypeError: if `tx` is no transformation.
        Exception: what `tx.update` raises.
    """
    apply = find_apply(getattr(tx, "update", None))
    if apply is not None:
        return apply(grads, opt_state, params, **extra_args)
    _arguments.check_transformation("`tx`", tx)
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
    released = opt_state[-1].released if _ends_with_accumulate(tx) else True
    if not isinstance(released, Tracer):  # outside jit a conditional is compiled in every call
        return apply_updates(params, updates), opt_state
    return lax.cond(released, apply_updates, lambda params, _: params, params, updates), opt_state


def _ends_with_accumulate(tx: optax.GradientTransformation) -> bool:
    """Returns whether the updates are those of an accumulate: exact zeros on a hold.

    A chain is known by its code, and its last link by the function that it closes over. A state
    that ends in an AccumulateState could be anybody's, who may go on to change the updates.
    """
    if getattr(tx.update, "__code__", None) is not _CHAIN_CODE:
        return False
    links = inspect.getclosurevars(tx.update).nonlocals.get("update_fns", (None,))
    return find_apply(links[-1]) is not None


_CHAIN_CODE = getattr(optax.chain(optax.identity()).update, "__code__", ())
