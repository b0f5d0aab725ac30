"""The ways of accumulating gradients that the benchmarks compare: one adapter for each.

An adapter is a function `(inner, every_k) -> Contender`; `benchmarks.parallel` adds those that need
several devices.
"""

from collections.abc import Callable, Iterable
import functools
import os
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import optax

from benchmarks.contender import Carry, Contender, Step
from benchmarks.inners import Inner
import optaccum
import optaccum.flax

FULL_BATCH = "full batch"
APPLY_GRADIENTS, UPDATE = "optaccum.apply_gradients", "optaccum, drop-in update"
RELEASE, TRAIN_STATE = "optaccum, Python-bool release", "optaccum.flax.TrainState"
NNX_OPTIMIZER, FLAX_OPTIMIZER = "optaccum.flax.Optimizer", "flax.nnx.Optimizer, drop-in"
MULTI_STEPS, AGGREGATING = "optax.MultiSteps", "aggregating.process"
APPLY_EVERY, KERAS = "optax.apply_every", "Keras, accumulation steps"
HAND_WRITTEN, NOT_ZEROING = "hand-written loop", "hand-written, no zeroing"
VALUE_AND_GRAD, MICROBATCH = "optaccum.value_and_grad", "optax.microbatch"
SCAN, ALONE = "hand-written scan", "AdamW alone"


def update(tx: Any, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _init(tx: Any) -> Callable[[Any], Carry]:
    return lambda params: {"params": params, "state": tx.init(params)}


def _step(tx: Any, apply: Callable[..., tuple[Any, Any]], takes_weight: bool = False) -> Step:
    def step(part, grads, weight):
        given = {"weight": weight} if takes_weight and weight is not None else {}
        params, opt_state = apply(tx, grads, part["state"], part["params"], **given)
        return {"params": params, "state": opt_state}

    return Step(step)


def of(tx: Any, name: str, calls: int, apply: Any = update, **more: Any) -> Contender:
    """Returns a contender whose calls are all the same step of a transformation."""
    step = _step(tx, apply, takes_weight=apply is optaccum.apply_gradients)
    return Contender(name, more.pop("init", _init(tx)), (step,) * calls, **more)


def apply_gradients(inner: Inner, every_k: int, **options: Any) -> Contender:
    tx = optaccum.accumulate(every_k, inner.transformation, **options)
    return of(tx, APPLY_GRADIENTS, every_k, optaccum.apply_gradients)


def release(inner: Inner, every_k: int) -> Contender:
    """The same with a Python bool `release=`: two programs, and a conditional in neither."""
    tx = optaccum.accumulate(every_k, inner.transformation)
    holds, releases = (
        _step(tx, functools.partial(optaccum.apply_gradients, release=x)) for x in (False, True)
    )
    return Contender(RELEASE, _init(tx), (holds,) * (every_k - 1) + (releases,))


def train_state(inner: Inner, every_k: int) -> Contender:
    tx = optaccum.accumulate(every_k, inner.transformation)

    def make(params):
        return optaccum.flax.TrainState.create(apply_fn=lambda: None, params=params, tx=tx)

    def init(params):
        state = make(params)
        return {"params": params, "state": (jnp.asarray(state.step), state.opt_state)}

    def apply(tx, grads, state, params):
        new = make(params).replace(step=state[0], opt_state=state[1]).apply_gradients(grads=grads)
        return new.params, (new.step, new.opt_state)

    return of(tx, TRAIN_STATE, every_k, apply, init=init)


def nnx_optimizer(name: str, kind: Any, inner: Inner, every_k: int) -> Contender:
    """An `Optimizer` for Flax's nnx: ours, or Flax's own with `accumulate` in it."""
    tx = optaccum.accumulate(every_k, inner.transformation)

    def model(tree):
        return nnx.State({"model": jax.tree.map(nnx.Param, tree)})

    def init(params):
        return {"params": params, "state": nnx.split(kind(model(params), tx, wrt=nnx.Param))}

    def apply(tx, grads, state, params):
        optimizer, trained = nnx.merge(*state), model(params)
        optimizer.update(trained, model(grads))  # in place
        tree = jax.tree.structure(params)
        return jax.tree.unflatten(tree, jax.tree.leaves(trained)), nnx.split(optimizer)

    return of(tx, name, every_k, apply, init=init)


def aggregating(inner: Inner, every_k: int) -> Contender:
    from optax.experimental import aggregating

    mean = aggregating.average_incrementally_updates(per_elt_axis=None, accumulation_steps=every_k)
    tx = aggregating.process(optax.identity(), mean, inner.transformation)
    return of(tx, AGGREGATING, every_k)


def apply_every(inner: Inner, every_k: int) -> Contender:
    """It sums k steps of the inner optimizer, each on the gradient of a microbatch."""
    tx = optax.chain(inner.transformation, optax.apply_every(every_k))
    return of(tx, APPLY_EVERY, every_k, equivalent=False)


def hand_written(inner: Inner, every_k: int, zeroing: bool = True) -> Contender:
    """A loop of two programs, `add` and `add and update`; the second zeroes the sums.

    Or of three: the first microbatch overwrites the sums, and the last only reads them.
    """
    tx = inner.transformation

    def init(params):
        return _init(tx)(params) | {"sums": optax.tree.zeros_like(params)}

    def overwrite(part, grads, weight):
        return {"sums": jax.tree.map(jnp.copy, grads)}

    def add(part, grads, weight):
        return {"sums": optax.tree.add(part["sums"], grads)}

    def add_and_update(part, grads, weight):
        mean = optax.tree.scale(1 / every_k, add(part, grads, weight)["sums"])
        params, opt_state = update(tx, mean, part["state"], part["params"])
        sums = optax.tree.zeros_like(part["sums"]) if zeroing else part["sums"]
        return {"params": params, "state": opt_state, "sums": sums}

    hold = Step(add, ("sums",))
    first = hold if zeroing else Step(overwrite, ("sums",))
    last = Step(add_and_update, ("params", "state", "sums"))
    steps = (first,) + (hold,) * (every_k - 2) + (last,)
    return Contender(HAND_WRITTEN if zeroing else NOT_ZEROING, init, steps)


def keras(inner: Inner, every_k: int) -> Contender:
    """Keras 3's `gradient_accumulation_steps`, by `stateless_apply` on its JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError(f"Keras runs on {keras.backend.backend()}, not on jax")
    try:
        optimizer = inner.keras(keras.optimizers, gradient_accumulation_steps=every_k)
    except (AttributeError, ValueError) as error:  # raised for Muon by older versions
        raise ImportError(f"Keras {keras.__version__}: {error}") from error

    def init(params):
        if not optimizer.built:
            # Keras keeps concrete variables, even while a caller traces this for its shapes.
            with jax.ensure_compile_time_eval():
                leaves = jax.tree.leaves(params)
                optimizer.build([keras.Variable("zeros", p.shape, p.dtype) for p in leaves])
        return {"params": params, "state": [jnp.copy(v.value) for v in optimizer.variables]}

    def apply(tx, grads, opt_state, params):
        leaves, treedef = jax.tree.flatten(params)
        leaves, opt_state = tx.stateless_apply(opt_state, jax.tree.leaves(grads), leaves)
        return jax.tree.unflatten(treedef, leaves), opt_state

    return of(optimizer, KERAS, every_k, apply, init=init, reference=inner.reference)


def in_step(inner: Inner, every_k: int, **options: Any) -> Contender:
    def differentiate(loss_fn, weight_fn, params, batch):
        given = {"num_microbatches": every_k, "weight_fn": weight_fn, **options}
        return optaccum.value_and_grad(loss_fn, **given)(params, batch)

    return of(inner.transformation, VALUE_AND_GRAD, 1, differentiate=differentiate)


def microbatch(inner: Inner, every_k: int) -> Contender:
    """`optax.microbatch` with the accumulator that means what the full batch means."""

    def differentiate(loss_fn, weight_fn, params, batch):
        rows = len(jax.tree.leaves(batch)[0]) // every_k
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatch(jax.value_and_grad(loss_fn), 1, rows, mean)(params, batch)

    return of(inner.transformation, MICROBATCH, 1, differentiate=differentiate)


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

    return of(inner.transformation, SCAN, 1, differentiate=differentiate)


ADAPTERS: dict[str, Callable[[Inner, int], Contender]] = {
    # One step of the inner optimizer on the whole batch, and one on every microbatch.
    FULL_BATCH: lambda inner, k: of(inner.transformation, FULL_BATCH, 1),
    ALONE: lambda inner, k: of(inner.transformation, ALONE, k, equivalent=False),
    APPLY_GRADIENTS: apply_gradients,
    RELEASE: release,
    UPDATE: lambda inner, k: of(optaccum.accumulate(k, inner.transformation), UPDATE, k),
    TRAIN_STATE: train_state,
    NNX_OPTIMIZER: functools.partial(nnx_optimizer, NNX_OPTIMIZER, optaccum.flax.Optimizer),
    FLAX_OPTIMIZER: functools.partial(nnx_optimizer, FLAX_OPTIMIZER, nnx.Optimizer),
    MULTI_STEPS: lambda inner, k: of(optax.MultiSteps(inner.transformation, k), MULTI_STEPS, k),
    AGGREGATING: aggregating,
    APPLY_EVERY: apply_every,
    HAND_WRITTEN: hand_written,
    NOT_ZEROING: functools.partial(hand_written, zeroing=False),
    KERAS: keras,
    VALUE_AND_GRAD: in_step,
    MICROBATCH: microbatch,
    SCAN: scan,
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
