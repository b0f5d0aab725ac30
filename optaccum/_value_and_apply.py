"""A training step that adds gradients to the window where the backward pass makes them."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import inspect
from typing import Any, Concatenate, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from optaccum import _call, _reduce_axes, _reductions, _validate, _window
from optaccum._accumulate import accumulator_of, apply_gradients
from optaccum._accumulator import Accumulator, Added, Arguments
from optaccum._backward import Gradient
from optaccum._device_rows import as_shard, on_each_device
from optaccum._devices import Automatic, PerDevice, Replicated
from optaccum._outputs import as_loss
from optaccum._state import AccumulateState, has_sums
from optaccum._trees import fast, tracing
from optaccum._window import Microbatch, Sums

Params = TypeVar("Params")
Value = TypeVar("Value")  # the loss, or with `has_aux` `(loss, aux)`


def value_and_apply(
    tx: optax.GradientTransformation,
    fun: Callable[Concatenate[Params, ...], Value],
    has_aux: bool = False,
    *,
    weight_fn: Callable[..., Any] | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    rng_argnums: int | Sequence[int] = (),
) -> Callable[..., tuple[Value, Params, Any]]:
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
        * The sums have the bits that :func:`apply_gradients` gives them, except for roundings that
          XLA leaves out in bfloat16, and for the rows of a weighted lookup, which are multiplied by
          the weight before they are added up.
        * A microbatch of weight 0 adds nothing, whatever its gradients are. It is computed.
        * The gradients are made first with `should_skip_update_fn`, with the constant `every_k` 1,
          outside `jax.jit`, and for any other transformation.

    Args:
        tx: Any Optax transformation; an :func:`accumulate` outermost.
        fun: A loss: `(params, *args)` to a real scalar, or with `has_aux` to `(scalar, aux)`.
        has_aux: Whether `fun` returns `(scalar, aux)`.
        weight_fn: Called as `fun` is; returns the `weight` of the microbatch, such as its unpadded
            tokens.
        batch_argnums: Positions of the arguments of `fun` that hold rows. None for the argument 1.
            Read only with `reduce_axes` under automatic sharding, as `rng_argnums` is.
        rng_argnums: Positions of keys. Each device folds its index into its keys.

    Returns:
        A function `(params, opt_state, *args, **extra_args) -> (loss, params, opt_state)`, or with
        `has_aux` `((loss, aux), params, opt_state)`. `args` are for `fun`, `extra_args` for `tx`:
        `weight=` and `release=` for :func:`accumulate`. `value=` is the loss. It is the loss of
        the window if :func:`accumulate` names it: in `average_args` for an `inner` that reads it,
        or in `metrics`. In `jax.shard_map` with `reduce_axes` the loss that is returned is the loss
        of this device's rows.
        (With explicit `reduce_axes` call `apply_gradients` instead.)

        Under automatic sharding with `reduce_axes` each device computes the gradient of its rows,
        and a release reduces the sums. The loss is of all rows, and leaves of `aux` get a
        leading axis of devices. Weights come from `weight_fn`, which sees the rows of a device,
        and extra arguments stand for all rows. Sharding constraints in `fun` must not name these
        axes.

    Raises:
        TypeError: here for arguments of another kind; when traced for `weight=` beside `weight_fn`,
            or with `reduce_axes` under automatic sharding, which needs `weight_fn`.
        ValueError: for rows that cannot be divided among the devices of `reduce_axes`.
        Exception: what `fun` and the `update` of `tx` raise.
    """
    _validate.check_transformation("`tx`", tx)
    _validate.check_function("`fun`", fun)
    _validate.check_flag("`has_aux`", has_aux)
    if weight_fn is not None:
        _validate.check_function("`weight_fn`", weight_fn)
    argnums = _call.check_roles(
        None, argnums=0, batch_argnums=batch_argnums, rng_argnums=rng_argnums
    )
    loss = Loss(as_loss(fun, has_aux), has_aux, weight_fn, argnums)
    accumulator = accumulator_of(tx)

    def step(params, opt_state, /, *args, weight=None, release=None, **extra_args) -> Any:
        check_one_weight(weight, weight_fn)
        args = fast(params), *args
        call = Arguments((), opt_state, params, weight, release, extra_args)
        if accumulator is not None:
            value, params, opt_state = _take_in(accumulator.for_state(opt_state), loss, args, call)
        else:
            value, grads = loss.value_and_grad(args)
            extra_args = with_value(tx, extra_args, value[0])
            given = {"weight": loss.weigh(args, weight), "release": release}
            extra_args |= {name: x for name, x in given.items() if x is not None}
            params, opt_state = apply_gradients(tx, grads, opt_state, params, **extra_args)
        return (value if has_aux else value[0]), params, opt_state

    return step


def check_one_weight(weight: Any, weight_fn: Callable[..., Any] | None) -> None:
    """Raises if a microbatch has a weight and a function for it."""
    if weight is not None and weight_fn is not None:
        raise TypeError("`weight` was passed beside `weight_fn`; leave one of them out")


def with_value(tx: Any, extra_args: dict[str, Any], loss: jax.Array) -> dict[str, Any]:
    """Returns extra arguments with `value`, the loss, if `tx` takes it and it is not given."""
    accumulator = accumulator_of(tx)
    if accumulator is not None:
        return accumulator.extra_args.with_value(extra_args, loss)
    parameters = inspect.signature(tx.update).parameters.values()
    takes_value = any(p.name == "value" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"value": loss} | extra_args if takes_value else extra_args


class Loss(NamedTuple):
    """What is computed of a microbatch."""

    fun: Callable[..., Any]
    has_aux: bool
    weight_fn: Callable[..., Any] | None
    argnums: _call.Argnums  # which arguments of `fun` are rows and keys

    def value_and_grad(self, args: Sequence[Any]) -> tuple[tuple[Any, Any], Any]:
        """Returns `(loss, aux)` and gradients."""
        value, grads = jax.value_and_grad(self.fun, has_aux=self.has_aux)(*args)
        return (value if self.has_aux else (value, ())), grads

    def weigh(self, args: Sequence[Any], weight: Any) -> Any:
        """Returns the weight of a microbatch: `weight`, without a function for it."""
        if self.weight_fn is None:
            return weight
        _validate.check_takes("`weight_fn`", self.weight_fn, args, {})
        return self.weight_fn(*args)


def _take_in(accumulator: Accumulator, loss: Loss, args: Sequence[Any], call: Arguments) -> tuple:
    """Returns `(loss, aux)`, the parameters and the state after a microbatch.

    `args` are for the loss. `call` has the arguments of the step, without gradients.
    """
    devices = accumulator.check_state(call.state)
    if isinstance(devices, Automatic):
        call, added = _add_on_each_device(accumulator, loss, args, call, devices)
    else:
        call, added = _add(accumulator, loss, args, call, devices)
    extra_args = accumulator.extra_args.with_value(call.extra_args, added.value[0])
    return added.value, *accumulator.apply(call._replace(extra_args=extra_args), added)


def _add(
    accumulator: Accumulator, loss: Loss, args: Sequence[Any], call: Arguments, devices: Replicated
) -> tuple[Arguments, Added]:
    """Returns the call with gradients, or their shapes, and the window with the microbatch."""
    call = call._replace(weight=loss.weigh(args, call.weight))
    # Over `reduce_axes` JAX would sum the gradients of what all devices share.
    run = functools.partial(loss.value_and_grad, (devices.vary(args[0]), *args[1:]))
    must_see = accumulator.judge is not None or not has_sums(call.state)
    if must_see or not tracing():
        program, (value, grads) = None, run()
        scalar, extra_args = value[0], accumulator.extra_args.with_value(call.extra_args, value[0])
    else:
        program, value, extra_args = Gradient.traced(run), None, call.extra_args
        scalar, grads = program.shapes()
    _reduce_axes.check_gradients(scalar, grads, None, devices)
    call = call._replace(grads=grads)
    accumulator.check_grads(call, devices, applied=True)
    added = accumulator.add(call._replace(extra_args=extra_args), devices, program)
    return call, added if value is None else added._replace(value=value)


def _add_on_each_device(
    accumulator: Accumulator, loss: Loss, args: Sequence[Any], call: Arguments, devices: Automatic
) -> tuple[Arguments, Added]:
    """Returns what `_add` does, under automatic sharding: each device adds its rows."""
    if call.weight is not None:
        raise TypeError(
            "`weight` was passed with `reduce_axes` under automatic sharding, where each device "
            "needs the weight of its rows; pass `weight_fn` to `value_and_apply` instead"
        )
    of_fun = _call.Call(loss.fun, loss.argnums, tuple(args), {})
    of_fun.check(1, devices=devices.count)
    found = []
    # Extra arguments stand for all rows. They are added once, to the sums of the first device.
    named, state = accumulator.extra_args, call.state
    without = dataclasses.replace(named, averages={}, metrics={})
    local = dataclasses.replace(accumulator, extra_args=without)
    local_call = call._replace(state=state._replace(inner_state=(), arg_sums={}), extra_args={})

    def fun(args, state):
        per_device = PerDevice(devices.axes)
        new, added = _add(local, loss, args, local_call._replace(state=state), per_device)
        value, aux = added.value
        weight, value = _mean_loss(value, added, per_device)
        counts = added.microbatch.counts
        found[:] = jax.tree.map(_as_shape, (new.grads, added.values)), added.known_positive, counts
        counts = () if isinstance(counts, bool) else counts
        return (weight, value, counts, added.skip_state), (as_shard(aux, devices), added.sums)

    sharded: Any = jax.P(devices.axes)
    whole: Any = jax.P()
    specs = AccumulateState(*[whole] * len(state))._replace(weight=sharded, grad_sum=sharded)
    (weight, value, counts, skip_state), (aux, sums) = on_each_device(
        fun, devices, of_fun, (whole, sharded), (local_call.state,), (specs,)
    )
    (grads, values), known_positive, decided = found
    counts = decided if isinstance(decided, bool) else counts
    microbatch = Microbatch(weight, state.mini_step == 0, counts, summed=accumulator.summed)
    extra_args = named.with_value(call.extra_args, value)
    averaged = named.averaged(extra_args, jax.eval_shape(devices.load, state.arg_sums))
    sums = sums._replace(
        args=_reductions.add_to_first(state.arg_sums, averaged, microbatch.decided())
    )
    values = values._replace(args=averaged)
    added = Added(devices, sums, values, microbatch, known_positive, skip_state, (value, aux))
    return call._replace(grads=grads), added


def _mean_loss(loss: jax.Array, added: Added, devices: Replicated) -> tuple[jax.Array, jax.Array]:
    """Returns the weight and the loss of the rows of all devices."""
    terms, how = Sums(added.values.weight, (), loss), added.microbatch._replace(opens=True)
    sums = _window.add(_window.open_sums(terms), terms, how._replace(counts=True))
    _, (weight, total) = devices.reduce((), (sums.weight, sums.args))
    divisor = jnp.ones_like(weight) if how.summed else weight
    return weight, _window.mean(Sums(divisor, (), total), terms)[1]


def _as_shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
