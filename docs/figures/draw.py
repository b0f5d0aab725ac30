"""Draw the pictures of the explanations: `python docs/figures/draw.py`.

Each is drawn on a white card, so that it can be read on a dark page too, and is narrow enough for a
phone. A picture has one thought, and no text below 9 points.
"""

from collections.abc import Sequence
import itertools
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
import matplotlib.pyplot as plt
import numpy as np

# From the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, SKY, VERMILION, BLACK = "#0072B2", "#56B4E9", "#D55E00", "#222222"
GREY, PALE, LINE = "#777777", "#EEEEEE", "#BBBBBB"
WINDOWS = "#CDE6F7", "#FBE3CF", "#D5EEDF"  # a colour for each window
DARK = BLUE, VERMILION, "#007A57"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "font.size": 11,
    "svg.fonttype": "path",
    "svg.hashsalt": "optaccum",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.12,
}
WIDTH = 6.4


def canvas(height: float, xlim: tuple[float, float], ylim: tuple[float, float]):
    """Returns a figure and empty axes for a drawing."""
    figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    axes.set(xlim=xlim, ylim=ylim)
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """Draws a box with round corners; x and y are its lower left corner."""
    style = {"edgecolor": LINE, "facecolor": "white", "linewidth": 1, **style}
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))


def arrow(axes: Axes, start: Sequence[float], end: Sequence[float], **style: Any) -> None:
    """Draws an arrow from one point to another."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": BLACK, "shrinkA": 0, **style}
    axes.add_patch(FancyArrowPatch((start[0], start[1]), (end[0], end[1]), shrinkB=0, **style))


def say(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Writes a text, centred unless said otherwise."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": BLACK, **style})


def draw_time_line() -> Figure:
    """Draws three windows: a full one, one with a rejected and an empty microbatch, a short one."""
    # Each call: its window, what it brings, and mini_step after it.
    calls = [
        (0, "", 1), (0, "", 2), (0, "", 3), (0, "", 0),
        (1, "", 1), (1, "NaN", 1), (1, "", 2), (1, "empty", 3), (1, "", 0),
        (2, "", 1), (2, "", 0),
    ]  # fmt: skip
    figure, axes = canvas(3.6, (-2.05, 11.25), (-0.8, 6.5))
    held = 0
    for i, (window, event, mini_step) in enumerate(calls):
        opens = i == 0 or calls[i - 1][0] != window
        closes = mini_step == 0
        # The microbatch.
        style = {"facecolor": WINDOWS[window], "edgecolor": DARK[window]}
        if event:
            style = {"facecolor": "white", "edgecolor": GREY, "linestyle": "--"}
        box(axes, i + 0.1, 4.6, 0.8, 0.8, **style)
        if event == "NaN":
            say(axes, i + 0.5, 5, "NaN", size=9, color=VERMILION, weight="bold")
        if event == "empty":
            say(axes, i + 0.5, 5, "0", size=11, color=GREY, weight="bold")
        # The sum after it.
        held = (0 if opens else held) + (not event)
        for level in range(held):
            new = level == held - 1 and not event
            color = DARK[window] if new else WINDOWS[window]
            y = 2.35 + 0.42 * level
            axes.add_patch(Rectangle((i + 0.15, y), 0.7, 0.38, color=color, linewidth=0))
        # The counter and the step.
        say(axes, i + 0.5, 1.75, str(mini_step), color=GREY if event else BLACK)
        if closes:
            arrow(axes, (i + 0.5, 1.35), (i + 0.5, 0.55), linewidth=2, mutation_scale=15)
            say(axes, i + 0.5, 0.15, "step", weight="bold")
    starts = [0, 4, 9, 11]
    for window, (begin, end) in enumerate(itertools.pairwise(starts)):
        name = ("a full window", "two strange microbatches", "a short one")[window]
        axes.plot([begin + 0.1, end - 0.1], [5.75] * 2, color=DARK[window], linewidth=3)
        say(axes, (begin + end) / 2, 6.2, name, color=DARK[window], weight="bold", size=10)
        if window:
            axes.plot([begin] * 2, [1.5, 5.4], color=LINE, linewidth=1, linestyle=":")
    for x, y in ((4, 3.55), (9, 3.85)):
        say(axes, x + 1, y, "overwritten", size=9, color=GREY)
        arrow(axes, (x + 0.5, y - 0.25), (x + 0.5, 2.8), color=GREY, mutation_scale=8)
    notes = {(5.5, 0.8): "rejected:\nnot counted", (7.5, 0.8): "empty:\ncounted"}
    for (x, y), text in (notes | {(10.1, -0.5): "release=True"}).items():
        say(axes, x, y, text, size=9, color=GREY)
    for y, text in {5: "microbatch", 3.2: "sum", 1.75: "mini_step", 0.15: "optimizer"}.items():
        say(axes, -0.15, y, text, ha="right", size=10)
    return figure


def draw_mean_of_means() -> Figure:
    """Draws ten tokens as squares, whose area is what a token counts."""
    figure, axes = canvas(2.4, (0, 16.1), (-0.3, 5.4))
    axes.set_aspect("equal")  # areas are what is compared
    for left, title, shares, color in (
        (0.0, "mean of means", (1 / 4, 1 / 16), VERMILION),
        (7.9, "weight=tokens", (1 / 10, 1 / 10), BLUE),
    ):
        say(axes, left + 3.8, 5.1, title, color=color, weight="bold", size=13)
        for y, tokens, share in ((3.5, 2, shares[0]), (1.1, 8, shares[1])):
            name = "short" if tokens == 2 else "long"
            say(axes, left + 1.2, y, name, ha="right", size=10)
            side = 2.2 * share**0.5
            for token in range(tokens):
                corner = left + 1.5 + token * (side + 0.1), y - side / 2
                axes.add_patch(Rectangle(corner, side, side, color=color, linewidth=0))
            parts = f"1/{round(1 / share)} each"
            say(axes, left + 1.5, y - side / 2 - 0.4, parts, ha="left", size=10, color=GREY)
    axes.plot([7.5] * 2, [-0.2, 5.3], color=LINE, linewidth=1)
    return figure


def draw_hold() -> Figure:
    """Draws what a hold and a release of AdamW read and write."""
    figure, axes = canvas(3.7, (0, 12.6), (-1.2, 7.3))
    names = "gradient", "sum", "parameters", "1st moment", "2nd moment"
    columns = (
        (3.3, "a hold", (1, 2, 0, 0, 0), "3 P moved"),
        (8.1, "a release", (1, 2, 2, 2, 2), "9 P moved"),
    )
    for row, name in enumerate(names):
        say(axes, 2.9, 5.5 - 1.25 * row, name, ha="right", size=11)
    for left, title, passes, total in columns:
        say(axes, left + 2, 7.0, title, weight="bold", size=13)
        for row, count in enumerate(passes):
            y = 5.5 - 1.25 * row
            color, edge = (WINDOWS[0], BLUE) if count else (PALE, LINE)
            box(axes, left, y - 0.42, 1.9, 0.84, facecolor=color, edgecolor=edge)
            if count:
                arrow(axes, (left + 2.0, y + 0.17), (left + 2.8, y + 0.17), color=BLUE)
                say(axes, left + 2.9, y + 0.17, "read", ha="left", size=9, color=BLUE)
            if count == 2:
                arrow(axes, (left + 2.8, y - 0.22), (left + 2.0, y - 0.22), color=VERMILION)
                say(axes, left + 2.9, y - 0.22, "write", ha="left", size=9, color=VERMILION)
            if not count:
                say(axes, left + 2.1, y, "not touched", ha="left", size=9, color=GREY)
        say(axes, left + 2, -0.7, total, weight="bold", size=13)
    return figure


def draw_one_reduction() -> Figure:
    """Draws four devices that reduce after each microbatch, and once per window."""
    figure, axes = canvas(4.1, (-1.9, 11.2), (-0.3, 9.9))
    halves = (5.1, "reduced per microbatch", True), (0, "reduced once per window", False)
    for base, title, every in halves:
        color = VERMILION if every else BLUE
        say(axes, -0.2, base + 4.3, title, ha="left", weight="bold", size=12, color=color)
        x = 0.0
        for microbatch in range(4):
            for device in range(4):
                box(axes, x, base + 0.85 * device, 1.7, 0.65, facecolor=PALE)
            x += 1.75
            if every or microbatch == 3:
                axes.add_patch(Rectangle((x, base - 0.1), 0.55, 3.4, color=color, linewidth=0))
                say(axes, x + 0.275, base + 1.6, "reduce", rotation=90, color="white", size=9)
                x += 0.6
        say(axes, x + 0.1, base + 1.6, "step", ha="left", weight="bold")
        for device in range(4):
            say(
                axes, -0.15, base + 0.85 * device + 0.32, f"device {3 - device}", ha="right", size=9
            )
    return figure


def draw_when_not() -> Figure:
    """Draws the rows that a run needs against its batch, by the model of arXiv:1812.06162."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.3), layout="constrained")
    batch = np.logspace(-2, 2, 200)
    axes.loglog(batch, 1 + batch, color=BLUE, linewidth=3)
    axes.axvspan(1, 100, color=WINDOWS[1], linewidth=0)
    axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
    say(axes, 0.1, 25, "noisy gradients:\nany batch costs the same", size=11, color=BLUE)
    say(axes, 10, 1.9, "good gradients:\na larger batch\nis wasted work", size=11, color=VERMILION)
    axes.set(xlim=(0.01, 100), ylim=(0.7, 120))
    axes.set_xticks([0.01, 0.1, 1, 10, 100], ["1/100", "1/10", "noise scale", "10 x", "100 x"])
    axes.set_yticks([1, 10, 100], ["least", "10 x", "100 x"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="batch size", ylabel="rows to reach a loss")
    return figure


def main() -> None:
    """Draws every picture beside this file."""
    folder = pathlib.Path(__file__).parent
    figures = {
        "time_line": draw_time_line,
        "mean_of_means": draw_mean_of_means,
        "hold": draw_hold,
        "one_reduction": draw_one_reduction,
        "when_not": draw_when_not,
    }
    with plt.rc_context(STYLE):
        for name, draw in figures.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
