"""Write the tables and figures of the READMEs from the committed results: no number is typed.

A table stands between `<!-- name: begin -->` and `<!-- name: end -->`. The names are those of
`render`; a README has the ones it wants. A figure has a sentence as its title, one unit, and a
legend that names each colour.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import importlib
import math
import pathlib
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks import harness
from benchmarks.compiled import by_chip
from benchmarks.contenders import ALONE, APPLY_GRADIENTS, MULTI_STEPS, UPDATE
from benchmarks.overhead import main_run
from benchmarks.tables import middle, name_of

ROOT = pathlib.Path(__file__).parent.parent
READMES = ROOT / "docs" / "explanation" / "holds.md", ROOT / "benchmarks" / "README.md"
MODULES = "compiled", "overhead", "train_step", "in_step", "coupled", "collectives", "scaling"
# From the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, SKY, VERMILION, BLACK, GREY = "#0072B2", "#56B4E9", "#D55E00", "#000000", "#9A9A9A"
CHIPS = {"H100": "#009E73", "TPU v5e": "#E69F00", "TPU v6e": "#CC79A7", "CPU": GREY}
KINDS = {APPLY_GRADIENTS: BLUE, "optaccum, other ways": SKY, MULTI_STEPS: VERMILION, "others": GREY}
LINES: dict[str, Any] = {
    APPLY_GRADIENTS: {"color": BLUE, "marker": "o"},
    UPDATE: {"color": SKY, "marker": "s"},
    MULTI_STEPS: {"color": VERMILION, "marker": "^"},
    ALONE: {"color": BLACK, "marker": "x"},
}
STYLE: dict[Any, Any] = {
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4"},
    **{"axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False},
    **{"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "figure.titleweight": "bold"},
    **{"savefig.bbox": "tight", "savefig.dpi": 160},
}
BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 8}


def load(folder: pathlib.Path = harness.RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Returns the committed results of each benchmark, those of a CPU, a GPU and a TPU."""
    return {name: harness.load(name, folder) for name in MODULES}


def render(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Returns every table by name, those of a CPU, a GPU and a TPU one below the other."""
    rendered: dict[str, list[str]] = {}
    for benchmark, of in results.items():
        tables = importlib.import_module(f"benchmarks.{benchmark}").tables
        for name, found in (item for result in of for item in tables(result).items()):
            rendered.setdefault(name, []).extend(table.markdown() for table in found)
    return {name: "\n\n".join(found) for name, found in rendered.items()}


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Returns `text` with the right table between each pair of its markers."""

    def between(found):
        table = tables.get(found["name"], "No result is committed.")
        return f"{found['begin']}{table}\n{found['end']}"

    markers = r"(?P<begin><!-- (?P<name>\w+): begin -->\n).*?(?P<end><!-- (?P=name): end -->)"
    return re.sub(markers, between, text, flags=re.DOTALL)


def draw_compiled(result: Any) -> Figure | None:
    # Flax's are the same programs as others.
    found = [x for x in result["optimizer"] if x["inner"] == "adamw" and "flax" not in x["name"]]
    if not found:
        return None
    groups = {name: group for (name,), group in by_chip(found, "name").items()}
    names = {row["name"]: name_of(row) for row in found}
    chips = [chip for chip in CHIPS if any(chip in group for group in groups.values())]
    figure, (axes,) = _panels(1, 1 + 0.13 * len(names) * (len(chips) + 1))
    for i, chip in enumerate(chips):
        height, shift = 0.8 / len(chips), 0.8 * ((i + 0.5) / len(chips) - 0.5)
        of = {
            y + shift: groups[x][chip]["window"] for y, x in enumerate(names) if chip in groups[x]
        }
        axes.barh(list(of), list(of.values()), height, color=CHIPS[chip], label=chip)
        for y, value in of.items():
            axes.annotate(f"{value:.0f}", (value, y), (3, 0), **BESIDE)
    axes.set_yticks(range(len(names)), list(names.values()))
    _sideways(axes)
    axes.set_xlabel(
        f"bytes read and written per window of k = {result['every_k']}, in sizes of the parameters"
    )
    axes.legend(loc="lower right")

    def span(name):
        of = {chip: row["window"] for chip, row in groups.get(name, {}).items()}
        elsewhere = [value for chip, value in of.items() if chip != "CPU"]
        rounded = {f"{value:.0f}" for value in elsewhere or of.values()}
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
    figure, (axes,) = _panels(1, 1.4 + 0.27 * len(rows))
    of = _bars(axes, rows, [row["peak_bytes"] / size for row in rows])
    axes.set_xlabel("peak memory of a training step, in sizes of the parameters")
    sentence = (
        f"A training step peaks at {of[APPLY_GRADIENTS]:.1f} sizes of the parameters with "
        f"optaccum.apply_gradients, at {of[MULTI_STEPS]:.1f} with optax.MultiSteps"
    )
    figure.suptitle(f"{sentence} ({result['device']})")
    _kinds(figure, [result])
    return figure


def _lines(result: Any, panels: Mapping[str, Any], unit: str, title: str) -> Figure | None:
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
                of = [row for row in rows if row["name"] == name and row[quantity]]
                points = [row[sweep] for row in of], [middle(row[quantity]) for row in of]
                axes.loglog(*points, dashes, markersize=4, **LINES[name])
        handles |= {name: Line2D([], [], **LINES[name]) for name in names}
        values = sorted({row[sweep] for row in rows})
        decades = [x for x in values if math.log10(x).is_integer()]
        axes.set_xticks(decades if len(decades) > 1 else values)
        axes.xaxis.set_major_formatter(FuncFormatter(_millions))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    grid[0].set_ylabel(unit)
    figure.suptitle(f"{title} ({result['device']})")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure((9, height), layout="constrained")
    return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


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


def _millions(x: float, _: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def draw_scaling(result: Any) -> Figure | None:
    panels = {
        "parameters": {"hold_ms": ("-", "hold"), "release_ms": ("--", "release")},
        "every_k": {"hold_ms": ("-", "hold"), "microbatch_ms": (":", "mean of a window")},
    }
    title = "A hold takes time in proportion to the parameters, and none for longer windows"
    return _lines(result, panels, "milliseconds", title)


def draw_compilation(result: Any) -> Figure | None:
    panels = {"leaves": {"compile_s": ("-", "compile"), "trace_s": ("--", "trace")}}
    title = "Compile time grows with the leaves of the tree; apply_gradients needs least of it"
    return _lines(result, panels, "seconds", title)


FIGURES: dict[str, tuple[str, Callable[[Any], Figure | None]]] = {  # and their benchmarks
    "compiled": ("compiled", draw_compiled),
    "overhead": ("overhead", draw_overhead),
    "memory": ("train_step", draw_memory),
    "scaling": ("scaling", draw_scaling),
    "compilation": ("scaling", draw_compilation),
}


def draw(results: Mapping[str, Sequence[Any]], folder: pathlib.Path) -> None:
    """Draws every figure that there are results for, by the name of their benchmark."""
    with matplotlib.rc_context(STYLE):
        for name, (benchmark, draw_figure) in FIGURES.items():
            for i, result in enumerate(results[benchmark]):
                # The first stands for all devices in the READMEs, which is a CPU.
                device = f"-{result['file']}" if i else ""
                if figure := draw_figure(result):
                    # Without the version of matplotlib, the same figures give the same file.
                    figure.savefig(folder / f"{name}{device}.png", metadata={"Software": None})


def main() -> None:
    """Rewrites the tables and draws the figures."""
    argparse.ArgumentParser("python -m benchmarks.report", description=__doc__).parse_args()
    results = load()
    tables = render(results)
    for path in READMES:
        path.write_text(fill(path.read_text(), tables))
    draw(results, ROOT / "benchmarks" / "figures")


if __name__ == "__main__":
    main()
