"""Gradients: whether a microbatch fits the state that it is to be added to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaccum._check import arguments, devices as check_devices, extra_args as check_args
from optaccum._check.arguments import leaf_name
from optaccum._core import devices
from optaccum._state import AccumulateState


class Options(NamedTuple):
    """The checked arguments of `accumulate` that decide what a microbatch has to look like."""

    every_k: int | jax.Array | Callable[[jax.Array], Any]
    average_args: tuple[str, ...]
    metrics: tuple[str, ...]
    reduce_axes: tuple[str, ...]
    inner_args: frozenset[str]
    measure_noise: str | None

    @property
    def averages(self) -> tuple[str, ...]:
        """The names of all extra arguments that are averaged."""
        return *self.average_args, *self.metrics

    @property
    def keeps_sums(self) -> bool:
        """Whether a state has an accumulator."""
        alone = isinstance(self.every_k, int) and self.every_k == 1
        return bool(self.reduce_axes) or not alone


class Checked(NamedTuple):
    """A microbatch that was not refused.

    Attributes:
        weight: None for 1, a Python float (known now, and allowed), or an f32[].
        due: None to count, or whether the window closes, as far as the caller decides.
        args: the extra arguments to average, floating scalars by name.
        length: i32[], the length of the window.
        alone: whether every window has one microbatch, and the state no sums.
        devices: where the sums are.
    """

    weight: float | jax.Array | None
    due: bool | jax.Array | None
    args: dict[str, jax.Array]
    length: jax.Array
    alone: bool
    devices: devices.Whole


def check_microbatch(
    options: Options,
    grads: Any,
    state: Any,
    trained: Any,
    weight: Any,
    release: Any,
    extra_args: dict[str, Any],
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

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for arguments that do not fit the state.
    """
    _check_state(state, grads, options)
    # A state that came from a longer window has sums, perhaps of an open one: keep them.
    none = jax.tree.structure(state.grad_sum) == jax.tree.structure(())
    alone = not options.keeps_sums and none
    check_devices.check_mesh(options.reduce_axes)
    over = devices.over(options.reduce_axes)
    check_devices.check_state(state.weight, over)
    sums = over.load(state.grad_sum)
    like = (grads if trained is None else trained) if alone else sums
    check_fits(grads, like)
    check_devices.check_parts(grads, over)
    if not alone:
        check_devices.check_placed(over.as_parts(grads), sums)
    check_args.check_spelling(extra_args, {*options.inner_args, *options.averages})
    if weight is not None:
        weight = check_args.as_weight("`weight`", weight)
    due = check_args.as_release(release, alone=alone)
    args = check_args.averaged(options.average_args, options.metrics, extra_args)
    length = arguments.window_length(options.every_k, state.gradient_step)
    check_devices.check_agreed(length if due is None else due, over)
    return Checked(weight, True if alone else due, args, length, alone, over)


def check_parameters(params: Any, accumulator_dtype: Any) -> None:
    """Raises if gradients of `params` cannot be summed."""
    wanted = accumulator_dtype
    drops = wanted is not None and not jnp.issubdtype(wanted, jnp.complexfloating)
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        dtype = _dtype("parameter", path, p)
        if drops and jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"`accumulator_dtype` {wanted} would drop the imaginary part of the {dtype} leaf "
                f"{leaf_name(path)}; pass a complex dtype or leave it None"
            )


def check_fits(grads: Any, like: Any) -> None:
    """Raises if `grads` cannot be summed in, or applied to, trees shaped `like`.

    Args:
        grads: a pytree of gradients. A None stands for "no gradient here" and fits anything.
        like: the sums (or the parameters) that the gradients belong to.

    Raises:
        ValueError: if the trees, the shapes, or real and complex leaves differ.
        TypeError: if a gradient leaf is an integer, a boolean, a float0, or no array.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda x: x is None)
    try:
        expected = treedef.flatten_up_to(like)
    except ValueError as error:
        raise ValueError(_describe_mismatch(grads, like)) from error
    for (path, g), x in zip(leaves, expected, strict=True):
        if g is None:
            continue
        if not jax.tree_util.all_leaves([x]):
            raise ValueError(_describe_mismatch(grads, like))
        _check_leaf(path, g, x)


def _check_leaf(path: Any, g: Any, expected: Any) -> None:
    float0 = getattr(g, "dtype", None) == jax.dtypes.float0
    dtype = jax.dtypes.float0 if float0 else _dtype("gradient", path, g)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"gradient leaf {leaf_name(path)} has dtype {'float0' if float0 else dtype}, which "
            "cannot be accumulated; differentiate floating-point parameters only, or replace this "
            "leaf by None (optax.masked, equinox.filter)"
        )
    if jnp.shape(g) != jnp.shape(expected):
        raise ValueError(
            f"gradient leaf {leaf_name(path)} has shape {jnp.shape(g)}, but the optimizer was "
            f"initialised with shape {jnp.shape(expected)}; pass the gradient of the same "
            "parameters that `init` was given"
        )
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if is_complex != jnp.issubdtype(jnp.result_type(expected), jnp.complexfloating):
        raise ValueError(
            f"gradient leaf {leaf_name(path)} is {dtype}, but the optimizer was initialised with "
            f"{jnp.result_type(expected)}; real and complex do not mix"
        )


def _dtype(kind: str, path: Any, leaf: Any) -> jnp.dtype:
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{kind} leaf {leaf_name(path)} is not an array but {leaf!r}; pass arrays only "
            "(equinox.filter, flax.nnx.split)"
        ) from error


def _describe_mismatch(grads: Any, like: Any) -> str:
    def names(tree):
        return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    unknown = [name for name in names(grads) if name not in names(like)]
    missing = [name for name in names(like) if name not in names(grads)]
    remedy = "pass the gradient of the same parameters that `init` was given"
    if unknown:
        return f"gradient leaf {unknown[0]} has no counterpart in the optimizer state; {remedy}"
    if missing:
        return f"the gradients have no leaf {missing[0]}, which the optimizer state has; {remedy}"
    return (
        f"the gradients have the tree structure {jax.tree.structure(grads)}, but the optimizer "
        f"was initialised with {jax.tree.structure(like)}; {remedy}"
    )


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
    names = tuple(state.arg_sums)
    if sorted(names) != sorted(options.averages):
        raise ValueError(
            f"the optimizer state has averages of {names}, but `average_args` and `metrics` name "
            f"{options.averages}; between two windows, go on with "
            "`state._replace(arg_sums=tx.init(params).arg_sums)`"
        )
    if options.measure_noise and not state.noise:
        raise ValueError(
            "the optimizer state has no measurement: it was made without `measure_noise`; give it "
            "one with `state._replace(noise=tx.init(params).noise)`"
        )
