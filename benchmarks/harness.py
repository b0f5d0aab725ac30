"""Arguments, turns, medians and the origin of figures, shared by every benchmark."""

import argparse
from collections.abc import Callable, Iterator, Mapping
import contextlib
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
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.tables import Table

WARMUP_ROUNDS = 3
RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = "jax", "jaxlib", "optax", "flax", "keras", "libtpu", "jax-cuda12-plugin"
progress = functools.partial(track, console=Console(stderr=True))
Result = dict[str, Any]


def at_least(bound: Any) -> Callable[[str], Any]:
    """Returns an argparse type: a finite number of the type of `bound`, not below it."""

    def number(text):
        value = type(bound)(text)
        if not bound <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {bound}, got {text}")
        return value

    return number


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of seconds; its numbers mean nothing"
    )
    parser.add_argument("--rounds", type=at_least(1), help="timed rounds (quick: fewer)")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="also write JSON")
    return parser


def parse_args(
    parser: argparse.ArgumentParser,
    defaults: Mapping[str, tuple[Any, Any, Any]],
    argv: list[str] | None = None,
) -> argparse.Namespace:
    """Returns the command line, with defaults for --quick, a CPU, or a GPU or TPU.

    Ends with a usage error if the figures could not be written, before they are measured.
    """
    args = parser.parse_args(argv)
    if args.output is not None:
        if args.output.is_dir() or not args.output.parent.is_dir():
            parser.error(f"argument --output: {args.output} is not a file in an existing folder")
        try:
            args.output.open("a").close()
        except OSError as error:
            parser.error(f"argument --output: {error}")
    scale = 0 if args.quick else 1 if jax.default_backend() == "cpu" else 2
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[scale])
    return args


def run(
    name: str,
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Iterator[Result]],
    tables: Callable[[Result], Mapping[str, list[Table]]],
) -> None:
    """Measures, prints the tables, and writes the figures if a file was named.

    Args:
        name: of the benchmark.
        args: of `parse_args`.
        measure: yields all figures that it has, again and again as they become more. Ctrl-C ends
            the run with those that it yielded last.
        tables: what to print of them, by name.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    print(_estimate(name, args.quick), file=sys.stderr)
    start, result, stopped = time.perf_counter(), {}, False
    try:
        for figures in measure(args):
            result = figures
    except KeyboardInterrupt:
        stopped = True
        print("Stopped: these are the figures so far.", file=sys.stderr)
    if result:
        result = origin(name) | result | {"seconds": round(time.perf_counter() - start)}
        result |= {"complete": False} if stopped else {}
        for table in (table for several in tables(result).values() for table in several):
            print(table.terminal())
        write(result, args.output)
    if stopped:
        sys.exit(130)


def _estimate(name: str, quick: bool) -> str:
    if quick:
        return "--quick: a smoke test. Its numbers mean nothing."
    for path in sorted(RESULTS.glob(f"{name}*.json")):
        with contextlib.suppress(ValueError, KeyError):
            committed = json.loads(path.read_text())
            seconds, device = committed["seconds"], committed["device"]
            return f"The committed run took {seconds / 60:.0f} minutes on {device}."
    return "No committed run says how long this takes."


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, title: str = "Timing"
) -> dict[str, list[float]]:
    """Returns the seconds that each contender took, round by round.

    All run once a round, in a new order every round, so that whatever else the machine does
    falls on all alike. What a contender returns is waited for.
    """
    seconds = {name: [] for name in contenders}
    shuffled = random.Random(0)
    for turn in progress(range(WARMUP_ROUNDS + rounds), title):
        for name in shuffled.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            if turn >= WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: Any) -> dict[str, float]:
    """Returns the median and the quartiles."""
    q1, median, q3 = np.percentile(values, (25, 50, 75)).tolist()
    return {"q1": q1, "median": median, "q3": q3}


def ratios(seconds: Mapping[str, list[float]], name: str, unit: str) -> dict[str, float] | None:
    """Returns the quartiles of one contender's time in another's, or None if one did not run."""
    if name not in seconds or unit not in seconds:
        return None
    return quartiles(np.divide(seconds[name], seconds[unit]))


def origin(name: str) -> Result:
    """Returns which benchmark ran when, on what, with which versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }


def write(result: Mapping[str, Any], output: pathlib.Path | None) -> None:
    """Writes all figures as JSON, if a file was named."""
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
