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
from benchmarks.tables import name_of

# From the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, SKY, VERMILION, BLACK, GREY = "#0072B2", "#56B4E9", "#D55E00", "#000000", "#9A9A9A"
CHIPS = {"h100": "#009E73", "v5e": "#E69F00", "v6e": "#CC79A7", "cpu": GREY}
KINDS = {APPLY_GRADIENTS: BLUE, "optaccum, other ways": SKY, MULTI_STEPS: VERMILION, "others": GREY}
LINES = {  # colour and marker
    APPLY_GRADIENTS: (BLUE, "o"),
    UPDATE: (SKY, "s"),
    MULTI_STEPS: (VERMILION, "^"),
    ALONE: (BLACK, "x"),
}
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "font.size": 9,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 160,
}
WIDTH = 9.0
Results = Mapping[str, Sequence[Mapping[str, Any]]]


def draw(results: Results, folder: pathlib.Path) -> None:
    """Draws every figure that there are results for.

    Args:
        results: the results of each benchmark, by its name.
        folder: where to put the pictures.
    """
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


def draw_compiled(result: Mapping[str, Any]) -> Figure | None:
    """Returns bars of the bytes that a window moves, a colour for each chip."""
    found = [row for row in result["optimizer"] if row["inner"] == "adamw"]
    found = [row for row in found if "flax" not in row["name"]]  # they are the same programs
    names = list(dict.fromkeys(row["name"] for row in found))
    chips = [chip for chip in CHIPS if any(row["target"] == chip for row in found)]
    if not found:
        return None
    size = WIDTH, 1 + 0.13 * len(names) * (len(chips) + 1)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    height = 0.8 / len(chips)
    for i, chip in enumerate(chips):
        of = {row["name"]: row for row in found if row["target"] == chip}
        ys = [y + (i - (len(chips) - 1) / 2) * height for y, n in enumerate(names) if n in of]
        values = [of[name]["window"] for name in names if name in of]
        axes.barh(ys, values, height, color=CHIPS[chip], label=TARGETS[chip])
        for y, value in zip(ys, values, strict=True):
            axes.annotate(f"{value:.0f}", (value, y), (3, 0), **_BESIDE)
    marked = {row["name"]: name_of(row) for row in found}
    axes.set_yticks(range(len(names)), [marked[name] for name in names])
    _sideways(axes)
    axes.set_xlabel(
        f"bytes read and written per window of k = {result['every_k']}, in sizes of the parameters"
    )
    axes.legend(loc="lower right")

    def span(name):
        rows = [row for row in found if row["name"] == name]
        rows = [row for row in rows if row["target"] != "cpu"] or rows
        return " to ".join(sorted({f"{row['window']:.0f}" for row in rows}, key=int))

    figure.suptitle(
        f"A window of AdamW moves the parameters {span(APPLY_GRADIENTS)} times with "
        f"optaccum.apply_gradients,\n{span(MULTI_STEPS)} times with optax.MultiSteps"
        + (" on GPUs and TPUs" if len(chips) > 1 else "")
    )
    return figure


def draw_overhead(result: Mapping[str, Any]) -> Figure:
    """Returns bars of one window against its bandwidth floor, a panel for each inner optimizer."""
    runs = result["runs"]
    height = 1.6 + 0.27 * max(len(run["contenders"]) for run in runs)
    figure, grid = plt.subplots(
        1, len(runs), sharey=True, squeeze=False, figsize=(WIDTH, height), layout="constrained"
    )
    for run, axes in zip(runs, grid[0], strict=True):
        rows = run["contenders"]
        _bars(axes, rows, [row["ratio_to_floor"]["window"] for row in rows], "{:.2f}")
        axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
        axes.set(title=f"{run['inner']}, {run['parameter_bytes'] / 1e6:.3g} MB", xlabel="floors")
    run = main_run(dict(result))
    ours, theirs = _ours_and_theirs(run, lambda row: row["ratio_to_floor"]["window"]["median"])
    sentence = (
        f"{run['inner']}: optaccum.apply_gradients takes {ours:.2g} times as long as the memory "
        f"needs, optax.MultiSteps {theirs:.2g} times"
    )
    figure.suptitle(f"{sentence} ({result['device']})")
    _kinds(figure, runs, "the bandwidth floor")
    return figure


def draw_memory(result: Mapping[str, Any]) -> Figure:
    """Returns bars of the peak memory of a training step."""
    rows, size = result["contenders"], 4 * result["parameters"]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.4 + 0.27 * len(rows)), layout="constrained")
    _bars(axes, rows, [row["peak_bytes"] / size for row in rows], "{:.2f}")
    axes.set_xlabel("peak memory of a training step, in sizes of the parameters")
    ours, theirs = _ours_and_theirs(result, lambda row: row["peak_bytes"] / size)
    sentence = (
        f"A training step peaks at {ours:.1f} sizes of the parameters with "
        f"optaccum.apply_gradients, at {theirs:.1f} with optax.MultiSteps"
    )
    figure.suptitle(f"{sentence} ({result['device']})")
    _kinds(figure, [result])
    return figure


def draw_scaling(result: Mapping[str, Any]) -> Figure | None:
    """Returns lines of the times of holds and releases."""
    return _lines(
        result,
        {
            "parameters": {"hold_ms": ("-", "hold"), "release_ms": ("--", "release")},
            "every_k": {"hold_ms": ("-", "hold"), "microbatch_ms": (":", "mean of a window")},
        },
        "milliseconds",
        "A hold takes time in proportion to the parameters, and none for longer windows",
    )


def draw_compilation(result: Mapping[str, Any]) -> Figure | None:
    """Returns lines of the times to trace and to compile."""
    quantities = {"compile_s": ("-", "compile"), "trace_s": ("--", "trace")}
    sentence = "Compile time grows with the leaves of the tree; apply_gradients needs least of it"
    return _lines(result, {"leaves": quantities}, "seconds", sentence)


def _lines(
    result: Mapping[str, Any], panels: Mapping[str, Any], unit: str, sentence: str
) -> Figure | None:
    found = [sweep for sweep in panels if sweep in result["sweeps"]]
    if not found:
        return None
    labels = {
        "parameters": "parameters",
        "leaves": "leaves",
        "every_k": "microbatches per window, k",
    }
    figure, grid = plt.subplots(
        1, len(found), squeeze=False, sharey=True, figsize=(WIDTH, 3.8), layout="constrained"
    )
    handles = {}
    for sweep, axes in zip(found, grid[0], strict=True):
        axes.set(xlabel=labels[sweep])
        for quantity, (dashes, meaning) in panels[sweep].items():
            _curves(axes, sweep, result["sweeps"][sweep]["rows"], quantity, dashes)
            handles[meaning] = Line2D([], [], color=GREY, linestyle=dashes)
        names = dict.fromkeys(row["name"] for row in result["sweeps"][sweep]["rows"])
        handles |= {n: Line2D([], [], color=LINES[n][0], marker=LINES[n][1]) for n in names}
    grid[0][0].set_ylabel(unit)
    figure.suptitle(f"{sentence} ({result['device']})")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 8}


def _ours_and_theirs(table: Mapping[str, Any], value: Callable[[Any], float]) -> list[float]:
    found = {row["name"]: value(row) for row in table["contenders"]}
    return [found[APPLY_GRADIENTS], found[MULTI_STEPS]]


def _kind(name: str) -> str:
    ours = "optaccum, other ways" if name.startswith("optaccum") else "others"
    return name if name in KINDS else ours


def _kinds(figure: Figure, tables: Sequence[Mapping[str, Any]], *more: str) -> None:
    """Adds a legend for the colours that are in the tables, and for the dashed line."""
    found = {_kind(row["name"]) for table in tables for row in table["contenders"]}
    handles: list[Any] = [Patch(color=KINDS[k], label=k) for k in KINDS if k in found]
    if any(not row.get("equivalent", True) for table in tables for row in table["contenders"]):
        label = "† not what the full batch computes"
        handles.append(Patch(hatch="///", facecolor="white", edgecolor=GREY, label=label))
    handles += [Line2D([], [], color=BLACK, linestyle="--", label=label) for label in more]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _sideways(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        if label.get_text().startswith("optaccum"):
            label.set_fontweight("bold")


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]], values: Sequence[Any], form: str) -> None:
    """Draws horizontal bars with their values, and quartiles where there are any."""
    medians = [x["median"] if isinstance(x, dict) else x for x in values]
    ends = [x["q3"] if isinstance(x, dict) else x for x in values]
    colours = [KINDS[_kind(row["name"])] for row in rows]
    bars = axes.barh([name_of(row) for row in rows], medians, color=colours, height=0.7)
    for bar, row in zip(bars, rows, strict=True):
        if not row.get("equivalent", True):
            bar.set(hatch="///", facecolor="white", edgecolor=GREY)
    for y, (value, median, end) in enumerate(zip(values, medians, ends, strict=True)):
        if isinstance(value, dict):
            axes.plot((value["q1"], value["q3"]), (y, y), color=BLACK, linewidth=1)
        axes.annotate(form.format(median), (end, y), (3, 0), **_BESIDE)
    _sideways(axes)
    axes.set_xlim(0, 1.2 * max(max(ends), 0.1))


def _curves(
    axes: Axes, variable: str, rows: Sequence[Mapping[str, Any]], quantity: str, dashes: str
) -> None:
    """Draws a line for each contender."""
    for name in dict.fromkeys(row["name"] for row in rows):
        points = [(r[variable], r[quantity]) for r in rows if r["name"] == name and r[quantity]]
        if points:
            x, y = zip(
                *((x, y["median"] if isinstance(y, dict) else y) for x, y in points), strict=True
            )
            colour, marker = LINES[name]
            axes.loglog(x, y, dashes, color=colour, marker=marker, markersize=4)
    values = sorted({row[variable] for row in rows})
    decades = [x for x in values if math.log10(x).is_integer()]
    axes.set_xticks(decades if len(decades) > 1 else values)
    axes.xaxis.set_major_formatter(FuncFormatter(_millions))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _millions(x: float, _: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"
