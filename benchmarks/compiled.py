"""Compile accumulation for chips that are not here, and count the bytes moved and sent.

Nothing runs. `optimizer`: gradients lie ready, and a window is its k calls. `training`: whole
training steps of a transformer, above the bytes that its gradients take alone. `traffic`: what
eight devices send each other. Bytes are operands and results of all instructions outside fusions,
in P, the size of the parameters; TPU compilers report theirs, and the two are compared.
"""

import argparse
from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import (
    collectives,
    compiled_tables,
    contenders,
    harness,
    hlo,
    parallel,
    programs,
    targets,
    transformer,
)
from benchmarks.contender import Contender, Step
from benchmarks.inners import INNERS

EVERY_K, DEVICES = 8, 8
GRADIENTS, UNWEIGHTED = "gradients alone", f"{contenders.VALUE_AND_GRAD}, unweighted"
OPTIMIZER = (
    contenders.APPLY_GRADIENTS,
    contenders.RELEASE,
    contenders.TRAIN_STATE,
    contenders.NNX_OPTIMIZER,
    contenders.UPDATE,
    contenders.FLAX_OPTIMIZER,
    contenders.MULTI_STEPS,
    contenders.AGGREGATING,
    contenders.APPLY_EVERY,
    contenders.HAND_WRITTEN,
    contenders.NOT_ZEROING,
)
IN_STEP = contenders.VALUE_AND_GRAD, contenders.MICROBATCH, contenders.SCAN
TRAINING = contenders.MULTI_STEPS, contenders.APPLY_GRADIENTS, *IN_STEP
CALLS = (
    contenders.MULTI_STEPS,
    contenders.APPLY_GRADIENTS,
    parallel.CALLS_DEFERRED,
    parallel.CALLS_EXPLICIT,
    parallel.FSDP,
    parallel.ZERO_2,
)
# TPUs stage leaves below some 64 MB through memory on the chip, and count them twice.
LEAVES = {"sgd": (4, 4096, 8192), "adamw": (4, 4096, 8192), "muon": (2, 8192, 8192)}


def optimizer_row(target: str, inner: str, name: str, leaves: tuple[int, int, int]) -> Any:
    """Returns what a window moves where the gradients lie ready."""
    count, *shape = leaves
    params = {f"w{i}": jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for i in range(count)}
    contender, size = contenders.ADAPTERS[name](INNERS[inner], EVERY_K), programs.nbytes(params)
    window = programs.Window(contender, params, params, devices=targets.devices(target))
    moved = [hlo.moved(program.as_text()) for program in window.programs]
    reported = [(p.cost_analysis() or {}).get("bytes accessed") for p in window.programs]
    differences = [
        abs(found / one.release - 1) for found, one in zip(reported, moved, strict=True) if found
    ]
    return {
        **{"target": target, "inner": inner, "name": name, "equivalent": contender.equivalent},
        "parameter_bytes": size,
        **_bytes(moved, size),
        "reported_release": reported[-1] / size if reported[-1] else None,
        "disagreement": max(differences, default=None),
        "temporaries": window.temporary_bytes / size,
        # The first hold may overwrite the sums, and do without reading them.
        "kernels_of_hold": moved[-2].kernels_of_hold,
        "kernels_of_release": moved[-1].kernels_of_release,
        "compile_s": window.trace_s + window.compile_s,
    }


def _bytes(moved: list[hlo.Moved], size: int, free: float = 0.0) -> dict[str, Any]:
    """Returns bytes of a hold, a release and a window in P, without those of the gradients."""
    if len(moved) == 1:
        return {"hold": None, "release": None, "window": moved[0].release / size - EVERY_K * free}
    window = sum(one.hold for one in moved[:-1]) + moved[-1].release
    parts = {"hold": moved[-2].hold, "release": moved[-1].release}
    return {name: x / size - free for name, x in parts.items()} | {
        "window": window / size - EVERY_K * free
    }


def training_rows(target: str, config: transformer.Config, rows: int, sequence: int) -> Any:
    """Yields what training steps move above the bytes that their gradients take alone."""
    params = transformer.param_shapes(config)
    size, devices = programs.nbytes(params), targets.devices(target)

    def compiled(contender):
        count = rows * (EVERY_K if len(contender.steps) == 1 else 1)
        batch = transformer.batch_shapes(count, sequence)
        model = transformer.Model(config)
        window = programs.Window(contender, params, batch, model=model, devices=devices)
        return window, [hlo.moved(program.as_text()) for program in window.programs]

    keep = Step(lambda part, grads, weight: {"state": grads}, ("state",))
    alone = Contender(GRADIENTS, lambda p: {"params": p, "state": p}, (keep, keep))
    free = compiled(alone)[1][0].release / size
    for name in TRAINING:
        window, moved = compiled(contenders.ADAPTERS[name](INNERS["adamw"], EVERY_K))
        yield {
            **{"target": target, "name": name, "parameter_bytes": size, "gradients": free},
            **_bytes(moved, size, free),
            "temporaries": window.temporary_bytes / size,
            "peak_bytes": window.peak_bytes,
        }


def traffic_row(target: str, model: str, config: transformer.Config, name: str) -> Any:
    """Returns what eight devices send each other in a hold and in a window."""
    adapter = contenders.VALUE_AND_GRAD if name == UNWEIGHTED else name
    contender = contenders.ADAPTERS[adapter](INNERS["adamw"], EVERY_K)
    config = dataclasses.replace(config, one_hot="explicit" in name)
    params = transformer.param_shapes(config)
    rows = DEVICES * (EVERY_K if len(contender.steps) == 1 else 1)
    window = programs.Window(
        contender,
        params,
        transformer.batch_shapes(rows, 64),
        model=transformer.Model(config),
        weighted=name != UNWEIGHTED,
        devices=targets.devices(target, DEVICES),
        optimized=False,
    )
    sent, hold = collectives.traffic(window.programs, EVERY_K)
    return {
        **{"target": target, "model": model, "name": name, "devices": DEVICES},
        **{"parameter_bytes": programs.nbytes(params), "window": sent, "hold": hold},
    }


def measure(args: argparse.Namespace) -> Iterator[harness.Result]:
    """Yields every figure of the benchmark, ready for JSON, after each program."""
    left_out = {target: targets.missing(target) for target in args.targets}
    found = [target for target, remedy in left_out.items() if not remedy]
    result: harness.Result = {
        "device": "compiled for " + ", ".join(found),
        "every_k": EVERY_K,
        "left_out": {target: remedy for target, remedy in left_out.items() if remedy},
        **{"optimizer": [], "training": [], "traffic": []},
    }
    leaves = {"adamw": (2, 64, 128)} if args.quick else LEAVES
    tasks = [
        (target, inner, name, leaves[inner])
        for target in found
        for inner in leaves
        for name in OPTIMIZER
    ]
    for task in harness.progress(tasks, "Compiling windows"):
        result["optimizer"].append(optimizer_row(*task))
        yield result

    small = transformer.Config(2048, 256, 2, 2, tied=False)
    models = {
        "blocks in a list": small,
        "blocks in a scan": dataclasses.replace(small, scanned=True),
        "tied embedding": dataclasses.replace(small, tied=True),
    }
    deferred = parallel.IN_STEP_DEFERRED, parallel.IN_STEP_EXPLICIT
    ways = {
        "blocks in a list": (*CALLS, UNWEIGHTED, *IN_STEP, *deferred),
        "blocks in a scan": (UNWEIGHTED, *IN_STEP),
        "tied embedding": (UNWEIGHTED, *IN_STEP, parallel.IN_STEP_DEFERRED),
    }
    chips = [target for target in found if target in ("cpu" if args.quick else ("h100", "v5e"))]
    tasks = [
        (chip, model, models[model], n) for chip in chips for model in ways for n in ways[model]
    ]
    for task in harness.progress(tasks, "Compiling for eight devices"):
        result["traffic"].append(traffic_row(*task))
        yield result

    large = dataclasses.replace(transformer.PRESETS["350m"], layers=2, dtype=jnp.bfloat16)
    config = transformer.PRESETS["100k"] if args.quick else large
    for chip in chips:
        rows = training_rows(chip, config, 1 if args.quick else 4, 32 if args.quick else 1024)
        for row in harness.progress(rows, f"Compiling training, {chip}", total=len(TRAINING)):
            result["training"].append(row)
            yield result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line."""
    parser = harness.make_parser("compiled", __doc__)
    parser.add_argument(
        *("--targets", "--target"),
        nargs="+",
        choices=targets.TARGETS,
        help="chips to compile for (all; quick: cpu)",
    )
    defaults = {"targets": (["cpu"], targets.TARGETS, targets.TARGETS)}
    return harness.parse_args(parser, defaults, argv)


def main() -> None:
    """Runs the benchmark."""
    targets.prepare()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    harness.run("compiled", parse_args(), measure, compiled_tables.tables)


if __name__ == "__main__":
    main()
