"""Hold gradients back for a window of microbatches, then let the optimizer step once."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from optaccum import _arguments, _window


class AccumulateState(NamedTuple):
    """State of :func:`optaccum.accumulate`.

    Every leaf is a strongly typed `jax.Array` whose dtype never changes. Sums and weight stay
    readable after a release, when `grad_sum / weight` is the mean that was released, until the
    next accepted microbatch overwrites them.

    Attributes:
        mini_step: i32[], microbatches accepted in the open window; 0 once it is closed.
        gradient_step: i32[], windows released so far: the steps of the inner optimizer.
        released: bool[], whether the last call released a window.
        skipped: i32[], microbatches rejected so far.
        weight: f32[], sum of the weights of the window's microbatches.
        grad_sum: weighted sums of the window's gradients, a tree like the parameters in the
            accumulator dtype; () where `every_k` is the constant 1.
        arg_sums: {name: f32[]}, weighted sums of the `average_args`.
        skip_state: what `should_skip_update_fn` last reported; () without one.
        inner_state: state of the inner optimizer; only a release changes it.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    released: jax.Array
    skipped: jax.Array
    weight: jax.Array
    grad_sum: Any
    arg_sums: dict[str, jax.Array]
    skip_state: Any
    inner_state: Any


class _Accumulate(optax.GradientTransformationExtraArgs):
    """`(init, update)`, and in `apply` the same step ending in parameters, not in updates."""

    apply: Callable[..., tuple[Any, AccumulateState]]


def accumulate(
    every_k: int | jax.Array | Callable[[jax.Array], jax.typing.ArrayLike],
    inner: optax.GradientTransformation | None = None,
    *,
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    average_args: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """DOC"""
    every_k = _arguments.check_every_k(every_k)
    inner = _arguments.check_transformation("`inner`", optax.identity() if inner is None else inner)
    _arguments.check_skip_fn(should_skip_update_fn)
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)
    average_args = _arguments.check_average_args(average_args)
    every_one = isinstance(every_k, int) and every_k == 1

    def init_fn(params):
        trained = _trained(params)
        skip_state = ()
        if should_skip_update_fn is not None:
            step = jax.ShapeDtypeStruct((), jnp.int32)
            _, report = jax.eval_shape(should_skip_update_fn, trained, step, params)
            skip_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report)
        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            released=jnp.zeros([], jnp.bool_),
            skipped=jnp.zeros([], jnp.int32),
            weight=jnp.zeros([], jnp.float32),
            grad_sum=() if every_one else _window.open_sums(trained, accumulator_dtype),
            arg_sums={name: jnp.zeros([], jnp.float32) for name in average_args},
            skip_state=skip_state,
            inner_state=jax.tree.map(_strongly_typed, inner.init(params)),
        )

    def judge(grads, state, params, weight):
        """Returns whether to accept the microbatch (True if that is certain), and a report."""
        accept, skip_state = True, state.skip_state
        if should_skip_update_fn is not None:
            skip, report = should_skip_update_fn(grads, state.gradient_step, params)
            accept, skip_state = ~_arguments.as_skip(skip), _cast_like(report, state.skip_state)
        if isinstance(weight, jax.Array):
            accept = _both(accept, jnp.isfinite(weight) & (weight >= 0))
        return accept, skip_state

    def advance(grads, state, params, weight, release, extra_args, finish, idle):
        """Takes in one microbatch; returns what `finish` or `idle` made of it, and the state."""
        weight, release = _arguments.as_weight(weight), _arguments.as_release(release)
        args = _arguments.averaged(average_args, extra_args)
        if not every_one:
            _window.check_fits(grads, state.grad_sum)
        elif params is not None:
            _window.check_fits(grads, _trained(params))
        accept, skip_state = judge(grads, state, params, weight)
        certain = weight is None or (isinstance(weight, float) and weight > 0)
        weight = None if weight is None else jnp.asarray(weight, jnp.float32)

        count = optax.safe_increment(state.mini_step)
        if every_one:
            first, due = True, _due_every_time(release)
        else:
            first = state.mini_step == 0
            length = _arguments.window_length(every_k, state.gradient_step)
            due = count >= length if release is None else release

        add = functools.partial(_window.add, first=first, accept=accept)
        total = add(state.weight, 1.0 if weight is None else weight)
        arg_sums = add(state.arg_sums, args, weight)
        grad_sum = state.grad_sum if every_one else add(state.grad_sum, grads, weight)
        closes = _both(accept, due)
        steps = closes if certain else _both(closes, total > 0)

        def step():
            if not every_one:
                mean = _window.mean(grad_sum, total if use_grad_mean else None, like=grads)
            elif use_grad_mean or weight is None:
                mean = grads
            else:
                sums = _window.add(_window.open_sums(grads), grads, weight, first=True)
                mean = _window.mean(sums, None, like=grads)
            means = _window.mean(arg_sums, total, like=args)
            updates, inner_state = inner.update(
                mean, state.inner_state, params, **{**extra_args, **means}
            )
            return finish(updates), _cast_like(inner_state, state.inner_state)

        def hold():
            return idle(step), state.inner_state

        # The sums stay outside the conditional: one fused pass a microbatch, and nothing for
        # the branches to copy. A Python bool `release` leaves no conditional: where it is True
        # and the window may yet be dropped, the step is taken and selected.
        if due is False:
            result, inner_state = hold()
        elif due is not True:
            result, inner_state = lax.cond(steps, step, hold)
        elif steps is True:
            result, inner_state = step()
        else:
            select = functools.partial(jnp.where, steps)
            result, inner_state = jax.tree.map(select, step(), hold())

        return result, AccumulateState(
            mini_step=jnp.where(closes, 0, jnp.where(accept, count, state.mini_step)),
            gradient_step=jnp.where(
                steps, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            released=jnp.asarray(steps),
            skipped=jnp.where(accept, state.skipped, optax.safe_increment(state.skipped)),
            weight=total,
            grad_sum=grad_sum,
            arg_sums=arg_sums,
            skip_state=skip_state,
            inner_state=inner_state,
        )

    def update_fn(updates, state, params=None, *, weight=None, release=None, **extra_args):
        def idle(step):
            return optax.tree.zeros_like(jax.eval_shape(step)[0])

        return advance(
            updates, state, params, weight, release, extra_args, finish=lambda u: u, idle=idle
        )

    def apply_fn(grads, state, params, *, weight=None, release=None, **extra_args):
        def finish(updates):
            return optax.apply_updates(params, updates)

        return advance(
            grads, state, params, weight, release, extra_args, finish, idle=lambda _: params
        )

    tx = _Accumulate(init_fn, update_fn)
    tx.apply = apply_fn
    return tx


def apply_gradients(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """DOC"""
    if isinstance(tx, _Accumulate):
        return tx.apply(grads, opt_state, params, **extra_args)
    tx = _arguments.check_transformation("`tx`", tx)
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
    last = opt_state
    while type(last) is tuple and last:
        last = last[-1]
    if not isinstance(last, AccumulateState):
        return optax.apply_updates(params, updates), opt_state
    params = lax.cond(
        last.released, optax.apply_updates, lambda params, _: params, params, updates
    )
    return params, opt_state


def get_state(opt_state: Any) -> AccumulateState:
    """DOC"""
    found = optax.tree.get_all_with_path(opt_state, AccumulateState.__name__)
    if len(found) == 1:
        return found[0][1]
    if not found:
        raise ValueError(
            "`opt_state` holds no AccumulateState; pass the state of an optimizer built with "
            f"optaccum.accumulate, got {type(opt_state).__name__}"
        )
    paths = ", ".join(f"opt_state{jax.tree_util.keystr(path)}" for path, _ in found)
    raise ValueError(
        f"`opt_state` holds {len(found)} AccumulateStates, at {paths}; pass one of them"
    )


def has_released(opt_state: Any) -> jax.Array:
    """DOC"""
    return get_state(opt_state).released


def _trained(params: Any) -> Any:
    """Returns the parameters that gradients are taken of: lookahead's slow copy has none."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def _due_every_time(release: bool | jax.Array | None) -> bool:
    if release is None or release is True:
        return True
    raise ValueError(
        "`release` must be None or True where `every_k` is 1, which has no accumulator to hold a "
        f"gradient in, got {release}; build with every_k >= 2 (`release` then overrides the count)"
    )


def _both(a: jax.Array | bool, b: jax.Array | bool) -> jax.Array | bool:
    """`a & b` that keeps what is known at trace time a Python bool."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def _strongly_typed(x: Any) -> Any:
    if isinstance(x, jax.Array | float | int | complex) or hasattr(x, "__array__"):
        x = jnp.asarray(x)
        return x.astype(x.dtype) if jax.typeof(x).weak_type else x
    return x


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, like)
