"""What is shown of the figures of `benchmarks.scaling`: cells, slopes and tables."""

from collections.abc import Mapping, Sequence
import itertools
import sys
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

# What is shown of each sweep, what of it is fitted, and how the tables call it.
SHOWN = {
    "parameters": ("hold_ms", "release_ms", "temporaries"),
    "leaves": (
        "trace_s",
        "compile_s",
        "dispatch_ms",
        "compilation_ms_a_leaf",
        "dispatch_us_a_leaf",
    ),
    "every_k": ("hold_ms", "release_ms", "microbatch_ms"),
    "dtype": ("hold_ms", "release_ms", "parameter_bytes", "state_bytes", "temporary_bytes"),
}
FITTED = {
    "parameters": ("hold_ms", "release_ms"),
    "leaves": ("trace_s", "compile_s", "dispatch_ms"),
    "every_k": ("hold_ms", "microbatch_ms"),
    "dtype": (),
}
SLOPE = ("quantity", "name", "slope", "slope_of_largest")
HEADINGS = {
    "name": "contender",
    "every_k": "k",
    "hold_ms": "hold ms",
    "release_ms": "release ms",
    "microbatch_ms": "mean ms",
    "trace_s": "trace s",
    "compile_s": "compile s",
    "dispatch_ms": "dispatch ms",
    "compilation_ms_a_leaf": "trace, compile ms/leaf",
    "dispatch_us_a_leaf": "dispatch us/leaf",
    "parameter_bytes": "params MB",
    "state_bytes": "state MB",
    "temporary_bytes": "temps MB",
    "slope_of_largest": "largest three",
}


def slopes(sweep: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns how each contender's figures grow with the variable: as which power of it."""
    fits = []
    for quantity, name in itertools.product(FITTED[sweep], dict.fromkeys(r["name"] for r in rows)):
        points = [(r[sweep], r[quantity]) for r in rows if r["name"] == name and r[quantity]]
        x, y = np.log([(x, y["median"] if isinstance(y, dict) else y) for x, y in points]).T
        fit = {"quantity": quantity, "name": name, "slope": np.polyfit(x, y, 1)[0].item()}
        fits.append(fit | {"slope_of_largest": np.polyfit(x[-3:], y[-3:], 1)[0].item()})
    return fits


def cell(key: str, value: Any) -> str:
    """Returns how a table shows a figure, by its name: medians, and bytes in MB."""
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "NO", None: "-"}[value]
    if isinstance(value, dict):
        value = value["median"]
    if key.endswith("bytes"):
        value = value / 1e6
    if not isinstance(value, float):
        return HEADINGS.get(value, value) if isinstance(value, str) else f"{value:,}"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def print_rows(rows: Sequence[Mapping[str, str]], title: str) -> None:
    """Prints rows of cells by heading as a table that fits into 100 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in rows[0]:
        is_name = heading == "contender"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def cells(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """Returns what is shown of a row of figures, by heading."""
    return {HEADINGS.get(key, key): cell(key, row[key]) for key in keys}


def tables(sweep: str, figures: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Returns what is shown of a sweep: its rows, and its slopes, as cells by heading."""
    shown = {"rows": (sweep, "name", *SHOWN[sweep], "agrees"), "slopes": SLOPE}
    return {kind: [cells(row, keys) for row in figures[kind]] for kind, keys in shown.items()}


def print_tables(result: dict[str, Any]) -> None:
    """Prints the figures of each sweep and its slopes."""
    for sweep, figures in result["sweeps"].items():
        by_kind = tables(sweep, figures)
        print_rows(by_kind["rows"], f"By {HEADINGS.get(sweep, sweep)}, on {result['device']}")
        if by_kind["slopes"]:
            print_rows(by_kind["slopes"], f"Slopes against {HEADINGS.get(sweep, sweep)}, log-log")
