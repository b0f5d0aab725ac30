"""Measure how the cost of accumulating gradients grows, one variable at a time.

`parameters`: the time of a hold and of a release against the number of parameters, which is linear
where memory bandwidth is the limit. `leaves`: the time to trace, to compile and to dispatch one
step against the number of leaves, at few parameters. `every_k`: the time of a hold against the
length of the window, which must not matter. `dtype`: time and bytes in float32 and bfloat16.

Every contender is first checked, at every point, against the inner optimizer on the mean gradients
of two windows. Slopes are those of a line through the medians in log-log coordinates: 1 is linear,
0 is flat. On a CPU the smallest trees fit into the caches, which makes the slope over all points
too steep; on a GPU they are bound by the launch of kernels, which makes it too shallow. The slope
over the three largest points is free of both.
"""

import argparse
from collections.abc import Callable, Sequence
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness, peers, scaling_tables

# A small `eps` would hide the scale of the gradients from Adam, and a sum from a mean.
INNER = optax.adamw(0.1, eps=0.1)
# The most that the contenders, their gradients and the check need at one time.
BYTES_PER_PARAMETER = 80
ACCUMULATING = (peers.optaccum_apply_gradients, peers.optax_multi_steps)


def adamw(inner: optax.GradientTransformation, every_k: int) -> peers.Peer:
    """The inner optimizer alone, on every microbatch: what a release costs at least."""

    def init(params):
        return {"params": params, "opt_state": inner.init(params)}

    def step(part, grads):
        updates, opt_state = inner.update(grads, part["opt_state"], part["params"])
        return {"params": optax.apply_updates(part["params"], updates), "opt_state": opt_state}

    program = peers.make_program(step, ("params", "opt_state"))
    return peers.Peer("AdamW alone", init, (program,) * every_k)


def make_tree(seed: int, parameters: int, leaves: int, dtype: Any) -> dict[str, jax.Array]:
    """Returns vectors of normal deviates, equally long."""
    keys = jax.random.split(jax.random.key(seed), leaves)
    length = parameters // leaves
    return {f"leaf_{i:04d}": jax.random.normal(key, (length,), dtype) for i, key in enumerate(keys)}


def full_batch(every_k: int, params: Any, microbatches: Sequence[Any]) -> Any:
    """Returns the parameters after two steps of the inner optimizer on a window's mean gradient.

    Not jitted: with many leaves the check would take longer to compile than what it checks.
    """
    counts = np.bincount(np.arange(every_k) % len(microbatches), minlength=len(microbatches))

    def leaf_mean(*leaves):
        total = jnp.zeros(leaves[0].shape, jnp.float32)
        for n, x in zip(counts.tolist(), leaves, strict=True):
            total += n * x.astype(jnp.float32)
        return (total / every_k).astype(leaves[0].dtype)

    mean, state = jax.tree.map(leaf_mean, *microbatches), INNER.init(params)
    for _ in range(2):
        updates, state = INNER.update(mean, state, params)
        params = optax.apply_updates(params, updates)
    return params


def agrees(params: Any, start: Any, expected: Any) -> bool:
    """Returns whether the way from `start` to `params` is the expected one, by its length.

    A contender that sums in float32 is off by rounding alone. One that sums in bfloat16 is off by
    up to 2^-8 an addition; what it gets wrong beyond a twentieth of the way is no rounding.
    """

    def square_distance(a, b):
        return sum(
            float(jnp.sum((x.astype(jnp.float32) - y.astype(jnp.float32)) ** 2))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )

    tolerance = 0.05 if jax.tree.leaves(params)[0].dtype == jnp.bfloat16 else 1e-3
    way = square_distance(expected, start)
    return square_distance(params, expected) <= tolerance**2 * way


def measure_point(
    factories: Sequence[Any],
    variable: str,
    rounds: int,
    *,
    parameters: int,
    leaves: int = 16,
    every_k: int = 4,
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """Returns a row of figures for each contender at one value of the variable."""
    value = {"parameters": parameters, "leaves": leaves, "every_k": every_k, "dtype": dtype}
    params, *microbatches = (
        make_tree(seed, parameters, leaves, dtype) for seed in range(1 + min(every_k, 2))
    )
    expected = full_batch(every_k, params, microbatches)
    rows, windows, calls = [], {}, {}
    for factory in factories:
        peer = factory(INNER, every_k)
        carry = peer.init(jax.tree.map(jnp.copy, params))
        program = peer.programs[0]
        start = time.perf_counter()
        part = {name: carry[name] for name in program.names}
        lowered = program.function.lower(part, microbatches[0])
        traced = time.perf_counter()
        compiled = lowered.compile()
        seconds = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
        for _ in range(2):
            carry = peer.run_window(carry, microbatches)
        rows.append(
            {
                "name": peer.name,
                variable: value[variable],
                "agrees": agrees(carry["params"], params, expected)
                if factory is not adamw
                else None,
                "parameter_bytes": nbytes(params),
                "state_bytes": nbytes(carry) - nbytes(carry["params"]),
                "temporary_bytes": (temporary := compiled.memory_analysis().temp_size_in_bytes),
                "temporaries": temporary / nbytes(params),
                **seconds,
                "compilation_ms_a_leaf": 1e3 * sum(seconds.values()) / leaves,
            }
        )
        calls[peer.name] = []
        windows[peer.name] = timed_window(peer, carry, microbatches, calls[peer.name])
    del params, expected, carry, part  # the largest trees need the memory
    harness.take_turns(windows, rounds, f"{variable} = {value[variable]}")
    for row in rows:
        ready, dispatch = np.moveaxis(1e3 * np.array(calls[row["name"]][-rounds:]), -1, 0)
        row |= {
            "microbatch_ms": harness.quartiles(ready.mean(axis=1)),
            "hold_ms": harness.quartiles(ready[:, :-1]) if every_k > 1 else None,
            "release_ms": harness.quartiles(ready[:, -1]),
            "dispatch_ms": harness.quartiles(dispatch),
            "dispatch_us_a_leaf": harness.quartiles(1e3 * dispatch / leaves),
        }
    return rows


def timed_window(
    peer: peers.Peer, carry: peers.Carry, microbatches: Sequence[Any], calls: list[Any]
) -> Callable[[], None]:
    """Returns a function that runs a window and notes each call's seconds: ready, returned."""

    def run():
        nonlocal carry
        seconds = []
        for i, program in enumerate(peer.programs):
            start = time.perf_counter()
            carry = program(carry, microbatches[i % len(microbatches)])
            returned = time.perf_counter()
            jax.block_until_ready(carry)
            seconds.append((time.perf_counter() - start, returned - start))
        calls.append(seconds)

    return run


def nbytes(tree: Any) -> int:
    """Returns the bytes of the arrays in a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def plan(args: argparse.Namespace) -> dict[str, tuple[Sequence[Any], Sequence[Any], dict]]:
    """Returns the contenders, the values and the fixed sizes of each sweep on this device."""
    gpu = jax.default_backend() != "cpu"
    sizes = 10 ** np.linspace(6, *((9, 7) if gpu else (8, 5)))
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    sizes = sizes[sizes * BYTES_PER_PARAMETER <= memory]
    leaves, ks = [10, 32, 100, 316, 1000] + [5000] * (gpu or args.full), (1, 4, 16, 64, 256, 1024)
    small, medium = (10**7, 10**8) if gpu else (250_000, 10**7)
    fixed = {}
    if args.quick:
        sizes, leaves, ks, small, medium = np.array([1e4, 1e5]), [2, 4], (1, 2, 4), 10**4, 10**4
        fixed = {"leaves": 2}
    tree = {"parameters": 2000 if args.quick else 100_000}
    with_update = (peers.optaccum_apply_gradients, peers.optaccum_update, peers.optax_multi_steps)
    return {
        "parameters": (
            (*ACCUMULATING, adamw),
            sizes.round().astype(int).tolist(),
            {**fixed, "every_k": 2},
        ),
        "leaves": (with_update, leaves, tree),
        "every_k": (ACCUMULATING, ks, {**fixed, "parameters": small}),
        "dtype": (ACCUMULATING, ("float32", "bfloat16"), {**fixed, "parameters": medium}),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns every figure of the benchmark, ready for JSON."""
    sweeps = {}
    for name, (factories, values, fixed) in plan(args).items():
        if args.sweep in (name, "all"):
            rows = []
            for value in values:
                rows += measure_point(factories, name, args.rounds, **fixed, **{name: value})
            sweeps[name] = {**fixed, "rows": rows, "slopes": scaling_tables.slopes(name, rows)}
    return {**harness.origin("scaling"), "rounds": args.rounds, "sweeps": sweeps}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, the rounds that it leaves open filled in."""
    parser = harness.make_parser("scaling", __doc__)
    parser.add_argument(
        "--sweep", choices=(*scaling_tables.SHOWN, "all"), default="all", help="which (all)"
    )
    parser.add_argument("--full", action="store_true", help="on a CPU too, up to 5,000 leaves")
    args = parser.parse_args(argv)
    harness.check_output(parser, args.output)
    args.rounds = args.rounds or (2 if args.quick else 5)
    return args


def main() -> None:
    """Runs the benchmark."""
    args = parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    scaling_tables.print_tables(result := measure(args))
    harness.write(result, args.output)


if __name__ == "__main__":
    main()
