"""What the leaves of a batch hold per microbatch: candidates for the right weights."""

from collections.abc import Iterator
import itertools
from typing import Any

import numpy as np

from optaccum._validate import rank

LARGEST = 2**24  # elements; a larger leaf is not a mask
VALUES = 64  # of an integer leaf that are tried as the one to ignore


def count(named: dict[str, Any], n: int) -> dict[str, np.ndarray]:
    """Returns {expression: f64[n]}, the simplest first, of those that are not all alike.

    Pass the likeliest of the `named` leaves first. Microbatch i of n holds the rows i, i + n, ...
    """
    found: dict[str, np.ndarray] = {}
    # Booleans, integers and real numbers, not keys and complex numbers.
    likely = {name: x for name, x in named.items() if rank(x) in (1, 2, 3)}
    leaves = {name: np.asarray(x) for name, x in likely.items() if np.size(x) <= LARGEST}
    for source, x in _counted(leaves):
        counts = x.reshape(len(x) // n, n, -1).astype(np.float64).sum((0, 2))
        usable = np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0
        if usable and np.ptp(counts) > 1e-9 * counts.max():
            found[source] = counts
    return found


def _counted(leaves: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields expressions and what they add up, [rows, ...]."""
    for name, x in leaves.items():
        views = {name: x}
        if x.ndim > 1 and x.shape[1] > 1:
            views |= {f"{name}[:, 1:]": x[:, 1:], f"{name}[:, :-1]": x[:, :-1]}
        values, times = np.unique(x, return_counts=True) if x.dtype.kind in "biu" else ([], [])
        often = [int(values[i]) for i in np.argsort(-np.asarray(times))[:VALUES]]
        for view, y in views.items():
            yield f"{view}.sum()", y
            for value in (0, *often):
                yield f"({view} != {value}).sum()", y != value
            yield f"({view} > 0).sum()", y > 0
            yield f"({view} >= 0).sum()", y >= 0
            yield f"(~jnp.isnan({view})).sum()", y == y
            for value in often:
                yield f"({view} == {value}).sum()", y == value
    for (b, y), (a, x) in itertools.combinations([*leaves.items()][:8], 2):
        short, long = sorted((x, y), key=lambda each: each.ndim)
        if long.shape[: short.ndim] == short.shape:  # the shorter one counts rows or tokens
            wide = short.reshape(short.shape + (1,) * (long.ndim - short.ndim))
            yield f"({b} * {a}).sum()", long.astype(np.float64) * wide
