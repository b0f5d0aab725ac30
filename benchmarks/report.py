"""Write the tables and figures of the READMEs from the committed results: no number is typed.

A README has the tables that it wants, between `<!-- name: begin -->` and `<!-- name: end -->`.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
import numpy as np

from benchmarks import compiled, coupled, folds, headline, large, overhead, scaling, training
from benchmarks.contenders import APPLY_GRADIENTS, FULL_BATCH, MULTI_STEPS
from benchmarks.tables import Result
from benchmarks.targets import TITLES

# Each has `measure`, at a scale (with --quick, on a CPU, elsewhere), and `tables`.
BENCHMARKS: dict[str, Any] = {
    "headline": headline,
    "compiled": compiled,
    "large": large,
    "folds": folds,
    "overhead": overhead,
    "train_step": training,
    "coupled": coupled,
    "scaling": scaling,
}
ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXPLANATIONS = ROOT / "docs" / "explanation"
READMES = (
    *(EXPLANATIONS / f"{name}.md" for name in ("holds", "one_reduction", "scanned_layers")),
    ROOT / "benchmarks" / "README.md",
)
# From the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, VERMILION, BLACK = "#0072B2", "#D55E00", "#000000"
COLOURS = "#009E73", "#E69F00", "#CC79A7", "#9A9A9A"  # of chips
STYLE: dict[Any, Any] = {
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4"},
    **{"axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False},
    **{"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "figure.titleweight": "bold"},
    **{"savefig.bbox": "tight", "savefig.dpi": 160},
}


def load(folder: pathlib.Path = RESULTS) -> dict[str, list[Result]]:
    """Returns the committed results of each benchmark, from a CPU, a GPU and a TPU."""
    return {
        name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}*.json"))]
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
    of = result["memory"]
    gigabytes = [of["peak_bytes"][name] / 1e9 for name in (FULL_BATCH, APPLY_GRADIENTS)]
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
    beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 10}
    right.annotate("an H100 has 80 GB", (1.35, 80), (0, 9), ha="right", **beside)
    right.set(ylim=(0, 1.15 * max(gigabytes)), yticks=())
    right.set_xlabel(f"a step of {of['parameters'] / 1e6:.0f} million parameters", size=11)
    right.grid(visible=False)
    right.spines["left"].set_visible(False)
    right.tick_params(axis="x", length=0, labelsize=11)
    _headline(right, f"{1 - gigabytes[1] / gigabytes[0]:.0%} less memory")
    return figure


def _headline(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=15, weight="bold", pad=10)


def draw_compiled(result: Result) -> Figure:
    found = [x for x in result["optimizer"] if x["inner"] == "adamw"]
    names = list(dict.fromkeys(row["name"] for row in found))
    chips = [chip for chip in TITLES if any(row["target"] == chip for row in found)]
    figure = Figure((9, 1 + 0.13 * len(names) * (len(chips) + 1)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(chips)
    for i, chip in enumerate(chips):
        values = [row["window"] for row in found if row["target"] == chip]
        places = np.arange(len(names)) + height * (i + 0.5) - 0.4
        bars = axes.barh(places, values, height, color=COLOURS[i], label=TITLES[chip])
        axes.bar_label(bars, fmt="%.0f", padding=3, size=8)
    _sideways(axes, names)
    axes.set_xlabel(
        f"bytes read and written per window of k = {result['every_k']}, in sizes of the parameters"
    )
    axes.legend(loc="upper right")

    def span(name):
        of = [x["window"] for x in found if x["name"] == name and x["target"] != "cpu"]
        return " to ".join(sorted({f"{window:.0f}" for window in of}, key=int))

    figure.suptitle(
        f"A window of AdamW moves the parameters {span(APPLY_GRADIENTS)} times with "
        f"optaccum.apply_gradients,\n{span(MULTI_STEPS)} times with optax.MultiSteps on GPUs "
        "and TPUs"
    )
    return figure


def draw_large(result: Result) -> Figure:
    rows = [x for x in result["rows"] if x["fits"] and (x["model"], x["devices"]) == ("7b", 8)]
    figure = Figure((9, 1 + 0.3 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_title("peak memory of a device, GB")
    right.set_title("sent per window, P")
    peaks = [row["peak_bytes"] / 1e9 for row in rows]
    sent = [sum(compiled.amounts(row["window"], row).values()) for row in rows]
    colours = [BLUE if "optaccum" in row["name"] else COLOURS[-1] for row in rows]
    for axes, values in ((left, peaks), (right, sent)):
        bars = axes.barh(range(len(rows)), values, 0.7, color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=3, size=8)
        axes.margins(x=0.15)
        _sideways(axes, [f"{row['placed'].split(',')[0]}: {row['name']}" for row in rows])
    figure.suptitle(
        f"Windows of {result['every_k']} microbatches, 7 billion parameters (P) on eight H100"
    )
    return figure


def _sideways(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


FIGURES = {"headline": draw_headline, "compiled": draw_compiled, "large": draw_large}


def draw(results: Mapping[str, Sequence[Result]], folder: pathlib.Path) -> None:
    """Draws each figure whose result there is."""
    with matplotlib.rc_context(STYLE):
        for name, draw_figure in FIGURES.items():
            for result in results[name][:1]:
                # Without the version of matplotlib, the same figures give the same file.
                file = folder / f"{name}.png"
                draw_figure(result).savefig(file, metadata={"Software": None})


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
