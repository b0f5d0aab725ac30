"""Write the tables and figures of the READMEs from the committed results: no number is typed.

A table stands between `<!-- name: begin -->` and `<!-- name: end -->`. The names are those of
`render`; a README has the ones it wants.
"""

import argparse
from collections.abc import Mapping
import json
import pathlib
import re
from typing import Any

from benchmarks import (
    collectives,
    compiled_tables,
    coupled,
    harness,
    in_step,
    overhead,
    plots,
    scaling,
    train_step,
)

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "figures"
README = ROOT / "docs" / "explanation" / "holds.md"
READMES = README, ROOT / "benchmarks" / "README.md"
DEVICES = "", "-cpu", "-gpu", "-tpu"
TABLES = {
    "compiled": compiled_tables.tables,
    "overhead": overhead.tables,
    "train_step": train_step.tables,
    "in_step": in_step.tables,
    "coupled": coupled.tables,
    "collectives": collectives.tables,
    "scaling": scaling.tables,
}


def load(folder: pathlib.Path = harness.RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Returns the committed results of each benchmark, those of a CPU, a GPU and a TPU."""
    paths = {name: [folder / f"{name}{device}.json" for device in DEVICES] for name in TABLES}
    return {
        name: [
            json.loads(path.read_text()) | {"file": path.stem.rpartition("-")[2]}
            for path in found
            if path.exists()
        ]
        for name, found in paths.items()
    }


def render(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Returns every table by name, those of a CPU, a GPU and a TPU one below the other."""
    rendered: dict[str, list[str]] = {}
    for benchmark, of in results.items():
        for result in of:
            for name, found in TABLES[benchmark](result).items():
                rendered.setdefault(name, []).extend(table.markdown() for table in found)
    return {name: "\n\n".join(found) for name, found in rendered.items()}


def insert(text: str, name: str, table: str) -> str:
    """Returns `text` with `table` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}{table}\n{end}{rest.split(end)[1]}"


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Returns `text` with the right table between each pair of its markers."""
    for name in re.findall(r"<!-- (\w+): begin -->", text):
        text = insert(text, name, tables.get(name, "No result is committed."))
    return text


def main() -> None:
    """Rewrites the tables and draws the figures."""
    argparse.ArgumentParser("python -m benchmarks.report", description=__doc__).parse_args()
    results = load()
    tables = render(results)
    for path in READMES:
        path.write_text(fill(path.read_text(), tables))
    FIGURES.mkdir(exist_ok=True)
    plots.draw(results, FIGURES)


if __name__ == "__main__":
    main()
