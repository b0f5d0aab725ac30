"""The gradient noise scale: what the microbatches of a window tell of the gradient's variance.

Their gradients are samples of one gradient, and in a window they pass by anyway. With the squared
norms of some of them and that of their mean, both moments can be estimated without a bias.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from optaccum._core.devices import Whole, vary, varying
from optaccum._core.traced import both, branch, where
from optaccum._core.window import SMALLEST, at_least_float32, select

# Sums of weights beyond this, or below its reciprocal, may have no squares in float32.
LARGEST_SQUARED = 2.0**40
# With less freedom one sample has nearly all the weight, and rounding is all that is left.
LEAST_FREEDOM = 2.0**-10


class Samples(NamedTuple):
    """Sums over the measured microbatches of a window, and of a device where it has its own.

    Attributes:
        squares: f32[], sum of w_i |g_i|^2.
        weight: f32[], sum of w_i.
        count: f32[], how many there are.
    """

    squares: jax.Array
    weight: jax.Array
    count: jax.Array


class Averages(NamedTuple):
    """Decayed sums of the estimates of windows; only a release changes them.

    Attributes:
        trace: f32[], of the estimates of tr(Sigma).
        signal: f32[], of the estimates of |E g|^2.
        mass: f32[], what both are to be divided by; 0 before the first estimate.
    """

    trace: jax.Array
    signal: jax.Array
    mass: jax.Array


class Noise(NamedTuple):
    """What an optimizer that measures the noise remembers of it.

    Attributes:
        samples: of the open window.
        averages: of the windows before it.
    """

    samples: Samples
    averages: Averages


def start(over: Whole) -> Noise:
    """Returns what is known before the first microbatch, as a state keeps it."""
    zeros = jnp.zeros([3], jnp.float32)
    return Noise(over.store(over.share(Samples(*zeros))), Averages(*zeros))


def measure(
    kept: Noise | tuple[()],
    grads: Any,
    weight: jax.Array | None,
    mode: str | None,
    over: Whole,
    *,
    first: jax.Array | bool,
    accept: jax.Array | bool,
    summed: bool,
) -> tuple[Any, Any]:
    """Returns the samples with a microbatch, if it is one to measure, and the averages.

    Where only the first of a window is measured, the norm is behind a conditional. XLA for GPUs and
    TPUs fuses the norms of all with the additions, that for CPUs reads the gradients once more.

    Args:
        kept: in the state; () where nothing is measured.
        grads: of the microbatch.
        weight: f32[], or None for 1.
        mode: "first" to measure the first of a window, "all" for every microbatch, or None: then
            a window that was measured in part by another transformation is not measured at all.
        over: where the sums are.
        first: bool[], whether this microbatch opens the window.
        accept: bool[], whether it is counted.
        summed: whether `grads` is that of a sum over what `weight` counts.
    """
    if not kept:
        return (), ()
    samples, averages = kept
    before = over.load(samples)
    if mode is None:  # those of another window must not be taken for this one's
        return over.store(_where(accept, jax.tree.map(jnp.zeros_like, before), before)), averages
    old = jax.tree.map(lambda x: select(first, jnp.zeros_like(x), x), before)
    wanted = accept if weight is None else both(accept, weight >= SMALLEST)
    if mode == "first":
        wanted = both(wanted, old.count == 0)
    pieces = _by_axes(grads, over.axes)
    zeros = tuple(vary(jnp.zeros([], jnp.float32), (*over.axes, *axes)) for axes in pieces)

    def norms(*_):
        return tuple(_squared_norm(leaves) for leaves in pieces.values())

    found = branch(wanted, wanted, norms, zeros) if mode == "first" else norms()
    square = _joined(found, pieces)
    factor = jnp.ones([], jnp.float32) if weight is None else weight
    divisor = select(wanted, factor, jnp.ones_like(factor))
    square = square / divisor if summed else square * factor
    new = Samples(old.squares + square, old.weight + factor, old.count + 1)
    return over.store(_where(accept, _where(wanted, new, old), before)), averages


def update(
    averages: Any, samples: Any, grad_sum: Any, weight: jax.Array, decay: float | jax.Array
) -> Any:
    """Returns `averages` with the estimates of a window; () where nothing is measured.

    Its mean is never written: its norm is that of the sums, which are read once more.

    Args:
        averages: so far.
        samples: of the window, of all devices.
        grad_sum: its weighted sum of gradients.
        weight: f32[], its weight.
        decay: of the averages.
    """
    if not averages:
        return averages
    weight = select(weight > 0, weight, jnp.ones_like(weight))
    square = squared_norm(grad_sum) / weight / weight
    freedom = samples.count - samples.weight / weight
    # To scale sums before they are squared would cost a CPU a temporary.
    known = (freedom > LEAST_FREEDOM) & (weight > 1 / LARGEST_SQUARED) & (weight < LARGEST_SQUARED)
    divisor = select(known, freedom, jnp.ones_like(freedom))
    trace = (samples.squares - samples.weight * square) / divisor
    signal = square - trace / weight
    usable = known & jnp.isfinite(trace) & jnp.isfinite(signal)
    own = Averages(trace, signal, jnp.ones_like(trace))
    new = jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, averages, own)
    return where(usable, new, averages)


def squared_norm(tree: Any) -> jax.Array:
    """Returns |tree|^2, f32[], of all its pieces on the devices of a `jax.shard_map`."""
    pieces = _by_axes(tree, ())
    return _joined([_squared_norm(leaves) for leaves in pieces.values()], pieces)


def _by_axes(tree: Any, own: tuple[str, ...]) -> dict[tuple[str, ...], list[jax.Array]]:
    """Returns the leaves by the axes, but its `own`, over which a device has a piece of them."""
    pieces = {}
    for x in map(jnp.asarray, jax.tree.leaves(tree)):
        if jnp.issubdtype(x.dtype, jnp.inexact):  # the others are sums of nothing
            pieces.setdefault(tuple(sorted(varying(x) - set(own))), []).append(x)
    return pieces


def _squared_norm(leaves: list[jax.Array]) -> jax.Array:
    wide = [x.astype(at_least_float32(x.dtype)) for x in leaves]
    return optax.tree.norm(wide, squared=True).astype(jnp.float32)


def _joined(norms: Any, pieces: dict[tuple[str, ...], Any]) -> jax.Array:
    whole = [lax.psum(x, axes) if axes else x for x, axes in zip(norms, pieces, strict=True)]
    return sum(whole, jnp.zeros([], jnp.float32))


def _where(predicate: jax.Array | bool, on_true: Any, on_false: Any) -> Any:
    return jax.tree.map(lambda x, y: select(predicate, x, y), on_true, on_false)
