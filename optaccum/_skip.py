"""Judge a microbatch by its gradients, where no device may have them whole."""

from typing import Any

import jax
import jax.numpy as jnp

from optaccum import _devices, _mesh_axes, _window


def skip_not_finite(updates: Any, gradient_step: Any, params: Any) -> tuple[jax.Array, Any]:
    """Reject a microbatch whose gradients hold a NaN or an infinity.

    For `should_skip_update_fn`. It decides what `optax.skip_not_finite` does, but by a sum::

        skip = not isfinite(sum_j 0 * g_j)        0 * g is NaN where g is not finite, else 0

    which can be taken of gradients that wait to be reduced over devices, for the reduction of one
    scalar.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, skip_not_finite
    >>> tx = accumulate(2, optax.sgd(0.5), should_skip_update_fn=skip_not_finite)
    >>> params = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(jnp.array([1.0, jnp.nan]), tx.init(params), params)
    >>> print(state.skipped, state.mini_step, state.skip_state)
    1 0 {'should_skip': Array(True, dtype=bool)}

    Args:
        updates: gradients; None leaves pass.
        gradient_step: not used.
        params: not used.

    Returns:
        Whether to skip, bool[], and the report `{"should_skip": bool[]}`.
    """
    del gradient_step, params
    sums: dict[frozenset[str], list] = {}  # by the axes over which they wait to be reduced
    for g in jax.tree.leaves(updates):
        if not jnp.issubdtype(jnp.result_type(g), jnp.inexact):
            continue
        g = jnp.asarray(g)
        # The dtype of the sum must not matter to it: a float64 may not fit into a float32.
        zeros = _window.times(g, jnp.zeros([], g.dtype))
        dtype = jnp.complex64 if jnp.iscomplexobj(g) else jnp.float32
        sums.setdefault(_mesh_axes.unreduced(g), []).append(jnp.sum(zeros, dtype=dtype))
    whole = [
        _devices.along(tuple(axes)).reduce(sum(others, first), ())[0]
        for axes, (first, *others) in sums.items()
    ]
    skip = ~jnp.isfinite(jnp.asarray(sum(whole)))
    return skip, {"should_skip": skip}
