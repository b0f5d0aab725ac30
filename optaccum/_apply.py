"""From gradients to parameters in one call, with nothing written on a hold."""

from typing import Any, TypeVar
import warnings

import jax
import optax

from optaccum._accumulate import apply_updates, find_apply
from optaccum._state import AccumulateState
from optaccum._validate import check_transformation

Params = TypeVar("Params")


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: optax.OptState,
    params: Params,
    /,
    **extra_args: Any,
) -> tuple[Params, optax.OptState]:
    """Update the parameters: `tx.update` and `optax.apply_updates` in one.

    The result is that of the two calls, for any Optax transformation. If `tx` is an
    :func:`accumulate`, the parameters are updated inside its release branch, so that a hold
    neither writes zeros nor touches the parameters. Inside a larger transformation, such as an
    `optax.chain`, it costs as much as the two calls, so let :func:`accumulate` stand outermost.
    A parameter whose update is None is kept.

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

    Warns:
        UserWarning: if in an `optax.chain` an :func:`accumulate` of a stateless optimizer stands
            before a link that keeps state.

    Raises:
        TypeError: if `tx` is no transformation.
        Exception: what `tx.update` raises.
    """
    apply = find_apply(getattr(tx, "update", None))
    if apply is not None:
        return apply(grads, opt_state, params, **extra_args)
    check_transformation("`tx`", tx)
    _warn_if_misplaced(opt_state)
    tree: Any = params
    updates, opt_state = tx.update(grads, opt_state, tree, **extra_args)
    return apply_updates(tree, updates), opt_state


def _warn_if_misplaced(state: Any) -> None:
    """Warns of a chain in which zeros of an accumulator reach a link that keeps state."""
    bare = False
    for link in jax.tree.leaves(state, is_leaf=lambda x: type(x) is not tuple):
        if isinstance(link, AccumulateState):
            bare = not jax.tree.leaves(link.inner_state)
        elif bare and jax.tree.leaves(link):
            message = (
                "`accumulate` stands in front of a link that keeps state, "
                f"{type(link).__name__}, which takes the zeros of every hold for gradients; put "
                "the links after it inside: `accumulate(k, optax.chain(...))`"
            )
            warnings.warn(message, UserWarning, stacklevel=3)
            return
