"""One scan over the microbatches of a batch, with the sums of their gradients."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp
import optax

from optaccum import _devices, _extra_args, _reduce_axes, _scatters, _validate, _window
from optaccum._backward import add_gradients
from optaccum._call import Call, Roles
from optaccum._cotangents import call_with_drops, drop_unless, flat_jaxpr
from optaccum._gradients import dtypes_of_sums
from optaccum._mesh_axes import vary, varying
from optaccum._outputs import as_carry_and_aux, check_aux
from optaccum._overwritten import Overwritten
from optaccum._trees import cast_floating, cast_like, strongly_typed
from optaccum._window import Microbatch, Sums


class Outputs(NamedTuple):
    """What a microbatch returns; the scan stacks it, with a leading axis of length n."""

    loss: jax.Array  # l_i, a scalar
    aux: Any  # what `fun` returned beside the loss, without the carry
    weight: jax.Array | None  # w_i, a scalar; None if all are equal
    adds: jax.Array | None  # bool[], whether it adds anything; None if all do
    new: list[jax.Array]  # new values of parameters, f32[...]


class Settings(NamedTuple):
    """The checked options of a loop."""

    n: Any  # an int, or a function that counts the microbatches that are real
    has_aux: bool
    summed: bool  # whether the loss is a sum over what the weight counts
    accumulator_dtype: Any
    reduce_dtype: Any = None
    overlap_reduction: bool = False

    @classmethod
    def checked(
        cls, fun: Any, weight_fn: Any, n: Any, has_aux: Any, loss_reduction: Any, dtype: Any
    ) -> "Settings":
        """Returns the options with a `dtype` of sums that has been checked, or raises."""
        _validate.check_function("`fun`", fun)
        if weight_fn is not None:
            _validate.check_function("`weight_fn`", weight_fn)
        summed = _validate.check_loss_reduction(loss_reduction) == "sum"
        _validate.check_denominator("`weight_fn`", summed and weight_fn is None)
        if not callable(n):
            n = _validate.check_count(
                "`num_microbatches`", n, " or, of stacked microbatches, a function that counts them"
            )
        return cls(n, has_aux, summed, dtype)

    def of_call(self, call: Call, devices: int = 1) -> tuple["Settings", jax.Array | None]:
        """Checks a call; returns the options with an int, and how many microbatches are real.

        None means that all are. `devices` share the rows.
        """
        if not callable(self.n):
            call.check(self.n, devices=devices)
            return self, None
        if not call.roles.stacked:
            raise ValueError(
                "`num_microbatches` is a function, so the number of microbatches is known only "
                "when the program runs, and no rows can be split by it; stack microbatches, "
                "[n, rows, ...], and pass `batch_layout='stacked'`"
            )
        n = max(call.nums_rows[:1], default=1)
        call.check(n, devices=devices)
        count = call.by_position(self.n)(*call.args)
        _validate.check_scalar("`num_microbatches(...)`", count, jnp.integer)
        count = jnp.asarray(count)
        n_or_less = min(n, jnp.iinfo(count.dtype).max)  # n itself might wrap in a narrow dtype
        return self._replace(n=n), jnp.clip(count, 0, n_or_less).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A call of a loss in microbatches."""

    settings: Settings
    args: list[Any]  # by position, as `Roles.split` returns them
    roles: Roles
    params: Any  # the arguments that are differentiated: one, or a tuple
    differentiate: Callable[..., Any]  # `jax.value_and_grad` of the loss, by position
    weight_fn: Callable[..., Any] | None  # by position
    devices: _devices.Replicated
    overwritten: Overwritten  # which parameters their gradients replace
    count: jax.Array | None  # i32[], how many microbatches are real, the first ones; None for all

    @property
    def n(self) -> int:
        """The number of microbatches, real or not."""
        return self.settings.n

    def __call__(self) -> tuple[Any, Any]:
        """Returns what `jax.value_and_grad` of the loss does, with means and stacked aux."""
        alone = self.n == 1 and not self.roles.stacked and not self.devices.axes
        loss, aux, carry, grads = self.once() if alone else self.scan()
        aux = (*carry, aux) if carry else aux
        return ((loss, aux) if self.settings.has_aux else loss), grads

    def once(self) -> tuple[Any, Any, list, Any]:
        """Returns loss, aux, carry and gradients of one microbatch, without a scan or sums."""
        args = self.arguments(0, self._first_carry())
        weight, adds = self.weigh(args, 0)
        run = functools.partial(self.run, args, weight, adds)
        ((loss, aux, new), grads), holds = _scatters.trace(run)
        # The caller may add it up in a loop.
        grads = _scatters.apart(grads, holds, 0) if adds is None else grads
        carry, aux = self.carry_on(args, adds, aux)
        if self.settings.summed:
            each = Sums(jnp.asarray(weight), grads, loss)
            grads, loss = _window.mean(each, each)
        if adds is not None:
            zeros = jax.tree.map(jnp.zeros_like, (loss, grads))
            loss, grads = optax.tree.where(adds, (loss, grads), zeros)
        aux, new, adds = jax.tree.map(lambda x: jnp.asarray(x)[None], (aux, new, adds))
        return loss, aux, carry, self._with_new(grads, new, adds)

    def scan(self) -> tuple[Any, Any, list, Any]:
        """Returns mean loss, stacked aux, last carry and mean gradients of all microbatches."""
        sums, each, carry = self.sums()
        grads = cast_floating(sums.grads, self.settings.reduce_dtype)
        with jax.named_scope("optaccum.reduce"):
            grads, (total, loss) = self.devices.reduce(grads, (sums.weight, sums.args))
        like = Sums(None, self.overwritten.split(self.params)[0], each.loss)
        grads, loss = _window.mean(Sums(total, grads, loss), like)
        return loss, each.aux, carry, self._with_new(grads, each.new, each.adds)

    def sums(self) -> tuple[Sums, Outputs, list]:
        """Returns sums over all microbatches on this device, what each returned, and the carry."""
        carry = self._first_carry()
        # Zeros of the gradients' type: if it is `unreduced`, that of `params` is not.
        params, _ = self.overwritten.split(self.params)
        zeros = jax.grad(lambda _: 0.0)(params)
        dtypes = dtypes_of_sums(params, self.settings.accumulator_dtype)
        sums, total = _window.open_sums(zeros, dtypes), jnp.zeros([], _dtype())
        if self.weight_fn is not None:
            weight, _ = jax.eval_shape(lambda: self.weigh(self.arguments(0, carry), 0))
            total = vary(total, tuple(varying(weight)))
        trips = self.n - self.settings.overlap_reduction
        if self.count is None:
            carried, each = lax.scan(self.trip, (sums, total, carry), jnp.arange(trips))
        else:
            total = vary(total, tuple(varying(self.count)))
            carried, each = self._real_trips(self.count, (sums, total, carry))
        if self.settings.overlap_reduction:
            carried, last = self.trip(carried, jnp.asarray(trips))
            each = jax.tree.map(
                lambda xs, x: jnp.concatenate([xs, jnp.asarray(x)[None]]), each, last
            )
        sums, total, carry = carried
        summed = self.settings.summed
        if each.weight is None and not summed:
            total = jnp.asarray(self.n if self.count is None else self.count, total.dtype)
        all_of_them = Microbatch(each.weight, True, adds=each.adds, summed=summed)
        losses = _window.add(_window.open_sums(each.loss), each.loss, all_of_them)
        return Sums(total, sums, losses.sum()), each, carry

    def trip(self, carried: tuple, i: jax.Array) -> tuple[tuple, Outputs]:
        """Runs microbatch i, and adds it to the sums of gradients and to the total weight."""
        sums, total, carry = carried
        args = self.arguments(i, carry)
        weight, adds = self.weigh(args, total)
        if self.count is not None and varying(self.count):  # other devices may have more
            real = i < self.count
            weight = jnp.asarray(weight, _dtype())
            adds = real if adds is None else real & adds
        unequal = None if adds is None else weight  # equal weights cancel
        microbatch = Microbatch(unequal, adds=adds, summed=self.settings.summed)
        run = functools.partial(self.run, args, weight, adds)
        (loss, aux, new), sums = add_gradients(run, sums, microbatch, total)
        carry, aux = self.carry_on(args, adds, aux)
        total += weight if adds is None else jnp.where(adds, weight, 0)
        return (sums, total, carry), Outputs(loss, aux, unequal, adds, new)

    def _real_trips(self, trips: jax.Array, start: tuple) -> tuple[tuple, Outputs]:
        """Does what a scan does, in as many trips as the device with the most needs."""
        if axes := tuple(varying(trips)):  # `fun` may communicate, so devices run alike
            trips = lax.pmax(trips, axes)
        closed, structure = flat_jaxpr(self.trip, start, jnp.int32(0))
        trip, first = core.jaxpr_as_fun(closed), jax.tree.leaves(start)
        carries = len(first)

        def body(i, state):
            carried, stacks = state
            results = trip(*carried, i)
            stacks = jax.tree.map(lambda xs, x: xs.at[i].set(x), stacks, results[carries:])
            return results[:carries], stacks

        stacks = [
            vary(jnp.zeros((self.n, *x.shape), x.dtype), tuple(varying(x)))
            for x in jax.eval_shape(trip, *first, jnp.int32(0))[carries:]
        ]
        carried, stacks = lax.fori_loop(0, trips, body, (first, stacks))
        return structure.unflatten([*carried, *stacks])

    def arguments(self, i: Any, carry: list) -> list[Any]:
        """Returns the arguments of microbatch i."""
        args = self.roles.microbatch(self.args, i, self.n)
        for j, x in zip(self.roles.carry, carry, strict=True):
            args[j] = x
        return args

    def weigh(self, args: list[Any], total: Any) -> tuple[Any, jax.Array | None]:
        """Returns the weight of a microbatch, and whether it adds anything to a `total` of others.

        The second is None for a positive Python number, which does and is the same for all.
        """
        weight, dtype = 1.0, _dtype()
        if self.weight_fn is not None:
            weight = _extra_args.as_weight("`weight_fn(...)`", self.weight_fn(*args), dtype)
        if isinstance(weight, float) and weight > 0:
            return weight, None
        weight = jnp.asarray(weight, dtype)
        adds = _window.adds(weight, total, self.devices.largest)
        return drop_unless(adds, weight), adds

    def run(self, args: list[Any], weight: Any, adds: jax.Array | None) -> tuple[Any, Any]:
        """Returns `(loss, aux, new)` and the gradients of a microbatch."""
        value, grads = call_with_drops(adds, functools.partial(self.differentiate, *args))
        loss, aux = value if self.settings.has_aux else (value, None)
        check_aux(aux)
        _reduce_axes.check_gradients(loss, grads, weight, self.devices)
        grads, new = self.overwritten.split(grads)
        return (loss, aux, new), grads

    def _with_new(self, grads: Any, new: list[jax.Array], adds: jax.Array | None) -> Any:
        """Returns the gradients with what overwrites parameters, of the microbatches that count."""
        if not self.overwritten.places:
            return grads
        real = jnp.arange(self.n) < (self.n if self.count is None else self.count)
        adds = real if adds is None else real & adds
        return self.overwritten.join(grads, new, adds, self.params)

    def carry_on(self, args: list[Any], adds: jax.Array | None, aux: Any) -> tuple[list, Any]:
        """Returns the carry of the next microbatch, and what is left of `aux`."""
        if not self.roles.carry:
            return [], aux
        old = args[self.roles.carry[0]]
        new, aux = as_carry_and_aux(aux, old)
        new = _scatters.fence(self.devices.vary(cast_like(new, old)))
        return [new if adds is None else optax.tree.where(adds, new, old)], aux

    def _first_carry(self) -> list:
        return [jax.tree.map(strongly_typed, self.args[j]) for j in self.roles.carry]


def _dtype() -> jnp.dtype:
    return jax.dtypes.canonicalize_dtype(float)  # float64 with `jax_enable_x64`
