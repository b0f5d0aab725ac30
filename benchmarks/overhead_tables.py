"""The figures of `benchmarks.overhead` as tables that fit into 100 columns."""

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from benchmarks import floor

CAPTION = (
    "* By its definition it computes something else than the full batch.\n"
    "Medians over the rounds of this run. Ratios are what counts; absolute times are noise.\n"
    "Temporaries: of the hungriest program, in sizes of the parameters."
)


def show(result: dict[str, Any], run: dict[str, Any]) -> None:
    """Prints one run: milliseconds and ratios to the floor, then ratios to other contenders."""
    size = f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters in {result['leaves']} leaves"
    title = f"{run['inner']}, k = {result['every_k']}, {size}, on {result['device']}"
    times = _table(
        title,
        "window\nms",
        "hold\nms",
        "release\nms",
        "window,\nto floor",
        "hold,\nto floor",
        "release,\nto floor",
        "agrees",
    )
    least, parts = run["floor"], ("window", "hold", "release")
    times.add_row("floor", *(_milliseconds(least[f"{part}_ms"]) for part in parts))
    ratios = _table(
        None,
        "window, to\nMultiSteps",
        "to hand-\nwritten",
        "to hand-written,\nno zeroing",
        "tempo-\nraries",
        "compile\ns",
    )
    ratios.caption = CAPTION
    for row in run["contenders"]:
        agrees = "yes" if row["agrees"] else "[bold red]NO"
        times.add_row(
            row["name"],
            *(_milliseconds(row[f"{part}_ms"]) for part in parts),
            *(f"{row['ratio_to_floor'][part]['median']:.2f}" for part in parts),
            agrees if row["equivalent"] else f"{agrees} *",
        )
        units = "multi_steps", "hand_written", "hand_written_no_zeroing"
        windows = (row[f"ratio_to_{unit}"]["window"]["median"] for unit in units)
        figures = (*windows, row["temporaries"], row["compile_s"])
        ratios.add_row(row["name"], *(f"{x:.2f}" for x in figures))
    console = _console()
    console.print(times, _describe_floor(least), ratios)
    for missing in run["left_out"]:
        console.print(f"[bold]Left out:[/] {missing['name']}: {missing['why']}")


def show_by_every_k(result: dict[str, Any]) -> None:
    """Prints what compiling takes by the length of the window."""
    table = Table("k", "temporaries", "compile s", box=box.SIMPLE_HEAD)
    for row in result["compilation_of_apply_gradients"]:
        table.add_row(str(row["every_k"]), f"{row['temporaries']:.2f}", f"{row['compile_s']:.2f}")
    _console().print("optaccum.apply_gradients by window length:", table)


def _describe_floor(least: dict[str, Any]) -> str:
    rates = {name: f"{q['median'] / 1e9:.1f} GB/s" for name, q in least["bandwidth"].items()}
    moved = (f"{least['streams'][part]:.3g} for a {part}" for part in ("hold", "release"))
    text = f"Floor: {' and '.join(moved)}, in sizes of the parameters, at {rates[floor.TRIAD]}"
    text += f" (triad; a copy: {rates[floor.COPY]})."
    text += (
        f"\nA call that only passes all arrays through: {_milliseconds(least['dispatch_ms'])} ms."
    )
    if not least["bandwidth_bound"]:
        text += "\nThis inner optimizer computes for longer than its bytes take to move."
    return text


def _table(title: str | None, *headings: str) -> Table:
    columns = (Column(heading, justify="right") for heading in headings)
    return Table(Column("contender", no_wrap=True), *columns, title=title, box=box.SIMPLE_HEAD)


def _milliseconds(quartiles: dict[str, float]) -> str:
    median = quartiles["median"]
    return f"{median:.0f}" if median >= 100 else f"{median:.3g}"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100)
