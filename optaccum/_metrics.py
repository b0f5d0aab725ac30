"""What to log of a window: its counters, the means of its losses, the norm of its gradient."""

from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optaccum import _devices
from optaccum._state import by_name, read
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
    the names in `average_args` and `metrics`  f32[], the window's weighted means of scalars
    =========================================  ==================================================

    Guarantees:
        * It adds no NaN. Means and norm are 0 before the first microbatch.
        * At the constant `every_k` 1, which keeps no sums, the same program has the same numbers
          if it passes that call's `grads`. The norm is then 0 unless the call released.
        * With `reduce_axes` all numbers are over all devices. Whoever uses `grad_norm` reduces the
          sums for it.
        * In `jax.shard_map` a sharded model has one norm, by its types. With `check_vma=False` and
          in `jax.pmap` gradients count as replicated.
        * The norm is computed of the sums, so weights from 2**-40 to 2**40 are safe.

    Args:
        opt_state: As for :func:`optaccum.get_state`, after the update.
        grads: The gradients of that update, as :func:`optaccum.accumulate` got them. Read only if
            the state has no sums.
        loss_reduction: As :func:`optaccum.accumulate` was built. Read only with `grads`.

    Returns:
        A dict of scalars.

    Raises:
        ValueError: if there are neither sums nor `grads`, if an average has the name of another
            key, if the state has several members of `jax.vmap`, or as :func:`get_state` does.
    """
    summed = check_loss_reduction(loss_reduction) == "sum"
    state = read(opt_state, "window_metrics")
    sums = {name: jax.tree.leaves(x) for name, x in by_name(state.arg_sums).items()}
    # Averaged trees are left out. With `reduce_axes` a scalar has an axis, as the weight does.
    ndims = [jnp.ndim(state.weight)]
    scalars = {name: x[0] for name, x in sums.items() if [*map(jnp.ndim, x)] == ndims}
    check_own_names(scalars)
    has_sums = jax.tree.structure(state.grad_sum) != jax.tree.structure(())
    if not has_sums and grads is None:
        raise ValueError(
            "`opt_state` has no sums of gradients, since `every_k` is the constant 1; pass "
            "`grads`, those of the update before it, with every k"
        )
    weight, grad_sum, scalars = _devices.of_all(Sums(state.weight, state.grad_sum, scalars))
    known = weight > 0
    divisor = jnp.where(known, weight, 1)

    def mean(x):
        return jnp.where(known, x / divisor, 0).astype(x.dtype)

    norm = jnp.sqrt(_devices.squared_norm(grad_sum if has_sums else grads))
    if has_sums or summed:
        norm = mean(norm)
    if not has_sums:
        norm = jnp.where(state.released, norm, 0)
    counters = {name: getattr(state, name) for name in KEYS[:4]}
    means = {name: mean(x) for name, x in scalars.items()}
    return {**counters, "weight": weight, "grad_norm": norm, **means}


def check_own_names(averages: Iterable[str]) -> None:
    """Raises if an average has the name of another number."""
    if both := sorted(set(averages).intersection(KEYS)):
        raise ValueError(
            f"`average_args` or `metrics` name {both[0]!r}, which `window_metrics` returns itself; "
            "pass it under another name"
        )
