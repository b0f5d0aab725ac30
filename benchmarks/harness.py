"""What every benchmark shares: arguments, turns, medians, and where the figures came from."""

import argparse
from collections.abc import Callable, Mapping
import functools
import importlib.metadata
import json
import pathlib
import platform
import random
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

WARMUP_ROUNDS = 3
progress = functools.partial(track, console=Console(stderr=True))


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
    parser.add_argument("--quick", action="store_true", help="small and short, for a smoke test")
    parser.add_argument("--rounds", type=at_least(1), help="timed rounds (quick: fewer)")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="also write JSON")
    return parser


def check_output(parser: argparse.ArgumentParser, output: pathlib.Path | None) -> None:
    """Ends with a usage error if the figures could not be written, before they are measured."""
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        parser.error(f"argument --output: {output} is not a file in an existing folder")
    try:
        output.open("a").close()
    except OSError as error:
        parser.error(f"argument --output: {error}")


def parse_args(
    parser: argparse.ArgumentParser,
    defaults: Mapping[str, tuple[Any, Any, Any]],
    argv: list[str] | None = None,
) -> argparse.Namespace:
    """Returns the command line, what it leaves open filled in: for --quick, a CPU, a GPU."""
    args = parser.parse_args(argv)
    check_output(parser, args.output)
    scale = 0 if args.quick else 2 if jax.default_backend() == "gpu" else 1
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[scale])
    return args


def run(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    print_tables: Callable[[dict[str, Any]], None],
) -> None:
    """Measures, prints the tables, and writes the figures if a file was named."""
    jax.config.update("jax_enable_compilation_cache", False)
    print_tables(result := measure(args))
    write(result, args.output)


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


def ratios(seconds: Mapping[str, list[float]], name: str, unit: str) -> dict[str, float]:
    """Returns the quartiles of the ratios, round by round, of one contender to another."""
    return quartiles(np.divide(seconds[name], seconds[unit]))


def origin(name: str) -> dict[str, Any]:
    """Returns which benchmark ran when, on what, with which versions."""
    packages = ("jax", "jaxlib", "optax")
    return {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def write(result: Mapping[str, Any], output: pathlib.Path | None) -> None:
    """Writes all figures as JSON, if a file was named."""
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
