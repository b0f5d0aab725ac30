"""Microbatches: whether one fits the state that it is to be added to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaccum import _extra_args, _reduce_axes
from optaccum._devices import Replicated
from optaccum._gradients import check_fits, check_trained
from optaccum._state import AccumulateState, key_of
from optaccum._validate import INT32_MAX, Options, check_count, check_scalar


class Checked(NamedTuple):
    """A microbatch that was not refused.

    Attributes:
        weight: None for 1, a Python float (known now, and allowed), or an f32[].
        due: None to count, or whether the window closes, as far as the caller decides.
        args: the extra arguments to average, by the keys of their sums.
        inner_args: the extra arguments that `inner` gets, as far as they are known now.
        length: i32[], the length of the window.
        alone: whether every window has one microbatch, and the state no sums.
        devices: where the sums are.
        parts: the gradients as they are added to sums there.
    """

    weight: float | jax.Array | None
    due: bool | jax.Array | None
    args: dict[str, Any]
    inner_args: dict[str, Any]
    length: jax.Array
    alone: bool
    devices: Replicated
    parts: Any


def check_microbatch(
    options: Options,
    grads: Any,
    state: Any,
    trained: Any,
    weight: Any,
    release: Any,
    extra_args: dict[str, Any],
    applied: bool,
) -> Checked:
    """Raises if a microbatch cannot be taken in; else returns its arguments in one form.

    Args:
        options: of the transformation.
        grads: the gradients.
        state: what should be an AccumulateState.
        trained: the parameters that gradients are taken of, or None.
        weight: the extra argument.
        release: the extra argument.
        extra_args: all others.
        applied: whether the updates are to be added to the parameters.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for arguments that do not fit the state.
    """
    _check_state(state, grads, options)
    # A state that came from a longer window has sums, perhaps of an open one: keep them.
    none = jax.tree.structure(state.grad_sum) == jax.tree.structure(())
    alone = not options.keeps_sums and none
    over = _reduce_axes.check_state(options.reduce_axes, state.weight)
    sums = None if alone else over.load(state.grad_sum)
    check_fits(grads, sums if not alone else grads if trained is None else trained)
    if trained is not None and not alone:
        check_trained(trained, sums, applied=applied)
    parts = _reduce_axes.check_placed(grads, sums, over)
    weight, due = _extra_args.check_extra_args(options, weight, release, extra_args, alone=alone)
    sums_of_args = jax.eval_shape(over.load, state.arg_sums)
    args = _extra_args.averaged(options, extra_args, sums_of_args)
    inner_args = _extra_args.for_inner(options, extra_args, grads, alone=alone)
    length = window_length(options.every_k, state.gradient_step)
    _reduce_axes.check_agreed(length if due is None else due, over)
    due = True if alone else due
    return Checked(weight, due, args, inner_args, length, alone, over, parts)


def window_length(
    every_k: int | jax.Array | Callable[[jax.Array], Any], gradient_step: jax.Array
) -> jax.Array:
    """Returns the length of the window that follows `gradient_step` releases, i32[]."""
    if callable(every_k):
        length, remedy = every_k(gradient_step), "; cast a float schedule with `.astype(int)`"
        check_scalar("`every_k(gradient_step)`", length, jnp.integer, remedy=remedy)
        every_k = length if isinstance(length, jax.Array) else check_count("`every_k`", int(length))
    dtype = jnp.result_type(every_k)
    if isinstance(every_k, jax.Array) and jnp.iinfo(dtype).max > INT32_MAX:  # it would wrap
        every_k = jnp.clip(every_k, 1, jnp.asarray(INT32_MAX, dtype))
    return jnp.asarray(every_k, jnp.int32)


def _check_state(state: Any, grads: Any, options: Options) -> None:
    """Raises unless `state` is what `init` returns, with all that the options ask for."""
    if not isinstance(state, AccumulateState):
        remedy = "the order is update(grads, state, params)"
        if isinstance(state, optax.MultiStepsState):
            remedy = "convert it with optaccum.from_multi_steps"
        elif isinstance(state, dict):
            remedy += ", and a checkpoint is restored into `tx.init(params)`"
        raise TypeError(
            "the optimizer state must be the AccumulateState that `init` returns, got "
            f"{type(state).__name__}; {remedy}"
        )
    no_sums = jax.tree.structure(state.grad_sum) == jax.tree.structure(())
    if options.keeps_sums and no_sums and jax.tree.leaves(grads):
        raise ValueError(
            "the optimizer state has no accumulator: it was made with `every_k=1`; give it one "
            "with `state._replace(grad_sum=tx.init(params).grad_sum)`"
        )
    names, wanted = tuple(state.arg_sums), tuple(options.averages)
    if sorted(names) != sorted(map(key_of, wanted)):
        raise ValueError(
            f"the optimizer state has averages of {names}, but `average_args` and `metrics` name "
            f"{wanted}; between two windows, go on with "
            "`state._replace(arg_sums=tx.init(params).arg_sums)`"
        )
