"""Run all benchmarks, or those named, write their figures to `results`, and then the report.

Several run in a process each: some compile for chips that are not here.
"""

import argparse
import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time

import jax

from benchmarks import report, targets
from benchmarks.tables import Result

COMPILED = "compiled", "headline", "large", "folds"  # for chips that are not here
PACKAGES = "jax", "jaxlib", "optax", "flax", "keras", "libtpu", "jax-cuda12-plugin"


def main(argv: list[str] | None = None) -> None:
    names = list(report.BENCHMARKS)
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (all)")
    told = "a smoke test of minutes: its numbers mean nothing, and nothing is written"
    parser.add_argument("--quick", action="store_true", help=told)
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    names = args.names or names
    if len(names) == 1:
        run(names[0], args.quick)
        return
    for name in names:
        options = ["--quick"] if args.quick else []
        if status := subprocess.call([sys.executable, "-m", "benchmarks", name, *options]):
            sys.exit(status)


def run(name: str, quick: bool) -> None:
    """Runs a benchmark, prints its tables, and writes its figures and the report."""
    if name in COMPILED:
        targets.prepare()
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_compilation_cache", False)
    backend, start = jax.default_backend(), time.perf_counter()
    result = report.BENCHMARKS[name].measure(0 if quick else 1 if backend == "cpu" else 2)
    result = origin(name) | result | {"seconds": round(time.perf_counter() - start)}
    for title, table in report.BENCHMARKS[name].tables(result).items():
        print(f"\n{title}\n\n{table}")
    if not quick:
        suffix = "" if name in COMPILED else f"-{backend}"
        if name in ("compiled", "large", "folds"):  # which compare the newest and an older JAX
            suffix = f"-jax{'.'.join(jax.__version__.split('.')[:2])}"
        (report.RESULTS / f"{name}{suffix}.json").write_text(json.dumps(result, indent=2) + "\n")
        report.write()


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
