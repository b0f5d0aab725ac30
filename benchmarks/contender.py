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
    """The program of one call, without the gradients that it is given."""

    # `(part, grads, weight) -> part`, where `part` holds the entries `names` of the carry and the
    # weight is None where all microbatches count alike. It leaves the other entries alone.
    apply: Callable[[Carry, Any, Any], Carry]
    names: tuple[str, ...] = ("params", "state")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a contender uses several devices that share the rows of each batch."""

    # Auto for `jax.jit`, Explicit for that under explicit sharding, Manual in `jax.shard_map`.
    axis_type: AxisType = AxisType.Auto
    # `params -> {name: spec}`, where entries of the carry lie: each a prefix of its tree, or None
    # for where `init` makes them. Those it does not name lie on all devices alike. Called under
    # `jax.set_mesh`.
    specs: Callable[[Any], Carry] = lambda params: {}
    # Makes of the parameters those that the loss is differentiated by.
    prepare: Callable[[Any], Any] = lambda params: params


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of accumulating gradients.

    It knows neither a model nor a device; `benchmarks.programs` makes programs of it.
    """

    name: str
    # `params -> carry`: a dict with the entry `params` and whatever else a step needs. JAX passes
    # entries in alphabetical order; with `params` first XLA does best by all.
    init: Callable[[Any], Carry]
    # One for each call of a window. A single one is given the whole batch, more a microbatch each.
    steps: tuple[Step, ...]
    # `(loss_fn, weight_fn, params, batch) -> (loss, grads)`
    differentiate: Callable[..., Any] = lambda loss_fn, _, *args: jax.value_and_grad(loss_fn)(*args)
    equivalent: bool = True  # whether it means to do what one step on the full batch does
    reference: optax.GradientTransformation | None = None  # that it steps, if not the one given
    layout: Layout = Layout()
