"""One scan over the microbatches of a batch, with the sums of their gradients."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from optaccum import _devices, _extra_args, _reduce_axes, _scatters, _validate, _window
from optaccum._backward import add_gradients
from optaccum._batch import named_leaves
from optaccum._call import Roles
from optaccum._cotangents import call_with_drops, drop_unless
from optaccum._keys import is_typed_key
from optaccum._mesh_axes import vary, varying
from optaccum._trees import ARRAYS, cast_floating, cast_like, strongly_typed, where
from optaccum._window import Sums


class Carried(NamedTuple):
    """What the scan carries from one microbatch to the next."""

    sums: Any  # weighted sums of the gradients, in the accumulator dtype
    total: jax.Array  # sum of the weights so far: f32[], or f64[] with `jax_enable_x64`
    carry: Any  # the argument `carry_argnum` of the next microbatch; None if there is none


class Microbatch(NamedTuple):
    """What the scan stacks of each microbatch, with a leading axis of length n."""

    loss: jax.Array  # l_i, a scalar
    aux: Any  # what `fun` returned beside the loss, without the carry
    weight: jax.Array | None  # w_i, a scalar; None if all are equal
    counts: jax.Array | None  # bool[], whether the weight counts; None if all do


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A call of a loss in microbatches.

    Attributes:
        args: The arguments by position, the rows of the batch as [rows / n, n, ...] if n > 1.
        roles: Which of them are what.
        params: The arguments that are differentiated: one, or a tuple.
        differentiate: `jax.value_and_grad` of the loss, by position like `weight_fn`.
        devices: Where the sums are.
        summed: Whether the loss is a sum over what the weight counts.
        n: The number of microbatches.
        (others): As in :func:`optaccum.value_and_grad`.
    """

    args: list[Any]
    roles: Roles
    params: Any
    differentiate: Callable[..., Any]
    devices: _devices.Replicated
    summed: bool
    n: int
    has_aux: bool
    weight_fn: Callable[..., Any] | None
    accumulator_dtype: Any
    reduce_dtype: Any
    overlap_reduction: bool

    def once(self) -> tuple[Any, Any, Any, Any]:
        """Returns loss, aux, carry and gradients of one microbatch, without a scan or sums."""
        args = self.arguments(0, self._first_carry())
        weight, counts = self.weigh(args, 0)
        run = functools.partial(self.run, args, weight, counts)
        ((loss, aux), grads), holds = _scatters.trace(run)
        grads = _scatters.apart(grads, holds, 0) if counts is None else grads
        carry, aux = self.carry_on(args, counts, aux)
        if self.summed:
            each = Sums(jnp.asarray(weight), grads, loss)
            grads, loss = _window.mean(each, each)
        if counts is not None:
            zeros = jax.tree.map(jnp.zeros_like, (loss, grads))
            loss, grads = where(counts, (loss, grads), zeros)
        return loss, jax.tree.map(lambda x: jnp.asarray(x)[None], aux), carry, grads

    def scan(self) -> tuple[Any, Any, Any, Any]:
        """Returns mean loss, stacked aux, last carry and mean gradients of all microbatches."""
        sums, each, carry = self.sums()
        grads = cast_floating(sums.grads, self.reduce_dtype)
        grads, (total, loss) = self.devices.reduce(grads, (sums.weight, sums.args))
        like = Sums(None, self.params, each.loss)
        grads, loss = _window.mean(Sums(total, grads, loss), like)
        return loss, each.aux, carry, grads

    def sums(self) -> tuple[Sums, Microbatch, Any]:
        """Returns sums over all microbatches on this device, what each returned, and the carry."""
        carry = self._first_carry()
        # Zeros of the gradients' type: if it is `unreduced`, that of `params` is not.
        zeros = jax.grad(lambda _: 0.0)(self.params)
        sums, total = _window.open_sums(zeros, self.accumulator_dtype), jnp.zeros([], _dtype())
        if self.weight_fn is not None:
            weight, _ = jax.eval_shape(lambda: self.weigh(self.arguments(0, carry), 0))
            total = vary(total, tuple(varying(weight)))
        carried, trips = Carried(sums, total, carry), self.n - self.overlap_reduction
        carried, each = lax.scan(self.trip, carried, jnp.arange(trips))
        if self.overlap_reduction:
            carried, last = self.trip(carried, jnp.asarray(trips))
            each = jax.tree.map(
                lambda xs, x: jnp.concatenate([xs, jnp.asarray(x)[None]]), each, last
            )
        sums, total, carry = carried
        if each.weight is None and not self.summed:
            total = jnp.asarray(self.n, total.dtype)
        all_of_them = _window.Microbatch(each.weight, True, adds=each.counts, summed=self.summed)
        losses = _window.add(_window.open_sums(each.loss), each.loss, all_of_them)
        return Sums(total, sums, losses.sum()), each, carry

    def trip(self, carried: Carried, i: jax.Array) -> tuple[Carried, Microbatch]:
        """Runs microbatch i and adds it to the sums."""
        sums, total, carry = carried
        args = self.arguments(i, carry)
        weight, counts = self.weigh(args, total)
        unequal = None if counts is None else weight  # equal weights cancel
        microbatch = _window.Microbatch(unequal, adds=counts, summed=self.summed)
        run = functools.partial(self.run, args, weight, counts)
        (loss, aux), sums = add_gradients(run, sums, microbatch, total)
        carry, aux = self.carry_on(args, counts, aux)
        total += weight if counts is None else jnp.where(counts, weight, 0)
        return Carried(sums, total, carry), Microbatch(loss, aux, unequal, counts)

    def arguments(self, i: Any, carry: Any) -> list[Any]:
        """Returns the arguments of microbatch i, or all of them if it is the only one."""
        args = list(self.args) if self.n == 1 else self.roles.microbatch(self.args, i)
        for j in self.roles.carry:
            args[j] = carry
        return args

    def weigh(self, args: list[Any], total: Any) -> tuple[Any, jax.Array | None]:
        """Returns the weight of a microbatch, and whether it counts after a `total` of others.

        None means that it does: a positive Python number, which is then the same for all.
        """
        weight, dtype = 1.0, _dtype()
        if self.weight_fn is not None:
            weight = _extra_args.as_weight("`weight_fn(...)`", self.weight_fn(*args), dtype)
        if isinstance(weight, float) and weight > 0:
            return weight, None
        weight = jnp.asarray(weight, dtype)
        counts = _window.adds(weight, total, self.devices.largest)
        return drop_unless(counts, weight), counts

    def run(self, args: list[Any], weight: Any, counts: jax.Array | None) -> tuple[Any, Any]:
        """Returns `(loss, aux)` and the gradients of a microbatch.

        Args:
            args: Its arguments.
            weight: Its weight.
            counts: Whether that counts, as `weigh` returns both.
        """
        value, grads = call_with_drops(counts, functools.partial(self.differentiate, *args))
        loss, aux = value if self.has_aux else (value, None)
        check_aux(aux)
        _reduce_axes.check_gradients(loss, grads, weight, self.devices)
        return (loss, aux), grads

    def carry_on(self, args: list[Any], counts: jax.Array | None, aux: Any) -> tuple[Any, Any]:
        """Returns the carry of the next microbatch, and what is left of `aux`."""
        if not self.roles.carry:
            return None, aux
        old = args[self.roles.carry[0]]
        new, aux = as_carry_and_aux(aux)
        check_carry(new, old)
        new = _scatters.fence(self.devices.share(cast_like(new, old)))
        return (new if counts is None else where(counts, new, old)), aux

    def _first_carry(self) -> Any:
        if not self.roles.carry:
            return None
        return jax.tree.map(strongly_typed, self.args[self.roles.carry[0]])


def _dtype() -> jnp.dtype:
    return jax.dtypes.canonicalize_dtype(float)  # float64 with `jax_enable_x64`


def check_aux(aux: Any) -> None:
    """Raises unless what `fun` returned beside its loss can be stacked."""
    for name, x in named_leaves({"": aux}):
        if not isinstance(x, ARRAYS):
            raise TypeError(
                f"`fun` returned {_validate.describe(x)} as aux leaf {name or '(the only leaf)'}; "
                "return arrays or numbers, which are stacked over the microbatches"
            )


def as_carry_and_aux(aux: Any) -> tuple[Any, Any]:
    """Returns what `fun` returned beside its loss, if it hands on a carry, as a pair."""
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise TypeError(
            "`fun` must return `(loss, (carry, aux))` with `carry_argnum`, where aux may be (), "
            f"got {_validate.describe(aux)} for `(carry, aux)`"
        )
    return aux


def check_carry(new: Any, carry: Any) -> None:
    """Raises unless `fun` returned a carry of the structure, shapes and dtypes that it got."""
    if jax.tree.structure(new) != jax.tree.structure(carry):
        raise TypeError(
            f"`fun` returned a carry of the tree structure {jax.tree.structure(new)}, but it "
            f"began as {jax.tree.structure(carry)}"
        )
    for (name, x), old in zip(named_leaves({"": new}), jax.tree.leaves(carry), strict=True):
        if is_typed_key(x) and is_typed_key(old) and x.shape == old.shape:
            continue
        keys = is_typed_key(x) or is_typed_key(old)
        if jnp.shape(x) != jnp.shape(old) or keys or _widens(x, old):
            raise TypeError(
                f"`fun` returned a carry whose leaf {name or '(the only leaf)'} is "
                f"{_validate.describe(x)}, but it began as {_validate.describe(old)}; begin "
                "with the shape and dtype that it will have"
            )


def _widens(x: Any, old: Any) -> bool:
    """Returns whether `x` would lose bits in the dtype of `old`."""
    with jax.numpy_dtype_promotion("standard"):
        wider = _validate.kind(x) > _validate.kind(old)
        return wider or jnp.result_type(x, old) != jnp.result_type(old)
