"""The command line, the turns and the JSON of every benchmark."""

import argparse
from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import importlib.metadata
import inspect
import json
import pathlib
import platform
import random
import sys
import tempfile
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
# By option: help, its least value or its choices, and what it is with --quick, on a CPU, elsewhere.
Options = Mapping[str, tuple[Any, Any, Any, Any, Any]]


def parse_args(name: str, doc: str | None, options: Options, argv: Any = None) -> Any:
    """Returns the command line of a benchmark, the options that it leaves open filled in."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=doc)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smoke test; its numbers mean nothing")
    add("--output", type=_writable, metavar="FILE", help="also write JSON")
    for option, (told, least, quick, *values) in options.items():
        checks: Any = {"choices": least} if isinstance(quick, str) else {"type": type(least)}
        told = f"{told} ({values[0]} on a CPU, {values[1]} on a GPU or TPU; quick: {quick})"
        add(f"--{option.replace('_', '-')}", help=told, **checks)
    quick = parser.parse_args(argv).quick
    scale = 0 if quick else 1 if jax.default_backend() == "cpu" else 2
    parser.set_defaults(scale=scale, **{name: of[2 + scale] for name, of in options.items()})
    args = parser.parse_args(argv)
    for option, (_, least, *_) in options.items():
        value = getattr(args, option)
        given = value != parser.get_default(option) and not isinstance(least, tuple)
        if given and not least <= value < float("inf"):
            parser.error(f"--{option.replace('_', '-')} must be at least {least}, got {value}")
    return args


def _writable(text: str) -> pathlib.Path:
    """Returns a path, after an attempt to write beside it: before anything is measured."""
    path = pathlib.Path(text)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory")
    return path


def main(
    name: str,
    doc: str | None,
    options: Options,
    measure: Callable[[Any], Iterator[Result]],
    tables: Callable[[Result], Mapping[str, list[Table]]],
    argv: list[str] | None = None,
) -> None:
    """Measures, prints the tables, and writes the figures if a file was named.

    `measure` yields all figures that it has, again and again as they become more. Ctrl-C ends the
    run with those that it yielded last.
    """
    args = parse_args(name, doc, options, argv)
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
        for several in tables(result).values():
            print(*(table.terminal() for table in several), sep="\n")
        if args.output:
            unfinished = args.output.with_name(args.output.name + ".part")
            unfinished.write_text(json.dumps(result, indent=2) + "\n")
            unfinished.replace(args.output)  # so that there is never half a file
    if stopped:
        sys.exit(130)


def load(name: str, folder: pathlib.Path | None = None) -> list[Result]:
    """Returns the committed results of a benchmark, those of a CPU, a GPU and a TPU."""
    return [
        json.loads(path.read_text()) | {"file": path.stem.rpartition("-")[2]}
        for path in sorted((folder or RESULTS).glob(f"{name}*.json"))
    ]


def _estimate(name: str, quick: bool) -> str:
    if quick:
        return "--quick: a smoke test. Its numbers mean nothing."
    for one in load(name):
        if "seconds" in one:
            return f"The committed run took {one['seconds'] / 60:.0f} minutes on {one['device']}."
    return "No committed run says how long this takes."


def origin(name: str) -> Result:
    """Returns which benchmark ran when, on what, with which versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    device = jax.devices()[0].device_kind
    return {"benchmark": name, "date": date, "device": device, "versions": versions}


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, title: str = "Timing"
) -> dict[str, np.ndarray]:
    """Returns the seconds that each contender took, round by round.

    All run once a round, in a new order every round, so that whatever else the machine does
    falls on all alike. What a contender returns is waited for. A generator is timed from one
    `yield` to the next, and has several times in each round.
    """
    seconds = {name: [] for name in contenders}
    shuffled = random.Random(0)
    for turn in progress(range(WARMUP_ROUNDS + rounds), title):
        for name in shuffled.sample(list(contenders), len(contenders)):
            times, start = [], time.perf_counter()
            done = contenders[name]()
            for lap in done if inspect.isgenerator(done) else [done]:
                jax.block_until_ready(lap)
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
            if turn >= WARMUP_ROUNDS:
                seconds[name].append(times if inspect.isgenerator(done) else times[0])
    return {name: np.array(times) for name, times in seconds.items()}


def quartiles(values: Any) -> dict[str, float]:
    q1, median, q3 = np.percentile(values, (25, 50, 75)).tolist()
    return {"q1": q1, "median": median, "q3": q3}


def ratios(seconds: Mapping[str, Any], name: str, unit: str) -> dict[str, float] | None:
    """Returns the quartiles of one contender's time in another's, or None if one did not run."""
    both = name in seconds and unit in seconds
    return quartiles(np.divide(seconds[name], seconds[unit])) if both else None
