"""The least that an accumulated window can cost: its bytes, at the bandwidth measured beside it.

A hold reads g and the sum and writes the sum: 3 streams as large as the parameters. A release
reads g, the sum, p and the inner state, and writes p, the inner state and the sum: 5 streams and
2 for each parameter-sized array of the state, 9 for Adam. That is the floor of a window whose
sums stay readable after the release; a loop that throws them away saves one stream in it.

The bandwidth is that of the triad `sum + g -> sum`, in place, over the parameters' tree, with
the gradients of a window in turn: the caches are as warm as a hold finds them. It writes only
arrays that it has read. A copy is timed for comparison: a CPU fetches its target first, a third
more than the two streams that count. Of parameters so few that they take longer to dispatch than
to move (a megabyte), this measures the dispatch, and is no floor. The dispatch is timed too: calls
that give back all that `optaccum.apply_gradients` carries, and compute one scalar. A device that
runs behind its host hides it, so it is not part of the floor; a CPU is its own host.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import quartiles
from benchmarks.programs import nbytes

STREAMS = {"triad": 3, "copy": 2}


def kernels(microbatches: list[Any], carry: Any) -> dict[str, Callable[[], Any]]:
    """Returns the kernels by name; a call runs one for each microbatch, in place."""

    def repeated(kernel, state):
        # Kept though it is not used, a donated argument still is where a copy goes.
        step = jax.jit(kernel, donate_argnums=0, keep_unused=True)

        def run():
            nonlocal state
            for grads in microbatches:
                state = step(state, grads)
            return state

        return run

    sums, others = (optax.tree.zeros_like(microbatches[0]) for _ in range(2))
    dispatch = repeated(lambda state, _: (state[0], state[1] + 1), (carry, jnp.zeros([])))
    copy = repeated(lambda _, grads: jax.tree.map(jnp.copy, grads), others)
    return {"triad": repeated(optax.tree.add, sums), "copy": copy, "dispatch": dispatch}


def streams(inner: optax.GradientTransformation, params: Any) -> dict[str, float]:
    """Returns the bytes that a hold and a release move, in sizes of the parameters."""
    state = jax.eval_shape(inner.init, params)
    return {"hold": 3, "release": 5 + 2 * nbytes(state) / nbytes(params)}


def floors(seconds: Any, passes: int, moved: dict[str, float], every_k: int) -> dict[str, Any]:
    """Returns the least seconds of a hold, a release and a window, round by round.

    A call of a kernel, whose seconds are given by name and round, makes `passes` over the
    parameters; `moved` is that of `streams`.
    """
    per_stream = np.array(seconds["triad"]) / (passes * STREAMS["triad"])
    least = {name: number * per_stream for name, number in moved.items()}
    return least | {"window": (every_k - 1) * least["hold"] + least["release"]}


def figures(seconds: Any, passes: int, size: int) -> dict[str, Any]:
    """Returns bandwidths in bytes per second, and the dispatch in milliseconds."""
    rates = {name: passes * number * size / seconds[name] for name, number in STREAMS.items()}
    return {
        "bandwidth": {name: quartiles(rate) for name, rate in rates.items()},
        "dispatch_ms": quartiles(seconds["dispatch"] * 1e3 / passes),
    }
