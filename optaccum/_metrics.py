"""What to log of a window: its counters, the means of its losses, the norm of its gradient."""

from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optaccum import _devices, _reductions
from optaccum._reductions import AVERAGE, of_key
from optaccum._state import as_array, has_sums, is_variable, read
from optaccum._validate import check_loss_reduction
from optaccum._window import Sums

KEYS = "gradient_step", "mini_step", "released", "skipped", "weight", "grad_norm"


def window_metrics(
    opt_state: Any, grads: Any = None, *, loss_reduction: Literal["mean", "sum"] = "mean"
) -> dict[str, jax.Array]:
    """Return what is worth logging of the window that an optimizer's state is in.

    After a release these are the numbers of the released window, else of the open window so far, so
    log them if `released` is True. All are computed from the state. Under `jax.jit` unused ones
    cost nothing.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, window_metrics
    >>> tx = accumulate(2, optax.sgd(0.1), metrics=("loss",))
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> for grads, loss in (([3.0, 0.0], 5.0), ([3.0, 8.0], 3.0)):
    ...     _, state = tx.update(jnp.array(grads), state, params, loss=loss)
    >>> metrics = window_metrics(state)
    >>> print(metrics["released"], metrics["loss"], metrics["grad_norm"])
    True 4.0 5.0

    =========================================  ==================================================
    key                                        meaning
    =========================================  ==================================================
    `gradient_step`                            i32[], windows released so far
    `mini_step`                                i32[], microbatches in the open window, 0 after a
                                               release
    `released`                                 bool[], whether the last call released a window
    `skipped`                                  i32[], microbatches rejected so far
    `weight`                                   f32[], sum of the window's weights
    `grad_norm`                                f32[], norm of the window's mean gradient, also
                                               with `use_grad_mean=False`
    the names in `metrics`                     the window's value of each, f32[] or a tree
    the names of scalars in `average_args`     f32[], the window's weighted mean
    =========================================  ==================================================

    Guarantees:
        * It adds no NaN. Metrics and norm are 0 before the first microbatch that counts, and a
          ratio is 0 if its denominator is.
        * The constant `every_k` 1 keeps no sums. There the numbers are the same if `grads` are
          passed, and the norm is 0 unless the call released.
        * With `reduce_axes` all numbers are over all devices. The sums are reduced only if
          `grad_norm` is used.
        * In `jax.shard_map` a sharded model has one norm, by its types. With `check_vma=False` and
          in `jax.pmap` gradients count as replicated.
        * The norm is computed of the sums, so weights from 2**-40 to 2**40 are safe.

    Args:
        opt_state: As for :func:`optaccum.get_state`, after the update.
        grads: The gradients of that update, as :func:`optaccum.accumulate` got them. Read only if
            the state has no sums.
        loss_reduction: As :func:`optaccum.accumulate` was built. Read only with `grads`.

    Returns:
        A dict of scalars, and of trees for metrics that are trees.

    Raises:
        ValueError: if there are neither sums nor `grads`, if an average has the name of another
            key, if the state has several members of `jax.vmap`, or as :func:`get_state` does.
    """
    summed = check_loss_reduction(loss_reduction) == "sum"
    state = read(opt_state, "window_metrics")
    # Trees in `average_args` are left out. With `reduce_axes` a scalar has the weight's axis.
    ndims = [jnp.ndim(state.weight)]
    sums = {
        key: jax.tree.map(as_array, x, is_leaf=is_variable)
        for key, x in state.arg_sums.items()
        if of_key(key)[0] != AVERAGE or [*map(jnp.ndim, jax.tree.leaves(x))] == ndims
    }
    check_own_names(of_key(key)[1] for key in sums)
    summed_grads = has_sums(state)
    if not summed_grads and grads is None:
        raise ValueError(
            "`opt_state` has no sums of gradients, since `every_k` is the constant 1 or the "
            "parameters are (); pass the `grads` of the update before it, with every k"
        )
    weight, grad_sum, sums = _reductions.of_all(Sums(state.weight, state.grad_sum, sums))
    known = weight > 0
    divisor = jnp.where(known, weight, 1)

    def mean(x):
        return jnp.where(known, x / divisor, 0).astype(x.dtype)

    norm = jnp.sqrt(_devices.squared_norm(grad_sum if summed_grads else grads))
    if summed_grads or summed:
        norm = mean(norm)
    if not summed_grads:
        norm = jnp.where(state.released, norm, 0)
    counters = {name: getattr(state, name) for name in KEYS[:4]}
    metrics = {}
    for key, x in sums.items():
        reduction, name = of_key(key)
        metrics[name] = _reductions.read(reduction, x, known, mean)
    return {**counters, "weight": weight, "grad_norm": norm, **metrics}


def check_own_names(averages: Iterable[str]) -> None:
    """Raises if an average has the name of another number."""
    if both := sorted(set(averages).intersection(KEYS)):
        raise ValueError(
            f"`average_args` or `metrics` name {both[0]!r}, which `window_metrics` returns itself; "
            "pass it under another name"
        )
