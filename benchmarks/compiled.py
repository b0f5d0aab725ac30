"""Compile accumulation for chips that are not here, and count the bytes moved and sent.

Nothing runs. `optimizer`: gradients lie ready, and a window is its k calls. `training`: whole
training steps of a transformer, above the bytes that its gradients take alone. `traffic`: what
eight devices send each other. Bytes are in P, the size of the parameters.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contenders, hlo, targets, transformer
from benchmarks.collectives import traffic
from benchmarks.contender import INNERS, Contender, Step
from benchmarks.contenders import ADAPTERS, APPLY_GRADIENTS, MULTI_STEPS, VALUE_AND_GRAD
from benchmarks.programs import Task, Window, progress
from benchmarks.tables import (
    NOT_EQUIVALENT,
    Result,
    name_of,
    rows_of,
    table,
    three_digits,
    versions,
)

EVERY_K, DEVICES = 8, 8
REDUCED = 0.005  # a smaller part of P is not shown as an array
TITLES = {"h100": "H100", "v5e": "TPU v5e", "v6e": "TPU v6e", "cpu": "CPU"}
FORGETS = (
    "‡ Its gradient of the embedding is wrong: all devices but one forget earlier microbatches "
    "(openxla/xla issue 49143)."
)
UNWEIGHTED = f"{VALUE_AND_GRAD}, unweighted"
OPTIMIZER = (
    *(APPLY_GRADIENTS, contenders.RELEASE, contenders.TRAIN_STATE, contenders.NNX_OPTIMIZER),
    *(contenders.UPDATE, contenders.FLAX_OPTIMIZER, MULTI_STEPS, contenders.AGGREGATING),
    *(contenders.APPLY_EVERY, contenders.HAND_WRITTEN, contenders.NOT_ZEROING),
)
IN_STEP = VALUE_AND_GRAD, contenders.MICROBATCH, contenders.SCAN
TRAINING = MULTI_STEPS, APPLY_GRADIENTS, *IN_STEP
SMALL = transformer.Model(2048, 256, 2, 2, tied=False)
LARGE = dataclasses.replace(transformer.PRESETS["350m"], layers=2, dtype=jnp.bfloat16)
MODELS = {  # and who trains them on eight devices
    "blocks in a list": (
        SMALL,
        (
            *(MULTI_STEPS, APPLY_GRADIENTS, contenders.CALLS_DEFERRED, contenders.CALLS_EXPLICIT),
            *(contenders.FSDP, contenders.ZERO_2, UNWEIGHTED, *IN_STEP),
            *(contenders.IN_STEP_DEFERRED, contenders.IN_STEP_EXPLICIT),
        ),
    ),
    "blocks in a scan": (dataclasses.replace(SMALL, scanned=True), (UNWEIGHTED, *IN_STEP)),
    "tied embedding": (
        dataclasses.replace(SMALL, tied=True),
        (UNWEIGHTED, *IN_STEP, contenders.IN_STEP_DEFERRED),
    ),
}
QUICK = contenders.CALLS_DEFERRED, contenders.FSDP, contenders.ZERO_2, *IN_STEP[:2]
# TPUs stage leaves below some 64 MB through memory on the chip, and count them twice.
LEAVES = {"sgd": (4, 4096, 8192), "adamw": (4, 4096, 8192), "muon": (2, 8192, 8192)}


def optimizer_row(target: str, inner: str, name: str, leaves: tuple[int, ...]) -> Result:
    """Returns what a window moves if the gradients lie ready."""
    params = {f"w{i}": jax.ShapeDtypeStruct(leaves[1:], jnp.float32) for i in range(leaves[0])}
    task = Task(params, [params], EVERY_K, INNERS[inner], devices=targets.devices(target))
    return {"target": target, "inner": inner} | window_row(task, name)


def window_row(task: Task, name: str, free: float = 0.0) -> Result:
    """Returns the figures of a window: bytes in P, above `free` in each of its microbatches."""
    contender = ADAPTERS[name](task.inner, EVERY_K)
    window = Window(contender, task)
    moved = [hlo.moved(program.as_text()) for program in window.programs]
    reported = [(p.cost_analysis() or {}).get("bytes accessed") for p in window.programs]
    pairs = zip(reported, moved, strict=True)
    total = sum(one.hold for one in moved[:-1]) + moved[-1].release
    row: Result = {"name": name, "equivalent": contender.equivalent}
    row |= {"parameter_bytes": task.size, "hold": None, "release": None, "gradients": free}
    if len(moved) > 1:
        # The first hold may overwrite the sums, and do without reading them.
        row |= {"hold": moved[-2].hold / task.size - free}
        row |= {"release": moved[-1].release / task.size - free}
        row |= {"kernels_of_hold": moved[-2].kernels_of_hold}
    return row | {
        "window": total / task.size - EVERY_K * free,
        "reported_release": reported[-1] / task.size if reported[-1] else None,
        "disagreement": max((abs(x / one.release - 1) for x, one in pairs if x), default=None),
        "kernels_of_release": moved[-1].kernels_of_release,
        "temporaries": window.temporary_bytes / task.size,
        "peak_bytes": window.peak_bytes,
        "compile_s": window.trace_s + window.compile_s,
    }


def model_task(target: str, config: Any, rows: int, sequence: int, devices: int = 1) -> Task:
    """Returns the training of a model, of shapes alone."""
    (batch,) = transformer.make_window(config, 1, rows * devices, sequence)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    on = targets.devices(target, devices)
    return Task(transformer.param_shapes(config), [batch], EVERY_K, model=config, devices=on)


def training_row(target: str, name: str, *sizes: Any) -> Result:
    """Returns what training steps move above the bytes that their gradients take alone."""
    task = model_task(target, *sizes)
    return {"target": target} | window_row(task, name, gradients_alone(target, *sizes))


@functools.cache
def gradients_alone(target: str, *sizes: Any) -> float:
    """Returns the bytes in P that the gradients of a model take alone."""
    task = model_task(target, *sizes)
    keep = Step(lambda part, grads, weight: {"state": grads}, ("state",))
    alone = Contender(lambda p: {"params": p, "state": p}, (keep, keep))
    return hlo.moved(Window(alone, task).programs[0].as_text()).release / task.size


def traffic_row(target: str, model: str, config: Any, name: str) -> Any:
    """Returns what eight devices send each other in a hold and in a window."""
    config = dataclasses.replace(config, one_hot="explicit" in name)
    task = model_task(target, config, 1, 64, DEVICES)
    task = dataclasses.replace(task, weighted=name != UNWEIGHTED, optimized=False)
    adapter = ADAPTERS[VALUE_AND_GRAD if name == UNWEIGHTED else name]
    programs = Window(adapter(task.inner, EVERY_K), task).programs
    row = {"target": target, "model": model, "name": name, "devices": DEVICES}
    row |= {"parameter_bytes": task.size} | traffic(programs, EVERY_K)
    return row | {"forgets": any(hlo.forgotten(program.as_text()) for program in programs)}


def measure(scale: int) -> Iterator[Result]:
    remedies = {x: targets.missing(x) for x in (targets.TARGETS if scale else ["cpu"])}
    found = [target for target, remedy in remedies.items() if not remedy]
    chips = [target for target in found if not scale or target in ("h100", "v5e")]
    result: Result = {
        "device": "compiled for " + ", ".join(found),
        "every_k": EVERY_K,
        "left_out": {target: remedy for target, remedy in remedies.items() if remedy},
        **{"optimizer": [], "traffic": [], "training": []},
    }
    sizes = LEAVES if scale else {"adamw": (2, 64, 128)}
    jobs: list[Any] = [
        (optimizer_row, target, inner, name, leaves)
        for target in found
        for inner, leaves in sizes.items()
        for name in OPTIMIZER
    ]
    small = {"blocks in a list": (dataclasses.replace(SMALL, layers=1), QUICK)}
    jobs += [
        (traffic_row, chip, model, config, name)
        for chip in chips
        for model, (config, names) in (MODELS if scale else small).items()
        for name in names
    ]
    size = (LARGE, 4, 1024) if scale else (transformer.PRESETS["100k"], 1, 32)
    jobs += [(training_row, chip, name, *size) for chip in chips for name in TRAINING]
    for job, *given in progress(jobs, "Compiling"):
        result[job.__name__.removesuffix("_row")].append(job(*given))
        yield result


def tables(result: Result) -> dict[str, str]:
    """Returns all tables by name."""
    adamw = [row for row in result["optimizer"] if row["inner"] == "adamw"]
    others = [row for row in result["optimizer"] if row["inner"] != "adamw"]
    named = {"compiled": windows_table(result, adamw)} if adamw else {}
    named |= {"compiled_others": windows_table(result, others)} if others else {}
    named |= {"compiled_programs": kernels_table(result, adamw)} if adamw else {}
    named |= {"compiled_training": training_table(result)} if result["training"] else {}
    return named | ({"compiled_traffic": traffic_table(result)} if result["traffic"] else {})


def by_chip(found: Iterable[Any], *names: str) -> dict[Any, dict[str, Any]]:
    """Returns rows by these of their figures, and then by the title of their target, in order."""
    groups: dict[Any, dict[str, Any]] = {}
    for row in sorted(found, key=lambda row: list(TITLES).index(row["target"])):
        groups.setdefault(tuple(row[x] for x in names), {})[TITLES[row["target"]]] = row
    return groups


def windows_table(result: Result, found: list[Result]) -> str:
    """Returns bytes and temporaries of each contender, target by target."""
    rows, chips = [], [x for key, x in TITLES.items() if any(row["target"] == key for row in found)]
    for (inner, _), group in by_chip(found, "inner", "name").items():
        cells = {} if inner == "adamw" else {"inner": inner}
        cells["contender"] = name_of(next(iter(group.values())))
        for chip in chips:
            parts = [group[chip][x] for x in ("hold", "release", "window")] if chip in group else []
            cells[chip] = " / ".join(map(three_digits, parts)) or "-"
        spaces = (
            f"{round(group[chip]['temporaries'], 2):g}" if chip in group else "-" for chip in chips
        )
        rows.append(cells | {"temporaries": " / ".join(spaces)})
    sizes = dict.fromkeys(f"{row['inner']} {row['parameter_bytes'] / 1e6:,.0f} MB" for row in found)
    legend = f"Cells: bytes of a hold / a release / a window; temporaries for {', '.join(chips)}. "
    legend += "All are in sizes of the parameters, P."
    parameters = f"Parameters: {', '.join(sizes)}. {_setting(result)}"
    return table(rows, legend, NOT_EQUIVALENT, parameters)


def kernels_table(result: Result, found: list[Result]) -> str:
    """Returns kernels of a hold and a release, and the time to compile a window."""
    rows = []
    for group in by_chip(found, "name").values():
        cells = {"contender": name_of(next(iter(group.values())))}
        for chip, row in group.items():
            cells[f"{chip}: kernels"] = f"{row['kernels_of_hold']} / {row['kernels_of_release']}"
            cells[f"{chip}: compile"] = f"{row['compile_s']:.1f} s"
        rows.append(cells)
    return table(rows, _agreement(result), _setting(result))


def training_table(result: Result) -> str:
    """Returns what training steps move above their gradients, and their peak."""
    columns = {
        "target": lambda row: TITLES[row["target"]],
        "contender": name_of,
        **{f"{part}, P": (part, "{:+.1f}") for part in ("hold", "release", "window")},
        "temporaries, P": ("temporaries",),
        "peak": ("peak_bytes", "{:.2f} GB", 1e9),
    }
    sizes = {row["parameter_bytes"] / 4e6 for row in result["training"]}
    notes = [f"Transformer of {size:.1f} M parameters in bfloat16." for size in sizes]
    return table(rows_of(result["training"], columns), *notes, _setting(result))


def traffic_table(result: Result) -> str:
    """Returns what devices send each other in a hold and in a window, target by target."""
    rows = []
    for (model, name), group in by_chip(result["traffic"], "model", "name").items():
        wrong = " ‡" if any(row["forgets"] for row in group.values()) else ""
        cells = {"model": model, "contender": name + wrong}
        for chip, row in group.items():
            cells |= {f"{chip}: {part}": sent(row[part], row) for part in ("hold", "window")}
        rows.append(cells)
    notes = [FORGETS] if any(row["forgets"] for row in result["traffic"]) else []
    return table(rows, *notes, _setting(result))


def sent(found: list[Result], row: Result) -> str:
    """Returns a cell of what is sent, by kind."""
    cells = [f"{kind} {size:.2f}" for kind, size in amounts(found, row).items() if size >= REDUCED]
    return ", ".join(cells) or ("scalars" if found else "none")


def amounts(found: list[Result], row: Result) -> dict[str, float]:
    """Returns the sizes in P of the arrays that are reduced or gathered, by kind.

    A kind says between how many devices, if not between all.
    """
    totals: dict[str, float] = {}
    for one in found:
        group = one.get("group") or row["devices"]
        # An array that is gathered is as many times larger as there are devices with a part of it.
        whole = group if one["kind"] == "all-gather" else 1
        kind = one["kind"] + (f" of {group}" if group < row["devices"] else "")
        size = whole * one["bytes"] * one["times"] / row["parameter_bytes"]
        totals[kind] = totals.get(kind, 0) + size
    return totals


def _agreement(result: Result) -> str:
    """Returns how well the bytes agree with those that the compilers of TPUs report."""
    largest: dict[str, float] = {}
    for row in result["optimizer"]:
        if row["target"] in (targets.V5E, targets.V6E) and row["disagreement"] is not None:
            largest[row["inner"]] = max(largest.get(row["inner"], 0), row["disagreement"])
    if not largest:
        return "No compiler of a TPU was there to compare the bytes with."
    parts = ", ".join(f"{inner} {part:.1%}" for inner, part in largest.items())
    return (
        f"Bytes differ from those that the compilers of TPUs report by at most: {parts}. These "
        "count an operand of a product once for each side that it stands on."
    )


def _setting(result: Result) -> str:
    remedies = result["left_out"].items()
    left_out = "".join(f" Left out: {TITLES[chip]}; `{remedy}`." for chip, remedy in remedies)
    return f"k = {result['every_k']}. Compiled with {versions(result)}{left_out}"
