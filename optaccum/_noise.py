"""How much the gradients of microbatches differ: the gradient noise scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaccum._core.traced import where
from optaccum._state import get_state


class NoiseScale(NamedTuple):
    """What :func:`noise_scale` returns.

    Attributes:
        trace: f32[], estimate of tr(Sigma), where Sigma / w is the covariance of the gradient of a
            microbatch of weight w. By chance it may be negative.
        signal: f32[], estimate of `|E g|^2`. By chance it may be negative.
        batch_size: f32[], `trace / signal`, in units of `weight`: the weight of a batch whose
            gradient has as much noise as signal.
    """

    trace: jax.Array
    signal: jax.Array
    batch_size: jax.Array


def noise_scale(opt_state: Any) -> NoiseScale:
    """Return the gradient noise scale that an `accumulate(..., measure_noise=)` has measured.

    For the measured microbatches M of a window, of weights w_i and gradients g_i, and the window's
    mean gradient G and weight W, with `S = sum_M w_i |g_i|^2`, `V = sum_M w_i` and `m = |M|`::

        trace  = (S - V |G|^2) / (m - V / W)
        signal = |G|^2 - trace / W

    are free of bias for any weights, if g_i has the covariance Sigma / w_i. Both are averaged over
    windows with the factor `noise_decay`; the ratio of the averages is taken here.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, noise_scale
    >>> tx = accumulate(2, optax.sgd(0.1), measure_noise="all")
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> for grads in ([3.0, 0.0], [1.0, 0.0]):
    ...     _, state = tx.update(jnp.array(grads), state, params)
    >>> trace, signal, batch_size = noise_scale(state)
    >>> print(trace.round(4), signal.round(4), batch_size.round(4))
    2.0 3.0 0.6667

    Guarantees:
        * `batch_size` counts what `weight` counts: tokens, examples, or microbatches without one.
        * Before the first estimate all three are NaN. Where `signal` is not positive `batch_size`
          is inf, and where `trace` is negative so is it. Both are signs of too few windows.
        * Microbatches that are rejected or of weight 0 are not measured. A window tells nothing if
          m - V / W is at most 2**-10 (one microbatch has all of the weight, or nearly all on one
          device), if W is outside of 2**-40..2**40, where sums have no squares in float32,
          or if its estimates are not finite.
        * With `reduce_axes` in `jax.shard_map` the part of each device is a sample of its own, so
          that windows of one microbatch tell something too.
        * The pieces of a model in `jax.shard_map` are known by their types. With `check_vma=False`
          and in `jax.pmap` there are none, and gradients are taken for whole.

    Args:
        opt_state: as for :func:`optaccum.get_state`.

    Raises:
        ValueError: if the optimizer does not measure; as :func:`optaccum.get_state` does.

    References: McCandlish et al., arXiv:1812.06162, appendix A.1, which has equal weights.
    """
    leaves = jax.tree.leaves(getattr(get_state(opt_state).noise, "averages", ()))
    if not leaves:
        raise ValueError(
            "the optimizer has not measured its noise; build it with "
            "`accumulate(..., measure_noise='first')`"
        )
    trace, signal, mass = leaves
    known = mass > 0
    divisor = where(known, mass, 1.0)
    unknown = jnp.float32(jnp.nan)
    trace, signal = (where(known, x / divisor, unknown) for x in (trace, signal))
    positive = signal > 0
    ratio = where(positive, trace / where(positive, signal, 1.0), jnp.float32(jnp.inf))
    return NoiseScale(trace, signal, where(known, ratio, unknown))
