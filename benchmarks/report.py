"""Write the tables and figures of the READMEs from the committed results: no number is typed.

A table stands between `<!-- name: begin -->` and `<!-- name: end -->`. The names are those of
`render`; a README has the ones it wants.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import re
from typing import Any

from benchmarks import collectives_tables, in_step_tables, plots, scaling_tables

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"
README = ROOT / "README.md"
READMES = README, ROOT / "benchmarks" / "README.md"
NOT_EQUIVALENT = "\\* By its definition it computes something else than the full batch."


def load(folder: pathlib.Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Returns the committed results of each benchmark, CPU before GPU."""
    return {
        name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-[cg]pu.json"))]
        for name in ("overhead", "scaling", "train_step", "in_step", "collectives")
    }


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows of cells by heading as a Markdown table."""
    text = ("contender", "figure", "inner", "reduction")
    rule = ("---" if heading in text else "---:" for heading in rows[0])
    lines = (rows[0], rule, *(row.values() for row in rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(result: dict[str, Any]) -> str:
    """Returns what the figures were measured on, and when."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Measured on: {result['device']}, {versions}, {result['date'][:10]}."


def name_of(row: dict[str, Any]) -> str:
    """Returns a contender's name, with a mark where it does not claim to match the full batch."""
    return row["name"] + ("" if row["equivalent"] else " \\*")


def overhead_table(result: dict[str, Any]) -> str:
    """Returns the ratios that `benchmarks.overhead` found, for AdamW if it is among the inners."""
    run = plots.main_run(result)
    units = {
        "window, to the floor": "floor",
        "to MultiSteps": "multi_steps",
        "to the hand-written loop": "hand_written",
        "to the same, no zeroing": "hand_written_no_zeroing",
    }
    rows = [
        {
            "contender": name_of(row),
            **{
                heading: f"{row[f'ratio_to_{unit}']['window']['median']:.2f}"
                for heading, unit in units.items()
            },
            "temporaries": f"{row['temporaries']:.1f}",
            "trace and compile": f"{row['compile_s']:.1f} s",
            "agrees": "yes" if row["agrees"] else "no",
        }
        for row in run["contenders"]
    ]
    size = f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters in {result['leaves']} leaves"
    note = f"{run['inner']}, k = {result['every_k']}, {size}. {where(result)}"
    marked = [] if all(row["equivalent"] for row in run["contenders"]) else [NOT_EQUIVALENT]
    return "\n".join([markdown(rows), "", *marked, note])


def overhead_times_table(result: dict[str, Any]) -> str:
    """Returns the times of `benchmarks.overhead`, and their ratios to the floor, inner by inner."""
    parts, rows, notes = ("window", "hold", "release"), [], []
    for run in result["runs"]:
        least = run["floor"]

        def cells(name, figures, ratios, agrees, inner=run["inner"]):
            milliseconds = {f"{part} ms": _milliseconds(figures[f"{part}_ms"]) for part in parts}
            to_floor = {f"{part}, to floor": _ratio(ratios[part]) for part in parts}
            return {"inner": inner, "contender": name, **milliseconds, **to_floor, "agrees": agrees}

        rows.append(cells("floor", least, dict.fromkeys(parts), ""))
        for row in run["contenders"]:
            agrees = "yes" if row["agrees"] else "no"
            rows.append(cells(name_of(row), row, row["ratio_to_floor"], agrees))
        rates = (
            f"{q['median'] / 1e9:,.0f} GB/s ({name})" for name, q in least["bandwidth"].items()
        )
        bound = "" if least["bandwidth_bound"] else ", which is not what bounds it"
        size = f"{run['parameter_bytes'] / 1e6:.3g} MB of parameters"
        dispatch = (
            f"a call that only passes all arrays through {_milliseconds(least['dispatch_ms'])} ms"
        )
        notes.append(f"{run['inner']}: {size}; bandwidth {', '.join(rates)}{bound}; {dispatch}.")
    if not all(row["equivalent"] for run in result["runs"] for row in run["contenders"]):
        notes.insert(0, NOT_EQUIVALENT)
    size = f"k = {result['every_k']}, {result['leaves']} leaves, {result['rounds']} rounds."
    return "\n".join([markdown(rows), "", *notes, f"{size} {where(result)}"])


def compilation_table(result: dict[str, Any]) -> str:
    """Returns what compiling `optaccum.apply_gradients` takes by the length of the window."""
    rows = [
        {
            "k": f"{row['every_k']:,}",
            "temporaries": f"{row['temporaries']:.1f}",
            "trace and compile": f"{row['compile_s']:.1f} s",
        }
        for row in result["compilation_of_apply_gradients"]
    ]
    return f"{markdown(rows)}\n\n{where(result)}"


def train_step_table(result: dict[str, Any]) -> str:
    """Returns the figures of `benchmarks.train_step`: speed, peak memory and the largest batch."""
    fits = {row["name"]: row for row in result["largest"]}
    budget = f"{result['budget_bytes'] / 1e6:,.0f} MB"

    def cells(row):
        speed, largest = row["tokens_per_second"], fits[row["name"]]
        least = "at least " if largest["capped"] else ""
        return {
            "contender": row["name"],
            "tokens/s": f"{speed['median']:,.0f}" if speed else "-",
            "time, to MultiSteps": _ratio(row["time_to_multi_steps"]),
            "to the hand-written loop": _ratio(row["time_to_hand_written"]),
            "peak": f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"largest microbatch in {budget}": f"{least}{largest['microbatch'] or 'none'}",
            "agrees": {True: "yes", False: "no", None: "did not run"}[row["agrees"]],
        }

    model = f"{result['parameters'] / 1e6:,.1f} M parameters, {result['dtype']}"
    window = (
        f"{result['every_k']} x {result['microbatch']} sequences of {result['sequence']} tokens"
    )
    rows = [cells(row) for row in result["contenders"]]
    return f"{markdown(rows)}\n\nTransformer of {model}, window of {window}. {where(result)}"


def slopes_table(result: dict[str, Any]) -> str:
    """Returns how each figure of `benchmarks.scaling` grows: the power of its variable."""
    rows = [
        {
            "figure": f"{scaling_tables.HEADINGS[fit['quantity']].rpartition(' ')[0]}, by "
            f"{scaling_tables.HEADINGS.get(sweep, sweep)}",
            **scaling_tables.cells(fit, scaling_tables.SLOPE[1:]),
        }
        for sweep, figures in result["sweeps"].items()
        for fit in figures["slopes"]
    ]
    return f"{markdown(rows)}\n\n{where(result)}"


def in_step_table(result: dict[str, Any]) -> str:
    """Returns what accumulating inside one step costs, the largest batch, and the drift."""
    model = f"{result['parameters'] / 1e6:,.1f} M parameters, {result['dtype']}"
    batch = f"{result['num_microbatches']} x {result['microbatch']} sequences"
    note = f"Transformer of {model}, a batch of {batch} of {result['sequence']} tokens."
    rows = (in_step_tables.step_rows, in_step_tables.largest_rows, in_step_tables.drift_rows)
    tables = "\n\n".join(markdown(make(result)) for make in rows)
    return f"{tables}\n\n{note} {where(result)}"


def collectives_table(result: dict[str, Any]) -> str:
    """Returns what devices send each other, the time of a window, and how that grows with k."""
    pairs = zip(
        collectives_tables.traffic_rows(result), collectives_tables.time_rows(result), strict=True
    )
    rows = [traffic | time for traffic, time in pairs], collectives_tables.length_rows(result)
    left_out = [f"Left out: {name}, for {why}." for name, why in result["left_out"].items()]
    note = f"Transformer of {collectives_tables.setting(result)}. {where(result)}"
    return "\n\n".join([*map(markdown, rows), *left_out, note])


def at_scale_table() -> str:
    """Returns the calculation of what one reduction a window saves on many chips."""
    scale = collectives_tables.Scale()
    return f"{markdown(collectives_tables.scale_rows(scale))}\n\n{scale}"


def sweep_table(sweep: str, result: dict[str, Any]) -> str:
    """Returns one sweep of `benchmarks.scaling`."""
    rows = scaling_tables.tables(sweep, result["sweeps"][sweep])["rows"]
    return f"{markdown(rows)}\n\n{where(result)}"


def _milliseconds(figure: dict[str, float]) -> str:
    return f"{figure['median']:.0f}" if figure["median"] >= 100 else f"{figure['median']:.3g}"


def _ratio(figure: dict[str, float] | None) -> str:
    return f"{figure['median']:.2f}" if figure else "-"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "overhead": ("overhead", overhead_table),
    "overhead_times": ("overhead", overhead_times_table),
    "compilation": ("overhead", compilation_table),
    "train_step": ("train_step", train_step_table),
    "in_step": ("in_step", in_step_table),
    "collectives": ("collectives", collectives_table),
    "slopes": ("scaling", slopes_table),
    "leaves": ("scaling", lambda result: sweep_table("leaves", result)),
    "dtype": ("scaling", lambda result: sweep_table("dtype", result)),
}


def render(results: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Returns every table by name, those of a CPU and a GPU one below the other."""
    measured = {
        name: "\n\n".join(map(table, results[benchmark]))
        or f"No result is committed: run `python -m benchmarks.{benchmark}`."
        for name, (benchmark, table) in TABLES.items()
    }
    return measured | {"at_scale": at_scale_table()}


def insert(text: str, name: str, table: str) -> str:
    """Returns `text` with `table` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}{table}\n{end}{rest.split(end)[1]}"


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Returns `text` with the right table between each pair of its markers."""
    for name in re.findall(r"<!-- (\w+): begin -->", text):
        text = insert(text, name, tables[name])
    return text


def main() -> None:
    """Rewrites the tables and draws the figures."""
    results = load()
    tables = render(results)
    for path in READMES:
        path.write_text(fill(path.read_text(), tables))
    FIGURES.mkdir(exist_ok=True)
    plots.draw(results, FIGURES)


if __name__ == "__main__":
    main()
