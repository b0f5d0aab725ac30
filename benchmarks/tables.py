"""Tables: one list of rows for the terminal and for the READMEs."""

from collections.abc import Mapping, Sequence
import dataclasses
import textwrap
from typing import Any

AGREES = {True: "yes", False: "NO", None: "-"}
NOT_EQUIVALENT = "† By its definition it computes something else than the full batch."
TEXT = frozenset({"contender", "figure", "inner", "model", "target"})


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells by heading, a dash where a row lacks one, and what is said above and below."""

    rows: Sequence[Mapping[str, str]]
    title: str = ""
    notes: Sequence[str] = ()

    def terminal(self) -> str:
        """Returns the table for a terminal, its headings, cells and notes broken into lines."""
        # Wide enough for the longest word; a heading of names stays whole.
        widths = [
            None if heading in TEXT else max(9, *map(len, heading.split()))
            for heading in self.headings
        ]
        table = self._format("simple", 12, maxheadercolwidths=widths)
        notes = (textwrap.fill(note, 100) for note in self.notes)
        return "\n".join([*([self.title] if self.title else []), table, *notes, ""])

    def markdown(self) -> str:
        """Returns the table for a README, its notes below."""
        return "\n".join([self._format("pipe"), *([""] if self.notes else []), *self.notes])

    def _format(self, name: str, width: int | None = None, **options: Any) -> str:
        from tabulate import tabulate  # here, so that the report's paths are known without it

        def cell(row, heading):
            text = row.get(heading, "-")
            return text if width is None or heading in TEXT else textwrap.fill(text, width)

        rows = [[cell(row, heading) for heading in self.headings] for row in self.rows]
        align = ["left" if heading in TEXT else "right" for heading in self.headings]
        options |= {"colalign": align, "disable_numparse": True}
        return tabulate(rows, self.headings, name, **options)

    @property
    def headings(self) -> list[str]:
        """The headings of all rows."""
        return list(dict.fromkeys(heading for row in self.rows for heading in row))


def name_of(row: Mapping[str, Any]) -> str:
    """Returns a contender's name, with a mark where it does not claim to match the full batch."""
    return row["name"] + ("" if row.get("equivalent", True) else " †")


def median(figure: Any, form: str = "{:.2f}", unit: float = 1) -> str:
    """Returns a figure, or the median of {q1, median, q3}, in a unit; "-" if there is none."""
    if figure is None:
        return "-"
    return form.format((figure["median"] if isinstance(figure, dict) else figure) / unit)


def three_digits(figure: Any) -> str:
    """Returns a figure, or its median, with three digits."""
    value = figure["median"] if isinstance(figure, dict) else figure
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def where(result: Mapping[str, Any]) -> str:
    """Returns what the figures were measured on, and when."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    stopped = "" if result.get("complete", True) else " Stopped before its end."
    return f"Measured on: {result['device']}, {versions}, {result['date'][:10]}.{stopped}"
