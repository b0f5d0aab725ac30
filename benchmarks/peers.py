"""The contenders of the benchmarks, one adapter for each way of accumulating gradients.

An adapter is a function `(inner, every_k) -> Peer`; what `PEERS` lists is measured.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaccum

Carry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function that takes in one microbatch.

    Attributes:
        function: `(part, grads) -> part`, where `part` holds the entries `names` of the carry. It
            is donated and comes back in the order it went in, so that XLA can update each buffer
            in place; the gradients are not donated.
        names: the entries of the carry that the program needs; it leaves the others alone.
    """

    function: Any
    names: tuple[str, ...]

    def __call__(self, carry: Carry, grads: Any) -> Carry:
        """Returns the carry after the microbatch."""
        return carry | self.function({name: carry[name] for name in self.names}, grads)

    def compile(self, carry: Carry, grads: Any) -> Any:
        """Returns the program compiled ahead of time; shapes and dtypes are all it reads."""
        return self.function.lower({name: carry[name] for name in self.names}, grads).compile()


def make_program(function: Callable[[Carry, Any], Carry], names: tuple[str, ...]) -> Program:
    """Returns a program that donates its part of the carry."""
    # An unused argument is kept, or what overwrites a buffer could not be given that buffer.
    return Program(jax.jit(function, donate_argnums=0, keep_unused=True), names)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way of accumulating gradients.

    Attributes:
        name: what the tables call it.
        init: `params -> carry`: a dict with the entry `params` and whatever else a step needs.
        programs: the programs of one window, a program for each of its microbatches.
        equivalent: whether it means to do what one step on the full batch does.
        reference: the inner optimizer that it steps, where that is not the one it was given.
    """

    name: str
    init: Callable[[Any], Carry]
    programs: tuple[Program, ...]
    equivalent: bool = True
    reference: optax.GradientTransformation | None = None

    def run_window(self, carry: Carry, microbatches: list[Any]) -> Carry:
        """Returns the carry after one window; its gradients repeat where there are too few."""
        return self.release(self.hold(carry, microbatches), microbatches)

    def hold(self, carry: Carry, microbatches: list[Any]) -> Carry:
        """Returns the carry after all of a window but its last microbatch."""
        for i, program in enumerate(self.programs[:-1]):
            carry = program(carry, microbatches[i % len(microbatches)])
        return carry

    def release(self, carry: Carry, microbatches: list[Any]) -> Carry:
        """Returns the carry after the last microbatch of a window."""
        last = len(self.programs) - 1
        return self.programs[last](carry, microbatches[last % len(microbatches)])


def optaccum_apply_gradients(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """`optaccum.apply_gradients`: the parameters are updated where the inner optimizer steps."""
    tx = optaccum.accumulate(every_k, inner)
    return _one_program("optaccum.apply_gradients", tx, every_k, optaccum.apply_gradients)


def optaccum_release(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """The same with a Python bool `release=`: two programs, and a conditional in neither."""
    tx = optaccum.accumulate(every_k, inner)

    def program(release):
        return _step(tx, functools.partial(optaccum.apply_gradients, release=release))

    programs = (program(False),) * (every_k - 1) + (program(True),)
    return Peer("optaccum, two programs", _init_with_state(tx), programs)


def optaccum_update(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """`optaccum.accumulate` as a drop-in: `update`, then `optax.apply_updates`."""
    return _one_program("optaccum, drop-in update", optaccum.accumulate(every_k, inner), every_k)


def optax_multi_steps(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """`optax.MultiSteps`."""
    return _one_program("optax.MultiSteps", optax.MultiSteps(inner, every_k), every_k)


def optax_aggregating(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """`optax.experimental.aggregating.process`."""
    from optax.experimental import aggregating  # since optax 0.2.7

    tx = aggregating.process(
        preprocessor=optax.identity(),
        aggregator=aggregating.average_incrementally_updates(
            per_elt_axis=None, accumulation_steps=every_k
        ),
        postprocessor=inner,
    )
    return _one_program("aggregating.process", tx, every_k)


def optax_apply_every(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """`optax.apply_every` behind the inner optimizer, which steps k times a window.

    Not equivalent: it sums k steps of the inner optimizer, each on the gradient of a microbatch.
    """
    tx = optax.chain(inner, optax.apply_every(every_k))
    peer = _one_program("optax.apply_every", tx, every_k)
    return dataclasses.replace(peer, equivalent=False)


def hand_written(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """A loop of two programs, `add` and `add and update`; the second zeroes the sums."""

    def add_and_update(part, grads):
        stepped = _add_and_update(inner, every_k, part, grads)
        return stepped | {"sums": optax.tree.zeros_like(part["sums"])}

    hold = make_program(_add, ("sums",))
    release = make_program(add_and_update, ("params", "opt_state", "sums"))
    return Peer("hand-written loop", _init_with_sums(inner), (hold,) * (every_k - 1) + (release,))


def hand_written_overwriting(inner: optax.GradientTransformation, every_k: int) -> Peer:
    """The same loop with a third program: the first microbatch overwrites, the last only reads."""

    def overwrite(part, grads):
        del part
        return {"sums": jax.tree.map(jnp.copy, grads)}

    def add_and_update(part, grads):
        return _add_and_update(inner, every_k, part, grads) | {"sums": part["sums"]}

    first, hold = make_program(overwrite, ("sums",)), make_program(_add, ("sums",))
    release = make_program(add_and_update, ("params", "opt_state", "sums"))
    programs = (first,) + (hold,) * (every_k - 2) + (release,)
    return Peer("hand-written, no zeroing", _init_with_sums(inner), programs)


def full_batch(
    inner: optax.GradientTransformation, every_k: int, params: Any, microbatches: list[Any]
) -> Any:
    """Returns the parameters after two steps of `inner` on the mean gradient of a window."""
    window = list(itertools.islice(itertools.cycle(microbatches), every_k))
    mean = jax.tree.map(lambda *g: sum(np.asarray(x, np.float64) for x in g) / every_k, *window)
    mean = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), mean)
    state = inner.init(params)
    step = jax.jit(functools.partial(_update_and_apply, inner))
    for _ in range(2):
        params, state = step(mean, state, params)
    return params


def agrees(peer: Peer, params: Any, microbatches: list[Any], expected: Any) -> bool:
    """Returns whether two windows of `peer` take `params` to what `full_batch` expects."""
    carry = peer.init(jax.tree.map(jnp.copy, params))
    for _ in range(2):
        carry = peer.run_window(carry, microbatches)

    def largest_difference(a, b):
        return np.max(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), a, b)))

    # Rounding a parameter near 4 is worth 1e-4 of a step of 1e-2.
    error = largest_difference(carry["params"], expected)
    return bool(error <= 1e-3 * largest_difference(expected, params))


PEERS = (
    optaccum_apply_gradients,
    optaccum_release,
    optaccum_update,
    optax_multi_steps,
    optax_aggregating,
    optax_apply_every,
    hand_written,
    hand_written_overwriting,
)


def _update_and_apply(tx: Any, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _step(tx: Any, apply: Callable[..., tuple[Any, Any]] = _update_and_apply) -> Program:
    def step(part, grads):
        params, opt_state = apply(tx, grads, part["opt_state"], part["params"])
        return {"params": params, "opt_state": opt_state}

    return make_program(step, ("params", "opt_state"))


def _init_with_state(tx: Any) -> Callable[[Any], Carry]:
    return lambda params: {"params": params, "opt_state": tx.init(params)}


def _one_program(name: str, tx: Any, every_k: int, apply: Any = _update_and_apply) -> Peer:
    return Peer(name, _init_with_state(tx), (_step(tx, apply),) * every_k)


def _add(part: Carry, grads: Any) -> Carry:
    return {"sums": optax.tree.add(part["sums"], grads)}


def _init_with_sums(inner: optax.GradientTransformation) -> Callable[[Any], Carry]:
    def init(params):
        sums = optax.tree.zeros_like(params)
        return {"params": params, "opt_state": inner.init(params), "sums": sums}

    return init


def _add_and_update(
    inner: optax.GradientTransformation, every_k: int, part: Carry, grads: Any
) -> Carry:
    mean = optax.tree.scale(1 / every_k, optax.tree.add(part["sums"], grads))
    params, opt_state = _update_and_apply(inner, mean, part["opt_state"], part["params"])
    return {"params": params, "opt_state": opt_state}
