"""The ways of accumulating gradients that the benchmarks compare: one adapter for each.

An adapter is a function `(inner, every_k) -> Contender`. The inner optimizers are Optax's and
Keras's, with the same hyperparameters. Adam and Muon are blind to the scale of their gradients but
for `eps`: a small one would let a contender that releases the sum pass for one that releases the
mean, so theirs are large.
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

import optaccum
import optaccum.flax

AXIS = "data"
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
FSDP, ZERO_2 = f"{APPLY_GRADIENTS}, FSDP", f"{APPLY_GRADIENTS}, ZeRO-2"

RATES: Any = {"learning_rate": 1e-2, "weight_decay": 1e-2}
ADAM_EPS, MUON_EPS = 0.1, 10.0  # to be compared to an element, and to the norm of a leaf
B2, MUON_RMS = 0.999, 0.2
# Optax corrects the bias of Nesterov's momentum, Keras does not. Without Nesterov the bias is a
# factor that the orthogonalisation cancels, and the two define the same update.
_muon = functools.partial(optax.contrib.muon, **RATES, nesterov=False, consistent_rms=MUON_RMS)


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner optimizer."""

    transformation: optax.GradientTransformation
    keras: tuple[str, dict[str, Any]]  # the name and the options of Keras's, which accumulates
    reference: optax.GradientTransformation  # what one step of that does
    bandwidth_bound: bool = True  # whether a release takes as long as its bytes take to move


def _adam_eps_of_keras(count: Any) -> Any:
    # Keras adds its epsilon to the root of the second moment before correcting the bias.
    return ADAM_EPS / jnp.sqrt(1 - B2 ** (count + 1))


INNERS = {
    "sgd": Inner(optax.sgd(1e-2), ("SGD", {"learning_rate": 1e-2}), optax.sgd(1e-2)),
    "adamw": Inner(
        optax.adamw(**RATES, b2=B2, eps=ADAM_EPS),
        ("AdamW", RATES | {"beta_2": B2, "epsilon": ADAM_EPS}),
        optax.inject_hyperparams(optax.adamw)(**RATES, b2=B2, eps=_adam_eps_of_keras),
    ),
    "muon": Inner(
        _muon(eps=MUON_EPS),
        ("Muon", RATES | {"nesterov": False, "rms_rate": MUON_RMS}),
        _muon(eps=1e-7),  # which Keras fixes
        bandwidth_bound=False,
    ),
}
Carry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """The program of one call, without the gradients that it is given."""

    # `(part, grads, weight) -> part`, where `part` holds the entries `names` of the carry and the
    # weight is None where all microbatches count alike. It leaves the other entries alone.
    apply: Callable[[Carry, Any, Any], Carry]
    names: tuple[str, ...] = ("params", "state")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of accumulating gradients.

    It knows neither a model nor a device; `benchmarks.programs` makes programs of it.
    """

    # `params -> carry`: a dict with the entry `params` and whatever else a step needs. JAX passes
    # entries in alphabetical order; with `params` first XLA does best by all.
    init: Callable[[Any], Carry]
    # One for each call of a window. A single one is given the whole batch, more a microbatch each.
    steps: tuple[Step, ...]
    # `(loss_fn, weight_fn, params, batch) -> (loss, grads)`
    differentiate: Callable[..., Any] = lambda loss_fn, _, *args: jax.value_and_grad(loss_fn)(*args)
    equivalent: bool = True  # whether it means to do what one step on the full batch does
    reference: optax.GradientTransformation | None = None  # that it steps, if not the one given
    # How it uses several devices that share the rows of each batch: Auto for `jax.jit`, Explicit
    # for that under explicit sharding, Manual in `jax.shard_map`.
    axis_type: AxisType = AxisType.Auto
    # `params -> {name: spec}`, where entries of the carry lie: each a prefix of its tree, or None
    # for where `init` makes them. Those it does not name lie on all devices alike. Called under
    # `jax.set_mesh`.
    specs: Callable[[Any], Carry] = lambda params: {}
    # Makes of the parameters those that the loss is differentiated by.
    prepare: Callable[[Any], Any] = lambda params: params


def update(tx: Any, grads: Any, opt_state: Any, params: Any, weight: Any = None) -> Any:
    """Returns what a transformation without weights makes of the parameters and its state."""
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def of(tx: Any, calls: int, apply: Any = update, init: Any = None, **more: Any) -> Contender:
    """Returns a contender whose calls are all the same step of a transformation."""

    def step(part, grads, weight):
        params, state = apply(tx, grads, part["state"], part["params"], weight=weight)
        return {"params": params, "state": state}

    init = init or (lambda params: {"params": params, "state": tx.init(params)})
    return Contender(init, (Step(step),) * calls, **more)


def apply_gradients(inner: Inner, every_k: int, **options: Any) -> Contender:
    tx = optaccum.accumulate(every_k, inner.transformation, **options)
    return of(tx, every_k, optaccum.apply_gradients)


def release(inner: Inner, every_k: int) -> Contender:
    """The same with a Python bool `release=`: two programs, and a conditional in neither."""
    tx = optaccum.accumulate(every_k, inner.transformation)
    holds = of(tx, every_k - 1, functools.partial(optaccum.apply_gradients, release=False))
    last = of(tx, 1, functools.partial(optaccum.apply_gradients, release=True))
    return dataclasses.replace(holds, steps=holds.steps + last.steps)


def train_state(inner: Inner, every_k: int) -> Contender:
    tx = optaccum.accumulate(every_k, inner.transformation)

    def make(params):
        return optaccum.flax.TrainState.create(apply_fn=lambda: None, params=params, tx=tx)

    def init(params):
        state = make(params)
        return {"params": params, "state": (jnp.asarray(state.step), state.opt_state)}

    def apply(tx, grads, state, params, weight):
        new = make(params).replace(step=state[0], opt_state=state[1]).apply_gradients(grads=grads)
        return new.params, (new.step, new.opt_state)

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


def hand_written(inner: Inner, every_k: int, zeroing: bool = True) -> Contender:
    """A loop of two programs, `add` and `add and update`; the second zeroes the sums.

    Or of three: the first microbatch overwrites the sums, and the last only reads them.
    """
    tx = inner.transformation

    def init(params):
        return {"params": params, "state": tx.init(params), "sums": optax.tree.zeros_like(params)}

    def overwrite(part, grads, weight):
        return {"sums": jax.tree.map(jnp.copy, grads)}

    def add(part, grads, weight):
        return {"sums": optax.tree.add(part["sums"], grads)}

    def add_and_update(part, grads, weight):
        mean = optax.tree.scale(1 / every_k, add(part, grads, weight)["sums"])
        params, opt_state = update(tx, mean, part["state"], part["params"])
        sums = optax.tree.zeros_like(part["sums"]) if zeroing else part["sums"]
        return {"params": params, "state": opt_state, "sums": sums}

    hold, last = Step(add, ("sums",)), Step(add_and_update, ("params", "state", "sums"))
    first = hold if zeroing else Step(overwrite, ("sums",))
    return Contender(init, (first,) + (hold,) * (every_k - 2) + (last,))


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

        def split(x):  # every k-th row, so that each microbatch has rows of all devices
            return x.reshape(-1, every_k, *x.shape[1:]).swapaxes(0, 1)

        zeros = jnp.zeros([]), optax.tree.zeros_like(params)
        sums, _ = lax.scan(body, zeros, jax.tree.map(split, batch))
        return optax.tree.scale(1 / every_k, sums)

    return of(inner.transformation, 1, differentiate=differentiate)


def vary(tree: Any) -> Any:
    """Returns replicated parameters such that each device keeps its own part of their gradients."""
    if hasattr(lax, "pcast"):
        return jax.tree.map(lambda x: lax.pcast(x, AXIS, to="varying"), tree)
    return jax.tree.map(lambda x: getattr(lax, "pvary")(x, AXIS), tree)  # noqa: B009  (jax 0.7.2)


def hold_back(tree: Any) -> Any:
    """Returns replicated parameters such that their gradients stay unreduced."""

    def reshard(x):
        return jax.reshard(x, P(*[None] * x.ndim, reduced=frozenset({AXIS})))

    return jax.tree.map(reshard, tree)


def explicit(make: Callable[..., Contender], inner: Inner, every_k: int) -> Contender:
    """Reduces once per window, under explicit sharding."""
    if not hasattr(jax, "reshard"):
        raise ImportError("this jax has no unreduced gradients")
    more: Any = {"specs": lambda params: {"state": None}, "prepare": hold_back}
    made = make(inner, every_k, reduce_axes=AXIS)
    return dataclasses.replace(made, axis_type=AxisType.Explicit, **more)


def calls_deferred(inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` in `jax.shard_map`, with one reduction, in the release."""
    tx = optaccum.accumulate(every_k, inner.transformation, reduce_axes=AXIS)
    given: Any = {"axis_type": AxisType.Manual, "prepare": vary}
    given["specs"] = lambda params: {"state": optaccum.state_shardings(tx, params, P())}
    return of(tx, every_k, optaccum.apply_gradients, **given)


def in_step_deferred(inner: Inner, every_k: int) -> Contender:
    """`value_and_grad` in `jax.shard_map`, with one reduction, after its scan."""
    made = in_step(inner, every_k, reduce_axes=AXIS)
    return dataclasses.replace(made, axis_type=AxisType.Manual)


def sharded(name: str, inner: Inner, every_k: int) -> Contender:
    """`apply_gradients` with moments and sums divided among the devices.

    Parameters are divided too (FSDP), or updates are gathered in the release (ZeRO-2).
    """
    inner_tx = inner.transformation
    if name == ZERO_2:
        gather = optax.stateless(lambda updates, _: lax.with_sharding_constraint(updates, P()))
        inner_tx = optax.chain(inner_tx, gather)
    tx = optaccum.accumulate(every_k, inner_tx)

    def divided(leaf):  # along its first axis that the devices divide, if it has one
        count = jax.sharding.get_abstract_mesh().size
        axes = [i for i, size in enumerate(leaf.shape) if size % count == 0]
        return P(*[None] * axes[0], AXIS) if axes else P()

    def specs(params):
        shardings = jax.tree.map(divided, params)
        state = {"state": optaccum.state_shardings(tx, params, shardings)}
        return state if name == ZERO_2 else state | {"params": shardings}

    return of(tx, every_k, optaccum.apply_gradients, specs=specs)


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

    def add_and_update(part, grads, weight):
        summed = add(part, grads, weight)
        total, tokens = lax.psum(load(summed), AXIS)
        mean = optax.tree.scale(1 / jnp.maximum(tokens, 1), total)
        params, state = update(tx, mean, part["state"], part["params"])
        return {"params": params, "state": state} | summed

    first, hold = Step(overwrite, ("sums",)), Step(add, ("sums",))
    last = Step(add_and_update, ("params", "state", "sums"))
    steps = (first,) + (hold,) * (every_k - 2) + (last,)
    specs = lambda params: {"sums": P(AXIS)}  # noqa: E731
    return Contender(init, steps, axis_type=AxisType.Manual, specs=specs, prepare=vary)


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
    CALLS_DEFERRED: calls_deferred,
    CALLS_EXPLICIT: functools.partial(explicit, apply_gradients),
    FSDP: functools.partial(sharded, FSDP),
    ZERO_2: functools.partial(sharded, ZERO_2),
    IN_STEP_DEFERRED: in_step_deferred,
    IN_STEP_EXPLICIT: functools.partial(explicit, in_step),
    BY_HAND: by_hand,
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
