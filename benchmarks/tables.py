"""Tables: one list of rows for the terminal and for the READMEs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

Result = dict[str, Any]
AGREES = {True: "yes", False: "NO", None: "-"}
TEXT = frozenset({"contender", "inner", "model", "target"})


def table(rows: Sequence[dict[str, str]], *notes: str) -> str:
    """Returns rows of cells by heading, with a dash for a missing one, and notes below."""
    headings = dict.fromkeys(heading for row in rows for heading in row)
    sides = ["left" if heading in TEXT else "right" for heading in headings]
    form: Any = {"disable_numparse": True, "missingval": "-", "colalign": sides}
    return "\n".join([tabulate(rows, "keys", "pipe", **form), *([""] if notes else []), *notes])


def rows_of(found: Iterable[Any], columns: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a row of cells for each of `found`.

    A column is a function of it, or the name of a figure and how `median` writes that.
    """

    def cell(one: Any, of: Any) -> Any:
        return of(one) if callable(of) else median(one.get(of[0]), *of[1:])

    return [{heading: cell(one, of) for heading, of in columns.items()} for one in found]


def quartiles(values: Any) -> dict[str, float]:
    q1, median, q3 = np.percentile(values, (25, 50, 75)).tolist()
    return {"q1": q1, "median": median, "q3": q3}


def ratios(seconds: Mapping[str, Any], name: str, units: Mapping[str, str]) -> dict[str, Any]:
    """Returns the quartiles of one contender's time in others'."""
    return {unit: quartiles(seconds[name] / seconds[of]) for unit, of in units.items()}


def median(figure: Any, form: str | Callable[[Any], str] = "{:.2f}", unit: float = 1) -> str:
    """Returns a figure, or its median, in a unit; a text as it is, and "-" if there is none."""
    if figure is None or isinstance(figure, bool):
        return AGREES[figure]
    if isinstance(figure, str):
        return figure
    value = (figure["median"] if isinstance(figure, dict) else figure) / unit
    return form(value) if callable(form) else form.format(value)


def three_digits(figure: Any) -> str:
    return median(figure, lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")


def where(result: Result) -> str:
    """Returns what the figures were measured on, and when."""
    return f"Measured on: {result['device']}, {versions(result)}"


def versions(result: Result) -> str:
    """Returns what the figures were measured with, and when."""
    return f"{', '.join(map(' '.join, result['versions'].items()))}, {result['date'][:10]}."
