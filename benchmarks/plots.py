"""Draw the figures of the READMEs from results of the benchmarks.

A figure has a sentence as its title, one unit, and a legend that names each colour.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.compiled_tables import TARGETS
from benchmarks.contenders import ALONE, APPLY_GRADIENTS, MULTI_STEPS, UPDATE
from benchmarks.overhead import main_run
from benchmarks.tables import middle, name_of

# From the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, SKY, VERMILION, BLACK, GREY = "#0072B2", "#56B4E9", "#D55E00", "#000000", "#9A9A9A"
CHIPS = {"h100": "#009E73", "v5e": "#E69F00", "v6e": "#CC79A7", "cpu": GREY}
KINDS = {APPLY_GRADIENTS: BLUE, "optaccum, other ways": SKY, MULTI_STEPS: VERMILION, "others": GREY}
LINES = {APPLY_GRADIENTS: (BLUE, "o"), UPDATE: (SKY, "s"), MULTI_STEPS: (VERMILION, "^")}
LINES |= {ALONE: (BLACK, "x")}  # colour and marker
STYLE: dict[Any, Any] = {
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4"},
    **{"axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False},
    **{"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "figure.titleweight": "bold"},
    **{"savefig.bbox": "tight", "savefig.dpi": 160},
}
WIDTH = 9.0
BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 8}


def draw(results: Mapping[str, Sequence[Any]], folder: pathlib.Path) -> None:
    """Draws every figure that there are results for, by the name of their benchmark."""
    figures: dict[str, tuple[str, Callable[[Any], Figure | None]]] = {
        "compiled": ("compiled", draw_compiled),
        "overhead": ("overhead", draw_overhead),
        "memory": ("train_step", draw_memory),
        "scaling": ("scaling", draw_scaling),
        "compilation": ("scaling", draw_compilation),
    }
    with plt.rc_context(STYLE):
        for name, (benchmark, draw_figure) in figures.items():
            for result in results[benchmark]:
                # The first stands for all devices in the READMEs, which is a CPU.
                device = "" if result is results[benchmark][0] else f"-{result['file']}"
                if figure := draw_figure(result):
                    # Without the version of matplotlib, the same figures give the same file.
                    figure.savefig(folder / f"{name}{device}.png", metadata={"Software": None})
                    plt.close(figure)


def draw_compiled(result: Any) -> Figure | None:
    found = [row for row in result["optimizer"] if row["inner"] == "adamw"]
    found = [row for row in found if "flax" not in row["name"]]  # they are the same programs
    names = {row["name"]: name_of(row) for row in found}
    chips = [chip for chip in CHIPS if any(row["target"] == chip for row in found)]
    if not found:
        return None
    size = WIDTH, 1 + 0.13 * len(names) * (len(chips) + 1)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    height, windows = 0.8 / len(chips), {name: {} for name in names}
    for row in found:
        windows[row["name"]][row["target"]] = row["window"]
    for i, chip in enumerate(chips):
        of = [(y, windows[name][chip]) for y, name in enumerate(names) if chip in windows[name]]
        ys = [y + (i - (len(chips) - 1) / 2) * height for y, _ in of]
        axes.barh(ys, [x for _, x in of], height, color=CHIPS[chip], label=TARGETS[chip])
        for y, (_, value) in zip(ys, of, strict=True):
            axes.annotate(f"{value:.0f}", (value, y), (3, 0), **BESIDE)
    axes.set_yticks(range(len(names)), list(names.values()))
    _sideways(axes)
    axes.set_xlabel(
        f"bytes read and written per window of k = {result['every_k']}, in sizes of the parameters"
    )
    axes.legend(loc="lower right")

    def span(name):
        of = [value for chip, value in windows.get(name, {}).items() if chip != "cpu"]
        rounded = {f"{value:.0f}" for value in of or windows.get(name, {}).values()}
        return " to ".join(sorted(rounded, key=int))

    figure.suptitle(
        f"A window of AdamW moves the parameters {span(APPLY_GRADIENTS)} times with "
        f"optaccum.apply_gradients,\n{span(MULTI_STEPS)} times with optax.MultiSteps"
        + (" on GPUs and TPUs" if len(chips) > 1 else "")
    )
    return figure


def draw_overhead(result: Any) -> Figure:
    runs = result["runs"]
    height = 1.6 + 0.27 * max(len(run["contenders"]) for run in runs)
    figure, grid = _panels(len(runs), height)
    for run, axes in zip(runs, grid, strict=True):
        ratios = [row["ratio_to_floor"]["window"] for row in run["contenders"]]
        of = _bars(axes, run["contenders"], ratios)
        if run is main_run(result):
            sentence = (
                f"{run['inner']}: optaccum.apply_gradients takes {of[APPLY_GRADIENTS]:.2g} times "
                f"as long as the memory needs, optax.MultiSteps {of[MULTI_STEPS]:.2g} times"
            )
            figure.suptitle(f"{sentence} ({result['device']})")
        axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
        axes.set(title=f"{run['inner']}, {run['parameter_bytes'] / 1e6:.3g} MB", xlabel="floors")
    _kinds(figure, runs, "the bandwidth floor")
    return figure


def draw_memory(result: Any) -> Figure:
    rows, size = result["contenders"], 4 * result["parameters"]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.4 + 0.27 * len(rows)), layout="constrained")
    of = _bars(axes, rows, [row["peak_bytes"] / size for row in rows])
    axes.set_xlabel("peak memory of a training step, in sizes of the parameters")
    sentence = (
        f"A training step peaks at {of[APPLY_GRADIENTS]:.1f} sizes of the parameters with "
        f"optaccum.apply_gradients, at {of[MULTI_STEPS]:.1f} with optax.MultiSteps"
    )
    figure.suptitle(f"{sentence} ({result['device']})")
    _kinds(figure, [result])
    return figure


def draw_scaling(result: Any) -> Figure | None:
    panels = {
        "parameters": {"hold_ms": ("-", "hold"), "release_ms": ("--", "release")},
        "every_k": {"hold_ms": ("-", "hold"), "microbatch_ms": (":", "mean of a window")},
    }
    sentence = "A hold takes time in proportion to the parameters, and none for longer windows"
    return _lines(result, panels, "milliseconds", sentence)


def draw_compilation(result: Any) -> Figure | None:
    panels = {"leaves": {"compile_s": ("-", "compile"), "trace_s": ("--", "trace")}}
    sentence = "Compile time grows with the leaves of the tree; apply_gradients needs least of it"
    return _lines(result, panels, "seconds", sentence)


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    size = WIDTH, height
    figure, grid = plt.subplots(
        1, count, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    return figure, grid[0]


def _kinds(figure: Figure, tables: Sequence[Any], *more: str) -> None:
    """Adds a legend for the colours that are in the tables, and for the dashed line."""
    rows = [row for table in tables for row in table["contenders"]]
    found = {_kind(row["name"]) for row in rows}
    handles: list[Any] = [Patch(color=KINDS[k], label=k) for k in KINDS if k in found]
    if not all(row.get("equivalent", True) for row in rows):
        label = "† not what the full batch computes"
        handles.append(Patch(hatch="///", facecolor="white", edgecolor=GREY, label=label))
    handles += [Line2D([], [], color=BLACK, linestyle="--", label=label) for label in more]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _kind(name: str) -> str:
    ours = "optaccum, other ways" if name.startswith("optaccum") else "others"
    return name if name in KINDS else ours


def _bars(axes: Axes, rows: Sequence[Any], values: Sequence[Any]) -> dict[str, float]:
    """Draws bars with their values, and quartiles where there are any; returns the values."""
    medians, ends = list(map(middle, values)), []
    colours = [KINDS[_kind(row["name"])] for row in rows]
    bars = axes.barh([name_of(row) for row in rows], medians, color=colours, height=0.7)
    for y, (bar, row, value) in enumerate(zip(bars, rows, values, strict=True)):
        if not row.get("equivalent", True):
            bar.set(hatch="///", facecolor="white", edgecolor=GREY)
        if isinstance(value, dict):
            axes.plot((value["q1"], value["q3"]), (y, y), color=BLACK, linewidth=1)
        ends.append(value["q3"] if isinstance(value, dict) else value)
        axes.annotate(f"{medians[y]:.2f}", (ends[-1], y), (3, 0), **BESIDE)
    _sideways(axes)
    axes.set_xlim(0, 1.2 * max(*ends, 0.1))
    return {row["name"]: value for row, value in zip(rows, medians, strict=True)}


def _sideways(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        if label.get_text().startswith("optaccum"):
            label.set_fontweight("bold")


def _lines(result: Any, panels: Mapping[str, Any], unit: str, sentence: str) -> Figure | None:
    """Returns a panel for each sweep, with a line for each contender and quantity."""
    found = [sweep for sweep in panels if sweep in result["sweeps"]]
    if not found:
        return None
    figure, grid = _panels(len(found), 3.8)
    handles = {}
    for sweep, axes in zip(found, grid, strict=True):
        rows = result["sweeps"][sweep]["rows"]
        names = list(dict.fromkeys(row["name"] for row in rows))
        axes.set(xlabel="microbatches per window, k" if sweep == "every_k" else sweep)
        for quantity, (dashes, meaning) in panels[sweep].items():
            handles[meaning] = Line2D([], [], color=GREY, linestyle=dashes)
            for name in names:
                of = [(r[sweep], middle(r[quantity])) for r in rows if r["name"] == name]
                points = [(x, y) for x, y in of if y]
                if points:
                    colour, marker = LINES[name]
                    given: Any = {"color": colour, "marker": marker, "markersize": 4}
                    axes.loglog(*zip(*points, strict=True), dashes, **given)
        handles |= {n: Line2D([], [], color=LINES[n][0], marker=LINES[n][1]) for n in names}
        values = sorted({row[sweep] for row in rows})
        decades = [x for x in values if math.log10(x).is_integer()]
        axes.set_xticks(decades if len(decades) > 1 else values)
        axes.xaxis.set_major_formatter(FuncFormatter(_millions))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    grid[0].set_ylabel(unit)
    figure.suptitle(f"{sentence} ({result['device']})")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def _millions(x: float, _: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"
