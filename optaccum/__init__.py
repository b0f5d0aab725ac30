"""Exact, free and safe gradient accumulation for Optax.

Step the optimizer once per four microbatches, as if they were one batch::

    from optaccum import accumulate, apply_gradients

    tx = accumulate(4, optax.adamw(1e-3))
    opt_state = tx.init(params)
    for batch in microbatches:
        grads = jax.grad(loss_fn)(params, batch)
        params, opt_state = apply_gradients(tx, grads, opt_state, params, weight=len(batch))

In your training step, put the last two lines into one `jax.jit` with donated arguments.

What to use when:

* `accumulate` and `apply_gradients`: each call brings one microbatch. `value_and_apply` also takes
  the gradient, in less memory if layers are in a scan.
* `value_and_grad`: one call brings the whole batch.
* `microbatched`: the loss compares rows, as contrastive losses do.
* `fit_num_microbatches`: finds how many microbatches fit in memory.
* `optaccum.flax`: train states for linen and nnx. `optaccum.testing`: is my accumulation right?
* `from_multi_steps`: goes on from a checkpoint of `optax.MultiSteps`.

`help(optaccum.accumulate)` has weights, releases and the other options. A name such as
`docs/semantics.md` is a page of the site, and a file of the repository.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from optaccum import flax as flax, testing as testing

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

_LAZY = ("flax", "testing")  # Flax is optional, and the checks take time to import


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'optaccum' has no attribute {name!r}")
    try:
        return importlib.import_module(f"optaccum.{name}")
    except ImportError as error:  # `help` and `hasattr` expect an AttributeError
        raise AttributeError(str(error)) from error


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY, "__doc__", "__version__"])
