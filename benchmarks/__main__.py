"""Run all benchmarks, or those named, write their figures to `results`, and then the report.

Each runs in a process of its own: one of them compiles for chips that are not here, another makes
eight devices of a CPU.
"""

import argparse
import subprocess
import sys

from benchmarks.harness import RESULTS
from benchmarks.report import MODULES


def main() -> None:
    """Runs the benchmarks one after the other; Ctrl-C ends with what has been measured."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODULES)} (all)")
    told = "a smoke test of minutes: its numbers mean nothing, and nothing is written"
    parser.add_argument("--quick", action="store_true", help=told)
    args = parser.parse_args()
    if unknown := set(args.names) - set(MODULES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    # A process of its own: a TPU serves one at a time.
    ask = "import jax; print(jax.default_backend())"
    backend = subprocess.check_output([sys.executable, "-c", ask], text=True).strip()
    for name in args.names or MODULES:
        print(f"benchmarks.{name}", file=sys.stderr)
        file = RESULTS / (f"{name}.json" if name == "compiled" else f"{name}-{backend}.json")
        run(name, *(["--quick"] if args.quick else ["--output", str(file)]))
    if not args.quick:
        run("report")


def run(name: str, *options: str) -> None:
    """Runs a module of this package, and ends with its exit status if it fails."""
    process = subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}", *options])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()  # it has been interrupted too, and saves what it has
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
