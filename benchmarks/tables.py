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
        """Returns the table with its headings, cells and notes broken into lines."""
        # Wide enough for the longest word; a heading of names stays whole.
        widths = [None if x in TEXT else max(9, *map(len, x.split())) for x in self.headings]
        table = self._format("simple", 12, maxheadercolwidths=widths)
        return "\n".join([self.title, table, *(textwrap.fill(x, 100) for x in self.notes), ""])

    def markdown(self) -> str:
        return "\n".join([self._format("pipe"), *([""] if self.notes else []), *self.notes])

    @property
    def headings(self) -> list[str]:
        return list(dict.fromkeys(heading for row in self.rows for heading in row))

    def _format(self, name: str, width: int = 10**6, **options: Any) -> str:
        from tabulate import tabulate  # here, so that the report's paths are known without it

        align = ["left" if heading in TEXT else "right" for heading in self.headings]
        options |= {"colalign": align, "disable_numparse": True}
        widths = {heading: 10**6 if heading in TEXT else width for heading in self.headings}
        rows = [[textwrap.fill(row.get(x, "-"), widths[x]) for x in widths] for row in self.rows]
        return tabulate(rows, self.headings, name, **options)


def name_of(row: Mapping[str, Any]) -> str:
    """Returns a contender's name, with a mark where it does not claim to match the full batch."""
    return row["name"] + ("" if row.get("equivalent", True) else " †")


def middle(figure: Any) -> Any:
    """Returns a figure, or the median of {q1, median, q3}."""
    return figure["median"] if isinstance(figure, dict) else figure


def median(figure: Any, form: str = "{:.2f}", unit: float = 1) -> str:
    """Returns a figure, or its median, in a unit; "-" if there is none."""
    return "-" if figure is None else form.format(middle(figure) / unit)


def three_digits(figure: Any) -> str:
    """Returns a figure, or its median, with three digits."""
    return median(figure, "{:,.0f}" if (middle(figure) or 0) >= 100 else "{:.3g}")


def where(result: Mapping[str, Any]) -> str:
    """Returns what the figures were measured on, and when."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    stopped = "" if result.get("complete", True) else " Stopped before its end."
    return f"Measured on: {result['device']}, {versions}, {result['date'][:10]}.{stopped}"


def left_out(result: Mapping[str, Any]) -> list[str]:
    """Returns a note for each contender that is not installed."""
    found = dict(result.get("left_out", ()))
    return [f"Left out: {name}, for {why}." for name, why in found.items()]
