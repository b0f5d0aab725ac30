"""From the state of `optax.MultiSteps` to ours and back, in mid-window too."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from optaccum import _mesh_axes, _window
from optaccum._state import AccumulateState, by_name
from optaccum._trees import cast_like
from optaccum._validate import check_count, leaf_name


def from_multi_steps(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    *,
    use_grad_mean: bool = True,
) -> Any:
    """Return the state with which `tx` goes on where `optax.MultiSteps` stopped.

    `optax.MultiSteps` keeps the mean of the n microbatches of its open window (or, without
    `use_grad_mean`, their sum); :func:`optaccum.accumulate` keeps sum and weight::

        grad_sum = n * acc_grads,    weight = n.

    So each of them weighs 1. Where :func:`optaccum.accumulate` will be given `weight` of another
    scale, numbers of tokens for example, convert between two windows, when n is 0.

    The counters and the state of the inner optimizer are taken over as they are. Restore the
    checkpoint into the state that the old transformation's `init(params)` gives, then convert.
    Call this outside of `jax.jit`, once.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, from_multi_steps
    >>> params, old = jnp.zeros(2), optax.MultiSteps(optax.sgd(1.0), 4)
    >>> _, state = old.update(jnp.array([1.0, 3.0]), old.init(params), params)
    >>> _, state = old.update(jnp.array([3.0, 3.0]), state, params)
    >>> state = from_multi_steps(accumulate(4, optax.sgd(1.0)), state, params)
    >>> print(state.mini_step, state.weight, state.grad_sum)
    2 2.0 [4. 6.]

    Args:
        tx: an :func:`optaccum.accumulate` of the same inner optimizer, or what contains it as the
            old transformation contained `optax.MultiSteps` (`optax.chain`, `optax.masked`,
            `optax.partition`); `every_k` may differ.
        state: the state of `optax.MultiSteps`, or of what contains it.
        params: the parameters, as for `tx.init`.
        use_grad_mean: as `optax.MultiSteps` was built; `tx` should be built with the same.

    Returns:
        A state of `tx`.

    Raises:
        TypeError: if `tx` has no accumulate where `state` has one of `optax.MultiSteps`.
        ValueError: if the inner optimizers or the parameters differ; or if a window is open and
            `tx` has `average_args` or `metrics`, which `optax.MultiSteps` has not summed.
    """
    fresh = tx.init(params)
    root = isinstance(state, optax.MultiStepsState)

    def convert(old, new):
        mini_step = _held(old, "MultiStepsState")
        sums = jax.tree.leaves(new.grad_sum)
        if root:
            _check_same("the accumulator in `state`", old.acc_grads, "`params`", params)
        elif sums:
            _check_same("the accumulator in `state`", old.acc_grads, "that of `tx`", new.grad_sum)
        inner = "the inner optimizer of `tx`"
        _check_same("`state.inner_opt_state`", old.inner_opt_state, inner, new.inner_state)
        held = int(mini_step)
        if held and new.arg_sums:
            raise ValueError(
                "optax.MultiSteps has not summed what `average_args` and `metrics` name, "
                f"{tuple(by_name(new.arg_sums))}, of the {held} microbatches in the open window; "
                "go on with it until `mini_step` is 0"
            )
        grad_sum = new.grad_sum
        if held:
            if not sums:  # `every_k` 1, which closes this window
                grad_sum = _window.open_sums(params if root else old.acc_grads)
            count = held if use_grad_mean else 1

            def take_over(s, x):
                waiting = tuple(_mesh_axes.unreduced(s))
                return _mesh_axes.unreduce(jnp.asarray(x, s.dtype) * count, waiting)

            grad_sum = jax.tree.map(take_over, grad_sum, old.acc_grads)
        return new._replace(
            mini_step=mini_step,
            gradient_step=jnp.asarray(old.gradient_step, jnp.int32),
            weight=mini_step.astype(jnp.float32),
            grad_sum=grad_sum,
            skip_state=_same_or(old.skip_state, new.skip_state),
            inner_state=cast_like(old.inner_opt_state, new.inner_state),
        )

    return _exchange(state, optax.MultiStepsState, fresh, AccumulateState, convert)


def to_multi_steps(
    tx: Any,
    state: Any,
    params: Any,
    *,
    use_grad_mean: bool = True,
    every_k: int | None = None,
) -> Any:
    """Return the state with which `optax.MultiSteps` goes on where an `accumulate` stopped.

    The way back of :func:`from_multi_steps`. An open window of n microbatches goes on, where
    `optax.MultiSteps` can express it: to the mean it adds each further microbatch as one of n + 1,
    so the weights of those that are in must sum to n.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, to_multi_steps
    >>> params, old = jnp.zeros(2), accumulate(4, optax.sgd(1.0))
    >>> _, state = old.update(jnp.array([1.0, 3.0]), old.init(params), params)
    >>> _, state = old.update(jnp.array([3.0, 3.0]), state, params)
    >>> state = to_multi_steps(optax.MultiSteps(optax.sgd(1.0), 4), state, params)
    >>> print(state.mini_step, state.acc_grads)
    2 [2. 3.]

    Args:
        tx: an `optax.MultiSteps` of the same inner optimizer, or a transformation that contains it
            as the old one contained its `accumulate`. Its windows must be longer than the open one
            is by now.
        state: the state of :func:`optaccum.accumulate`, or of what contains it.
        params: the parameters, as for `tx.init`.
        use_grad_mean: as `tx` is built, and `accumulate` was.
        every_k: microbatches in the next window of `tx`, which cannot be seen where another
            transformation contains it. Needed if a window is open then.

    Returns:
        A state of `tx`. The count of skipped microbatches is lost.

    Raises:
        TypeError: if `tx` has no `optax.MultiSteps` where `state` has an `AccumulateState`.
        ValueError: if the inner optimizers or the parameters differ; or if a window is open that
            `optax.MultiSteps` cannot go on with: of other weights, with `average_args` or
            `metrics`, in parts (`reduce_axes`), in a wider dtype, of as many microbatches as `tx`
            has in a window, or inside another transformation without `every_k`.
    """
    if every_k is not None:
        every_k = check_count("`every_k`", every_k)
    owner = tx if isinstance(tx, optax.MultiSteps) else getattr(tx.update, "__self__", None)
    schedule = getattr(owner, "_every_k_schedule", None)

    def convert(old, new):
        mini_step = _held(old, "AccumulateState")
        held, acc_grads = int(mini_step), new.acc_grads
        inner = "the inner optimizer of `tx`"
        _check_same("`state.inner_state`", old.inner_state, inner, new.inner_opt_state)
        if held:
            _check_same("`state.grad_sum`", old.grad_sum, "`params`", acc_grads)
            if every_k is not None:
                length = every_k
            elif schedule is not None:
                length = int(schedule(old.gradient_step))
            else:
                raise ValueError(
                    f"a window of {held} microbatches is open, and inside another transformation "
                    "the length of the windows of optax.MultiSteps cannot be seen; pass it as "
                    "`every_k`"
                )
            if problem := _inexpressible(old, acc_grads, held, length, use_grad_mean):
                raise ValueError(
                    f"optax.MultiSteps cannot go on with the open window of {held} microbatches: "
                    f"{problem}; go on with `accumulate` until `mini_step` is 0"
                )
            divisor = held if use_grad_mean else 1
            acc_grads = jax.tree.map(
                lambda x, s: s.astype(x.dtype) / divisor, acc_grads, old.grad_sum
            )
        return new._replace(
            mini_step=jnp.asarray(mini_step, jnp.result_type(new.mini_step)),
            gradient_step=jnp.asarray(old.gradient_step, jnp.result_type(new.gradient_step)),
            inner_opt_state=cast_like(old.inner_state, new.inner_opt_state),
            acc_grads=acc_grads,
            skip_state=_same_or(old.skip_state, new.skip_state),
        )

    return _exchange(state, AccumulateState, tx.init(params), optax.MultiStepsState, convert)


def _inexpressible(
    state: AccumulateState, acc_grads: Any, held: int, length: int, use_grad_mean: bool
) -> str:
    """Returns what of an open window `optax.MultiSteps` cannot go on with, or nothing."""
    sums = jax.tree.leaves(state.grad_sum)
    if jnp.ndim(state.weight) or any(map(_mesh_axes.unreduced, sums)):
        return "its sums are parts, one on each device"
    if state.arg_sums:
        names = tuple(by_name(state.arg_sums))
        return f"it holds sums of what `average_args` and `metrics` name, {names}"
    if use_grad_mean and state.weight != held:
        return f"its weights sum to {float(state.weight):g} and not to their number"
    if held >= length:
        return f"`tx` has windows of {length}, and would lose or misweight the gradients in it"
    for x, s in zip(jax.tree.leaves(acc_grads), sums, strict=True):
        if jnp.promote_types(x.dtype, s.dtype) != x.dtype:
            return f"its sums are {s.dtype}, and its accumulator would be {x.dtype}"
    return ""


def _exchange(
    state: Any, kind: type, fresh: Any, new_kind: type, convert: Callable[[Any, Any], Any]
) -> Any:
    """Returns `fresh` with all leaves of `state`, and each state of one kind as the other."""
    old, structure = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: isinstance(x, kind)
    )
    new, wanted = jax.tree.flatten(fresh, is_leaf=lambda x: isinstance(x, new_kind))
    ours, theirs = new_kind.__name__, kind.__name__
    places = [jax.tree_util.keystr(path) or "its root" for path, x in old if isinstance(x, kind)]
    if not places:
        raise TypeError(
            f"`state` must be an optax.MultiStepsState, or hold one, got {type(state).__name__}; "
            "restore the checkpoint into what `init` of the old transformation returns"
            if kind is optax.MultiStepsState
            else f"`state` holds no AccumulateState, got {type(state).__name__}"
        )
    paired = len(old) == len(new) and all(
        isinstance(x, kind) == isinstance(y, new_kind) for (_, x), y in zip(old, new, strict=True)
    )
    if structure != wanted or not paired:
        raise TypeError(
            f"`tx` must have its {ours} where `state` has {theirs}, at {places[0]}, got "
            f"{wanted} for {structure}; pass the transformation itself and not a transformation "
            "around it, or pass the one inside it, until both have one form"
        )
    leaves = []
    for (path, x), y in zip(old, new, strict=True):
        if isinstance(x, kind):
            leaves.append(convert(x, y))
        else:
            _check_same(f"`state{jax.tree_util.keystr(path)}`", x, "that of `tx`", y)
            leaves.append(cast_like(x, y))
    return jax.tree.unflatten(wanted, leaves)


def _held(state: Any, kind: str) -> jax.Array:
    mini_step = jnp.asarray(state.mini_step, jnp.int32)
    if isinstance(mini_step, Tracer):
        raise TypeError("`state` must be one state, outside of jax.jit and jax.vmap")
    if mini_step.ndim:
        raise TypeError(
            f"`state` must be one state, but has a {kind} for each of {mini_step.shape}; after "
            "jax.pmap take one device's, `flax.jax_utils.unreplicate(state)` and of the "
            "parameters too, convert, and replicate again"
        )
    return mini_step


def _same_or(report: Any, other: Any) -> Any:
    """Returns a report, if it has the structure of the other."""
    return report if jax.tree.structure(report) == jax.tree.structure(other) else other


def _check_same(name: str, tree: Any, other: str, like: Any) -> None:
    """Raises unless both trees have the same leaves, of the same shapes."""

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {leaf_name(path): jnp.shape(x) for path, x in leaves}

    remedy = (
        "build `tx` with the inner optimizer of optax.MultiSteps, for the same parameters, and "
        "pass arrays, not variables of flax.nnx (nnx.as_pure takes them out)"
    )
    found, expected = shapes(tree), shapes(like)
    for path in (*found, *expected):
        a, b = (x.get(path, "not there") for x in (found, expected))
        if a != b:
            raise ValueError(
                f"{name} does not fit {other}: leaf {path} is {a} in the first and {b} in the "
                f"second; {remedy}"
            )
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(f"{name} has the leaves of {other}, but in other containers; {remedy}")
