"""Compile accumulation for chips that are not here, and count the bytes moved and sent.

Nothing runs. `optimizer`: gradients lie ready, and a window is its k calls. `training`: whole
training steps of a transformer, above the bytes that its gradients take alone. `traffic`: what
eight devices send each other. Bytes are operands and results of all instructions outside fusions,
in P, the size of the parameters; TPU compilers report theirs, and the two are compared.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import collectives, contenders, harness, hlo, parallel, targets, transformer
from benchmarks.compiled_tables import tables
from benchmarks.contender import Contender, Step
from benchmarks.contenders import APPLY_GRADIENTS, MULTI_STEPS, VALUE_AND_GRAD
from benchmarks.inners import INNERS
from benchmarks.programs import Window, nbytes
from benchmarks.training import Task

EVERY_K, DEVICES = 8, 8
UNWEIGHTED = f"{VALUE_AND_GRAD}, unweighted"
OPTIMIZER = (
    *(APPLY_GRADIENTS, contenders.RELEASE, contenders.TRAIN_STATE, contenders.NNX_OPTIMIZER),
    *(contenders.UPDATE, contenders.FLAX_OPTIMIZER, MULTI_STEPS, contenders.AGGREGATING),
    *(contenders.APPLY_EVERY, contenders.HAND_WRITTEN, contenders.NOT_ZEROING),
)
IN_STEP = VALUE_AND_GRAD, contenders.MICROBATCH, contenders.SCAN
TRAINING = MULTI_STEPS, APPLY_GRADIENTS, *IN_STEP
SMALL = transformer.Config(2048, 256, 2, 2, tied=False)
MODELS = {  # and who trains them on eight devices
    "blocks in a list": (
        SMALL,
        (
            *(MULTI_STEPS, APPLY_GRADIENTS, parallel.CALLS_DEFERRED, parallel.CALLS_EXPLICIT),
            *(parallel.FSDP, parallel.ZERO_2, UNWEIGHTED, *IN_STEP),
            *(parallel.IN_STEP_DEFERRED, parallel.IN_STEP_EXPLICIT),
        ),
    ),
    "blocks in a scan": (dataclasses.replace(SMALL, scanned=True), (UNWEIGHTED, *IN_STEP)),
    "tied embedding": (
        dataclasses.replace(SMALL, tied=True),
        (UNWEIGHTED, *IN_STEP, parallel.IN_STEP_DEFERRED),
    ),
}
# TPUs stage leaves below some 64 MB through memory on the chip, and count them twice.
LEAVES = {"sgd": (4, 4096, 8192), "adamw": (4, 4096, 8192), "muon": (2, 8192, 8192)}


def optimizer_row(target: str, inner: str, name: str, leaves: tuple[int, int, int]) -> Any:
    """Returns what a window moves where the gradients lie ready."""
    count, *shape = leaves
    params = {f"w{i}": jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for i in range(count)}
    contender, size = contenders.ADAPTERS[name](INNERS[inner], EVERY_K), nbytes(params)
    window = Window(contender, params, params, devices=targets.devices(target))
    moved = [hlo.moved(program.as_text()) for program in window.programs]
    reported = [(p.cost_analysis() or {}).get("bytes accessed") for p in window.programs]
    pairs = zip(reported, moved, strict=True)
    return {
        **{"target": target, "inner": inner, "name": name, "equivalent": contender.equivalent},
        "parameter_bytes": size,
        **bytes_of(moved, size),
        "reported_release": reported[-1] / size if reported[-1] else None,
        "disagreement": max((abs(x / one.release - 1) for x, one in pairs if x), default=None),
        "temporaries": window.temporary_bytes / size,
        # The first hold may overwrite the sums, and do without reading them.
        "kernels_of_hold": moved[-2].kernels_of_hold,
        "kernels_of_release": moved[-1].kernels_of_release,
        "compile_s": window.trace_s + window.compile_s,
    }


def bytes_of(moved: list[hlo.Moved], size: int, free: float = 0.0) -> dict[str, Any]:
    """Returns bytes of a hold, a release and a window in P, without those of the gradients."""
    last = moved[-1].release
    window = (sum(one.hold for one in moved[:-1]) + last) / size - EVERY_K * free
    if len(moved) == 1:
        return {"hold": None, "release": None, "window": window}
    return {"hold": moved[-2].hold / size - free, "release": last / size - free, "window": window}


def training_rows(target: str, config: transformer.Config, rows: int, sequence: int) -> Any:
    """Yields what training steps move above the bytes that their gradients take alone."""
    task = Task(config, transformer.param_shapes(config), EVERY_K, rows, sequence)
    size = nbytes(task.params)

    def compiled(contender):
        window = task.compile(contender, devices=targets.devices(target))
        return window, [hlo.moved(program.as_text()) for program in window.programs]

    keep = Step(lambda part, grads, weight: {"state": grads}, ("state",))
    alone = Contender("gradients", lambda p: {"params": p, "state": p}, (keep, keep))
    free = compiled(alone)[1][0].release / size
    for name in TRAINING:
        window, moved = compiled(contenders.ADAPTERS[name](INNERS["adamw"], EVERY_K))
        yield {
            **{"target": target, "name": name, "parameter_bytes": size, "gradients": free},
            **bytes_of(moved, size, free),
            "temporaries": window.temporary_bytes / size,
            "peak_bytes": window.peak_bytes,
        }


def traffic_row(target: str, model: str, config: transformer.Config, name: str) -> Any:
    """Returns what eight devices send each other in a hold and in a window."""
    adapter = VALUE_AND_GRAD if name == UNWEIGHTED else name
    contender = contenders.ADAPTERS[adapter](INNERS["adamw"], EVERY_K)
    config = dataclasses.replace(config, one_hot="explicit" in name)
    params, devices = transformer.param_shapes(config), targets.devices(target, DEVICES)
    task = Task(config, params, EVERY_K, 1, 64, devices)
    window = task.compile(contender, weighted=name != UNWEIGHTED, optimized=False)
    sent, hold = collectives.traffic(window.programs, EVERY_K)
    row = {"target": target, "model": model, "name": name, "devices": DEVICES}
    return row | {"parameter_bytes": nbytes(params), "window": sent, "hold": hold}


def measure(args: Any) -> Iterator[harness.Result]:
    remedies = {x: targets.missing(x) for x in (["cpu"] if args.quick else targets.TARGETS)}
    found = [target for target, remedy in remedies.items() if not remedy]
    result: harness.Result = {
        "device": "compiled for " + ", ".join(found),
        "every_k": EVERY_K,
        "left_out": {target: remedy for target, remedy in remedies.items() if remedy},
        **{"optimizer": [], "training": [], "traffic": []},
    }
    sizes = {"adamw": (2, 64, 128)} if args.quick else LEAVES
    tasks = [(target, x, name, sizes[x]) for target in found for x in sizes for name in OPTIMIZER]
    for task in harness.progress(tasks, "Compiling windows"):
        result["optimizer"].append(optimizer_row(*task))
        yield result

    chips = [target for target in found if args.quick or target in ("h100", "v5e")]
    models = [(model, config, name) for model, (config, x) in MODELS.items() for name in x]
    tasks = [(chip, *model) for chip in chips for model in models]
    for task in harness.progress(tasks, "Compiling for eight devices"):
        result["traffic"].append(traffic_row(*task))
        yield result

    large = dataclasses.replace(transformer.PRESETS["350m"], layers=2, dtype=jnp.bfloat16)
    sizes = (transformer.PRESETS["100k"], 1, 32) if args.quick else (large, 4, 1024)
    for chip in chips:
        rows = training_rows(chip, *sizes)
        for row in harness.progress(rows, f"Compiling training, {chip}", total=len(TRAINING)):
            result["training"].append(row)
            yield result


if __name__ == "__main__":
    targets.prepare()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    harness.main("compiled", __doc__, {}, measure, tables)
