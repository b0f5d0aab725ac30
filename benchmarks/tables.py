"""Tables: one list of rows for the terminal and for the READMEs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        widths = [None if x in TEXT else max(9, *map(len, x.split())) for x in self._headings]
        table = self._format("simple", 12, maxheadercolwidths=widths)
        return "\n".join([self.title, table, *(textwrap.fill(x, 100) for x in self.notes), ""])

    def markdown(self) -> str:
        return "\n".join([self._format("pipe"), *([""] if self.notes else []), *self.notes])

    @property
    def _headings(self) -> list[str]:
        return list(dict.fromkeys(heading for row in self.rows for heading in row))

    def _format(self, form: str, width: int = 10**6, **options: Any) -> str:
        from tabulate import tabulate  # here, so that the report's paths are known without it

        options["colalign"] = ["left" if x in TEXT else "right" for x in self._headings]
        rows = [
            {x: cell if x in TEXT else textwrap.fill(cell, width) for x, cell in row.items()}
            for row in self.rows
        ]
        return tabulate(rows, "keys", form, disable_numparse=True, missingval="-", **options)


def rows_of(found: Iterable[Any], columns: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a row of cells for each of `found`.

    A column is a function of it, or the name of a figure and how `median` writes that.
    """

    def cell(one: Any, of: Any) -> Any:
        return of(one) if callable(of) else median(one.get(of[0]), *of[1:])

    return [{heading: cell(one, of) for heading, of in columns.items()} for one in found]


def name_of(row: Mapping[str, Any]) -> str:
    """Returns a contender's name, with a mark where it does not claim to match the full batch."""
    return row["name"] + ("" if row.get("equivalent", True) else " †")


def middle(figure: Any) -> Any:
    """Returns a figure, or the median of {q1, median, q3}."""
    return figure["median"] if isinstance(figure, dict) else figure


def median(figure: Any, form: str | Callable[[Any], str] = "{:.2f}", unit: float = 1) -> str:
    """Returns a figure, or its median, in a unit; a text as it is, and "-" if there is none."""
    if figure is None or isinstance(figure, bool):
        return AGREES[figure]
    if isinstance(figure, str):
        return figure
    value = middle(figure) / unit
    return form(value) if callable(form) else form.format(value)


def three_digits(figure: Any) -> str:
    """Returns a figure, or its median, with three digits."""
    return median(figure, lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")


def fitting(row: Mapping[str, Any], name: str) -> str:
    """Returns the largest size that fits, as far as the search went."""
    size = f"{row[name]:,}" if row[name] else "none"
    return f"at least {size}" if row["capped"] else size


def where(result: Mapping[str, Any]) -> str:
    """Returns what the figures were measured on, and when."""
    stopped = "" if result.get("complete", True) else " Stopped before its end."
    return f"Measured on: {result['device']}, {versions(result)}{stopped}"


def versions(result: Mapping[str, Any]) -> str:
    """Returns what the figures were measured with, and when."""
    return f"{', '.join(map(' '.join, result['versions'].items()))}, {result['date'][:10]}."


def left_out(result: Mapping[str, Any]) -> list[str]:
    """Returns a note for each contender that is not installed."""
    return [f"Left out: {x}, for {why}." for x, why in dict(result.get("left_out", ())).items()]
