"""A word on accumulators that stand where they do harm, known by the state of the whole."""

from collections.abc import Iterator
import contextlib
import pathlib
import sys
from typing import Any
import warnings
import weakref

import jax
import optax

from optaccum._state import AccumulateState

PACKAGE = str(pathlib.Path(__file__).parent.parent)
seen: weakref.WeakSet = weakref.WeakSet()


def warn_if_misplaced(update: Any, state: Any) -> None:
    """Warns, once a transformation, of an accumulator whose zeros or windows another one counts.

    Args:
        update: of the outermost transformation.
        state: its state.
    """
    owner = getattr(update, "__self__", update)
    with contextlib.suppress(TypeError):  # what cannot be remembered is asked again
        if owner in seen:
            return
        seen.add(owner)
    if message := _misplaced(state):
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_code.co_filename.startswith(PACKAGE):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, UserWarning, stacklevel=level)


def _misplaced(state: Any) -> str:
    """Returns what is wrong with the places of accumulators in a state, or nothing."""
    for outer, inner in (
        (AccumulateState, optax.MultiStepsState),
        (optax.MultiStepsState, AccumulateState),
    ):
        for _, found in optax.tree.get_all_with_path(state, outer.__name__):
            if optax.tree.get_all_with_path(found, inner.__name__):
                return (
                    "`accumulate` and optax.MultiSteps are around each other: the optimizer steps "
                    "once in as many microbatches as both have together; leave one out"
                )
    bare = None
    for link in _links(state):
        if isinstance(link, AccumulateState):
            bare = None if jax.tree.leaves(link.inner_state) else link
        elif bare is not None and jax.tree.leaves(link):
            return (
                "`accumulate` stands in front of a link that keeps state, "
                f"{type(link).__name__}, which takes the zeros of every hold for gradients; put "
                "the links after it inside: `accumulate(k, optax.chain(...))`"
            )
    return ""


def _links(state: Any) -> Iterator[Any]:
    """Yields the states of the links of chains in chains, in order."""
    if type(state) is tuple:
        for link in state:
            yield from _links(link)
    else:
        yield state
