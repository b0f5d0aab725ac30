"""What `accumulate` does with a microbatch: accept it, add it, step the optimizer or hold."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaccum import _callbacks, _reduce_axes, _reductions, _window
from optaccum._backward import Gradient
from optaccum._conditional import both, branch
from optaccum._devices import Replicated
from optaccum._extra_args import ExtraArgs, as_release, as_weight
from optaccum._gradients import check_fits, check_trained, dtypes_of_sums
from optaccum._state import AccumulateState, check_state, has_sums
from optaccum._trees import (
    apply_updates,
    cast_floating,
    cast_like,
    copy_shared,
    fast,
    keep_untrained,
)
from optaccum._validate import check_denominator
from optaccum._window import Microbatch, Sums


class Arguments(NamedTuple):
    """The arguments of `update`, as they came."""

    grads: Any
    state: Any
    params: Any
    weight: Any
    release: Any
    extra_args: dict[str, Any]


class Added(NamedTuple):
    """A window with a microbatch added to it."""

    devices: Replicated  # where sums are kept
    sums: Sums  # of the window, as a state keeps them
    values: Sums  # what the microbatch added, or its shapes and dtypes
    microbatch: Microbatch
    known_positive: bool  # whether its weight is known to be positive
    skip_state: Any
    value: Any = None  # `(loss, aux)` of the microbatch, if they were computed here


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """The checked options of `accumulate`, and what they make of a microbatch."""

    every_k: int | jax.Array | Callable[[jax.Array], Any]
    inner: optax.GradientTransformationExtraArgs
    extra_args: ExtraArgs
    use_grad_mean: bool
    summed: bool  # whether losses and gradients are sums
    judge: Callable[..., tuple[jax.Array, Any]] | None  # `should_skip_update_fn`
    accumulator_dtype: Any
    cast_mean: bool
    reduce_axes: tuple[str, ...]
    reduce_dtype: Any

    def init(self, params: Any) -> Any:
        """Returns the state before the first microbatch."""
        trained, zero = fast(params), jnp.zeros([], jnp.int32)
        dtypes = dtypes_of_sums(trained, self.accumulator_dtype)
        devices = _reduce_axes.check_sums(trained, self.reduce_axes)
        arg_sums = self.extra_args.open_sums(trained, dtypes)
        zeros = Sums(jnp.zeros([], jnp.float32), self._open_sums(trained, dtypes), arg_sums)
        sums = devices.store(zeros)
        report = () if self.judge is None else jax.eval_shape(self.judge, trained, zero, params)[1]
        return AccumulateState(
            mini_step=zero,
            gradient_step=jnp.zeros_like(zero),
            released=jnp.zeros([], jnp.bool_),
            skipped=jnp.zeros_like(zero),
            weight=sums.weight,
            grad_sum=sums.grads,
            arg_sums=sums.args,
            skip_state=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report),
            inner_state=copy_shared(self.inner.init(params), params),
        )

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        weight: Any = None,
        release: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        """Takes in one microbatch; returns the updates, zeros on a hold, and the state."""

        def step(inner_state, mean, args):
            return self.inner.update(mean, inner_state, params, **args)

        call = Arguments(updates, state, params, weight, release, extra_args)
        return self.for_state(state).take_in(call, step, ())

    def apply(self, call: Arguments, added: Added | None = None) -> tuple[Any, Any]:
        """Takes in one microbatch; returns the parameters, untouched on a hold, and the state.

        Args:
            call: The arguments of `update`.
            added: The window with the microbatch, if it is in it already.
        """

        def step(params, inner_state, mean, args):
            updates, inner_state = self.inner.update(mean, inner_state, params, **args)
            return apply_updates(params, updates), inner_state

        new, state = self.take_in(call, step, (call.params,), added)
        return keep_untrained(call.params, new, call.grads), state

    def for_state(self, state: Any) -> "Accumulator":
        """Returns the accumulator that takes in the next microbatch of this state."""
        return self

    def take_in(
        self,
        call: Arguments,
        step: Callable[..., tuple],
        carried: tuple,
        added: Added | None = None,
    ) -> tuple:
        """Adds a microbatch to its window and, if that closes it, takes the step.

        Args:
            call: The arguments of `update`.
            step: `(*carried, inner_state, mean, args) -> (result, inner_state)`.
            carried: What the result replaces: `(params,)`, or () for updates.
            added: As in `apply`.
        """
        grads, state, params, *_ = call
        if added is None:
            devices = self.check_state(state)
            self.check_grads(call, devices, applied=bool(carried))
            added = self.add(call, devices)
        devices, sums, values, microbatch, known_positive, skip_state, _ = added
        counts = microbatch.counts

        # Does it close the window?
        release = self._release(as_release(call.release))
        length = _callbacks.length(self.every_k, state.gradient_step)
        _reduce_axes.check_agreed(length if release is None else release, devices)
        inner_args = self._inner_args(call.extra_args, grads)
        count = jnp.asarray(optax.safe_increment(state.mini_step))
        closes = both(counts, count >= length if release is None else release)
        with jax.named_scope("optaccum.reduce"):
            total = devices.total(sums, closes, by_select=release is True)
        releases = closes if known_positive else both(closes, total > 0)

        # Step, or hold.
        trained = None if params is None else fast(params)

        def take_step(*start):
            kept, like = map(self.extra_args.for_means, (sums, values))
            kept = self._reduce(kept, devices, trained) if devices.axes else kept
            mean, means = self._mean(kept._replace(weight=total), like, microbatch)
            args = self.extra_args.with_means(inner_args, means, mean)
            result, new = step(*start, mean, args)
            return result, cast_like(new, state.inner_state)

        with _reduce_axes.explain_varying(grads, trained):
            result, inner_state = branch(
                releases,
                jax.named_scope("optaccum.release")(take_step),
                (*carried, state.inner_state),
                makes_more=not carried,
                by_select=release is True,  # nearly every call takes the step
            )
        return result, AccumulateState(
            mini_step=jnp.where(closes, 0, jnp.where(counts, count, state.mini_step)),
            gradient_step=jnp.where(
                releases, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            released=jnp.asarray(releases),
            skipped=jnp.where(counts, state.skipped, optax.safe_increment(state.skipped)),
            weight=sums.weight,
            grad_sum=sums.grads,
            arg_sums=sums.args,
            skip_state=skip_state,
            inner_state=inner_state,
        )

    def add(self, call: Arguments, devices: Replicated, gradient: Gradient | None = None) -> Added:
        """Returns the window with a microbatch.

        Args:
            call: Its arguments, which `check_grads` let pass.
            devices: Where sums are kept.
            gradient: The program of its gradients, of which `call` has the shapes. None if `call`
                has the gradients.
        """
        grads, state, params, weight, _, extra_args = call
        check_denominator("`weight`", self.summed and self.use_grad_mean and weight is None)
        weight = None if weight is None else as_weight("`weight`", weight)

        # Is it accepted?
        counts, skip_state = True, state.skip_state
        if self.judge is not None:
            verdict = self.judge(grads, state.gradient_step, params, skip_state)
            skip, report = devices.agree(*verdict)
            counts, skip_state = ~skip, cast_like(report, skip_state)
        opens = self._opens(state)
        known_positive = weight is None or (isinstance(weight, float) and weight > 0)
        if isinstance(weight, jax.Array):
            so_far = devices.load(jnp.asarray(state.weight))
            before = 0.0 if opens is True else jnp.where(opens, 0, so_far)
            weight, accepted = devices.weigh(weight, before)
            counts = both(counts, accepted)
        weight = None if weight is None else jnp.asarray(weight, jnp.float32)
        microbatch = Microbatch(weight, opens, counts, summed=self.summed)

        # Add it.
        value, total = None, None
        if gradient is not None:
            seen = jnp.asarray(state.mini_step, jnp.float32)
            value, total = gradient.add_to(devices.load(state.grad_sum), microbatch, seen)
            extra_args = self.extra_args.with_value(extra_args, value[0])
        arg_sums = jax.eval_shape(devices.load, state.arg_sums)
        averaged = self.extra_args.averaged(extra_args, arg_sums)
        weighed = self.summed and weight is not None
        values = Sums(weight if weighed else jnp.float32(1), grads, averaged)
        sums = self._add(state, devices, values, microbatch, total)
        return Added(devices, sums, values, microbatch, known_positive, skip_state, value)

    def _open_sums(self, params: Any, dtypes: Any) -> Any:
        return _window.open_sums(params, dtypes)

    def _opens(self, state: AccumulateState) -> jax.Array | bool:
        return state.mini_step == 0

    def _add(
        self,
        state: AccumulateState,
        devices: Replicated,
        values: Sums,
        microbatch: Microbatch,
        total: Any,
    ) -> Sums:
        """Returns the sums with a microbatch; `total` are the sums of gradients, if known."""
        microbatch, sums = microbatch.decided(), (state.weight, state.grad_sum)
        if total is not None:
            values, sums = values._replace(grads=()), (state.weight, ())
        values = devices.store(values)
        _reduce_axes.check_placed(values.grads, sums[1])
        weight, grads = _window.add(sums, values[:2], microbatch)
        if total is not None:
            grads = devices.store(Sums((), total, ())).grads
        return Sums(weight, grads, _reductions.add(state.arg_sums, values.args, microbatch))

    def _reduce(self, sums: Sums, devices: Replicated, like: Any) -> Sums:
        """Returns the sums over all devices, which are sent in `reduce_dtype`."""
        sent = sums._replace(grads=cast_floating(sums.grads, self.reduce_dtype))
        with jax.named_scope("optaccum.reduce"):
            reduced = devices.reduce_stored(sent, like)
        return reduced._replace(grads=cast_like(reduced.grads, sums.grads))

    def _mean(self, sums: Sums, values: Sums, microbatch: Microbatch) -> tuple[Any, Any]:
        """Returns G and the means of the arguments of the window that the microbatch closes."""
        return _window.mean(sums, values, of_grads=self.use_grad_mean, cast=self.cast_mean)

    def check_state(self, state: Any) -> Replicated:
        """Returns where sums are kept, or raises unless a state is what `init` returns here."""
        check_state(state)
        self.extra_args.check_state(state.arg_sums)
        return _reduce_axes.check_state(self.reduce_axes, state.weight)

    def check_grads(self, call: Arguments, devices: Replicated, *, applied: bool) -> None:
        """Raises unless gradients and parameters fit the sums."""
        self._check_fits(call, devices, applied)
        _reduce_axes.check_unreduced(call.grads, devices)

    def _check_fits(self, call: Arguments, devices: Replicated, applied: bool) -> None:
        if not has_sums(call.state) and jax.tree.leaves(call.grads):
            raise ValueError(
                "the optimizer state has no accumulator: it was made with `every_k=1`; give it one "
                "with `state._replace(grad_sum=tx.init(params).grad_sum)`"
            )
        sums = call.state.grad_sum
        if devices.axes:
            sums = jax.eval_shape(devices.load, sums)
        check_fits(call.grads, sums)
        if call.params is not None:
            check_trained(fast(call.params), sums, applied=applied)

    def _release(self, release: bool | jax.Array | None) -> bool | jax.Array | None:
        return release

    def _inner_args(self, extra_args: dict[str, Any], grads: Any) -> dict[str, Any]:
        return self.extra_args.for_window(extra_args, grads)
