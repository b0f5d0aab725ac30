"""Exact, free and safe gradient accumulation for Optax."""

from optaccum._accumulate import accumulate
from optaccum._apply import apply_gradients
from optaccum._migrate import from_multi_steps
from optaccum._state import AccumulateState, get_state, has_released

__all__ = (
    "AccumulateState",
    "accumulate",
    "apply_gradients",
    "from_multi_steps",
    "get_state",
    "has_released",
)
