"""What `accumulate` does with a microbatch: accept it, add it, step the optimizer or hold."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaccum import _callbacks, _reduce_axes, _reductions, _window
from optaccum._conditional import both, branch
from optaccum._devices import Replicated
from optaccum._extra_args import ExtraArgs, as_release, as_weight
from optaccum._gradients import check_fits, check_trained, dtypes_of_sums
from optaccum._state import AccumulateState, check_state, has_sums
from optaccum._trees import (
    apply_updates,
    cast_like,
    copy_shared,
    eval_shape,
    fast,
    keep_untrained,
)
from optaccum._validate import check_denominator
from optaccum._window import Microbatch, Sums


class Call(NamedTuple):
    """The arguments of `update`, as they came."""

    grads: Any
    state: Any
    params: Any
    weight: Any
    release: Any
    extra_args: dict[str, Any]
    grad_sum: Any = None  # sums to which the gradients were added already; these are shapes then


class Checked(NamedTuple):
    """What was not refused of them.

    Attributes:
        devices: Where sums are kept.
        weight: None for 1, a float if it is known and >= 0, or an f32[].
        length: i32[], microbatches per window.
        release: None to count, or whether the window closes: a Python bool, or a bool[].
        averaged: The extra arguments to average, by the keys of their sums.
        inner_args: The extra arguments of `inner`, but for the means of the window.
    """

    devices: Replicated
    weight: float | jax.Array | None
    length: jax.Array
    release: bool | jax.Array | None
    averaged: dict[str, Any]
    inner_args: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulator:
    """The checked options of `accumulate`, and what they make of a microbatch.

    Attributes:
        extra_args: Which extra arguments are averaged, and which `inner` gets.
        summed: Whether losses and gradients are sums.
        judge: `should_skip_update_fn`, with its results checked.
        (others): As in `accumulate`.
    """

    every_k: int | jax.Array | Callable[[jax.Array], Any]
    inner: optax.GradientTransformationExtraArgs
    extra_args: ExtraArgs
    use_grad_mean: bool
    summed: bool
    judge: Callable[..., tuple[jax.Array, Any]] | None
    accumulator_dtype: Any
    cast_mean: bool
    reduce_axes: tuple[str, ...]

    def init(self, params: Any) -> Any:
        """Returns the state before the first microbatch."""
        trained, none = fast(params), jnp.zeros([], jnp.int32)
        dtypes = dtypes_of_sums(trained, self.accumulator_dtype)
        devices = _reduce_axes.check_sums(trained, self.reduce_axes)
        arg_sums = self.extra_args.open_sums(trained, dtypes)
        zeros = Sums(jnp.zeros([], jnp.float32), self._open_sums(trained, dtypes), arg_sums)
        sums = devices.store(zeros)
        report = () if self.judge is None else jax.eval_shape(self.judge, trained, none, params)[1]
        return AccumulateState(
            mini_step=none,
            gradient_step=jnp.zeros_like(none),
            released=jnp.zeros([], jnp.bool_),
            skipped=jnp.zeros_like(none),
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

        call = Call(updates, state, params, weight, release, extra_args)
        return self.for_state(state).take_in(call, step, ())

    def apply(
        self,
        grads: Any,
        state: Any,
        params: Any,
        /,
        *,
        weight: Any = None,
        release: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        """Takes in one microbatch; returns the parameters, untouched on a hold, and the state."""
        call = Call(grads, state, params, weight, release, extra_args)
        return self.for_state(state).apply_call(call)

    def apply_call(self, call: Call) -> tuple[Any, Any]:
        """Returns what `apply` does, for a call that may bring its gradients in a sum."""

        def step(params, inner_state, mean, args):
            updates, inner_state = self.inner.update(mean, inner_state, params, **args)
            return apply_updates(params, updates), inner_state

        new, state = self.take_in(call, step, (call.params,))
        return keep_untrained(call.params, new, call.grads), state

    def for_state(self, state: Any) -> "Accumulator":
        """Returns the accumulator that takes in the next microbatch of this state."""
        return self

    def microbatch(
        self, state: AccumulateState, weight: Any, devices: Replicated, counts: Any
    ) -> tuple[Microbatch, bool]:
        """Returns how a microbatch is added, and whether its weight is known to be positive."""
        opens = self._opens(state)
        if isinstance(weight, jax.Array):
            total = devices.load(jnp.asarray(state.weight))
            before = 0.0 if opens is True else jnp.where(opens, 0, total)
            accepted, weight = devices.weigh(weight, before)
            counts = both(counts, accepted)
        known = weight is None or (isinstance(weight, float) and weight > 0)
        weight = None if weight is None else jnp.asarray(weight, jnp.float32)
        return Microbatch(weight, opens, counts, summed=self.summed), known

    def take_in(self, call: Call, step: Callable[..., tuple], carried: tuple) -> tuple:
        """Adds a microbatch to its window and, if that closes it, takes the step.

        Args:
            call: The arguments of `update`.
            step: `(*carried, inner_state, mean, args) -> (result, inner_state)`.
            carried: What the result replaces: `(params,)`, or () for updates.
        """
        grads, state, params, *_ = call
        devices, weight, length, release, averaged, inner_args = self._check(call, bool(carried))

        # Is it accepted?
        counts, skip_state = True, state.skip_state
        if self.judge is not None:
            verdict = self.judge(grads, state.gradient_step, params, skip_state)
            skip, report = devices.agree(*verdict)
            counts, skip_state = ~skip, cast_like(report, skip_state)
        microbatch, known_positive = self.microbatch(state, weight, devices, counts)
        weight, counts = microbatch.weight, microbatch.counts

        # Does it close the window?
        count = jnp.asarray(optax.safe_increment(state.mini_step))
        closes = both(counts, count >= length if release is None else release)

        # Add it.
        unit = weight if self.summed and weight is not None else jnp.float32(1)
        values = Sums(unit, grads, averaged)
        sums = self._add(call, devices, values, microbatch)
        with jax.named_scope("optaccum.reduce"):
            total = devices.total(sums, closes, by_select=release is True)
        releases = closes if known_positive else both(closes, total > 0)

        # Step, or hold.
        trained = None if params is None else fast(params)

        def take_step(*start):
            _, grad_sum, arg_sums = devices.load(self.extra_args.for_means(sums))
            with jax.named_scope("optaccum.reduce"):
                reduced = devices.reduce(grad_sum, arg_sums, trained)
            like = self.extra_args.for_means(values)
            mean, means = self._mean(Sums(total, *reduced), like, microbatch)
            result, new = step(*start, mean, self.extra_args.with_means(inner_args, means, mean))
            return result, cast_like(new, state.inner_state)

        def shapes():
            parts = map(self.extra_args.for_means, (sums, values))
            mean, means = eval_shape(self._mean, *parts, microbatch)
            args = self.extra_args.with_means(inner_args, means, mean)
            return eval_shape(self.inner.update, mean, state.inner_state, params, **args)[:1]

        with _reduce_axes.explain_varying(grads, trained):
            result, inner_state = branch(
                releases,
                jax.named_scope("optaccum.release")(take_step),
                (*carried, state.inner_state),
                shapes=None if carried else shapes,
                by_select=release is True,
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

    def _open_sums(self, params: Any, dtypes: Any) -> Any:
        return _window.open_sums(params, dtypes)

    def _opens(self, state: AccumulateState) -> jax.Array | bool:
        return state.mini_step == 0

    def _add(self, call: Call, devices: Replicated, values: Sums, microbatch: Microbatch) -> Sums:
        """Returns the sums with the microbatch."""
        state, added = call.state, call.grad_sum
        values = devices.store(values if added is None else values._replace(grads=()))
        if added is None:
            _reduce_axes.check_placed(values.grads, state.grad_sum)
        microbatch = microbatch.decided()
        sums = state.weight, state.grad_sum if added is None else ()
        weight, grads = _window.add(sums, values[:2], microbatch)
        args = _reductions.add(state.arg_sums, values.args, microbatch)
        return Sums(weight, grads if added is None else added, args)

    def _mean(self, sums: Sums, values: Sums, microbatch: Microbatch) -> tuple[Any, Any]:
        """Returns G and the means of the arguments of the window that the microbatch closes."""
        return _window.mean(sums, values, of_grads=self.use_grad_mean, cast=self.cast_mean)

    def _check(self, call: Call, applied: bool) -> Checked:
        """Raises if a microbatch cannot be taken in; else returns its arguments in one form."""
        grads, state, _, weight, release, extra_args, _ = call
        devices = self.check_sums(call, applied)
        check_denominator("`weight`", self.summed and self.use_grad_mean and weight is None)
        weight = None if weight is None else as_weight("`weight`", weight)
        release = self._check_release(as_release(release))
        arg_sums = jax.eval_shape(devices.load, state.arg_sums)
        averaged = self.extra_args.averaged(extra_args, arg_sums)
        length = _callbacks.length(self.every_k, state.gradient_step)
        _reduce_axes.check_agreed(length if release is None else release, devices)
        inner_args = self._inner_args(extra_args, grads)
        return Checked(devices, weight, length, release, averaged, inner_args)

    def check_sums(self, call: Call, applied: bool) -> Replicated:
        """Returns where the sums are kept, or raises unless the gradients fit them."""
        check_state(call.state)
        self.extra_args.check_state(call.state.arg_sums)
        devices = _reduce_axes.check_state(self.reduce_axes, call.state.weight)
        self._check_grads(call, devices, applied)
        _reduce_axes.check_unreduced(call.grads, devices)
        return devices

    def _check_grads(self, call: Call, devices: Replicated, applied: bool) -> None:
        """Raises unless gradients and parameters fit the sums."""
        if not has_sums(call.state) and jax.tree.leaves(call.grads):
            raise ValueError(
                "the optimizer state has no accumulator: it was made with `every_k=1`; give it one "
                "with `state._replace(grad_sum=tx.init(params).grad_sum)`"
            )
        sums = devices.load(call.state.grad_sum)
        check_fits(call.grads, sums)
        if call.params is not None:
            check_trained(fast(call.params), sums, applied=applied)

    def _check_release(self, release: bool | jax.Array | None) -> bool | jax.Array | None:
        return release

    def _inner_args(self, extra_args: dict[str, Any], grads: Any) -> dict[str, Any]:
        return self.extra_args.for_window(extra_args, grads)
