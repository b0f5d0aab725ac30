"""Adds gradients to sums inside the backward pass, where they are made.

Layers in a `lax.scan` have a stack of gradients: each trip of the backward scan makes one slice.
Added to the sums behind the scan, the stack is a temporary as large as the parameters. Here a trip
adds its slice, `sums[i] = add(sums[i], gradient of layer i)`. The arithmetic on each number stays
the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

from optaccum import _scatters, _window
from optaccum._cotangents import flat_jaxpr
from optaccum._fold import Target, evaluate, opened, plus
from optaccum._trees import is_none, take_apart, tracing
from optaccum._window import Microbatch


def add_gradients(
    fun: Callable[[], tuple[Any, Any]], sums: Any, microbatch: Microbatch, seen: jax.Array
) -> tuple[Any, Any]:
    """Returns `value` and `sums` with `grads`, for `fun() -> (value, grads)`, traced once.

    `seen`, f32[] >= 0, changes from trip to trip, as `_scatters.apart` needs it.
    """
    if not tracing():  # under `jax.disable_jit`, `fun` may read arrays
        value, grads = fun()
        return value, _window.add(sums, grads, microbatch)
    return Gradient.traced(fun).add_to(sums, microbatch, seen)


class Gradient(NamedTuple):
    """The program of a gradient, `() -> (value, grads)`."""

    closed: core.ClosedJaxpr  # returns the arrays of the value, then the gradients
    holds: list[bool]  # which of these hold a scatter
    as_value: Callable[[list], Any]  # puts the arrays of the value among its other leaves
    of_grads: Any  # tree structure of the gradients

    @classmethod
    def traced(cls, fun: Callable[[], tuple[Any, Any]]) -> "Gradient":
        """Traces `fun`, which may close over tracers."""
        found = []

        def flat():
            value, grads = fun()
            arrays, as_value = take_apart(value)
            found.append(as_value)
            return arrays, grads

        closed, structure = flat_jaxpr(flat)
        closed, holds = _scatters.with_fences(closed)
        return cls(closed, holds, found[0], structure.children()[1])

    def shapes(self) -> tuple[Any, Any]:
        """Returns shapes and dtypes of the loss, the first array of the value, and of gradients."""
        shapes = jax.eval_shape(core.jaxpr_as_fun(self.closed))
        return shapes[0], self.of_grads.unflatten(shapes[len(shapes) - self.of_grads.num_leaves :])

    def add_to(self, sums: Any, microbatch: Microbatch, seen: jax.Array) -> tuple[Any, Any]:
        """Returns the value, and `sums` with the gradients; a None adds nothing."""
        microbatch, first = microbatch.decided(), len(self.holds) - self.of_grads.num_leaves
        # Every class can be rebuilt from instances of `object`, as JAX does; a None stays.
        places = {object(): j for j in range(first, len(self.holds))}
        grads = self.of_grads.unflatten(places)
        leaves, structure = jax.tree.flatten(grads, is_leaf=is_none)
        pairs = [*zip(map(places.get, leaves), structure.flatten_up_to(sums), strict=True)]
        targets = {j: Target(s, seen, self.holds[j]) for j, s in pairs if j is not None}
        jaxpr, consts = opened(self.closed)
        try:  # traced before it is run, so that nothing is left of it if it fails
            folded = jax.make_jaxpr(lambda: evaluate(jaxpr, consts, [], targets, microbatch))()
            results = core.jaxpr_as_fun(folded)()
        except Exception:  # a loop that cannot be rebuilt, such as one over a sharded stack
            results = core.jaxpr_as_fun(self.closed)()
            for j, target in targets.items():
                results[j] = plus(target, results[j], microbatch)
        new = [results[j] if j is not None else _window.add(s, None, microbatch) for j, s in pairs]
        value = [jnp.asarray(x) for x in results[:first]]  # JAX 0.7.2 has literals among them
        return self.as_value(value), structure.unflatten(new)
