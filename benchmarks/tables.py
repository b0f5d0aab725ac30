"""Tables: one list of rows for the terminal and for the READMEs."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from tabulate import tabulate

AGREES = {True: "yes", False: "NO", None: "-"}
NOT_EQUIVALENT = "† By its definition it computes something else than the full batch."
TEXT = frozenset({"contender", "figure", "inner", "model", "target"})


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells by heading, all with the same headings, and what is said above and below."""

    rows: Sequence[Mapping[str, str]]
    title: str = ""
    notes: Sequence[str] = ()

    def terminal(self) -> str:
        """Returns the table for a terminal of 100 columns, its headings broken into lines."""
        broken = [heading if heading in TEXT else 9 for heading in self.rows[0]]
        widths = [None if isinstance(width, str) else width for width in broken]
        table = tabulate(
            [list(row.values()) for row in self.rows],
            headers=list(self.rows[0]),
            tablefmt="simple",
            maxheadercolwidths=widths,
            **self._cells(),
        )
        return "\n".join([*([self.title] if self.title else []), table, *self.notes, ""])

    def markdown(self) -> str:
        """Returns the table for a README, its notes below."""
        rows = [list(row.values()) for row in self.rows]
        table = tabulate(rows, headers=list(self.rows[0]), tablefmt="pipe", **self._cells())
        return "\n".join([table, *([""] if self.notes else []), *self.notes])

    def _cells(self) -> dict[str, Any]:
        align = tuple("left" if heading in TEXT else "right" for heading in self.rows[0])
        return {"colalign": align, "disable_numparse": True}


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
