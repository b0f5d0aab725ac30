"""Measure what accumulating gradients costs on the optimizer's side, contender by contender.

There is no model: the gradients lie ready, and a window is its k steps of accumulation and the
one step of the inner optimizer. Every contender is first checked against one optimizer step a
window on the mean gradient. Then all take turns, two windows each a round: one at full speed,
one that waits before its release and after it, for holds and releases apart. Kernels that measure
the bandwidth take turns with them, and wait as seldom. Absolute times are noise: the medians of
the ratios, taken round by round, are what counts.

The JSON, where Q stands for {"q1", "median", "q3"} and every time of W for {"window": Q,
"hold": Q, "release": Q}:

    benchmark, date, device, versions     where the figures came from
    every_k, leaves, rounds               of all runs
    runs[]                                one for each inner optimizer
      inner, parameter_bytes              its name, the size of the parameters
      floor                               see floor.py
        bandwidth_bound                   whether the inner optimizer is
        bandwidth {triad: Q, copy: Q}     bytes per second
        streams {hold, release}           bytes to move, in sizes of the parameters
        dispatch_ms                       Q: a call that only passes its arrays through
        window_ms, hold_ms, release_ms    Q: the least time
      contenders[]
        name, equivalent, agrees          whether it means to and does match the full batch
        window_ms, hold_ms, release_ms    Q
        ratio_to_floor, ratio_to_multi_steps, ratio_to_hand_written,
        ratio_to_hand_written_no_zeroing  W
        temporaries                       of the hungriest program, in sizes of the parameters
        compile_s                         trace and compile all programs of a window
      left_out[] {name, why}              contenders that are not installed
    compilation_of_apply_gradients[] {every_k, compile_s, temporaries}    of the first inner
"""

import argparse
import contextlib
import functools
import importlib.metadata
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floor, harness, keras_peer, overhead_tables, peers
from benchmarks.inners import INNERS

MAX_DISTINCT_MICROBATCHES = 8
# The states of all contenders lie side by side, about 40 times the parameters with AdamW. Muon
# multiplies matrices on every microbatch where the inner optimizer is masked, not skipped.
MEGABYTES = {
    "cpu": {"sgd": 25.0, "adamw": 25.0, "muon": 1.6},
    "gpu": {"sgd": 1000.0, "adamw": 1000.0, "muon": 100.0},
}
UNITS = {
    "ratio_to_multi_steps": "optax.MultiSteps",
    "ratio_to_hand_written": "hand-written loop",
    "ratio_to_hand_written_no_zeroing": "hand-written, no zeroing",
}


def make_tree(seed: int, leaves: int, megabytes: float) -> dict[str, jax.Array]:
    """Returns float32 square matrices of normal deviates, their sides multiples of 8."""
    side = max(8, 8 * round((megabytes * 1e6 / 4 / leaves) ** 0.5 / 8))
    keys = jax.random.split(jax.random.key(seed), leaves)
    return {f"layer_{i:03d}": jax.random.normal(key, (side, side)) for i, key in enumerate(keys)}


def find_contenders(inner: str, every_k: int) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns functions that make the contenders, by name, and those that are not installed."""
    factories = [functools.partial(f, INNERS[inner].transformation, every_k) for f in peers.PEERS]
    factories += [functools.partial(keras_peer.keras_optimizer, INNERS[inner], every_k)]
    found, left_out = {}, []
    for factory in factories:
        try:
            found[factory().name] = factory
        except ImportError as error:
            left_out.append({"name": factory.func.__name__, "why": str(error)})
    return found, left_out


def measure_compilation(factory: Any, params: Any, repeats: int) -> dict[str, Any]:
    """Returns the time to trace and compile a window's programs, and their temporaries."""
    seconds, programs = [], []
    for _ in range(repeats):
        jax.clear_caches()
        peer = factory()
        carry = jax.eval_shape(peer.init, params)
        start = time.perf_counter()
        programs = [program.compile(carry, params) for program in dict.fromkeys(peer.programs)]
        seconds.append(time.perf_counter() - start)
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in programs]
    return {
        "compile_s": float(np.median(seconds)),
        "temporaries": max(temporaries) / floor.num_bytes(params),
    }


def time_windows(
    contenders: list[peers.Peer], params: Any, microbatches: list[Any], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Returns the seconds of each contender's windows, holds and releases, and of the kernels.

    All of them round by round; for the holds of a round, their mean.
    """
    carries = {peer.name: peer.init(jax.tree.map(jnp.copy, params)) for peer in contenders}
    parts = {peer.name: [] for peer in contenders}

    def window(peer):
        carries[peer.name] = peer.run_window(carries[peer.name], microbatches)
        return carries[peer.name]

    def window_in_two(peer):
        start = time.perf_counter()
        held = jax.block_until_ready(peer.hold(carries[peer.name], microbatches))
        middle = time.perf_counter()
        carries[peer.name] = jax.block_until_ready(peer.release(held, microbatches))
        holds, release = middle - start, time.perf_counter() - middle
        parts[peer.name].append((holds / (len(peer.programs) - 1), release))

    turns = floor.kernels(microbatches)
    carried = contenders[0].init(jax.tree.map(jnp.copy, params))
    turns[floor.DISPATCH] = floor.dispatch(carried, len(microbatches))
    for peer in contenders:
        turns[peer.name] = functools.partial(window, peer)
        turns[f"{peer.name}, in two"] = functools.partial(window_in_two, peer)
    jax.block_until_ready((carries, microbatches))
    seconds = harness.take_turns(turns, rounds, "Timing windows")
    return {
        name: {
            "window": seconds[name],
            "hold": [hold for hold, _ in by_round[-rounds:]],
            "release": [release for _, release in by_round[-rounds:]],
        }
        for name, by_round in parts.items()
    }, seconds


def measure(args: argparse.Namespace, inner: str) -> dict[str, Any]:
    """Returns every figure of the run with one inner optimizer, ready for JSON."""
    tx, megabytes = INNERS[inner].transformation, choose_megabytes(args, inner)
    params, *microbatches = (
        make_tree(seed, args.leaves, megabytes)
        for seed in range(1 + min(args.every_k, MAX_DISTINCT_MICROBATCHES))
    )
    factories, left_out = find_contenders(inner, args.every_k)
    contenders = [factory() for factory in factories.values()]
    agreement = []
    for peer in harness.progress(contenders, f"{inner}: checking against the full batch"):
        expected = peers.full_batch(peer.reference or tx, args.every_k, params, microbatches)
        agreement.append(peers.agrees(peer, params, microbatches, expected))
    seconds, kernel_seconds = time_windows(contenders, params, microbatches, args.rounds)

    moved = floor.streams(tx, params)
    least = floor.floors(kernel_seconds, len(microbatches), moved, args.every_k)
    units = {name: seconds[unit] for name, unit in UNITS.items()}

    def timing(name):
        times = seconds[name]
        milliseconds = {f"{x}_ms": harness.quartiles(np.multiply(times[x], 1e3)) for x in times}
        ratios = {
            name: {x: harness.quartiles(np.divide(times[x], unit[x])) for x in times}
            for name, unit in {"ratio_to_floor": least, **units}.items()
        }
        return milliseconds | ratios

    repeats = 1 if args.quick else 3
    measure_compilation(factories[contenders[0].name], params, 1)  # wakes the compiler
    compilations = [
        measure_compilation(factory, params, repeats)
        for factory in harness.progress(factories.values(), f"{inner}: compiling")
    ]
    figures = floor.figures(
        kernel_seconds, len(microbatches), moved, least, floor.num_bytes(params)
    )
    rows = zip(contenders, agreement, compilations, strict=True)
    return {
        "inner": inner,
        "parameter_bytes": floor.num_bytes(params),
        "floor": {"bandwidth_bound": INNERS[inner].bandwidth_bound, **figures},
        "contenders": [
            {"name": peer.name, "equivalent": peer.equivalent, "agrees": agrees}
            | compilation
            | timing(peer.name)
            for peer, agrees, compilation in rows
        ],
        "left_out": left_out,
    }


def measure_by_every_k(args: argparse.Namespace, inner: str) -> list[dict[str, Any]]:
    """Returns what compiling `apply_gradients` takes, by the length of the window."""
    params = make_tree(0, args.leaves, choose_megabytes(args, inner))
    factory = functools.partial(peers.optaccum_apply_gradients, INNERS[inner].transformation)
    return [
        {"every_k": k}
        | measure_compilation(functools.partial(factory, k), params, 1 if args.quick else 3)
        for k in harness.progress((2, 8, 64, 1024), "Compiling at k = 2 to 1024")
    ]


def choose_megabytes(args: argparse.Namespace, inner: str) -> float:
    """Returns the size of the parameters: what was asked for, or what suits the machine."""
    sizes = MEGABYTES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    return args.megabytes or (0.1 if args.quick else sizes[inner])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, what it leaves open filled in but for the size."""
    parser = harness.make_parser("overhead", (__doc__ or "").partition("\n\nThe JSON")[0])
    add, at_least = parser.add_argument, harness.at_least
    add("--inner", choices=(*INNERS, "all"), default="adamw", help="inner optimizer (adamw)")
    add("--every-k", type=at_least(2), default=8, help="microbatches a window (8)")
    add(
        "--megabytes",
        type=at_least(0.001),
        help="float32 parameters (25 on a CPU, 1000 on a GPU; less for muon; quick: 0.1)",
    )
    add("--leaves", type=at_least(1), help="leaves of the parameters (24; quick: 4)")
    args = parser.parse_args(argv)
    harness.check_output(parser, args.output)
    args.leaves = args.leaves or (4 if args.quick else 24)
    args.rounds = args.rounds or (3 if args.quick else 15)
    return args


def main() -> None:
    """Runs the benchmark."""
    args = parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    # In TF32 the products of Muon would differ by more than the check allows.
    jax.config.update("jax_default_matmul_precision", "float32")
    inners = list(INNERS) if args.inner == "all" else [args.inner]
    result = harness.origin("overhead")
    result |= {name: getattr(args, name) for name in ("every_k", "leaves", "rounds")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        result["versions"]["keras"] = importlib.metadata.version("keras")
    result["runs"] = []
    for inner in inners:
        result["runs"].append(measure(args, inner))
        overhead_tables.show(result, result["runs"][-1])
    result["compilation_of_apply_gradients"] = measure_by_every_k(args, inners[0])
    overhead_tables.show_by_every_k(result)
    harness.write(result, args.output)


if __name__ == "__main__":
    main()
