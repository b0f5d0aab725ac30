"""The ways of training on several devices that share the rows of every batch."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import optax

from benchmarks import contenders
from benchmarks.contender import Contender, Layout, Step
from benchmarks.contenders import APPLY_GRADIENTS, VALUE_AND_GRAD
from benchmarks.inners import Inner
import optaccum

AXIS = "data"
CALLS_DEFERRED, CALLS_EXPLICIT = f"{APPLY_GRADIENTS}, shard_map", f"{APPLY_GRADIENTS}, explicit"
IN_STEP_DEFERRED, IN_STEP_EXPLICIT = f"{VALUE_AND_GRAD}, shard_map", f"{VALUE_AND_GRAD}, explicit"
FSDP, ZERO_2 = f"{APPLY_GRADIENTS}, FSDP", f"{APPLY_GRADIENTS}, ZeRO-2"
BY_HAND = "hand-written, shard_map"


def vary(tree: Any) -> Any:
    """Returns replicated parameters such that each device keeps its own part of their gradients."""
    if hasattr(lax, "pcast"):
        return jax.tree.map(lambda x: lax.pcast(x, AXIS, to="varying"), tree)
    return jax.tree.map(lambda x: getattr(lax, "pvary")(x, AXIS), tree)  # noqa: B009  (jax 0.7.2)


def hold_back(tree: Any) -> Any:
    """Returns replicated parameters such that their gradients stay unreduced."""
    return jax.tree.map(
        lambda x: jax.reshard(x, P(*[None] * x.ndim, reduced=frozenset({AXIS}))), tree
    )


def _renamed(made: Contender, name: str, *layout: Any) -> Contender:
    return dataclasses.replace(made, name=name, layout=Layout(*layout))


def _explicit(made: Contender, name: str) -> Contender:
    if not hasattr(jax, "reshard"):
        raise ImportError("this jax has no unreduced gradients")
    return _renamed(made, name, AxisType.Explicit, lambda params: {"state": None}, hold_back)


def calls_deferred(inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` in `jax.shard_map`, with one reduction, in the release."""
    tx = optaccum.accumulate(every_k, inner.transformation, reduce_axes=AXIS)

    def specs(params):
        return {"state": optaccum.state_shardings(tx, params, P())}

    made = contenders.apply_gradients(inner, every_k, reduce_axes=AXIS)
    return _renamed(made, CALLS_DEFERRED, AxisType.Manual, specs, vary)


def calls_explicit(inner: Inner, every_k: int) -> Contender:
    """The same under explicit sharding."""
    made = contenders.apply_gradients(inner, every_k, reduce_axes=AXIS)
    return _explicit(made, CALLS_EXPLICIT)


def in_step_deferred(inner: Inner, every_k: int) -> Contender:
    """`value_and_grad` in `jax.shard_map`, with one reduction, after its scan."""
    made = contenders.in_step(inner, every_k, reduce_axes=AXIS)
    return _renamed(made, IN_STEP_DEFERRED, AxisType.Manual)


def in_step_explicit(inner: Inner, every_k: int) -> Contender:
    """The same under explicit sharding."""
    made = contenders.in_step(inner, every_k, reduce_axes=AXIS)
    return _explicit(made, IN_STEP_EXPLICIT)


def divided(params: Any) -> Any:
    """Returns the spec of each leaf along its first axis that the devices divide, if it has one."""
    count = jax.sharding.get_abstract_mesh().size

    def spec(leaf):
        axes = [i for i, size in enumerate(leaf.shape) if size % count == 0]
        return P(*[None] * axes[0], AXIS) if axes else P()

    return jax.tree.map(spec, params)


def fsdp(inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` with parameters, moments and sums divided among the devices."""
    made = contenders.apply_gradients(inner, every_k)
    tx = optaccum.accumulate(every_k, inner.transformation)

    def specs(params):
        shardings = divided(params)
        opt_state = optaccum.state_shardings(tx, params, shardings)
        return {"params": shardings, "state": opt_state}

    return _renamed(made, FSDP, AxisType.Auto, specs)


def zero_2(inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` with moments and sums divided, and updates gathered in the release."""

    def gather(updates, params):
        return lax.with_sharding_constraint(updates, P())

    inner = dataclasses.replace(
        inner, transformation=optax.chain(inner.transformation, optax.stateless(gather))
    )
    made = contenders.apply_gradients(inner, every_k)
    tx = optaccum.accumulate(every_k, inner.transformation)

    def specs(params):
        return {"state": optaccum.state_shardings(tx, params, divided(params))}

    return _renamed(made, ZERO_2, AxisType.Auto, specs)


def by_hand(inner: Inner, every_k: int) -> Contender:
    """The loop that a careful engineer would write.

    Each device adds up its gradients, times its tokens, and its tokens: the first microbatch
    overwrites the old sums, and the program of the last one has the only reduction.
    """
    tx = inner.transformation

    def load(part):
        return jax.tree.map(lambda x: x[0], part["sums"])

    def store(sums):
        return {"sums": jax.tree.map(lambda x: x[None], sums)}

    def init(params):
        sums = optax.tree.zeros_like((params, jnp.zeros(())))
        return {"params": params, "state": tx.init(params)} | store(vary(sums))

    def weighted(grads, weight):
        return optax.tree.scale(weight, grads), weight

    def overwrite(part, grads, weight):
        return store(weighted(grads, weight))

    def add(part, grads, weight):
        return store(optax.tree.add(load(part), weighted(grads, weight)))

    def release(part, grads, weight):
        summed = add(part, grads, weight)
        total, tokens = lax.psum(load(summed), AXIS)
        mean = optax.tree.scale(1 / jnp.maximum(tokens, 1), total)
        updates, opt_state = tx.update(mean, part["state"], part["params"])
        params = optax.apply_updates(part["params"], updates)
        return {"params": params, "state": opt_state} | summed

    def specs(params):
        return {"sums": P(AXIS)}

    first, hold = Step(overwrite, ("sums",)), Step(add, ("sums",))
    last = Step(release, ("params", "state", "sums"))
    steps = (first,) + (hold,) * (every_k - 2) + (last,)
    return Contender(BY_HAND, init, steps, layout=Layout(AxisType.Manual, specs, vary))


WAYS: dict[str, Callable[[Inner, int], Contender]] = {
    CALLS_DEFERRED: calls_deferred,
    CALLS_EXPLICIT: calls_explicit,
    FSDP: fsdp,
    ZERO_2: zero_2,
    IN_STEP_DEFERRED: in_step_deferred,
    IN_STEP_EXPLICIT: in_step_explicit,
    BY_HAND: by_hand,
}
contenders.ADAPTERS.update(WAYS)
