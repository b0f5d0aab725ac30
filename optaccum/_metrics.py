"""What to log of a window: its counters, the means of its losses, the norm of its gradient."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from optaccum import _devices
from optaccum._state import by_name, get_state
from optaccum._trees import where
from optaccum._validate import check_loss_reduction
from optaccum._window import Sums

KEYS = "gradient_step", "mini_step", "released", "skipped", "weight", "grad_norm"


def window_metrics(
    opt_state: Any, grads: Any = None, *, loss_reduction: str = "mean"
) -> dict[str, jax.Array]:
    """Return what is worth logging of the window that an optimizer's state is in.

    After a release these are the numbers of the window that was released, and before it those of
    the open window so far. Log where `released` is True. All is computed from the state, and under
    `jax.jit` what is not used costs nothing.

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
    `mini_step`                                i32[], microbatches in the open window; 0 after a
                                               release
    `released`                                 bool[], whether the last call released a window
    `skipped`                                  i32[], microbatches rejected so far
    `weight`                                   f32[], sum of the window's weights
    `grad_norm`                                f32[], norm of the window's mean gradient (with
                                               `use_grad_mean=False`, too, where `inner` gets
                                               the sum)
    the names in `average_args` and `metrics`  f32[], the window's weighted means of scalars
    =========================================  ==================================================

    Guarantees:
        * Nothing is NaN that was not NaN before: means and norm are 0 before the first microbatch.
        * At the constant `every_k` 1, where no sums are kept, the same program has the same
          numbers if it passes that call's `grads`. The norm is then 0 unless the call released.
        * Where devices have parts of the sums (`reduce_axes`), all numbers are those of all
          devices. `grad_norm` then reduces the sums, in every call that uses it.
        * The pieces of a model in `jax.shard_map` are known by their types, and have one norm.
          With `check_vma=False` and in `jax.pmap` gradients are taken for whole.
        * The norm is that of the sums, divided by the weight: right for weights of 2**-40 to 2**40.

    Args:
        opt_state: as for :func:`optaccum.get_state`, after the update.
        grads: the gradients that the update took in, as they came to :func:`optaccum.accumulate`;
            read only if the state has no sums.
        loss_reduction: as :func:`optaccum.accumulate` was built, which the state does not show;
            read only where `grads` are.

    Returns:
        A dict of scalars.

    Raises:
        ValueError: if `every_k` is the constant 1 and `grads` is None; if an average has the name
            of another key; if the state is that of several members of `jax.vmap`; as
            :func:`optaccum.get_state` does.
    """
    summed = check_loss_reduction(loss_reduction) == "sum"
    state = get_state(opt_state)
    # Containers of arrays, such as the variables of flax.nnx, are leaves here that hold a leaf.
    counters = {name: jax.tree.leaves(getattr(state, name))[0] for name in KEYS[:4]}
    weight = jax.tree.leaves(state.weight)[0]
    sums = {name: jax.tree.leaves(x) for name, x in by_name(state.arg_sums).items()}
    scalars = {name: x[0] for name, x in sums.items() if [*map(jnp.ndim, x)] == [jnp.ndim(weight)]}
    check_own_names(scalars)
    check_one_member("window_metrics", counters["mini_step"])
    has_sums = check_readable(state.grad_sum, grads)
    weight, grad_sum, scalars = _devices.of_all(Sums(weight, state.grad_sum, scalars))
    known = weight > 0
    divisor = where(known, weight, jnp.ones_like(weight))

    def mean(x):
        return jnp.where(known, x / divisor, 0).astype(x.dtype)

    norm = jnp.sqrt(_devices.squared_norm(grad_sum if has_sums else grads))
    if has_sums or summed:
        norm = mean(norm)
    if not has_sums:
        norm = jnp.where(counters["released"], norm, 0)
    return {
        **counters,
        "weight": weight,
        "grad_norm": norm,
        **{name: mean(x) for name, x in scalars.items()},
    }


def check_one_member(caller: str, counter: jax.Array) -> None:
    """Raises where a counter of the state shows several members of `jax.vmap`."""
    if jnp.ndim(counter):
        raise ValueError(
            "`opt_state` is that of several members of jax.vmap, "
            f"{jnp.shape(counter)}; pass that of one: `jax.vmap({caller})(...)`"
        )


def check_readable(grad_sum: Any, grads: Any) -> bool:
    """Returns whether a state has sums, or raises where the gradient's norm cannot be known."""
    has_sums = jax.tree.structure(grad_sum) != jax.tree.structure(())
    if not has_sums and grads is None:
        raise ValueError(
            "`opt_state` has no sums of gradients, since `every_k` is the constant 1; pass "
            "`grads`, those of the update before it, with every k"
        )
    return has_sums


def check_own_names(averages: Iterable[str]) -> None:
    """Raises where an average has the name of another number."""
    if both := sorted(set(averages).intersection(KEYS)):
        raise ValueError(
            f"`average_args` or `metrics` name {both[0]!r}, which `window_metrics` returns itself; "
            "pass it under another name"
        )
