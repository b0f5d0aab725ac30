"""What a compiled program does: what it sends between devices, and what it needs in memory."""

from typing import Any

from benchmarks import hlo


def collectives(compiled: Any, kind: str | None = None) -> tuple[list[int], list[int]]:
    """Returns the sizes of collectives: those that every call runs, and those in a branch.

    Args:
        compiled: a compiled program.
        kind: one of `benchmarks.hlo.KINDS`, or None for all of them.

    Returns:
        Two sorted lists with the bytes that a device puts into each collective. One that stands
        in a loop is listed as often as the loop runs.
    """
    always, sometimes = [], []
    for found in hlo.collectives(compiled.as_text()):
        if kind in (None, found.kind):
            (sometimes if found.conditional else always).extend([found.bytes] * found.trips)
    return sorted(always), sorted(sometimes)


def kinds(compiled: Any) -> set[str]:
    """Returns the kinds of the collectives in a program."""
    return {found.kind for found in hlo.collectives(compiled.as_text())}


def temporaries(compiled: Any) -> int:
    """Returns the bytes that a program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
