"""What a check found, in a form for programs and in words."""

import dataclasses
import textwrap

import numpy as np


@dataclasses.dataclass(frozen=True)
class Finding:
    """One reason why microbatches and the full batch differ, or may differ.

    Attributes:
        kind: A word to compare with, such as "weights"; `optaccum.testing` lists them.
        where: The user's source line, "file.py:205", or None if none is known.
        detail: A sentence.
    """

    kind: str
    where: str | None
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}{f' at {self.where}' if self.where else ''}: {self.detail}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found; `str(report)` says it in a paragraph.

    Attributes:
        exact: Whether microbatches give what the full batch gives; None if that is unknown.
        error: How far they are from it, relative to its norm; None without numbers.
        scale: The factor that the mean over microbatches lacks (1.0 if it lacks none), or None.
        weights: How much each microbatch should count, in shares that sum to 1, or None.
        findings: The reasons, the verdict first. If all is exact, what of the program may differ
            with other rows; mostly nothing.
        remedy: What to change, or None if there is nothing to change.
        tolerance: The largest `error` that rounding explains, or None.
        left: The `error` that is left after the remedy, or None if the check cannot apply it.
    """

    exact: bool | None
    error: float | None = None
    scale: float | None = None
    weights: np.ndarray | None = None
    findings: tuple[Finding, ...] = ()
    remedy: str | None = None
    tolerance: float | None = None
    left: float | None = None

    @property
    def kind(self) -> str | None:
        """The kind of the first finding, which is the verdict; None if all is exact."""
        return self.findings[0].kind if self.findings and self.exact is not True else None

    def __str__(self) -> str:
        known = {True: "Exact", False: "Not exact", None: "Unknown"}[self.exact]
        if self.error is not None:
            bound = "" if self.tolerance is None else f" (rounding explains {self.tolerance:.1g})"
            off = f"within {self.error:.1g} of" if self.exact else f"{self.error:.2g} off"
            known = f"{known}: microbatches are {off} the full batch{bound}"
        lines = [f"{known}.", *(f"* {finding}" for finding in self.findings)]
        if self.weights is not None and self.exact is False:
            shares = [f"{w:.3g}" for w in self.weights[:8]] + ["..."] * (len(self.weights) > 8)
            lines.append(f"* shares of the microbatches: {', '.join(shares)}")
        if self.remedy:
            lines.append(f"Remedy: {self.remedy}")
        if self.remedy and self.left is not None:
            rounded = self.tolerance is not None and self.left <= self.tolerance
            lines[-1] += f" Tried: {'only rounding' if rounded else f'{self.left:.2g}'} is left."
        return "\n".join(map(_wrap, lines))


def _wrap(line: str) -> str:
    indent = "  " * line.startswith("*")
    return textwrap.fill(
        line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def said(error: BaseException | None) -> str:
    """Returns what an exception says, shortened."""
    return f"{type(error).__name__}: {str(error)[:300]}"
