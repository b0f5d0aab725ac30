"""The ways of accumulating gradients that the benchmarks compare: one adapter for each.

An adapter is a function `(inner, every_k) -> Contender`.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from benchmarks.contender import AXIS, INSIDE, Contender, Inner, Step, of, update
import optaccum

FULL_BATCH, MULTI_STEPS, KERAS = "full batch", "optax.MultiSteps", "Keras, accumulation steps"
APPLY_GRADIENTS, UPDATE = "optaccum.apply_gradients", "optaccum, drop-in update"
RELEASE, HAND_WRITTEN = "optaccum, Python-bool release", "hand-written loop"
VALUE_AND_GRAD, MICROBATCH = "optaccum.value_and_grad", "optax.microbatch"
VALUE_AND_APPLY, SCAN = "optaccum.value_and_apply", "hand-written scan"
REDUCED_ONCE, APPLIED_ONCE = f"{VALUE_AND_GRAD}, reduce_axes", f"{VALUE_AND_APPLY}, reduce_axes"
MAXTEXT, LEVANTER = "MaxText's form", "Levanter's form"


def apply_gradients(inner: Inner, every_k: int) -> Contender:
    return of(optaccum.accumulate(every_k, inner.transformation), every_k, optaccum.apply_gradients)


def release(inner: Inner, every_k: int) -> Contender:
    """The same with a Python bool `release=`: two programs, and a conditional in neither."""
    tx = optaccum.accumulate(every_k, inner.transformation)
    holds = of(tx, every_k - 1, functools.partial(optaccum.apply_gradients, release=False))
    last = of(tx, 1, functools.partial(optaccum.apply_gradients, release=True))
    return dataclasses.replace(holds, steps=holds.steps + last.steps)


def hand_written(inner: Inner, every_k: int) -> Contender:
    """A loop of three programs: the first microbatch overwrites the sums, the last reads them."""
    tx = inner.transformation

    def init(params):
        return {"params": params, "state": tx.init(params), "sums": optax.tree.zeros_like(params)}

    def overwrite(part, grads):
        return {"sums": jax.tree.map(jnp.copy, grads)}

    def add(part, grads):
        return {"sums": optax.tree.add(part["sums"], grads)}

    def add_and_update(part, grads):
        mean = optax.tree.scale(1 / every_k, optax.tree.add(part["sums"], grads))
        params, opt_state = update(tx, mean, part["state"], part["params"])
        return {"params": params, "state": opt_state, "sums": part["sums"]}

    first, hold = Step(overwrite, ("sums",)), Step(add, ("sums",))
    last = Step(add_and_update, ("params", "state", "sums"))
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

    def apply(tx, grads, opt_state, params):
        leaves, treedef = jax.tree.flatten(params)
        leaves, opt_state = tx.stateless_apply(opt_state, jax.tree.leaves(grads), leaves)
        return jax.tree.unflatten(treedef, leaves), opt_state

    return of(optimizer, every_k, apply, init, reference=inner.reference)


def in_step(inner: Inner, every_k: int, **options: Any) -> Contender:
    def differentiate(loss_fn, params, batch):
        given = {"num_microbatches": every_k, **options}
        return optaccum.value_and_grad(loss_fn, **given)(params, batch)

    return of(inner.transformation, 1, differentiate=differentiate)


def microbatch(inner: Inner, every_k: int) -> Contender:
    """`optax.microbatch` with the accumulator that means what the full batch means."""

    def differentiate(loss_fn, params, batch):
        rows = len(jax.tree.leaves(batch)[0]) // every_k
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatch(jax.value_and_grad(loss_fn), 1, rows, mean)(params, batch)

    return of(inner.transformation, 1, differentiate=differentiate)


def scan(
    inner: Inner,
    every_k: int,
    sharded: bool = False,
    gathered: bool = False,
    weight_fn: Callable[..., Any] = lambda params, rows: 1.0,
) -> Contender:
    """The usual scan over microbatches, that sums in the dtype of the parameters.

    Sharded, it divides its sums like the parameters, as trainers for TPUs do. MaxText casts and
    gathers the parameters once. Levanter gathers them in each microbatch, and divides its gradients
    too.
    """

    def differentiate(loss_fn, params, batch):
        def place(tree):
            if not sharded:
                return tree
            return jax.tree.map(lax.with_sharding_constraint, tree, divided(params))

        def gather(p):
            return lax.with_sharding_constraint(p.astype("bfloat16"), P())

        used = jax.tree.map(gather, params) if gathered else params

        def body(sums, rows):
            weight = weight_fn(used, rows)
            loss, grads = optax.tree.scale(weight, jax.value_and_grad(loss_fn)(used, rows))
            grads = grads if gathered else place(grads)
            total, losses, sums = sums
            return (total + weight, losses + loss, place(optax.tree.add(sums, grads))), None

        # Of every k-th row, so that each microbatch has rows of all devices.
        split = jax.tree.map(lambda x: x.reshape(-1, every_k, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = jnp.zeros([]), jnp.zeros([]), place(optax.tree.zeros_like(params))
        (total, *sums), _ = lax.scan(body, zeros, split)
        return optax.tree.scale(1 / total, sums)

    made = of(inner.transformation, 1, differentiate=differentiate)
    return fully_sharded(made, inner) if sharded else made


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


def value_and_apply(inner: Inner, every_k: int, **options: Any) -> Contender:
    """The step gets the loss in place of its gradients."""
    tx = optaccum.accumulate(every_k, inner.transformation, **options)

    def apply(tx, given, state, params):
        loss_fn, batch = given
        return optaccum.value_and_apply(tx, loss_fn)(params, state, batch)[1:]

    def differentiate(loss_fn, params, batch):
        return jnp.zeros([]), (loss_fn, batch)

    specs = lambda params: {"state": optaccum.state_shardings(tx, params, P())}  # noqa: E731
    return of(tx, every_k, apply, differentiate=differentiate, specs=specs)


ADAPTERS: dict[str, Callable[[Inner, int], Contender]] = {
    FULL_BATCH: lambda inner, k: of(inner.transformation, 1),
    APPLY_GRADIENTS: apply_gradients,
    RELEASE: release,
    UPDATE: lambda inner, k: of(optaccum.accumulate(k, inner.transformation), k),
    MULTI_STEPS: lambda inner, k: of(optax.MultiSteps(inner.transformation, k), k),
    HAND_WRITTEN: hand_written,
    KERAS: keras,
    VALUE_AND_GRAD: in_step,
    MICROBATCH: microbatch,
    SCAN: scan,
    VALUE_AND_APPLY: value_and_apply,
    # These need several devices.
    REDUCED_ONCE: functools.partial(in_step, reduce_axes=AXIS),
    APPLIED_ONCE: functools.partial(value_and_apply, reduce_axes=AXIS),
    MAXTEXT: functools.partial(scan, sharded=True, gathered=True),
    LEVANTER: functools.partial(scan, sharded=True),
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
