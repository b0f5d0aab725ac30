"""Misspelled arguments: most transformations of Optax take any extra argument and say nothing."""

from collections.abc import Iterable
import difflib
import inspect
from typing import Any

OURS = "weight", "release"
POSITIONAL = "updates", "grads", "state", "params"
# Optax's own: given to every optimizer alike, so that one can be exchanged for another.
OPTAX = "value", "grad", "value_fn"


def named_by(update: Any) -> frozenset[str]:
    """Returns the names of arguments in the signature of an `update`."""
    return frozenset(inspect.signature(update).parameters)


def check_spelling(extra_args: Iterable[str], known: Iterable[str]) -> None:
    """Raises if an extra argument is almost one of ours, and not a known one."""
    for name in set(extra_args).difference(known):
        meant = _nearest(name, OURS)
        if meant and name.lower().startswith(meant[0]):  # `height` is a word of its own
            raise TypeError(
                f"`{name}` is not an argument of `accumulate`; did you mean `{meant}`? (If it is "
                "one of `inner`, wrap `inner` so that the signature of its `update` names it)"
            )


def check_fields(owner: type, fields: Iterable[str], update: Any, names: Iterable[str]) -> None:
    """Raises if one of `names`, given to a train state, is almost a field or an argument.

    Other names may be for links inside of `update`, which its signature does not show.
    """
    known = {*fields, *OPTAX, *named_by(update)}
    for name in sorted(set(names).difference(known, OURS)):
        if name == "batch_stats":  # Optax would ignore it, and BatchNorm would never move
            raise TypeError(
                f"`{name}` is not a field of {owner.__name__}; to keep it in the state, subclass "
                f"it, `class State({owner.__name__}): {name}: Any`"
            )
        if meant := _nearest(name, known.difference(OURS, POSITIONAL)):
            raise TypeError(
                f"`{name}` is not a field of {owner.__name__} and no argument of its `tx`, did you "
                f"mean `{meant}`?"
            )


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), [*names], 1, 0.8)), None)
