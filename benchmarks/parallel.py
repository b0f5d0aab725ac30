"""The ways of training on several devices that share the rows of every batch."""

from collections.abc import Callable
import dataclasses
import functools
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

    def spec(x):
        return P(*[None] * x.ndim, reduced=frozenset({AXIS}))

    return jax.tree.map(lambda x: jax.reshard(x, spec(x)), tree)


def explicit(make: Callable[..., Contender], name: str, inner: Inner, every_k: int) -> Contender:
    """Reduces once per window, under explicit sharding."""
    if not hasattr(jax, "reshard"):
        raise ImportError("this jax has no unreduced gradients")
    layout = Layout(AxisType.Explicit, lambda params: {"state": None}, hold_back)
    return dataclasses.replace(make(inner, every_k, reduce_axes=AXIS), name=name, layout=layout)


def calls_deferred(inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` in `jax.shard_map`, with one reduction, in the release."""
    made = contenders.apply_gradients(inner, every_k, reduce_axes=AXIS)
    tx = optaccum.accumulate(every_k, inner.transformation, reduce_axes=AXIS)

    def specs(params):
        return {"state": optaccum.state_shardings(tx, params, P())}

    layout = Layout(AxisType.Manual, specs, vary)
    return dataclasses.replace(made, name=CALLS_DEFERRED, layout=layout)


def in_step_deferred(inner: Inner, every_k: int) -> Contender:
    """`value_and_grad` in `jax.shard_map`, with one reduction, after its scan."""
    made = contenders.in_step(inner, every_k, reduce_axes=AXIS)
    return dataclasses.replace(made, name=IN_STEP_DEFERRED, layout=Layout(AxisType.Manual))


def sharded(name: str, inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` with moments and sums divided among the devices.

    Parameters are divided too (FSDP), or updates are gathered in the release (ZeRO-2).
    """
    if name == ZERO_2:
        gather = optax.stateless(lambda updates, _: lax.with_sharding_constraint(updates, P()))
        transformation = optax.chain(inner.transformation, gather)
        inner = dataclasses.replace(inner, transformation=transformation)
    tx = optaccum.accumulate(every_k, inner.transformation)

    def divided(leaf):  # along its first axis that the devices divide, if it has one
        count = jax.sharding.get_abstract_mesh().size
        axes = [i for i, size in enumerate(leaf.shape) if size % count == 0]
        return P(*[None] * axes[0], AXIS) if axes else P()

    def specs(params):
        shardings = jax.tree.map(divided, params)
        state = {"state": optaccum.state_shardings(tx, params, shardings)}
        return state if name == ZERO_2 else state | {"params": shardings}

    made = contenders.apply_gradients(inner, every_k)
    return dataclasses.replace(made, name=name, layout=Layout(AxisType.Auto, specs))


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

    def overwrite(part, grads, weight):
        return store((optax.tree.scale(weight, grads), weight))

    def add(part, grads, weight):
        return store(optax.tree.add(load(part), (optax.tree.scale(weight, grads), weight)))

    def release(part, grads, weight):
        summed = add(part, grads, weight)
        total, tokens = lax.psum(load(summed), AXIS)
        mean = optax.tree.scale(1 / jnp.maximum(tokens, 1), total)
        params, state = contenders.update(tx, mean, part["state"], part["params"])
        return {"params": params, "state": state} | summed

    first, hold = Step(overwrite, ("sums",)), Step(add, ("sums",))
    steps = (first,) + (hold,) * (every_k - 2) + (Step(release, ("params", "state", "sums")),)
    layout = Layout(AxisType.Manual, lambda params: {"sums": P(AXIS)}, vary)
    return Contender(BY_HAND, init, steps, layout=layout)


contenders.ADAPTERS |= {
    CALLS_DEFERRED: calls_deferred,
    CALLS_EXPLICIT: functools.partial(explicit, contenders.apply_gradients, CALLS_EXPLICIT),
    FSDP: functools.partial(sharded, FSDP),
    ZERO_2: functools.partial(sharded, ZERO_2),
    IN_STEP_DEFERRED: in_step_deferred,
    IN_STEP_EXPLICIT: functools.partial(explicit, contenders.in_step, IN_STEP_EXPLICIT),
    BY_HAND: by_hand,
}
