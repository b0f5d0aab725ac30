"""Judge a microbatch by its gradients, which may be unreduced."""

from typing import Any

import jax
import jax.numpy as jnp

from optaccum._mesh_axes import unreduced
from optaccum._window import times


def skip_not_finite(updates: Any, gradient_step: Any, params: Any) -> tuple[jax.Array, Any]:
    """Reject a microbatch whose gradients hold a NaN or an infinity.

    For `should_skip_update_fn`. It decides like `optax.skip_not_finite`, but by a sum::

        skip = not isfinite(sum_j 0 * g_j)        0 * g is NaN if g is not finite, else 0

    so it takes unreduced gradients too, and reduces one scalar.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, skip_not_finite
    >>> tx = accumulate(2, optax.sgd(0.5), should_skip_update_fn=skip_not_finite)
    >>> params = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(jnp.array([1.0, jnp.nan]), tx.init(params), params)
    >>> print(state.skipped, state.mini_step, state.skip_state)
    1 0 {'should_skip': Array(True, dtype=bool)}

    Args:
        updates: Gradients.
        gradient_step: Not used.
        params: Not used.

    Returns:
        Whether to skip, bool[], and the report `{"should_skip": bool[]}`.
    """
    del gradient_step, params
    sums: dict[frozenset[str], jax.Array] = {}  # by the axes over which they are unreduced
    for g in jax.tree.leaves(updates):
        if jnp.issubdtype(jnp.result_type(g), jnp.inexact):
            g = jnp.asarray(g)
            # Zeros first, since a float64 may not fit into the dtype of the sum.
            zeros = times(g, jnp.zeros([], g.dtype))
            dtype = jnp.complex64 if jnp.iscomplexobj(g) else jnp.float32
            total, axes = jnp.sum(zeros, dtype=dtype), unreduced(g)
            sums[axes] = sums[axes] + total if axes in sums else total
    whole = [jax.reshard(x, jax.P()) if axes else x for axes, x in sums.items()]
    skip = ~jnp.isfinite(jnp.asarray(sum(whole)))
    return skip, {"should_skip": skip}
