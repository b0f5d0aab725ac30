"""A loss that differentiates itself in microbatches, for who owns the call of `jax.grad`."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Literal, ParamSpec, TypeVar

import jax

from optaccum import _call, _reduce_axes, _rule, _validate
from optaccum._loop import Settings
from optaccum._outputs import as_loss, refuse_changes

Value = TypeVar("Value")  # the loss, or with `has_aux` `(loss, aux)`
Arguments = ParamSpec("Arguments")


def microbatched_loss(
    fun: Callable[Arguments, Value],
    has_aux: bool = False,
    *,
    num_microbatches: int | Callable[..., Any],
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    batch_layout: Literal["rows", "uneven", "stacked"] = "rows",
    weight_fn: Callable[..., Any] | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    rng_argnums: int | Sequence[int] = (),
    carry_argnum: int | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reduce_axes: str | tuple[str, ...] = (),
) -> Callable[Arguments, Value]:
    """Return the loss `fun` with a derivative that runs the batch in n microbatches.

    Loss and gradient are what :func:`optaccum.value_and_grad` computes, by the same scan::

        loss = (sum_i w_i l_i) / (sum_i w_i)        gradient = (sum_i w_i g_i) / (sum_i w_i)

    but the caller differentiates. Use it for a trainer that calls `jax.value_and_grad`,
    `flax.nnx.value_and_grad` or `equinox.filter_value_and_grad` itself: wrap the loss, and it
    accumulates. If you write the training step, :func:`optaccum.value_and_grad` does the same.

    >>> import jax, jax.numpy as jnp, optaccum
    >>> def loss_fn(w, x):
    ...     return jnp.mean((w - x) ** 2)
    >>> in_two = optaccum.microbatched_loss(loss_fn, num_microbatches=2)
    >>> x = jnp.array([1.0, 2.0, 3.0, 6.0])
    >>> loss, grad = jax.value_and_grad(in_two)(5.0, x)
    >>> print(loss, grad)
    7.5 4.0

    Guarantees:
        * One forward and one backward pass for each microbatch. If the loss is differentiated, its
          forward pass makes and sums the gradients, which are then multiplied by the cotangent. If
          it is not, it costs forward passes alone.
        * Shapes, dtypes, rows, keys, weights and sums are as in :func:`optaccum.value_and_grad`.
        * All arguments but rows, keys and the carry may be differentiated. A gradient is exact or
          refused: with respect to those, to a value that `fun` closes over, and of `aux`, an error
          says so.
        * Second derivatives are exact. Forward mode alone (`jax.jvp`, `jax.jacfwd`) is an error of
          JAX.
        * `fun` is traced once.

    Args:
        fun: A function that returns a real scalar, or with `has_aux` `(scalar, aux)`.
        has_aux: Whether `fun` returns `(scalar, aux)`; so does the result, with `aux` stacked, and
            with `carry_argnum` `(scalar, (carry, aux))`.
        num_microbatches: As in :func:`optaccum.value_and_grad`, and so are the next seven.
        batch_argnums: Positions of the pytrees to split.
        batch_argnames: Names of the keyword arguments to split.
        batch_layout: "rows", "uneven" or "stacked".
        weight_fn: Returns how much a microbatch counts.
        loss_reduction: "mean" or "sum".
        rng_argnums: Positions of keys.
        carry_argnum: Position of the carry.
        accumulator_dtype: Dtype of all sums; None for each argument's own promoted to at least
            float32.
        reduce_axes: Axes of `jax.shard_map` over which to reduce loss and gradients once. Without
            it the loss is of the rows of a device, for a caller that reduces it, and gradients of
            what devices share are summed once. Under explicit sharding pass
            `jax.reshard(p, P(..., reduced={axis}))` instead.

    Returns:
        A function with the arguments of `fun` that returns the loss, or with `has_aux`
        `(loss, aux)`.

    Raises:
        TypeError, ValueError: as :func:`optaccum.value_and_grad` does; when differentiated, for
            what has no derivative here.
    """
    dtype = _validate.check_dtype(accumulator_dtype)
    settings = Settings.checked(fun, weight_fn, num_microbatches, has_aux, loss_reduction, dtype)
    axes = _validate.check_axes(reduce_axes)
    positions = _call.check_roles(
        batch_argnames,
        has_aux,
        batch_layout,
        batch_argnums=batch_argnums,
        rng_argnums=rng_argnums,
        carry_argnum=carry_argnum,
    )

    @functools.wraps(fun)
    def loss_fn(*args, **kwargs) -> Any:
        call = _call.Call(fun, positions, args, kwargs)
        of_call, count = settings.of_call(call)
        of_args = as_loss(call.by_position(fun), has_aux)
        of_args = refuse_changes(of_args, call.title, call.roles.carry)
        of_weight = None if weight_fn is None else call.by_position(weight_fn, "`weight_fn`")
        devices = _reduce_axes.check_in_shard_map(axes)
        return _rule.run(call, of_args, of_weight, devices, of_call, count)

    return loss_fn
