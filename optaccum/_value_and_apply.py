"""A training step that adds gradients to the window where the backward pass makes them."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from optaccum import _reduce_axes, _validate
from optaccum._accumulate import accumulator_of, apply_gradients
from optaccum._accumulator import Accumulator, Call
from optaccum._backward import Gradient
from optaccum._state import check_state, has_sums
from optaccum._trees import fast


def value_and_apply(
    tx: optax.GradientTransformation,
    fun: Callable[..., Any],
    has_aux: bool = False,
    *,
    weight_fn: Callable[..., Any] | None = None,
) -> Callable[..., tuple[Any, Any, Any]]:
    """Return a training step: `jax.value_and_grad(fun)` and :func:`apply_gradients` in one.

    The step takes `(params, opt_state, *args, **extra_args)` and computes::

        loss, grads = jax.value_and_grad(fun)(params, *args)
        params, opt_state = apply_gradients(tx, grads, opt_state, params, **extra_args)

    with the same results. If `tx` is an :func:`accumulate`, the gradients of layers in a `lax.scan`
    are added to the sums inside the backward scan, so that no stack of them is in memory.

    >>> import jax, jax.numpy as jnp, optax, optaccum
    >>> tx = optaccum.accumulate(2, optax.sgd(0.125))
    >>> step = jax.jit(optaccum.value_and_apply(tx, lambda w, x: jnp.sum((w - x) ** 2)))
    >>> params = jnp.zeros(2)
    >>> opt_state = tx.init(params)
    >>> for x in (1.0, 3.0):
    ...     loss, params, opt_state = step(params, opt_state, x)
    ...     print(loss, params)
    2.0 [0. 0.]
    18.0 [0.5 0.5]

    Guarantees:
        * The sums have the bits that :func:`apply_gradients` gives them, but for roundings that XLA
          leaves out in bfloat16, and for the rows of a weighted lookup, which are multiplied by the
          weight before they are added up.
        * A microbatch of weight 0 adds nothing, whatever its gradients are. It is computed.
        * With `should_skip_update_fn`, with the constant `every_k` 1 and outside `jax.jit` the
          gradients are made first. So they are for any other transformation.

    Args:
        tx: Any Optax transformation; an :func:`accumulate` outermost.
        fun: A loss: `(params, *args)` to a real scalar, or with `has_aux` to `(scalar, aux)`.
        has_aux: Whether `fun` returns `(scalar, aux)`.
        weight_fn: Called as `fun` is; returns the `weight` of the microbatch, such as its unpadded
            tokens.

    Returns:
        A function `(params, opt_state, *args, **extra_args) -> (loss, params, opt_state)`, or with
        `has_aux` `((loss, aux), params, opt_state)`. `args` are for `fun`, `extra_args` for `tx`:
        `weight=` and `release=` for :func:`accumulate`. `value=` is the loss: of the window in an
        :func:`accumulate` that names it in `average_args` or `metrics`, which an `inner` needs that
        reads it. In `jax.shard_map` with `reduce_axes` the loss is the one of this device's rows.
        (Under explicit sharding, `apply_gradients` is for `reduce_axes`.)

    Raises:
        TypeError: (here) for arguments of another kind, (when traced) for `weight=` beside
            `weight_fn`.
        Exception: what `fun` and the `update` of `tx` raise.
    """
    _validate.check_transformation("`tx`", tx)
    _validate.check_function("`fun`", fun)
    _validate.check_flag("`has_aux`", has_aux)
    if weight_fn is not None:
        _validate.check_function("`weight_fn`", weight_fn)
    differentiate = jax.value_and_grad(fun, has_aux=has_aux)
    accumulator = accumulator_of(tx)
    parameters = inspect.signature(tx.update).parameters.values()
    takes_value = any(p.name == "value" or p.kind is p.VAR_KEYWORD for p in parameters)

    def step(params, opt_state, /, *args, **extra_args):
        trained = fast(params)
        if weight_fn is not None:
            if "weight" in extra_args:
                raise TypeError("`weight` was passed beside `weight_fn`; leave one of them out")
            extra_args["weight"] = weight_fn(trained, *args)

        def gradient(trained):
            value, grads = differentiate(trained, *args)
            return (value if has_aux else (value, ())), grads

        if accumulator is not None:
            value, params, opt_state = _take_in(
                accumulator.for_state(opt_state), gradient, opt_state, params, extra_args
            )
        else:
            value, grads = gradient(trained)
            if takes_value:
                extra_args = {"value": value[0]} | extra_args
            params, opt_state = apply_gradients(tx, grads, opt_state, params, **extra_args)
        return (value if has_aux else value[0]), params, opt_state

    return step


def _take_in(
    accumulator: Accumulator,
    gradient: Callable[[Any], Any],
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any, Any]:
    """Returns `(loss, aux)`, the parameters and the state after a microbatch.

    Args:
        accumulator: The one for this state.
        gradient: `trained -> ((loss, aux), grads)`.
        state: Before the microbatch.
        params: Before the microbatch.
        extra_args: The keywords of the step.
    """
    check_state(state)
    devices = _reduce_axes.check_state(accumulator.reduce_axes, state.weight)
    # Over `reduce_axes` JAX would sum the gradients of what all devices share.
    fun = functools.partial(gradient, devices.share(fast(params)))
    must_see = accumulator.judge is not None or not has_sums(state)
    if must_see or not isinstance(jnp.zeros([]), Tracer):
        value, grads = fun()
        _reduce_axes.check_gradients(value[0], grads, None, devices)
        extra_args = accumulator.extra_args.with_value(extra_args, value[0])
        return value, *accumulator.apply(grads, state, params, **extra_args)
    program = Gradient.traced(fun)
    loss, grads = program.shapes()
    _reduce_axes.check_gradients(loss, grads, None, devices)
    rest = dict(extra_args)
    weight, release = rest.pop("weight", None), rest.pop("release", None)
    call = Call(grads, state, params, weight, release, rest)
    added = accumulator.add(call, accumulator.check_sums(call, applied=True), program)
    rest = accumulator.extra_args.with_value(rest, added.value[0])
    return added.value, *accumulator.apply_call(call._replace(extra_args=rest), added)
