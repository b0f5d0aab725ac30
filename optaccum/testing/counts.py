"""What the leaves of a batch hold per microbatch: candidates for the right weights."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from optaccum._core.batch import is_typed_key

LARGEST = 2**24  # elements; larger leaves are no masks
VALUES = 64  # of an integer leaf that are tried as the one to ignore


def count(named: dict[str, Any], n: int) -> dict[str, np.ndarray]:
    """Returns {expression: f64[n]}, the simplest first, of those that are not all alike.

    Args:
        named: {expression: leaf}, the likeliest first.
        n: the number of microbatches; microbatch i holds the rows i, i + n, ...
    """
    found: dict[str, np.ndarray] = {}
    leaves = []
    for name, leaf in named.items():
        if is_typed_key(leaf) or np.size(leaf) > LARGEST:
            continue
        x = np.asarray(leaf)
        if np.iscomplexobj(x) or not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
            continue
        integral = x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)
        leaves.append((name, x.astype(np.float64), integral))

    def add(source: str, x: np.ndarray) -> None:
        rows = x.reshape(len(x), -1).astype(np.float64).sum(1)
        counts = rows.reshape(-1, n).sum(0)
        usable = np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0
        if usable and np.ptp(counts) > 1e-9 * counts.max():
            found.setdefault(source, counts)

    for name, x, integral in leaves:
        views = {name: x}
        if x.ndim > 1 and x.shape[1] > 1:
            views |= {f"{name}[:, 1:]": x[:, 1:], f"{name}[:, :-1]": x[:, :-1]}
        for view, y in views.items():
            add(f"{view}.sum()", y)
            add(f"({view} != 0).sum()", y != 0)
        for value in (-100, -1) if integral else ():
            for view, y in views.items():
                if (y == value).any():
                    add(f"({view} != {value}).sum()", y != value)
        for view, y in views.items():
            add(f"({view} > 0).sum()", y > 0)
            add(f"({view} >= 0).sum()", y >= 0)
            add(f"(~jnp.isnan({view})).sum()", ~np.isnan(y))
        if integral:
            values, times = np.unique(x, return_counts=True)
            often = [int(v) for v in values[np.argsort(-times)][:VALUES]]
            for view, y in views.items():
                for value in often:
                    add(f"({view} != {value}).sum()", y != value)
            for view, y in views.items():
                for value in often:
                    add(f"({view} == {value}).sum()", y == value)
                    if y.ndim > 1:
                        others = (y != value).any(axis=tuple(range(1, y.ndim)))
                        add(f"({view} != {value}).any(axis=1).sum()", others)
            add(f"({name} - 1).sum()", x - 1)
        if x.ndim > 1:
            add(f"{name}.any(axis=1).sum()", x.any(axis=tuple(range(1, x.ndim))))
        add(f"({name} ** 2).sum()", x**2)
    few = leaves[:8]
    for i, (a, x, _) in enumerate(few):
        for b, y, _ in few[:i]:
            shape = _together(x.shape, y.shape)
            if shape is not None:
                long, short = (x, y) if x.ndim >= y.ndim else (y, x)
                short = short.reshape(short.shape + (1,) * (long.ndim - short.ndim))
                add(f"({b} * {a}).sum()", long * short)
    return found


def _together(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of a product in which the shorter one counts rows or tokens."""
    short, long = sorted((a, b), key=len)
    return long if long[: len(short)] == short else None
