"""Measure what accumulating gradients costs on the optimizer's side, contender by contender.

There is no model: the gradients lie ready, and a window is its k steps of accumulation and the
one step of AdamW. Every contender is first checked against one optimizer step a window on the
mean gradient. Then all take turns, one whole window each a round and in a new order every round,
so that whatever else the machine does falls on all alike. Absolute times are noise: the medians
of the ratios taken round by round are what counts.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import platform
import random
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks import peers

WARMUP_ROUNDS, MAX_DISTINCT_MICROBATCHES = 3, 8
CAPTION = (
    "Ratios, medians over the rounds of this run, are what counts; absolute times are noise.\n"
    "Temporaries: of the hungriest program, in sizes of the parameters."
)
progress = functools.partial(track, console=Console(stderr=True))

# Adam is blind to the scale of its gradients but for `eps`: a small one would let a contender
# that releases the sum pass for one that releases the mean.
INNER = optax.adamw(1e-2, eps=0.1)


def make_tree(seed: int, leaves: int, megabytes: float) -> dict[str, jax.Array]:
    """Returns float32 square matrices of normal deviates, their sides multiples of 8."""
    side = max(8, 8 * round((megabytes * 1e6 / 4 / leaves) ** 0.5 / 8))
    keys = jax.random.split(jax.random.key(seed), leaves)
    return {f"layer_{i:03d}": jax.random.normal(key, (side, side)) for i, key in enumerate(keys)}


def measure_compilation(factory: Any, every_k: int, params: Any, repeats: int) -> dict[str, Any]:
    """Returns the time to trace and compile a window's programs, and their temporaries."""
    seconds, programs = [], []
    for _ in range(repeats):
        jax.clear_caches()
        peer = factory(INNER, every_k)
        carry = jax.eval_shape(peer.init, params)
        start = time.perf_counter()
        programs = [program.compile(carry, params) for program in dict.fromkeys(peer.programs)]
        seconds.append(time.perf_counter() - start)
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in programs]
    return {
        "compile_s": float(np.median(seconds)),
        "temporaries": max(temporaries) / (4 * optax.tree.size(params)),
    }


def time_windows(
    contenders: list[peers.Peer], params: Any, microbatches: list[Any], rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds that a window of each contender took, round by round."""
    carries = {peer.name: peer.init(jax.tree.map(jnp.copy, params)) for peer in contenders}
    seconds = {peer.name: [] for peer in contenders}
    jax.block_until_ready((carries, microbatches))
    shuffled = random.Random(0)
    for turn in progress(range(WARMUP_ROUNDS + rounds), "Timing windows"):
        for peer in shuffled.sample(contenders, len(contenders)):
            start = time.perf_counter()
            carries[peer.name] = peer.run_window(carries[peer.name], microbatches)
            jax.block_until_ready(carries[peer.name])
            if turn >= WARMUP_ROUNDS:
                seconds[peer.name].append(time.perf_counter() - start)
    return seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns every figure of the benchmark, ready for JSON."""
    params, *microbatches = (
        make_tree(seed, args.leaves, args.megabytes)
        for seed in range(1 + min(args.every_k, MAX_DISTINCT_MICROBATCHES))
    )
    compiled = functools.partial(measure_compilation, params=params, repeats=1 if args.quick else 3)
    compiled(peers.PEERS[0], args.every_k)  # wakes the compiler
    compilations = [compiled(f, args.every_k) for f in progress(peers.PEERS, "Compiling")]
    by_every_k = [
        {"every_k": k, **compiled(peers.optaccum_apply_gradients, k)}
        for k in progress((2, 8, 64, 1024), "Compiling at k = 2 to 1024")
    ]
    contenders = [factory(INNER, args.every_k) for factory in peers.PEERS]
    expected = peers.full_batch(INNER, args.every_k, params, microbatches)
    agreement = [
        peers.agrees(peer, params, microbatches, expected)
        for peer in progress(contenders, "Checking against the full batch")
    ]
    seconds = time_windows(contenders, params, microbatches, args.rounds)

    units = {
        "window_ms": 1e-3,
        "ratio_to_multi_steps": seconds["optax.MultiSteps"],
        "ratio_to_hand_written": seconds["hand-written loop"],
    }

    def timing(name):
        ratios = {key: np.divide(seconds[name], unit) for key, unit in units.items()}
        quartiles = {"q1": 25, "median": 50, "q3": 75}.items()
        return {key: {q: np.percentile(x, at) for q, at in quartiles} for key, x in ratios.items()}

    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return {
        "benchmark": "overhead",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), **versions},
        "parameter_bytes": 4 * optax.tree.size(params),
        **{name: getattr(args, name) for name in ("every_k", "leaves", "rounds")},
        "contenders": [
            {"name": peer.name, "agrees": agrees, **compilation, **timing(peer.name)}
            for peer, agrees, compilation in zip(contenders, agreement, compilations, strict=True)
        ],
        "compilation_of_apply_gradients": by_every_k,
    }


def print_tables(result: dict[str, Any]) -> None:
    """Prints the figures as two tables that fit into 100 columns."""
    size = f"{result['parameter_bytes'] / 1e6:.3g} MB of parameters in {result['leaves']} leaves"
    headings = "window\nms", "quartiles\nms", "ratio to\nMulti-\nSteps", "ratio to\nhand-\nwritten"
    headings += "tempo-\nraries", "compile\ns", "agrees"
    table = Table(
        Column("contender", no_wrap=True),
        *(Column(heading, justify="right") for heading in headings),
        title=f"AdamW, k = {result['every_k']}, {size}, on {result['device']}",
        caption=CAPTION,
        box=box.SIMPLE_HEAD,
    )
    for row in result["contenders"]:
        ms = row["window_ms"]
        digits = 0 if ms["q3"] >= 100 else 1
        cells = [f"{ms['median']:.{digits}f}", f"{ms['q1']:.{digits}f}-{ms['q3']:.{digits}f}"]
        ratios = row["ratio_to_multi_steps"]["median"], row["ratio_to_hand_written"]["median"]
        cells += [f"{x:.2f}" for x in (*ratios, row["temporaries"], row["compile_s"])]
        table.add_row(row["name"], *cells, "yes" if row["agrees"] else "[bold red]NO")
    by_k = Table("k", "temporaries", "compile s", box=box.SIMPLE_HEAD)
    for row in result["compilation_of_apply_gradients"]:
        by_k.add_row(str(row["every_k"]), f"{row['temporaries']:.2f}", f"{row['compile_s']:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table, "optaccum.apply_gradients by window length:", by_k)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, the sizes that it leaves open filled in."""

    def at_least(bound):
        def number(text):
            value = type(bound)(text)
            if not bound <= value < float("inf"):
                raise argparse.ArgumentTypeError(f"must be at least {bound}, got {text}")
            return value

        return number

    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes and few rounds, for a smoke test")
    add("--every-k", type=at_least(2), default=8, help="microbatches a window (8)")
    add("--megabytes", type=at_least(0.001), help="float32 parameters (25; quick: 0.1)")
    add("--leaves", type=at_least(1), help="leaves of the parameters (24; quick: 4)")
    add("--rounds", type=at_least(1), help="timed rounds (15; quick: 3)")
    add("--output", type=pathlib.Path, metavar="FILE", help="also write all figures, as JSON")
    args = parser.parse_args(argv)
    if args.output and (args.output.is_dir() or not args.output.parent.is_dir()):
        parser.error(f"argument --output: {args.output} is not a file in an existing folder")
    for name, full, quick in (("megabytes", 25.0, 0.1), ("leaves", 24, 4), ("rounds", 15, 3)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    return args


def main() -> None:
    """Runs the benchmark."""
    args = parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    print_tables(result := measure(args))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
