"""What `lm.py --noise` adds: a window that grows, and the noise scale drawn beside the loss."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np


class Window(NamedTuple):
    """What is remembered of a window.

    Attributes:
        step: gradient steps so far.
        loss: mean loss per token, in nats.
        tokens: how many it held.
        noise_scale: in tokens, as far as it is known by then.
    """

    step: int
    loss: float
    tokens: float
    noise_scale: float


def window_length(step: jax.typing.ArrayLike, every_k: int, steps: int) -> jax.Array:
    """Return 2, 4, 8, ... microbatches, `every_k` from the middle of the training on.

    Windows of one microbatch would have nothing to compare.
    """
    doublings = max((every_k - 1).bit_length() - 1, 0)
    done = jnp.minimum(2 * doublings * jnp.asarray(step) // steps, doublings)
    return jnp.minimum(2 ** (1 + done), every_k)


def draw(windows: list[Window], output: Path) -> None:
    """Draw the loss above, and the noise scale with the windows' tokens below."""
    figure = Figure(figsize=(7, 5), dpi=200, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps, losses, tokens, scales = np.array(windows).T
    few = min(10, len(windows))
    smooth = np.ones(few) / few
    above.plot(steps[few - 1 :], np.convolve(losses, smooth, "valid"), color="#0072b2", linewidth=2)
    above.set(ylabel="nats per byte, mean of 10 steps")
    above.set_title("The loss falls, and the gradients become noisier")
    shown = np.isfinite(scales) & (scales > 0)
    below.plot(steps[shown], scales[shown], color="#d55e00", linewidth=2, label="noise scale")
    below.plot(steps, tokens, ".", color="#9fd3f3", markersize=3, label="batch of a step")
    below.set(xlabel="gradient step", ylabel="bytes", yscale="log")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(output)
