"""Exact, free and safe gradient accumulation for Optax."""

from optaccum._accumulate import (
    AccumulateState,
    accumulate,
    apply_gradients,
    get_state,
    has_released,
)

__all__ = (
    "AccumulateState",
    "accumulate",
    "apply_gradients",
    "get_state",
    "has_released",
)
