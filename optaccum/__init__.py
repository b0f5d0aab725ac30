"""Exact, free and safe gradient accumulation for Optax.

Documentation: the address is in the metadata of the package, `pip show -v optaccum`.
"""

from optaccum._accumulate import accumulate, apply_gradients
from optaccum._fit import Fit, fit_num_microbatches
from optaccum._metrics import window_metrics
from optaccum._microbatched import microbatched
from optaccum._microbatched_loss import microbatched_loss
from optaccum._migrate import from_multi_steps, to_multi_steps
from optaccum._noise import NoiseScale, init_noise_scale, update_noise_scale
from optaccum._skip import skip_not_finite
from optaccum._state import AccumulateState, get_state, has_released
from optaccum._state_shardings import state_shardings
from optaccum._value_and_apply import value_and_apply
from optaccum._value_and_grad import grad, value_and_grad

__version__ = "0.1.0"

__all__ = (
    "AccumulateState",
    "Fit",
    "NoiseScale",
    "accumulate",
    "apply_gradients",
    "fit_num_microbatches",
    "from_multi_steps",
    "get_state",
    "grad",
    "has_released",
    "init_noise_scale",
    "microbatched",
    "microbatched_loss",
    "skip_not_finite",
    "state_shardings",
    "to_multi_steps",
    "update_noise_scale",
    "value_and_apply",
    "value_and_grad",
    "window_metrics",
)
