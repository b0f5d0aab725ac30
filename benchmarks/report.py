"""Write the tables and figures of the READMEs from the committed results: no number is typed.

A table stands between `<!-- name: begin -->` and `<!-- name: end -->`. The names are those of
`render`; a README has the ones it wants.
"""

import argparse
from collections.abc import Mapping
import importlib
import pathlib
import re
from typing import Any

from benchmarks import harness, plots

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "figures"
READMES = ROOT / "docs" / "explanation" / "holds.md", ROOT / "benchmarks" / "README.md"
MODULES = "compiled", "overhead", "train_step", "in_step", "coupled", "collectives", "scaling"


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
