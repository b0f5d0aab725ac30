"""From the state of `optax.MultiSteps` to ours and back, in mid-window too."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from optaccum._mesh_axes import unreduce, unreduced
from optaccum._reductions import names
from optaccum._state import AccumulateState
from optaccum._trees import cast_like
from optaccum._validate import check_count, describe, leaf_name
from optaccum._window import open_sums


def from_multi_steps(
    tx: optax.GradientTransformation, state: Any, params: Any, *, use_grad_mean: bool = True
) -> Any:
    """Return the state with which `tx` goes on after `optax.MultiSteps`.

    `optax.MultiSteps` keeps the mean of the n microbatches of its open window, or their sum without
    `use_grad_mean`. :func:`optaccum.accumulate` keeps sum and weight::

        grad_sum = n * acc_grads,    weight = n

    so each microbatch weighs 1. If you will pass a `weight` in another unit, such as tokens,
    convert between two windows, when n is 0. Counters and the inner state are kept.

    Restore the checkpoint into `init(params)` of the old transformation, then call this once,
    outside of `jax.jit`.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, from_multi_steps
    >>> params, old = jnp.zeros(2), optax.MultiSteps(optax.sgd(1.0), 4)
    >>> _, state = old.update(jnp.array([1.0, 3.0]), old.init(params), params)
    >>> _, state = old.update(jnp.array([3.0, 3.0]), state, params)
    >>> state = from_multi_steps(accumulate(4, optax.sgd(1.0)), state, params)
    >>> print(state.mini_step, state.weight, state.grad_sum)
    2 2.0 [4. 6.]

    Args:
        tx: An :func:`optaccum.accumulate` of the same inner optimizer, wrapped as
            `optax.MultiSteps` was (in `optax.chain`, say). `every_k` may differ.
        state: The state of the old transformation.
        params: The parameters, as for `tx.init`.
        use_grad_mean: As both were built.

    Returns:
        A state of `tx`.

    Raises:
        TypeError: if `tx` and the old transformation are wrapped differently.
        ValueError: if the inner optimizers or the parameters differ, or if a window is open and
            `tx` has `average_args` or `metrics`, which `optax.MultiSteps` does not sum.
    """
    convert = functools.partial(
        _from_multi_steps,
        params=params if isinstance(state, optax.MultiStepsState) else None,
        use_grad_mean=use_grad_mean,
    )
    return _exchange(state, optax.MultiStepsState, tx.init(params), AccumulateState, convert)


def to_multi_steps(
    tx: Any, state: Any, params: Any, *, use_grad_mean: bool = True, every_k: int | None = None
) -> Any:
    """Return the state with which `optax.MultiSteps` goes on after an `accumulate`.

    The way back of :func:`from_multi_steps`. The weights of an open window of n microbatches must
    sum to n, since `optax.MultiSteps` takes the next microbatch for one of n + 1.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, to_multi_steps
    >>> params, old = jnp.zeros(2), accumulate(4, optax.sgd(1.0))
    >>> _, state = old.update(jnp.array([1.0, 3.0]), old.init(params), params)
    >>> _, state = old.update(jnp.array([3.0, 3.0]), state, params)
    >>> state = to_multi_steps(optax.MultiSteps(optax.sgd(1.0), 4), state, params)
    >>> print(state.mini_step, state.acc_grads)
    2 [2. 3.]

    Args:
        tx: An `optax.MultiSteps` of the same inner optimizer, wrapped as the `accumulate` was. Its
            windows must be longer than the open one is by now.
        state: The state of the old transformation.
        params: The parameters, as for `tx.init`.
        use_grad_mean: As both were built.
        every_k: Microbatches in the next window of `tx`. Needed if a window is open and `tx` is a
            transformation around `optax.MultiSteps`.

    Returns:
        A state of `tx`. The count of skipped microbatches is lost.

    Raises:
        TypeError: if `tx` and the old transformation are wrapped differently.
        ValueError: if the inner optimizers or the parameters differ, or if a window is open that
            `optax.MultiSteps` cannot express, with other weights, `average_args`, `metrics`, sums
            per device (`reduce_axes`) or in a wider dtype, or too many microbatches.
    """
    # A transformation of `optax.MultiSteps` has its bound method.
    length = getattr(getattr(tx.update, "__self__", None), "_every_k_schedule", None)
    if every_k is not None:
        length = optax.constant_schedule(check_count("`every_k`", every_k))
    convert = functools.partial(_to_multi_steps, length=length, use_grad_mean=use_grad_mean)
    return _exchange(state, AccumulateState, tx.init(params), optax.MultiStepsState, convert)


def _from_multi_steps(old: Any, new: Any, *, params: Any, use_grad_mean: bool) -> Any:
    """Returns `new` with what a MultiStepsState holds. Without `params` it is part of a state."""
    mini_step = _mini_step(old)
    n, grad_sum = int(mini_step), new.grad_sum
    if not jax.tree.leaves(grad_sum):  # `every_k` is 1, which closes an open window at once
        grad_sum = open_sums(old.acc_grads if params is None else params)
    _check_same("the accumulator in `state`", old.acc_grads, grad_sum, "`params`")
    _check_same("`state.inner_opt_state`", old.inner_opt_state, new.inner_state)
    if n and new.arg_sums:
        raise ValueError(
            "optax.MultiSteps has not summed what `average_args` and `metrics` name, "
            f"{names(new.arg_sums)}, of the {n} microbatches in the open window; "
            "go on with it until `mini_step` is 0"
        )
    count = n if use_grad_mean else 1
    sums = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype) * count, old.acc_grads, grad_sum)
    sums = jax.tree.map(lambda x, s: unreduce(x, tuple(unreduced(s))), sums, grad_sum)
    return new._replace(
        mini_step=mini_step,
        gradient_step=cast_like(old.gradient_step, new.gradient_step),
        weight=mini_step.astype(jnp.float32),
        grad_sum=sums if n else new.grad_sum,
        skip_state=_report(old, new),
        inner_state=cast_like(old.inner_opt_state, new.inner_state),
    )


def _to_multi_steps(old: Any, new: Any, *, length: Any, use_grad_mean: bool) -> Any:
    """Returns `new`, a MultiStepsState, with what an AccumulateState holds."""
    mini_step = _mini_step(old)
    n, acc_grads = int(mini_step), new.acc_grads
    _check_same("`state.inner_state`", old.inner_state, new.inner_opt_state)
    if n:
        _check_same("`state.grad_sum`", old.grad_sum, acc_grads, "`params`")
        k = None if length is None else int(length(old.gradient_step))
        if problem := _inexpressible(old, acc_grads, k, use_grad_mean):
            raise ValueError(
                f"optax.MultiSteps cannot go on with the open window of {n} microbatches: "
                f"{problem}; or go on with `accumulate` until `mini_step` is 0"
            )
        count = n if use_grad_mean else 1
        acc_grads = jax.tree.map(lambda x, s: s.astype(x.dtype) / count, acc_grads, old.grad_sum)
    return new._replace(
        mini_step=cast_like(mini_step, new.mini_step),
        gradient_step=cast_like(old.gradient_step, new.gradient_step),
        inner_opt_state=cast_like(old.inner_state, new.inner_opt_state),
        acc_grads=acc_grads,
        skip_state=_report(old, new),
    )


def _inexpressible(
    state: AccumulateState, acc_grads: Any, k: int | None, use_grad_mean: bool
) -> str:
    """Returns why `optax.MultiSteps` cannot go on with an open window, or an empty string."""
    sums, n = jax.tree.leaves(state.grad_sum), int(state.mini_step)
    if jnp.ndim(state.weight) or any(map(unreduced, sums)):
        return "each device has its own sums"
    if state.arg_sums:
        return f"it holds sums of what `average_args` and `metrics` name, {names(state.arg_sums)}"
    if use_grad_mean and state.weight != n:
        return f"its weights sum to {float(state.weight):g} and not to their number"
    if k is None:
        return "inside of `tx` the length of its windows cannot be seen; pass it as `every_k`"
    if n >= k:
        return f"`tx` has windows of {k}, and would lose or misweight the gradients in it"
    for x, s in zip(jax.tree.leaves(acc_grads), sums, strict=True):
        if jnp.promote_types(x.dtype, s.dtype) != x.dtype:
            return f"its sums are {s.dtype}, and its accumulator would be {x.dtype}"
    return ""


def _exchange(
    state: Any, kind: type, fresh: Any, new_kind: type, convert: Callable[[Any, Any], Any]
) -> Any:
    """Returns `fresh` with the leaves of `state`, states of `kind` converted to `new_kind`."""
    old, structure = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: isinstance(x, kind)
    )
    new, wanted = jax.tree.flatten(fresh, is_leaf=lambda x: isinstance(x, new_kind))
    places = [jax.tree_util.keystr(path) or "its root" for path, x in old if isinstance(x, kind)]
    if not places:
        library, name = kind.__module__.partition(".")[0], kind.__name__
        raise TypeError(
            f"`state` must be an {library}.{name} or contain one, but holds no {name}, got "
            f"{type(state).__name__}; restore the checkpoint into what `init` of the old "
            "transformation returns"
        )
    ours, theirs = [isinstance(x, kind) for _, x in old], [isinstance(x, new_kind) for x in new]
    if structure != wanted or ours != theirs:
        raise TypeError(
            f"`tx` must have its {new_kind.__name__} where `state` has {kind.__name__}, at "
            f"{places[0]}, got {wanted} for {structure}; pass the transformation itself and not a "
            "transformation around it, or pass the one inside it, until both have one form"
        )
    leaves = []
    for (path, x), y in zip(old, new, strict=True):
        if isinstance(x, kind):
            leaves.append(convert(x, y))
        else:
            _check_same(f"`state{jax.tree_util.keystr(path)}`", x, y)
            leaves.append(cast_like(x, y))
    return jax.tree.unflatten(wanted, leaves)


def _mini_step(state: Any) -> jax.Array:
    """Returns the count of one state, whose value is known."""
    mini_step = jnp.asarray(state.mini_step, jnp.int32)
    if mini_step.ndim or isinstance(mini_step, Tracer):
        raise TypeError(
            "`state` must be one state, outside of jax.jit and jax.vmap, but its `mini_step` is "
            f"{describe(mini_step)}; after jax.pmap take one device's, "
            "`flax.jax_utils.unreplicate(state)` and of the parameters too, convert, and replicate "
            "again"
        )
    return mini_step


def _report(old: Any, new: Any) -> Any:
    """Returns the old report of `should_skip_update_fn`, if the new one has its structure."""
    same = jax.tree.structure(old.skip_state) == jax.tree.structure(new.skip_state)
    return old.skip_state if same else new.skip_state


def _check_same(name: str, tree: Any, like: Any, other: str = "the state of `tx`") -> None:
    """Raises unless both trees have the same structure and shapes."""
    shapes, wanted = (
        {leaf_name(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, like)
    )
    problems = [
        f"leaf {path} is {shapes.get(path, 'missing')} in the first and "
        f"{wanted.get(path, 'missing')} in the second"
        for path in shapes | wanted
        if shapes.get(path) != wanted.get(path)
    ]
    if jax.tree.structure(tree) != jax.tree.structure(like):
        problems.append("the leaves are in other containers")
    if problems:
        raise ValueError(
            f"{name} does not fit {other}: {problems[0]}; build `tx` with the inner optimizer of "
            "optax.MultiSteps, for the same parameters, and pass arrays, not variables of "
            "flax.nnx (nnx.as_pure takes them out)"
        )
