"""`lm.py --noise` lets the window grow, and draws the noise scale beside the loss."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np


class Window(NamedTuple):
    """The numbers of a window that are drawn.

    Attributes:
        step: Gradient steps so far.
        loss: Mean loss per token, in nats.
        tokens: Number of tokens in the window.
        noise_scale: The estimate so far, in tokens.
    """

    step: int
    loss: float
    tokens: float
    noise_scale: float


def window_length(step: jax.typing.ArrayLike, every_k: int, steps: int) -> jax.Array:
    """Return 2, 4, 8, ... microbatches, and `every_k` from the middle of the training on.

    It is never 1, because a window of one microbatch has nothing to compare.
    """
    doublings = max((every_k - 1).bit_length() - 1, 0)
    done = jnp.minimum(2 * doublings * jnp.asarray(step) // steps, doublings)
    return jnp.minimum(2 ** (1 + done), every_k)


def draw(windows: list[Window], output: Path) -> None:
    """Draw the loss, and below it the noise scale with the tokens of each window."""
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
