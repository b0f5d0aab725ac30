"""One way of accumulating gradients: the notion that all benchmarks share."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType
import optax

Carry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """The program of one call, without the gradients that it is given.

    Attributes:
        apply: `(part, grads, weight) -> part`, where `part` holds the entries `names` of the carry
            and the weight is None where all microbatches count alike.
        names: the entries of the carry that it needs; it leaves the others alone.
    """

    apply: Callable[[Carry, Any, Any], Carry]
    names: tuple[str, ...] = ("params", "state")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a contender uses several devices that share the rows of each batch.

    Attributes:
        axis_type: Auto for `jax.jit`, Explicit for that under explicit sharding, or Manual for
            programs inside `jax.shard_map`.
        specs: `params -> {name: spec}`, where entries of the carry lie: each a prefix of its tree,
            or None for where `init` makes them. Those it does not name lie on all devices alike.
            Called under `jax.set_mesh`.
        prepare: makes of the parameters those that the loss is differentiated by.
    """

    axis_type: AxisType = AxisType.Auto
    specs: Callable[[Any], Carry] = lambda params: {}
    prepare: Callable[[Any], Any] = lambda params: params


def value_and_grad(loss_fn: Callable[..., Any], weight_fn: Any) -> Callable[..., Any]:
    """Returns the function that takes the gradients of a whole batch at once."""
    del weight_fn
    return jax.value_and_grad(loss_fn)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of accumulating gradients.

    It knows neither a model nor a device; `benchmarks.programs` makes programs of it.

    Attributes:
        name: what the tables call it.
        init: `params -> carry`: a dict with the entry `params` and whatever else a step needs. JAX
            passes entries in alphabetical order; with `params` first XLA does best by all.
        steps: one for each call of a window. A single one is given the whole batch, more are
            given a microbatch each.
        differentiate: `(loss_fn, weight_fn) -> ((params, batch) -> (loss, grads))`.
        equivalent: whether it means to do what one step on the full batch does.
        reference: the inner optimizer that it steps, where that is not the one it was given.
        layout: how it uses several devices.
    """

    name: str
    init: Callable[[Any], Carry]
    steps: tuple[Step, ...]
    differentiate: Callable[[Any, Any], Callable[..., Any]] = value_and_grad
    equivalent: bool = True
    reference: optax.GradientTransformation | None = None
    layout: Layout = Layout()
