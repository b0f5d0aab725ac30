"""The ways of accumulating gradients that the benchmarks compare: one adapter for each.

An adapter is a function `(inner, every_k) -> Contender`.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import os
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import optax

from benchmarks.contender import AXIS, INSIDE, Contender, Inner, Step, of, update
import optaccum
import optaccum.flax

FULL_BATCH, ALONE = "full batch", "AdamW alone"
APPLY_GRADIENTS, UPDATE = "optaccum.apply_gradients", "optaccum, drop-in update"
RELEASE, TRAIN_STATE = "optaccum, Python-bool release", "optaccum.flax.TrainState"
NNX_OPTIMIZER, FLAX_OPTIMIZER = "optaccum.flax.Optimizer", "flax.nnx.Optimizer, drop-in"
MULTI_STEPS, AGGREGATING = "optax.MultiSteps", "aggregating.process"
APPLY_EVERY, KERAS = "optax.apply_every", "Keras, accumulation steps"
HAND_WRITTEN, NOT_ZEROING = "hand-written loop", "hand-written, no zeroing"
VALUE_AND_GRAD, MICROBATCH = "optaccum.value_and_grad", "optax.microbatch"
SCAN, BY_HAND = "hand-written scan", "hand-written, shard_map"
CALLS_DEFERRED, CALLS_EXPLICIT = f"{APPLY_GRADIENTS}, shard_map", f"{APPLY_GRADIENTS}, explicit"
IN_STEP_DEFERRED, IN_STEP_EXPLICIT = f"{VALUE_AND_GRAD}, shard_map", f"{VALUE_AND_GRAD}, explicit"
VALUE_AND_APPLY, REDUCED_ONCE = "optaccum.value_and_apply", f"{VALUE_AND_GRAD}, reduce_axes"
MAXTEXT, LEVANTER = "MaxText's form", "Levanter's form"
FSDP, ZERO_2 = f"{APPLY_GRADIENTS}, FSDP", f"{APPLY_GRADIENTS}, ZeRO-2"


def apply_gradients(inner: Inner, every_k: int, **options: Any) -> Contender:
    tx = optaccum.accumulate(every_k, inner.transformation, **options)
    specs = lambda params: {"state": optaccum.state_shardings(tx, params, P())}  # noqa: E731
    return of(tx, every_k, optaccum.apply_gradients, specs=specs)


def release(inner: Inner, every_k: int) -> Contender:
    """The same with a Python bool `release=`: two programs, and a conditional in neither."""
    tx = optaccum.accumulate(every_k, inner.transformation)
    holds = of(tx, every_k - 1, functools.partial(optaccum.apply_gradients, release=False))
    last = of(tx, 1, functools.partial(optaccum.apply_gradients, release=True))
    return dataclasses.replace(holds, steps=holds.steps + last.steps)


def train_state(inner: Inner, every_k: int) -> Contender:
    tx = optaccum.accumulate(every_k, inner.transformation)

    def init(params):
        state = optaccum.flax.TrainState.create(apply_fn=None, params=params, tx=tx)
        state = state.replace(step=jnp.asarray(state.step), params=None)
        return {"params": params, "state": state}

    def apply(tx, grads, state, params, weight):
        state = state.replace(params=params).apply_gradients(grads=grads)
        return state.params, state.replace(params=None)

    return of(tx, every_k, apply, init)


def nnx_optimizer(kind: Any, inner: Inner, every_k: int) -> Contender:
    """An `Optimizer` for Flax's nnx: ours, or Flax's own with `accumulate` in it."""
    tx = optaccum.accumulate(every_k, inner.transformation)

    def model(tree):
        return nnx.State({"model": jax.tree.map(nnx.Param, tree)})

    def init(params):
        return {"params": params, "state": nnx.split(kind(model(params), tx, wrt=nnx.Param))}

    def apply(tx, grads, state, params, weight):
        optimizer, trained = nnx.merge(*state), model(params)
        optimizer.update(trained, model(grads))  # in place
        tree = jax.tree.structure(params)
        return jax.tree.unflatten(tree, jax.tree.leaves(trained)), nnx.split(optimizer)

    return of(tx, every_k, apply, init)


def aggregating(inner: Inner, every_k: int) -> Contender:
    from optax.experimental import aggregating

    mean = aggregating.average_incrementally_updates(per_elt_axis=None, accumulation_steps=every_k)
    return of(aggregating.process(optax.identity(), mean, inner.transformation), every_k)


def apply_every(inner: Inner, every_k: int) -> Contender:
    """It sums k steps of the inner optimizer, each on the gradient of a microbatch."""
    tx = optax.chain(inner.transformation, optax.apply_every(every_k))
    return of(tx, every_k, equivalent=False)


def hand_written(inner: Inner, every_k: int, zeroing: bool = True, axis: str = "") -> Contender:
    """A loop of two programs, `add` and `add and update`; the second zeroes the sums.

    Or of three: the first microbatch overwrites the sums, and the last only reads them. With an
    axis it is the loop that a careful engineer would write for several devices: each adds up its
    gradients, times its tokens, and its tokens; the program of the last has the only reduction.
    """
    tx = inner.transformation

    def term(grads, weight):  # of the sums
        return (optax.tree.scale(weight, grads), weight[None]) if axis else grads

    def init(params):
        grads = vary(params) if axis else params
        sums = term(optax.tree.zeros_like(grads), jax.tree.leaves(grads)[0].sum() * 0)
        return {"params": params, "state": tx.init(params), "sums": sums}

    def overwrite(part, grads, weight):
        return {"sums": jax.tree.map(jnp.copy, term(grads, weight))}

    def add(part, grads, weight):
        return {"sums": optax.tree.add(part["sums"], term(grads, weight))}

    def add_and_update(part, grads, weight):
        total, count = add(part, grads, weight)["sums"], every_k
        if axis:
            total, tokens = lax.psum(total, axis)
            count = jnp.maximum(tokens[0], 1)
        mean = optax.tree.scale(1 / count, total)
        params, opt_state = update(tx, mean, part["state"], part["params"])
        sums = optax.tree.zeros_like(part["sums"]) if zeroing else part["sums"]
        return {"params": params, "state": opt_state, "sums": sums}

    hold, last = Step(add, ("sums",)), Step(add_and_update, ("params", "state", "sums"))
    first = hold if zeroing else Step(overwrite, ("sums",))
    steps = (first,) + (hold,) * (every_k - 2) + (last,)
    if not axis:
        return Contender(init, steps)
    more: Any = {"specs": lambda params: {"sums": P(axis)}, "prepare": vary}
    return Contender(init, steps, axis_type=AxisType.Manual, **more)


def keras(inner: Inner, every_k: int) -> Contender:
    """Keras 3's `gradient_accumulation_steps`, by `stateless_apply` on its JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError(f"Keras runs on {keras.backend.backend()}, not on jax")
    name, options = inner.keras
    try:
        make = getattr(keras.optimizers, name)
        optimizer = make(**options, gradient_accumulation_steps=every_k)
    except (AttributeError, ValueError) as error:  # raised for Muon by older versions
        raise ImportError(f"Keras {keras.__version__}: {error}") from error

    def init(params):
        if not optimizer.built:
            # Keras keeps concrete variables, even while a caller traces this for its shapes.
            with jax.ensure_compile_time_eval():
                leaves = jax.tree.leaves(params)
                optimizer.build([keras.Variable("zeros", p.shape, p.dtype) for p in leaves])
        return {"params": params, "state": [jnp.copy(v.value) for v in optimizer.variables]}

    def apply(tx, grads, opt_state, params, weight):
        leaves, treedef = jax.tree.flatten(params)
        leaves, opt_state = tx.stateless_apply(opt_state, jax.tree.leaves(grads), leaves)
        return jax.tree.unflatten(treedef, leaves), opt_state

    return of(optimizer, every_k, apply, init, reference=inner.reference)


def in_step(inner: Inner, every_k: int, **options: Any) -> Contender:
    def differentiate(loss_fn, weight_fn, params, batch):
        given = {"num_microbatches": every_k, "weight_fn": weight_fn, **options}
        return optaccum.value_and_grad(loss_fn, **given)(params, batch)

    return of(inner.transformation, 1, differentiate=differentiate)


def microbatch(inner: Inner, every_k: int) -> Contender:
    """`optax.microbatch` with the accumulator that means what the full batch means."""

    def differentiate(loss_fn, weight_fn, params, batch):
        rows = len(jax.tree.leaves(batch)[0]) // every_k
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatch(jax.value_and_grad(loss_fn), 1, rows, mean)(params, batch)

    return of(inner.transformation, 1, differentiate=differentiate)


def scan(inner: Inner, every_k: int) -> Contender:
    """The usual scan over microbatches, that sums in the dtype of the parameters."""

    def differentiate(loss_fn, weight_fn, params, batch):
        def body(sums, rows):
            return optax.tree.add(sums, jax.value_and_grad(loss_fn)(params, rows)), None

        # Of every k-th row, so that each microbatch has rows of all devices.
        split = jax.tree.map(lambda x: x.reshape(-1, every_k, *x.shape[1:]).swapaxes(0, 1), batch)
        sums, _ = lax.scan(body, (jnp.zeros([]), optax.tree.zeros_like(params)), split)
        return optax.tree.scale(1 / every_k, sums)

    return of(inner.transformation, 1, differentiate=differentiate)


def vary(tree: Any) -> Any:
    """Returns replicated parameters such that each device keeps its part of their gradients."""
    if hasattr(lax, "pcast"):
        return jax.tree.map(lambda x: lax.pcast(x, AXIS, to="varying"), tree)
    return jax.tree.map(lambda x: getattr(lax, "pvary")(x, AXIS), tree)  # noqa: B009  (jax 0.7.2)


def hold_back(tree: Any) -> Any:
    """Returns replicated parameters such that their gradients stay unreduced."""
    return jax.tree.map(
        lambda x: jax.reshard(x, P(*[None] * x.ndim, reduced=frozenset({AXIS}))), tree
    )


def explicit(make: Callable[..., Contender], inner: Inner, every_k: int) -> Contender:
    """Reduces once per window, under explicit sharding."""
    if not hasattr(jax, "reshard"):
        raise ImportError("this jax has no unreduced gradients")
    more: Any = {"specs": lambda params: {"state": None}, "prepare": hold_back}
    made = make(inner, every_k, reduce_axes=AXIS)
    return dataclasses.replace(made, axis_type=AxisType.Explicit, **more)


def manual(make: Callable[..., Contender], inner: Inner, every_k: int) -> Contender:
    """Reduces once per window, in `jax.shard_map`: in the release, or after the scan."""
    made = make(inner, every_k, reduce_axes=AXIS)
    prepare = vary if make is apply_gradients else made.prepare
    return dataclasses.replace(made, axis_type=AxisType.Manual, prepare=prepare)


def divided(params: Any, axis: str = AXIS) -> Any:
    """Returns specs that divide each leaf along its longest axis, if the devices can."""
    count = jax.sharding.get_abstract_mesh().shape[axis]

    def spec(leaf):
        axes = [i for i, size in enumerate(leaf.shape) if size % count == 0]
        longest = max(axes, key=lambda i: leaf.shape[i], default=None)
        return P() if longest is None else P(*[None] * longest, axis)

    return jax.tree.map(spec, params)


def fully_sharded(made: Contender, inner: Inner, inside: int = 1) -> Contender:
    """Divides parameters and moments among all devices, or among those of a replica."""

    def specs(params):
        shardings = divided(params, AXIS if inside == 1 else INSIDE)
        state = optaccum.state_shardings(inner.transformation, params, shardings)
        return {"params": shardings, "state": state}

    return dataclasses.replace(made, specs=specs, inside=inside)


def placed(inner: Inner, every_k: int, gathered: bool) -> Contender:
    """A scan by hand that divides its sums like the parameters, as trainers for TPUs have it.

    MaxText casts and gathers the parameters once. Levanter gathers them in each microbatch, and
    divides its gradients too.
    """

    def differentiate(loss_fn, weight_fn, params, batch):
        place = functools.partial(jax.tree.map, lax.with_sharding_constraint)
        specs, used = divided(params), params
        if gathered:
            used = jax.tree.map(
                lambda p: lax.with_sharding_constraint(p.astype("bfloat16"), P()), params
            )

        def body(sums, rows):
            loss, grads = jax.value_and_grad(loss_fn)(used, rows)
            grads = grads if gathered else place(grads, specs)
            return (sums[0] + loss, place(optax.tree.add(sums[1], grads), specs)), None

        split = jax.tree.map(lambda x: x.reshape(-1, every_k, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = place(optax.tree.zeros_like(params), specs)
        sums, _ = lax.scan(body, (jnp.zeros([]), zeros), split)
        return optax.tree.scale(1 / every_k, sums)

    return fully_sharded(of(inner.transformation, 1, differentiate=differentiate), inner)


def value_and_apply(inner: Inner, every_k: int) -> Contender:
    """The step gets the loss in place of its gradients."""
    tx = optaccum.accumulate(every_k, inner.transformation)

    def apply(tx, given, state, params, weight):
        loss_fn, weight_fn, batch = given
        step = optaccum.value_and_apply(tx, loss_fn, weight_fn=weight_fn)
        return step(params, state, batch)[1:]

    def differentiate(loss_fn, weight_fn, params, batch):
        return jnp.zeros([]), (loss_fn, weight_fn, batch)

    return of(tx, every_k, apply, differentiate=differentiate)


def sharded(name: str, inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` with moments and sums divided among the devices.

    Parameters are divided too (FSDP), or updates are gathered in the release (ZeRO-2).
    """
    inner_tx = inner.transformation
    if name == ZERO_2:
        gather = optax.stateless(lambda updates, _: lax.with_sharding_constraint(updates, P()))
        inner_tx = optax.chain(inner_tx, gather)
    tx = optaccum.accumulate(every_k, inner_tx)

    def specs(params):
        shardings = divided(params)
        state = {"state": optaccum.state_shardings(tx, params, shardings)}
        return state if name == ZERO_2 else state | {"params": shardings}

    return of(tx, every_k, optaccum.apply_gradients, specs=specs)


ADAPTERS: dict[str, Callable[[Inner, int], Contender]] = {
    # One step of the inner optimizer on the whole batch, and one on every microbatch.
    FULL_BATCH: lambda inner, k: of(inner.transformation, 1),
    ALONE: lambda inner, k: of(inner.transformation, k, equivalent=False),
    APPLY_GRADIENTS: apply_gradients,
    RELEASE: release,
    UPDATE: lambda inner, k: of(optaccum.accumulate(k, inner.transformation), k),
    TRAIN_STATE: train_state,
    NNX_OPTIMIZER: functools.partial(nnx_optimizer, optaccum.flax.Optimizer),
    FLAX_OPTIMIZER: functools.partial(nnx_optimizer, nnx.Optimizer),
    MULTI_STEPS: lambda inner, k: of(optax.MultiSteps(inner.transformation, k), k),
    AGGREGATING: aggregating,
    APPLY_EVERY: apply_every,
    HAND_WRITTEN: hand_written,
    NOT_ZEROING: functools.partial(hand_written, zeroing=False),
    KERAS: keras,
    VALUE_AND_GRAD: in_step,
    MICROBATCH: microbatch,
    SCAN: scan,
    # These need several devices.
    CALLS_DEFERRED: functools.partial(manual, apply_gradients),
    CALLS_EXPLICIT: functools.partial(explicit, apply_gradients),
    FSDP: functools.partial(sharded, FSDP),
    ZERO_2: functools.partial(sharded, ZERO_2),
    VALUE_AND_APPLY: value_and_apply,
    REDUCED_ONCE: functools.partial(in_step, reduce_axes=AXIS),
    MAXTEXT: functools.partial(placed, gathered=True),
    LEVANTER: functools.partial(placed, gathered=False),
    IN_STEP_DEFERRED: functools.partial(manual, in_step),
    IN_STEP_EXPLICIT: functools.partial(explicit, in_step),
    BY_HAND: functools.partial(hand_written, zeroing=False, axis=AXIS),
}


def make(
    names: Iterable[str], inner: Inner, every_k: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Returns the contenders by name, and why those are left out that are not installed."""
    found, left_out = {}, {}
    for name in names:
        try:
            found[name] = ADAPTERS[name](inner, every_k)
        except ImportError as error:
            left_out[name] = str(error)
    return found, left_out
