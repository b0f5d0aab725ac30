"""Train data-parallel with each way of accumulating: what devices send each other, and the time.

Devices share the rows of every microbatch; parameters and AdamW's moments are replicated. Rows have
different numbers of tokens, and after two windows all contenders have to agree with AdamW on the
full batch. Then they take turns. Collectives are counted in the compiled programs: those of a scan
as often as it has trips, and those of a branch in the last call of a window, which releases it.
`--output` writes, as JSON::

    benchmark, date, device, versions      as of every benchmark
    devices                                how many
    preset, parameters, parameter_bytes    the model
    every_k, microbatch                    microbatches a window, sequences of a device in one
    sequence, rounds                       tokens a sequence, timed rounds
    left_out                               {contender: why it is not here}
    reference                              the contender that the others have to agree with
    contenders: a list, and for each
        name, agrees                       what it is, and whether it agrees
        error                              its largest error, 1 being what rounding explains
        window                             its collectives in a window: a list of {kind, bytes,
                                           times}, with the bytes of a device's operands each time
        hold                               the same of a microbatch that does not release; null for
                                           the full batch, which has none
        window_ms                          the time of a window {q1, median, q3}
        time_to_multi_steps                the same in that of optax.MultiSteps
        time_to_hand_written               the same in that of the loop by hand
    by_every_k: a list, and for each
        name, every_k, bytes               of all collectives in a window of that length
"""

import argparse
import collections
import dataclasses
import functools
import os
from typing import Any

import jax

from benchmarks import collectives_tables, harness, hlo, product_model, scaling_tables, trainers
from benchmarks.parallel import (
    BY_HAND,
    CALLS_DEFERRED,
    FULL_BATCH,
    IN_STEP_DEFERRED,
    MULTI_STEPS,
    Runner,
    make_ways,
)

CPU_DEVICES = 8
CPU_FLAG = "xla_force_host_platform_device_count"
GROWING = (MULTI_STEPS, CALLS_DEFERRED, IN_STEP_DEFERRED)
DEFAULTS = {  # quick, CPU, GPU
    "parameters": ("80k", "3m", "110m"),
    "microbatch": (1, 1, 4),
    "sequence": (16, 32, 1024),
    "rounds": (3, 15, 15),
}


def traffic(programs: list[Any], every_k: int) -> tuple[list[Any], list[Any]]:
    """Returns the collectives of a window, and those of a microbatch that does not release it.

    Args:
        programs: one compiled program a call: for each microbatch, or one for the whole batch.
        every_k: microbatches of the window.
    """
    found = {program: hlo.collectives(program.as_text()) for program in dict.fromkeys(programs)}
    calls = [[one for one in found[program] if not one.conditional] for program in programs]
    window = [one for call in calls[:-1] for one in call] + found[programs[-1]]
    if len(programs) > 1:
        return summed(window), summed(calls[0])
    # The scan of a whole batch has a trip for each microbatch.
    trips = [one for one in window if one.trips == every_k]
    return summed(window), summed([dataclasses.replace(one, trips=1) for one in trips])


def summed(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Returns how many times collectives of each kind and size run, the largest first."""
    times = collections.Counter()
    for one in found:
        times[one.bytes, one.kind] += one.trips
    return [
        {"kind": kind, "bytes": size, "times": count}
        for (size, kind), count in sorted(times.items(), reverse=True)
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns every figure of the benchmark, ready for JSON."""
    config = product_model.PRESETS[args.parameters]
    params = product_model.make_params(config)
    rows = jax.device_count() * args.microbatch

    def compiled(name, every_k, optimized):
        window = product_model.make_window(config, every_k, rows, args.sequence)
        return Runner(make_ways(every_k)[0][name], params, window, optimized)

    ways, left_out = make_ways(args.every_k)
    runners = {
        name: compiled(name, args.every_k, not args.quick)
        for name in harness.progress(ways, "Compiling")
    }
    trained = {}
    for name, runner in harness.progress(runners.items(), "Checking"):
        runner.start(params)
        for _ in range(trainers.WINDOWS):
            jax.block_until_ready(runner.run_window())
        trained[name] = jax.device_get(runner.params)
    errors = {
        name: trainers.largest_error(tree, trained[FULL_BATCH], params, config)
        for name, tree in trained.items()
    }
    seconds = harness.take_turns(
        {name: runner.run_window for name, runner in runners.items()}, args.rounds
    )

    @functools.cache
    def traffic_of(name, every_k):
        same = every_k == args.every_k
        runner = runners[name] if same else compiled(name, every_k, optimized=False)
        return traffic(runner.programs, every_k)

    def figures(name):
        window, hold = traffic_of(name, args.every_k)
        return {
            "name": name,
            "agrees": errors[name] <= 1,
            "error": errors[name],
            "window": window,
            "hold": None if name == FULL_BATCH else hold,
            "window_ms": harness.quartiles([1e3 * x for x in seconds[name]]),
            "time_to_multi_steps": harness.ratios(seconds, name, MULTI_STEPS),
            "time_to_hand_written": harness.ratios(seconds, name, BY_HAND),
        }

    leaves = jax.tree.leaves(params)
    lengths = [(name, every_k) for name in GROWING for every_k in (4, 16, 64)]
    given = "every_k", "microbatch", "sequence", "rounds"
    return {
        **harness.origin("collectives"),
        "devices": jax.device_count(),
        "preset": args.parameters,
        "parameters": sum(leaf.size for leaf in leaves),
        "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
        **{name: getattr(args, name) for name in given},
        "left_out": left_out,
        "reference": FULL_BATCH,
        "contenders": [figures(name) for name in runners],
        "by_every_k": [
            {"name": name, "every_k": every_k, "bytes": collectives_tables.total(window)}
            for name, every_k in harness.progress(lengths, "Compiling windows of 4 to 64")
            for window, _ in [traffic_of(name, every_k)]
        ],
    }


def print_tables(result: dict[str, Any]) -> None:
    """Prints the figures as tables that fit into 100 columns."""
    title = f"{collectives_tables.setting(result)}, on {result['device']}"
    scaling_tables.print_rows(collectives_tables.traffic_rows(result), title)
    scaling_tables.print_rows(collectives_tables.time_rows(result), "The same window")
    title = "Parameter sizes that a device reduces in a window of k microbatches"
    scaling_tables.print_rows(collectives_tables.length_rows(result), title)
    for name, reason in result["left_out"].items():
        print(f"Left out: {name}, for {reason}.")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, what it leaves open filled in for the device."""
    parser = harness.make_parser("collectives", (__doc__ or "").split("\n\n")[0])
    add, at_least = parser.add_argument, harness.at_least
    add("--parameters", choices=product_model.PRESETS, help="the model (3m; GPU: 110m)")
    add("--every-k", type=at_least(2), default=16, help="microbatches a window (16)")
    add("--microbatch", type=at_least(1), help="sequences of a device in one (1; GPU: 4)")
    add("--sequence", type=at_least(1), help="tokens a sequence (32; GPU: 1024)")
    args = harness.parse_args(parser, DEFAULTS, argv)
    if jax.device_count() < 2:
        found = f"{jax.device_count()} {jax.devices()[0].device_kind}"
        parser.error(
            f"needs at least 2 devices, found {found}; with JAX_PLATFORMS=cpu, and without "
            f"--{CPU_FLAG} in XLA_FLAGS, a CPU becomes {CPU_DEVICES}"
        )
    return args


def make_cpu_devices() -> None:
    """Makes several devices of a CPU, unless the user has said how many."""
    told = CPU_FLAG in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    if not told:
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def main() -> None:
    """Runs the benchmark."""
    make_cpu_devices()  # before anything asks for one
    harness.run(parse_args(), measure, print_tables)


if __name__ == "__main__":
    main()
