"""Write the tables and figures of the READMEs from the committed results: no number is typed.

A README has the tables that it wants, between `<!-- name: begin -->` and `<!-- name: end -->`.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, NullLocator

from benchmarks import collectives, compiled, coupled, headline, large, overhead, scaling, training
from benchmarks.contenders import ALONE, APPLY_GRADIENTS, FULL_BATCH, MULTI_STEPS, UPDATE
from benchmarks.tables import Result, middle, name_of


class Benchmark(NamedTuple):
    measure: Callable[[int], Iterator[Result]]  # at a scale: with --quick, on a CPU, elsewhere
    tables: Callable[[Result], dict[str, str]]


BENCHMARKS = {
    "headline": Benchmark(headline.measure, headline.tables),
    "compiled": Benchmark(compiled.measure, compiled.tables),
    "large": Benchmark(large.measure, large.tables),
    "overhead": Benchmark(overhead.measure, overhead.tables),
    "train_step": Benchmark(training.train_step, training.train_step_tables),
    "in_step": Benchmark(training.in_step, training.in_step_tables),
    "coupled": Benchmark(coupled.measure, coupled.tables),
    "collectives": Benchmark(collectives.measure, collectives.tables),
    "scaling": Benchmark(scaling.measure, scaling.tables),
}
ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
READMES = ROOT / "docs" / "explanation" / "holds.md", ROOT / "benchmarks" / "README.md"
# From the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, SKY, VERMILION, BLACK, GREY = "#0072B2", "#56B4E9", "#D55E00", "#000000", "#9A9A9A"
COLOURS = "#009E73", "#E69F00", "#CC79A7", GREY  # of chips
KINDS = {APPLY_GRADIENTS: BLUE, "optaccum, other ways": SKY, MULTI_STEPS: VERMILION, "others": GREY}
KEYS = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
NOT_EQUIVALENT: Any = {"hatch": "///", "facecolor": "white", "edgecolor": GREY}
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


def load(folder: pathlib.Path = RESULTS) -> dict[str, list[Result]]:
    """Returns the committed results of each benchmark, from a CPU, a GPU and a TPU."""
    return {
        name: [
            json.loads(path.read_text()) | {"file": path.stem.rpartition("-")[2]}
            for path in sorted(folder.glob(f"{name}*.json"))
        ]
        for name in BENCHMARKS
    }


def render(results: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    """Returns every table by name, from a CPU, a GPU and a TPU one below the other."""
    rendered: dict[str, list[str]] = {}
    for benchmark, of in results.items():
        tables = BENCHMARKS[benchmark].tables
        for name, text in (item for result in of for item in tables(result).items()):
            rendered.setdefault(name, []).append(text)
    return {name: "\n\n".join(found) for name, found in rendered.items()}


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Returns `text` with the right table between each pair of its markers."""

    def between(found):
        table = tables.get(found["name"], "No result is committed.")
        return f"{found['begin']}{table}\n{found['end']}"

    markers = r"(?P<begin><!-- (?P<name>\w+): begin -->\n).*?(?P<end><!-- (?P=name): end -->)"
    return re.sub(markers, between, text, flags=re.DOTALL)


def draw_headline(result: Result) -> Figure:
    of, gigabytes = result["memory"], headline.gigabytes(result)
    figure = Figure((7.4, 3.3), layout=ConstrainedLayoutEngine(wspace=0.08))  # read on phones, too
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    whole, ours = (result["losses"][name] for name in (FULL_BATCH, APPLY_GRADIENTS))
    left.plot(whole, color="#F2B48C", linewidth=8, label="full batch")
    left.plot(ours, "--", color=BLUE, linewidth=2, label=f"{result['every_k']} microbatches")
    left.legend(fontsize=12)
    left.set_xlabel("optimizer step of a small transformer", size=11)
    _headline(left, "Same loss")
    names = "full batch", f"{of['every_k']} microbatches"
    bars = right.bar(names, gigabytes, 0.6, color=(VERMILION, BLUE))
    right.bar_label(bars, [f"{x:.0f} GB" for x in gigabytes], padding=2, size=14, weight="bold")
    right.axhline(80, color=BLACK, linewidth=1, linestyle="--")
    right.annotate("an H100 has 80 GB", (1.35, 80), (0, 9), ha="right", **BESIDE | {"size": 10})
    right.set(ylim=(0, 1.15 * max(gigabytes)), yticks=())
    right.set_xlabel(f"a step of {of['parameters'] / 1e6:.0f} million parameters", size=11)
    right.grid(visible=False)
    right.spines["left"].set_visible(False)
    right.tick_params(axis="x", length=0, labelsize=11)
    _headline(right, f"{1 - gigabytes[1] / gigabytes[0]:.0%} less memory")
    return figure


def _headline(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=15, weight="bold", pad=10)


def draw_compiled(result: Result) -> Figure | None:
    # Flax's are the same programs as others.
    found = [x for x in result["optimizer"] if x["inner"] == "adamw" and "flax" not in x["name"]]
    if not found:
        return None
    names = list(dict.fromkeys(map(name_of, found)))
    chips = [chip for chip in compiled.TITLES if any(row["target"] == chip for row in found)]
    figure, (axes,) = _panels(1, 1 + 0.13 * len(names) * (len(chips) + 1))
    for i, chip in enumerate(chips):
        of = {name_of(row): row["window"] for row in found if row["target"] == chip}
        height, shift = 0.8 / len(chips), 0.8 * ((i + 0.5) / len(chips) - 0.5)
        places = [names.index(name) + shift for name in of]
        bars = axes.barh(places, list(of.values()), height, color=COLOURS[i])
        bars.set_label(compiled.TITLES[chip])
        axes.bar_label(bars, fmt="%.0f", padding=3, size=8)
    axes.set_yticks(range(len(names)), names)
    _sideways(axes)
    axes.set_xlabel(
        f"bytes read and written per window of k = {result['every_k']}, in sizes of the parameters"
    )
    axes.legend(loc="lower right")

    def span(name):
        of = [row for row in found if row["name"] == name]
        elsewhere = [row for row in of if row["target"] != "cpu"]
        rounded = {f"{row['window']:.0f}" for row in elsewhere or of}
        return " to ".join(sorted(rounded, key=int))

    figure.suptitle(
        f"A window of AdamW moves the parameters {span(APPLY_GRADIENTS)} times with "
        f"optaccum.apply_gradients,\n{span(MULTI_STEPS)} times with optax.MultiSteps"
        + (" on GPUs and TPUs" if len(chips) > 1 else "")
    )
    return figure


def draw_large(result: Result) -> Figure | None:
    found = [x for x in result["rows"] if x["fits"] and x["model"] == "7b" and x["devices"] == 8]
    if not found:
        return None
    rows = [row | {"name": f"{row['placed'].split(',')[0]}: {row['name']}"} for row in found]
    figure, (left, right) = _panels(2, 1 + 0.3 * len(rows))
    _bars(left, rows, [row["peak_bytes"] / 1e9 for row in rows])
    left.set_title("peak memory of a device, GB")
    _bars(right, rows, [sum(compiled.amounts(row["window"], row).values()) for row in rows])
    right.set_title("sent per window, P")
    figure.suptitle(
        f"Windows of {result['every_k']} microbatches, 7 billion parameters (P) on eight H100"
    )
    return figure


def draw_overhead(result: Result) -> Figure:
    runs = result["runs"]
    figure, grid = _panels(len(runs), 1.6 + 0.27 * max(len(run["contenders"]) for run in runs))
    for run, axes in zip(runs, grid, strict=True):
        ratios = [row["ratio_to_floor"]["window"] for row in run["contenders"]]
        of = _bars(axes, run["contenders"], ratios)
        if run is overhead.main_run(result):
            sentence = (
                f"{run['inner']}: optaccum.apply_gradients takes {of[APPLY_GRADIENTS]:.2g} times "
                f"as long as the memory needs, optax.MultiSteps {of[MULTI_STEPS]:.2g} times"
            )
            figure.suptitle(f"{sentence} ({result['device']})")
        axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
        axes.set(title=f"{run['inner']}, {run['parameter_bytes'] / 1e6:.3g} MB", xlabel="floors")
    floor = Line2D([], [], color=BLACK, linestyle="--", label="the bandwidth floor")
    other = Patch(label="† not what the full batch computes", **NOT_EQUIVALENT)
    figure.legend(handles=[*KEYS, other, floor], loc="outside lower center", ncols=3)
    return figure


def draw_memory(result: Result) -> Figure:
    rows, size = result["contenders"], 4 * result["parameters"]
    figure, (axes,) = _panels(1, 1.4 + 0.27 * len(rows))
    of = _bars(axes, rows, [row["peak_bytes"] / size for row in rows])
    axes.set_xlabel("peak memory of a training step, in sizes of the parameters")
    sentence = (
        f"A training step peaks at {of[APPLY_GRADIENTS]:.1f} sizes of the parameters with "
        f"optaccum.apply_gradients, at {of[MULTI_STEPS]:.1f} with optax.MultiSteps"
    )
    figure.suptitle(f"{sentence} ({result['device']})")
    figure.legend(handles=KEYS, loc="outside lower center", ncols=3)
    return figure


def draw_scaling(result: Result) -> Figure | None:
    panels = {
        "parameters": {"hold_ms": ("-", "hold"), "release_ms": ("--", "release")},
        "every_k": {"hold_ms": ("-", "hold"), "microbatch_ms": (":", "mean of a window")},
    }
    title = "A hold takes time in proportion to the parameters, and none for longer windows"
    return _lines(result, panels, "milliseconds", title)


def draw_compilation(result: Result) -> Figure | None:
    panels = {"leaves": {"compile_s": ("-", "compile"), "trace_s": ("--", "trace")}}
    title = "Compile time grows with the leaves of the tree; apply_gradients needs least of it"
    return _lines(result, panels, "seconds", title)


def _lines(result: Result, panels: Mapping[str, Any], unit: str, title: str) -> Figure | None:
    """Returns a panel for each sweep, with a line for each contender and quantity."""
    found = [sweep for sweep in panels if sweep in result["sweeps"]]
    if not found:
        return None
    figure, grid = _panels(len(found), 3.8)
    handles = {}
    for sweep, axes in zip(found, grid, strict=True):
        rows = result["sweeps"][sweep]["rows"]
        names = dict.fromkeys(row["name"] for row in rows)
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
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    grid[0].set_ylabel(unit)
    figure.suptitle(f"{title} ({result['device']})")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure((9, height), layout="constrained")
    return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def _bars(axes: Axes, rows: Sequence[Any], values: Sequence[Any]) -> dict[str, float]:
    """Draws bars with their values, and any quartiles; returns the values."""
    medians, ends = [middle(value) for value in values], []
    for y, (row, value, median) in enumerate(zip(rows, values, medians, strict=True)):
        ours = SKY if "optaccum" in row["name"] else GREY
        colour: Any = {"color": KINDS.get(row["name"], ours)}
        axes.barh(y, median, 0.7, **(colour if row.get("equivalent", True) else NOT_EQUIVALENT))
        low, high = (value["q1"], value["q3"]) if isinstance(value, dict) else (median, median)
        if low < high:
            axes.plot((low, high), (y, y), color=BLACK, linewidth=1)
        axes.annotate(f"{median:.2f}", (high, y), (3, 0), **BESIDE)
        ends.append(high)
    axes.set_yticks(range(len(rows)), list(map(name_of, rows)))
    _sideways(axes)
    axes.set_xlim(0, 1.2 * max(ends))
    return {row["name"]: median for row, median in zip(rows, medians, strict=True)}


def _sideways(axes: Axes) -> None:
    axes.yaxis.set_inverted(True)  # also if several share it
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        if "optaccum" in label.get_text():
            label.set_fontweight("bold")


FIGURES: dict[str, tuple[str, Callable[[Result], Figure | None]]] = {  # and their benchmarks
    "headline": ("headline", draw_headline),
    "compiled": ("compiled", draw_compiled),
    "large": ("large", draw_large),
    "overhead": ("overhead", draw_overhead),
    "memory": ("train_step", draw_memory),
    "scaling": ("scaling", draw_scaling),
    "compilation": ("scaling", draw_compilation),
}


def draw(results: Mapping[str, Sequence[Result]], folder: pathlib.Path) -> None:
    """Draws every figure that there are results for, by the name of their benchmark."""
    with matplotlib.rc_context(STYLE):
        for name, (benchmark, draw_figure) in FIGURES.items():
            for i, result in enumerate(results[benchmark]):
                # The first stands for all devices in the READMEs, which is a CPU.
                device = f"-{result['file']}" if i else ""
                if figure := draw_figure(result):
                    # Without the version of matplotlib, the same figures give the same file.
                    figure.savefig(folder / f"{name}{device}.png", metadata={"Software": None})


def write() -> None:
    """Rewrites the tables and draws the figures."""
    results = load()
    tables = render(results)
    for path in READMES:
        path.write_text(fill(path.read_text(), tables))
    draw(results, ROOT / "benchmarks" / "figures")


def main() -> None:
    argparse.ArgumentParser("python -m benchmarks.report", description=__doc__).parse_args()
    write()


if __name__ == "__main__":
    main()
