"""The gradient noise scale: how much the gradients of microbatches differ."""

import functools
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from optaccum._conditional import branch
from optaccum._devices import of_all, squared_norm
from optaccum._extra_args import as_weight
from optaccum._mesh_axes import unreduced, vary, varying
from optaccum._state import read
from optaccum._validate import check_decay, check_loss_reduction, leaf_name
from optaccum._window import SMALLEST, Sums

# Sums of weights beyond this, or below its reciprocal, may have no squares in float32.
LARGEST_SQUARED = 2.0**40
# With less freedom one sample has nearly all the weight, and only rounding errors are left.
LEAST_FREEDOM = 2.0**-10


class NoiseScale(NamedTuple):
    """A running estimate of the gradient noise scale, by :func:`update_noise_scale`.

    Three properties, f32[], are its results. Before the first estimate they are 0, 0 and inf:

    * `trace` estimates tr(Sigma), if a microbatch of weight w has a gradient of covariance
      Sigma / w. By chance it may be negative, and so may `signal`.
    * `signal` estimates `|E g|^2`.
    * `batch_size` is `trace / signal`, the weight of a batch whose gradient has as much noise as
      signal. It is inf if `signal` is not positive.

    Attributes:
        squares: f32[], sum of `w_i |g_i|^2` over the measured microbatches of the open window.
        weight: f32[], sum of their w_i.
        count: f32[], their number.
        trace_sum: f32[], decayed sum of the estimates of `trace`, which only a release changes.
        signal_sum: f32[], decayed sum of the estimates of `signal`, which only a release changes.
        mass: f32[], the divisor of both, 0 before the first estimate.
        gradient_step: i32[], the optimizer's at the last call.
        skipped: i32[], the optimizer's at the last call.
    """

    squares: jax.Array
    weight: jax.Array
    count: jax.Array
    trace_sum: jax.Array
    signal_sum: jax.Array
    mass: jax.Array
    gradient_step: jax.Array
    skipped: jax.Array

    @property
    def trace(self) -> jax.Array:
        return self.trace_sum / jnp.where(self.mass > 0, self.mass, 1)

    @property
    def signal(self) -> jax.Array:
        return self.signal_sum / jnp.where(self.mass > 0, self.mass, 1)

    @property
    def batch_size(self) -> jax.Array:
        known = self.signal > 0
        return jnp.where(known, self.trace / jnp.where(known, self.signal, 1), jnp.inf)


def init_noise_scale() -> NoiseScale:
    """Return the :class:`NoiseScale` before the first microbatch: zeros."""
    return NoiseScale(*jnp.zeros([6], jnp.float32), *jnp.zeros([2], jnp.int32))


def update_noise_scale(
    noise: NoiseScale,
    grads: Any,
    opt_state: Any,
    *,
    weight: jax.typing.ArrayLike | None = None,
    decay: float | jax.Array = 0.99,
    loss_reduction: Literal["mean", "sum"] = "mean",
) -> NoiseScale:
    """Return the estimate with one more microbatch. Call it after each update.

    It reads the window's sums, which stay in the optimizer's state after a release. The m measured
    microbatches have weights w_i and gradients g_i, the window has the mean gradient G and the
    weight W. With `S = sum_i w_i |g_i|^2` and `V = sum_i w_i`::

        trace  = (S - V |G|^2) / (m - V / W)
        signal = |G|^2 - trace / W

    are unbiased for any weights, if g_i has the covariance Sigma / w_i. A release adds both to
    their averages. `batch_size` is the ratio of the averages, in units of `weight`.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, apply_gradients, init_noise_scale, update_noise_scale
    >>> tx = accumulate(2, optax.sgd(0.1))
    >>> params = jnp.zeros(2)
    >>> opt_state, noise = tx.init(params), init_noise_scale()
    >>> for grads in (jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])):
    ...     params, opt_state = apply_gradients(tx, grads, opt_state, params)
    ...     noise = update_noise_scale(noise, grads, opt_state)
    >>> print(noise.trace.round(4), noise.signal.round(4), noise.batch_size.round(4))
    2.0 3.0 0.6667

    Guarantees:
        * Microbatches that are rejected or have weight 0 are not measured.
        * A window has an estimate if its release is measured and m - V / W > 2**-10 (more than one
          microbatch has weight), W is in 2**-40..2**40 and its estimates are finite. Nothing of
          any other reaches the next window.
        * In the jitted step of `apply_gradients` a hold on a GPU or TPU moves no more bytes, as
          norm and addition are fused. On a CPU it reads the gradients once more.
        * With `reduce_axes` in `jax.shard_map` each device gives a sample, so a window of one
          microbatch has an estimate too. The result is replicated. A call reduces three scalars,
          and a release reduces the sums once more.
        * In `jax.shard_map` a sharded model has one norm, by its types. With `check_vma=False` and
          in `jax.pmap` gradients count as replicated.

    Args:
        noise: The estimate so far.
        grads: The gradients of the update, as :func:`optaccum.accumulate` got them.
        opt_state: As for :func:`optaccum.get_state`, after that update.
        weight: Scalar, as the update got it.
        decay: A float in [0, 1), how much of the averages a release keeps.
        loss_reduction: As :func:`optaccum.accumulate` was built, which the state does not show.

    Raises:
        TypeError: if `noise` is not a `NoiseScale`, or if `grads` are unreduced under explicit
            sharding, since they have no norm.
        ValueError: if an argument is out of its range, if the state has several members of
            `jax.vmap`, or as :func:`optaccum.get_state` does.

    References: McCandlish et al., arXiv:1812.06162, appendix A.1, which has equal weights.
    """
    if not isinstance(noise, NoiseScale):
        raise TypeError(
            "`noise` must be what `init_noise_scale` returns, got "
            f"{type(noise).__name__}; the order is (noise, grads, opt_state)"
        )
    summed = check_loss_reduction(loss_reduction) == "sum"
    decay = check_decay("`decay`", decay)
    w = jnp.asarray(1.0 if weight is None else as_weight("`weight`", weight), jnp.float32)
    _check_reduced(grads)
    state = read(opt_state, "update_noise_scale")
    total, released = state.weight, state.released
    # The total has an axis only if each device keeps its weight and sums.
    axes = tuple(sorted(varying(total))) if jnp.ndim(total) else ()

    # `accumulate` rejects a device's weight beyond the bound, or the window is left out.
    counts = (state.skipped == noise.skipped) & (w >= SMALLEST) & (w < LARGEST_SQUARED)
    w = jnp.where(counts, w, 1)
    square = squared_norm(grads, axes)
    sample = square / w if summed else square * w, w, jnp.ones_like(w)
    sample = optax.tree.where(counts, sample, (0, 0, 0))
    if axes:
        sample = lax.psum(vary(sample, axes), axes)
    # Discard stale samples, of a window whose release was not measured.
    stale = noise.gradient_step != state.gradient_step - released
    samples = [x + jnp.where(stale, 0, y) for x, y in zip(sample, noise[:3], strict=True)]

    sums = Sums(total, jax.tree.leaves(state.grad_sum), ())
    step = functools.partial(_average, decay, samples, sums)
    averages = branch(released, step, noise[3:6])
    samples = optax.tree.where(released, [0, 0, 0], samples)
    return NoiseScale(*samples, *averages, gradient_step=state.gradient_step, skipped=state.skipped)


def _average(decay: Any, samples: list[jax.Array], sums: Sums, *old: jax.Array) -> Any:
    """Returns the averages with the estimates of a window, or as they are if it has none."""
    squares, weight, count = samples
    total, grad_sum, _ = of_all(sums)
    # To scale sums before they are squared would cost a CPU a temporary.
    square = squared_norm(grad_sum) / total / total
    freedom = count - weight / total
    known = (total > 1 / LARGEST_SQUARED) & (total < LARGEST_SQUARED) & (freedom > LEAST_FREEDOM)
    trace = (squares - weight * square) / jnp.where(known, freedom, 1)
    signal = square - trace / total
    known &= jnp.isfinite(trace) & jnp.isfinite(signal)
    estimates = trace, signal, jnp.ones_like(trace)
    new = jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, estimates)
    return optax.tree.where(known, new, old)


def _check_reduced(grads: Any) -> None:
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if axes := unreduced(g):
            raise TypeError(
                f"gradient leaf {leaf_name(path)} is unreduced over {sorted(axes)}, and has "
                "no norm before that; use jax.shard_map, where the part of each device is a "
                "sample, or leave `reduce_axes` out"
            )
