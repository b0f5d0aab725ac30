"""Draw the figures of the READMEs from results of the benchmarks, one row of panels a device."""

from collections.abc import Sequence
import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

# From the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, SKY, VERMILION, BLACK, GREY = "#0072B2", "#56B4E9", "#D55E00", "#000000", "#9A9A9A"
STYLES = {  # colour and marker
    "optaccum.apply_gradients": (BLUE, "o"),
    "optaccum, drop-in update": (SKY, "s"),
    "optax.MultiSteps": (VERMILION, "^"),
    "AdamW alone": (BLACK, "x"),
}
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 160,
}
WIDTH = 9.0


def _millions(x: float, _: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def draw(results: dict[str, list[dict[str, Any]]], folder: pathlib.Path) -> None:
    """Draws every figure that there are results for.

    Args:
        results: the results of each benchmark, by its name.
        folder: where to put the pictures.
    """
    figures = {"overhead": draw_overhead, "memory": draw_memory, "scaling": draw_scaling}
    with plt.rc_context(STYLE):
        for name, draw_figure in figures.items():
            if figure := draw_figure(results):
                # Without the version of matplotlib, the same figures give the same file.
                figure.savefig(folder / f"{name}.png", metadata={"Software": None})
                plt.close(figure)


def main_run(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the run of `benchmarks.overhead` that stands for all: AdamW's, or else the first."""
    return next((run for run in result["runs"] if run["inner"] == "adamw"), result["runs"][0])


def draw_overhead(results: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Returns bars of one window against its bandwidth floor, a panel for each inner optimizer."""
    found = results["overhead"]
    if not found:
        return None
    height = 1.2 + 0.27 * max(len(run["contenders"]) for result in found for run in result["runs"])
    figure, lines = _lines_of_panels(found, height)
    for result, line in zip(found, lines, strict=True):
        grid = line.subplots(1, len(result["runs"]), sharey=True, squeeze=False)[0]
        for run, axes in zip(result["runs"], grid, strict=True):
            rows = run["contenders"]
            _bars(axes, rows, [row["ratio_to_floor"]["window"] for row in rows], "{:.2f}")
            axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
            size = f"{run['parameter_bytes'] / 1e6:.3g} MB"
            axes.set(title=f"{run['inner']}, k = {result['every_k']}, {size}")
            axes.set(xlabel="window, bandwidth floor = 1")
    return figure


def draw_memory(results: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Returns bars of what the optimizer's step and the whole training step take in memory."""
    panels = []
    for result in results["overhead"]:
        rows = main_run(result)["contenders"]
        values, text = [row["temporaries"] for row in rows], result["device"]
        panels.append(
            (
                rows,
                values,
                f"Temporaries of the optimizer's step,\n{text}",
                "sizes of the parameters",
                "{:.1f}",
            )
        )
    for result in results["train_step"]:
        rows = result["contenders"]
        values = [row["peak_bytes"] / 1e6 for row in rows]
        text = f"{result['parameters'] / 1e6:.3g} M parameters, {result['device']}"
        panels.append((rows, values, f"Peak of a training step,\n{text}", "MB", "{:,.0f}"))
    if not panels:
        return None
    height = 0.8 + 0.27 * max(len(rows) for rows, *_ in panels)
    lines = -(-len(panels) // 2)
    figure, grid = plt.subplots(
        lines, 2, figsize=(WIDTH, height * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for (rows, values, title, label, form), axes in zip(panels, grid.flat, strict=False):
        _bars(axes, rows, values, form)
        axes.set(title=title, xlabel=label)
    return figure


def draw_scaling(results: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Returns lines of time against parameters, leaves and window length, a row for each device."""
    panels = {
        "parameters": ("hold (solid), release (dashed), ms", {"hold_ms": "-", "release_ms": "--"}),
        "leaves": ("compile (solid), trace (dashed), s", {"compile_s": "-", "trace_s": "--"}),
        "every_k": ("hold (solid), mean (dashed), ms", {"hold_ms": "-", "microbatch_ms": "--"}),
    }
    labels = {"parameters": "parameters", "leaves": "leaves", "every_k": "microbatches a window, k"}
    found = [result for result in results["scaling"] if result["sweeps"].keys() & panels.keys()]
    if not found:
        return None
    figure, lines = _lines_of_panels(found, 3.2)
    for result, line in zip(found, lines, strict=True):
        shown = {}
        for (sweep, (label, quantities)), axes in zip(
            panels.items(), line.subplots(1, len(panels)), strict=True
        ):
            axes.set(title=label, xlabel=labels[sweep])
            if sweep in result["sweeps"]:
                shown |= _curves(axes, sweep, result["sweeps"][sweep]["rows"], quantities)
        line.legend(shown.values(), shown, loc="outside lower center", ncols=4)
    return figure


def _lines_of_panels(results: Sequence[dict[str, Any]], height: float) -> tuple[Figure, Any]:
    """Returns a figure and a part of it for each device, titled with its name."""
    figure = plt.figure(figsize=(WIDTH, height * len(results)), layout="constrained")
    lines = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for result, line in zip(results, lines, strict=True):
        line.suptitle(result["device"], fontsize=11, fontweight="bold")
    return figure, lines


def _colour(name: str) -> str:
    ours = SKY if name.startswith("optaccum") else GREY
    return STYLES.get(name, (ours, ""))[0]


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], values: Sequence[Any], form: str) -> None:
    """Draws horizontal bars with their values, and quartiles where there are any."""
    medians = [x["median"] if isinstance(x, dict) else x for x in values]
    ends = [x["q3"] if isinstance(x, dict) else x for x in values]
    names = [row["name"] + ("" if row.get("equivalent", True) else " *") for row in rows]
    colours = [_colour(row["name"]) for row in rows]
    bars = axes.barh(names, medians, color=colours, height=0.7)
    for bar, row in zip(bars, rows, strict=True):
        if not row.get("equivalent", True):
            bar.set(hatch="///", facecolor="white", edgecolor=GREY)
    for y, (value, median, end) in enumerate(zip(values, medians, ends, strict=True)):
        if isinstance(value, dict):
            axes.plot((value["q1"], value["q3"]), (y, y), color=BLACK, linewidth=1)
        axes.annotate(
            form.format(median), (end, y), (3, 0), textcoords="offset points", va="center", size=8
        )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.15 * max(max(ends), 0.1))


def _curves(
    axes: Axes, variable: str, rows: Sequence[dict[str, Any]], quantities: dict[str, str]
) -> dict[str, Any]:
    """Draws a line for each contender and quantity, and returns one line a contender, by name."""
    drawn = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        colour, marker = STYLES[name]
        for quantity, dashes in quantities.items():
            points = [(r[variable], r[quantity]) for r in rows if r["name"] == name and r[quantity]]
            x, y = zip(
                *((x, y["median"] if isinstance(y, dict) else y) for x, y in points), strict=True
            )
            (line,) = axes.loglog(x, y, dashes, color=colour, marker=marker, markersize=4)
            drawn.setdefault(name, line)
    values = sorted({row[variable] for row in rows})
    decades = [x for x in values if math.log10(x).is_integer()]
    axes.set_xticks(decades if len(decades) > 1 else values)
    axes.xaxis.set_major_formatter(FuncFormatter(_millions))
    axes.xaxis.set_minor_locator(NullLocator())
    # Whole decades, or noise would fill the panel of a flat line.
    low, high = (math.log10(y) for y in axes.dataLim.intervaly)
    axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return drawn
