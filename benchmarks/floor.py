"""What an accumulated window must cost at least: its bytes, at the bandwidth measured beside it.

A hold reads g and the sum and writes the sum: 3 streams as large as the parameters. A release
reads g, the sum, p and the inner state, and writes p, the inner state and the sum: 5 streams and
2 for each parameter-sized array of the state, 9 for Adam. That is the floor of a window whose
sums stay readable after the release; a loop that throws them away saves one stream in it.

The bandwidth is that of the triad `sum + g -> sum`, in place, over the parameters' tree, with
the gradients of a window in turn: the caches are as warm as a hold finds them. It writes only
what it has read. A copy writes what it has not read, which a CPU fetches first (write-allocate):
the traffic is a third more than the two streams that count, so bytes/s from a copy understate
the bandwidth there. It is timed all the same, for comparison. Of parameters so few that they take
longer to dispatch than to move (a megabyte), this measures the dispatch, and is no floor.

A training step takes in and gives back every array of the parameters and of the optimizer's
state, though a hold touches only the sums. What that alone takes is timed too, as the dispatch:
calls that give back what `optaccum.apply_gradients` carries and compute one scalar. It is not part
of the floor. A device that runs behind its host hides it; a CPU is its own host.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.programs import nbytes

TRIAD, COPY, DISPATCH = "triad", "copy", "dispatch"
STREAMS = {TRIAD: 3, COPY: 2}
_FUNCTIONS = {TRIAD: jnp.add, COPY: lambda _, g: jnp.copy(g)}


def kernels(microbatches: list[Any]) -> dict[str, Any]:
    """Returns the kernels; a call runs one over each microbatch, in place on sums of its own."""
    return {name: _kernel(f, microbatches) for name, f in _FUNCTIONS.items()}


def dispatch(carry: Any, calls: int) -> Any:
    """Returns a function that passes all of `carry` through that many calls of a program."""
    pass_through = jax.jit(lambda carry, n: (carry, n + 1), donate_argnums=0, keep_unused=True)
    count = jnp.zeros([], jnp.int32)

    def run():
        nonlocal carry, count
        for _ in range(calls):
            carry, count = pass_through(carry, count)
        return carry, count

    return run


def _kernel(function: Any, microbatches: list[Any]) -> Any:
    # The copy does not use its donated argument; kept, it still is where the copy goes.
    one_pass = jax.jit(
        lambda sums, grads: jax.tree.map(function, sums, grads), donate_argnums=0, keep_unused=True
    )
    sums = optax.tree.zeros_like(microbatches[0])

    def run():
        nonlocal sums
        for grads in microbatches:
            sums = one_pass(sums, grads)
        return sums

    return run


def streams(inner: optax.GradientTransformation, params: Any) -> dict[str, float]:
    """Returns the bytes that a hold and a release move, in sizes of the parameters."""
    state = jax.eval_shape(inner.init, params)
    return {"hold": 3, "release": 5 + 2 * nbytes(state) / nbytes(params)}


def floors(
    seconds: dict[str, list[float]], passes: int, moved: dict[str, float], every_k: int
) -> dict[str, Any]:
    """Returns the least seconds of a hold, a release and a window, round by round.

    Args:
        seconds: what the kernels took, round by round.
        passes: passes over the parameters that one call of a kernel made.
        moved: what :func:`streams` returned.
        every_k: microbatches a window.
    """
    per_stream = np.array(seconds[TRIAD]) / (passes * STREAMS[TRIAD])
    least = {name: number * per_stream for name, number in moved.items()}
    return least | {"window": (every_k - 1) * least["hold"] + least["release"]}


def figures(
    seconds: dict[str, list[float]],
    passes: int,
    moved: dict[str, float],
    least: dict[str, Any],
    parameter_bytes: int,
) -> dict[str, Any]:
    """Returns bandwidths in bytes per second, streams, floors and dispatch in milliseconds."""

    def bandwidth(name):
        total = passes * STREAMS[name] * parameter_bytes
        return harness.quartiles(total / np.array(seconds[name]))

    return {
        "bandwidth": {name: bandwidth(name) for name in STREAMS},
        "streams": moved,
        "dispatch_ms": harness.quartiles(np.array(seconds[DISPATCH]) * 1e3 / passes),
        **{f"{part}_ms": harness.quartiles(values * 1e3) for part, values in least.items()},
    }
