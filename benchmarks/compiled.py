"""Compile accumulation for chips that are not here, and count the bytes moved and sent.

Nothing runs. `optimizer`: gradients lie ready, and a window is its k calls. `training`: whole
training steps of a transformer, above the bytes that its gradients take alone. `traffic`: what
eight devices send each other. Bytes are operands and results of all instructions outside fusions,
in P, the size of the parameters; TPU compilers report theirs, and the two are compared.
"""

from collections.abc import Iterable, Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import collectives, contenders, harness, hlo, targets, transformer
from benchmarks.contenders import APPLY_GRADIENTS, INNERS, MULTI_STEPS, VALUE_AND_GRAD
from benchmarks.programs import Window, nbytes
from benchmarks.tables import NOT_EQUIVALENT, Table, name_of, rows_of, three_digits, versions
from benchmarks.training import Task

OPTIONS: harness.Options = {}
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


def training_rows(target: str, config: transformer.Model, rows: int, sequence: int) -> Any:
    """Yields what training steps move above the bytes that their gradients take alone."""
    task = Task(config, transformer.param_shapes(config), EVERY_K, rows, sequence)
    size = nbytes(task.params)

    def compiled(contender):
        window = task.compile(contender, devices=targets.devices(target))
        return window, [hlo.moved(program.as_text()) for program in window.programs]

    keep = contenders.Step(lambda part, grads, weight: {"state": grads}, ("state",))
    alone = contenders.Contender(lambda p: {"params": p, "state": p}, (keep, keep))
    free = compiled(alone)[1][0].release / size
    for name in TRAINING:
        window, moved = compiled(contenders.ADAPTERS[name](INNERS["adamw"], EVERY_K))
        yield {
            **{"target": target, "name": name, "parameter_bytes": size, "gradients": free},
            **bytes_of(moved, size, free),
            "temporaries": window.temporary_bytes / size,
            "peak_bytes": window.peak_bytes,
        }


def traffic_row(target: str, model: str, config: transformer.Model, name: str) -> Any:
    """Returns what eight devices send each other in a hold and in a window."""
    adapter = VALUE_AND_GRAD if name == UNWEIGHTED else name
    contender = contenders.ADAPTERS[adapter](INNERS["adamw"], EVERY_K)
    config = dataclasses.replace(config, one_hot="explicit" in name)
    params, devices = transformer.param_shapes(config), targets.devices(target, DEVICES)
    task = Task(config, params, EVERY_K, 1, 64, devices)
    window = task.compile(contender, weighted=name != UNWEIGHTED, optimized=False)
    sent, hold = collectives.traffic(window.programs, EVERY_K)
    row = {"target": target, "model": model, "name": name, "devices": DEVICES}
    forgets = any(hlo.forgotten(program.as_text()) for program in window.programs)
    size = nbytes(params)
    return row | {"parameter_bytes": size, "window": sent, "hold": hold, "forgets": forgets}


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
    tasks = [
        (chip, model, dataclasses.replace(config, layers=1) if args.quick else config, name)
        for chip in chips
        for model, (config, names) in MODELS.items()
        for name in names
    ]
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


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns all tables by name."""
    found = result["optimizer"]
    named = {
        "compiled": windows(result, [row for row in found if row["inner"] == "adamw"]),
        "compiled_others": windows(result, [row for row in found if row["inner"] != "adamw"]),
        "compiled_programs": kernels(result, [row for row in found if row["inner"] == "adamw"]),
        "compiled_training": training(result),
        "compiled_traffic": traffic(result),
    }
    return {name: [table] for name, table in named.items() if table.rows}


def by_chip(found: Iterable[Any], *names: str) -> dict[Any, dict[str, Any]]:
    """Returns rows by these of their figures, and then by the title of their target, in order."""
    groups: dict[Any, dict[str, Any]] = {}
    for row in sorted(found, key=lambda row: list(TITLES).index(row["target"])):
        groups.setdefault(tuple(row[x] for x in names), {})[TITLES[row["target"]]] = row
    return groups


def windows(result: dict[str, Any], found: list[dict[str, Any]]) -> Table:
    """Returns bytes and temporaries of each contender, target by target."""
    rows, chips = [], [x for key, x in TITLES.items() if any(row["target"] == key for row in found)]
    for (inner, _), group in by_chip(found, "inner", "name").items():
        cells = {} if inner == "adamw" else {"inner": inner}
        cells["contender"] = name_of(next(iter(group.values())))
        for chip in chips:
            parts = [group[chip][x] for x in ("hold", "release", "window")] if chip in group else []
            cells[chip] = " / ".join(map(three_digits, parts)) or "-"
        spaces = (f"{group[chip]['temporaries']:.2f}" if chip in group else "-" for chip in chips)
        rows.append(cells | {"temporaries": " / ".join(spaces)})
    sizes = dict.fromkeys(f"{row['inner']} {row['parameter_bytes'] / 1e6:,.0f} MB" for row in found)
    legend = f"Cells: bytes of a hold / a release / a window; temporaries for {', '.join(chips)}. "
    legend += "All are in sizes of the parameters, P."
    notes = [legend, NOT_EQUIVALENT, f"Parameters: {', '.join(sizes)}. {_setting(result)}"]
    return Table(rows, "Windows", notes)


def kernels(result: dict[str, Any], found: list[dict[str, Any]]) -> Table:
    """Returns kernels of a hold and a release, and the time to compile a window."""
    rows = []
    for group in by_chip(found, "name").values():
        cells = {"contender": name_of(next(iter(group.values())))}
        for chip, row in group.items():
            cells[f"{chip}: kernels"] = f"{row['kernels_of_hold']} / {row['kernels_of_release']}"
            cells[f"{chip}: compile"] = f"{row['compile_s']:.1f} s"
        rows.append(cells)
    return Table(rows, "Programs of AdamW", [agreement(result), _setting(result)])


def training(result: dict[str, Any]) -> Table:
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
    title = "Training: bytes above those of the gradients alone"
    return Table(rows_of(result["training"], columns), title, [*notes, _setting(result)])


def traffic(result: dict[str, Any]) -> Table:
    """Returns what devices send each other in a hold and in a window, target by target."""
    rows = []
    for (model, name), group in by_chip(result["traffic"], "model", "name").items():
        wrong = " ‡" if any(row["forgets"] for row in group.values()) else ""
        cells = {"model": model, "contender": name + wrong}
        for chip, row in group.items():
            cells |= {f"{chip}: {part}": sent(row[part], row) for part in ("hold", "window")}
        rows.append(cells)
    notes = [FORGETS] if any(row["forgets"] for row in result["traffic"]) else []
    title = "Eight devices: arrays that they reduce or gather, in P"
    return Table(rows, title, [*notes, _setting(result)])


def sent(found: list[dict[str, Any]] | None, row: dict[str, Any]) -> str:
    """Returns the size in P of the arrays that are reduced or gathered, by kind."""
    if not found:
        return "-" if found is None else "none"
    totals: dict[str, float] = {}
    for one in found:
        # An array that is gathered is as many times larger as there are devices with a part of it.
        whole = row["devices"] if one["kind"] == "all-gather" else 1
        size = whole * one["bytes"] * one["times"] / row["parameter_bytes"]
        totals[one["kind"]] = totals.get(one["kind"], 0) + size
    cells = [f"{kind} {size:.2f}" for kind, size in totals.items() if size >= REDUCED]
    return ", ".join(cells) or "scalars"


def agreement(result: dict[str, Any]) -> str:
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


def _setting(result: dict[str, Any]) -> str:
    remedies = result["left_out"].items()
    left_out = "".join(f" Left out: {TITLES[chip]}; `{remedy}`." for chip, remedy in remedies)
    return f"k = {result['every_k']}. Compiled with {versions(result)}{left_out}"


if __name__ == "__main__":
    targets.prepare()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    harness.main("compiled", __doc__, OPTIONS, measure, tables)
