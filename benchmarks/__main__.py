"""Run all benchmarks, or those named, write their figures to `results`, and then the report.

Several run in a process each: one of them compiles for chips that are not here, another makes
eight devices of a CPU.
"""

import argparse
from collections.abc import Iterator
import contextlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import time

import jax

from benchmarks import report, targets
from benchmarks.tables import Result

RESULTS = pathlib.Path(__file__).parent / "results"
COMPILED = "compiled", "headline", "large"  # for chips that are not here
PACKAGES = "jax", "jaxlib", "optax", "flax", "keras", "libtpu", "jax-cuda12-plugin"


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmarks one after the other; Ctrl-C ends with what has been measured."""
    names = list(report.BENCHMARKS)
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (all)")
    told = "a smoke test of minutes: its numbers mean nothing, and nothing is written"
    parser.add_argument("--quick", action="store_true", help=told)
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    names = args.names or names
    if len(names) > 1:
        for name in names:
            run(name, *(["--quick"] if args.quick else []))
        return
    if names[0] in COMPILED:
        targets.prepare()
    if names[0] in ("compiled", "large", "collectives"):
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_compilation_cache", False)
    backend = jax.default_backend()
    scale = 0 if args.quick else 1 if backend == "cpu" else 2
    suffix = "" if names[0] in COMPILED else f"-{backend}"
    if names[0] == "large":  # of which the newest and an older JAX are compared
        suffix = f"-jax{'.'.join(jax.__version__.split('.')[:2])}"
    file = RESULTS / f"{names[0]}{suffix}.json"
    measure(names[0], report.BENCHMARKS[names[0]].measure(scale), None if args.quick else file)
    if not args.quick:
        report.write()


def run(name: str, *options: str) -> None:
    """Runs a benchmark in a process of its own, and ends with its exit status if it fails."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", name, *options])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()  # it has been interrupted too, and saves what it has
    if status:
        sys.exit(status)


def measure(name: str, figures: Iterator[Result], file: pathlib.Path | None) -> None:
    """Prints the tables, and writes the figures if a file is named.

    A benchmark yields all figures that it has, again and again as they become more. Ctrl-C ends the
    run with the last of them.
    """
    print(f"benchmarks: {name}", file=sys.stderr)
    start, result, stopped = time.perf_counter(), {}, False
    try:
        for more in figures:
            result = more
    except KeyboardInterrupt:
        stopped = True
        found = "these are the figures so far" if result else "there are no figures yet"
        print(f"Stopped: {found}.", file=sys.stderr)
    if result:
        result = origin(name) | result | {"seconds": round(time.perf_counter() - start)}
        result |= {"complete": False} if stopped else {}
        for title, table in report.BENCHMARKS[name].tables(result).items():
            print(f"\n{title}\n\n{table}")
        if file:
            unfinished = file.with_name(f"{file.name}.part")
            unfinished.write_text(json.dumps(result, indent=2) + "\n")
            unfinished.replace(file)  # so that there is never half a file
    if stopped:
        sys.exit(130)


def origin(name: str) -> Result:
    """Returns which benchmark ran when, on what, with which versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    device = jax.devices()[0].device_kind
    return {"benchmark": name, "date": date, "device": device, "versions": versions}


if __name__ == "__main__":
    main()
