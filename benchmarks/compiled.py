"""Compile accumulation for chips that are not here, and count the bytes moved and sent.

Nothing runs. `optimizer`: gradients lie ready, and a window is its k calls. `traffic`: what eight
devices send each other in a window of training steps. Bytes are in P, the size of the parameters.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contenders, hlo, targets, transformer
from benchmarks.contender import INNERS
from benchmarks.contenders import ADAPTERS, APPLY_GRADIENTS, MULTI_STEPS
from benchmarks.programs import Task, Window, progress
from benchmarks.tables import Result, table, three_digits, versions
from benchmarks.targets import TITLES

EVERY_K, DEVICES = 8, 8
REDUCED = 0.005  # a smaller part of P is not shown as an array
FORGETS = (
    "‡ Its gradient of the embedding is wrong: all devices but one forget earlier microbatches "
    "(openxla/xla issue 49143)."
)
OPTIMIZER = (
    *(APPLY_GRADIENTS, contenders.RELEASE, contenders.UPDATE),
    *(MULTI_STEPS, contenders.HAND_WRITTEN),
)
IN_STEP = (
    *(contenders.VALUE_AND_GRAD, contenders.REDUCED_ONCE),
    *(contenders.MICROBATCH, contenders.SCAN),
)
SMALL = transformer.Model(2048, 256, 2, 2, tied=False)
MODELS = {  # and who trains them on eight devices
    "blocks in a list": (SMALL, (MULTI_STEPS, APPLY_GRADIENTS, contenders.APPLIED_ONCE, *IN_STEP)),
    "blocks in a scan": (dataclasses.replace(SMALL, scanned=True), IN_STEP),
    "tied embedding": (dataclasses.replace(SMALL, tied=True), IN_STEP),
}
# TPUs stage leaves below some 64 MB through memory on the chip, and count them twice.
LEAVES = {"adamw": (4, 4096, 8192), "sgd": (4, 4096, 8192), "muon": (2, 8192, 8192)}


def by_program(read: Callable[[str], Any], window: Window) -> list[Any]:
    """Returns what is read from the text of the program of each call."""
    found = {program: read(program.as_text()) for program in dict.fromkeys(window.programs)}
    return [found[program] for program in window.programs]


def moved(window: Window) -> dict[str, float]:
    """Returns what a hold, a release and a window move, in P."""
    found = by_program(hlo.moved, window)
    release = found[-1].release
    # The first hold may overwrite the sums, and do without reading them.
    sizes = {"hold": found[-2:][0].hold, "release": release}
    sizes["window"] = sum(one.hold for one in found[:-1]) + release
    return {part: size / window.task.size for part, size in sizes.items()}


def traffic(window: Window, every_k: int) -> Result:
    """Returns the collectives of a window, and of a microbatch that does not release it."""
    found = by_program(hlo.collectives, window)
    calls = [[one for one in call if not one.conditional] for call in found]
    whole = [one for call in calls[:-1] for one in call] + found[-1]
    hold = calls[0]
    if len(calls) == 1:
        # The scan of a whole batch has a trip for each microbatch, or some for the layers of each.
        hold = [one for one in hold if one.trips % every_k == 0]
        hold = [dataclasses.replace(one, trips=one.trips // every_k) for one in hold]
    wrong = any(by_program(hlo.forgotten, window))
    return {"window": summed(whole), "hold": summed(hold), "forgets": wrong}


def summed(found: Iterable[hlo.Collective]) -> list[Result]:
    """Returns how many times collectives of each kind, size and group run, the largest first."""
    times = Counter()
    for one in found:
        times[one.bytes, one.kind, one.group or 0] += one.trips
    names = "bytes", "kind", "group", "times"
    runs = sorted(times.items(), reverse=True)
    return [dict(zip(names, (*key, count), strict=True)) for key, count in runs]


def optimizer_row(target: str, inner: str, name: str, leaves: tuple[int, ...]) -> Result:
    """Returns what a window moves if the gradients lie ready."""
    params = {f"w{i}": jax.ShapeDtypeStruct(leaves[1:], jnp.float32) for i in range(leaves[0])}
    task = Task(params, [params], EVERY_K, INNERS[inner], devices=targets.devices(target))
    window = Window(ADAPTERS[name](task.inner, EVERY_K), task)
    parts = moved(window)
    reported = (window.programs[-1].cost_analysis() or {}).get("bytes accessed", 0) / task.size
    return {
        **{"target": target, "inner": inner, "name": name, "parameter_bytes": task.size},
        **parts,
        "temporaries": window.temporaries,
        "disagreement": abs(reported / parts["release"] - 1) if reported else None,
    }


def model_task(
    target: str, config: Any, rows: int, sequence: int, devices: int = 1, every_k: int = EVERY_K
) -> Task:
    """Returns the training of a model, of shapes alone."""
    (batch,) = transformer.make_window(config, 1, rows * devices, sequence)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    params, on = transformer.param_shapes(config), targets.devices(target, devices)
    return Task(params, [batch], every_k, loss_fn=config.mean_loss, devices=on)


def traffic_row(target: str, model: str, name: str) -> Result:
    """Returns what eight devices send each other in a hold and in a window."""
    task = model_task(target, MODELS[model][0], 1, 64, DEVICES)
    row: Result = {"target": target, "model": model, "name": name, "devices": DEVICES}
    window = Window(ADAPTERS[name](task.inner, EVERY_K), task)
    return row | {"parameter_bytes": task.size} | traffic(window, EVERY_K)


def measure(scale: int) -> Result:
    remedies = {x: targets.missing(x) for x in (targets.TARGETS if scale else ["cpu"])}
    found = [target for target, remedy in remedies.items() if not remedy]
    sizes = LEAVES if scale else {"adamw": (2, 64, 128)}
    windows = [*itertools.product(found, sizes, OPTIMIZER)]
    steps = [
        (chip, model, name)
        for chip in found
        if chip in (targets.H100, targets.V5E) or not scale
        for model, (_, names) in MODELS.items()
        for name in names
    ]
    return {
        "every_k": EVERY_K,
        "left_out": {target: remedy for target, remedy in remedies.items() if remedy},
        "optimizer": [
            optimizer_row(target, inner, name, sizes[inner])
            for target, inner, name in progress(windows, "Windows")
        ],
        "traffic": [traffic_row(*job) for job in progress(steps, "Training steps")],
    }


def tables(result: Result) -> dict[str, str]:
    """Returns what AdamW's windows move, those of the others, and what devices send."""
    adamw, others = (
        [row for row in result["optimizer"] if (row["inner"] == "adamw") == main]
        for main in (True, False)
    )
    named = {"compiled": windows_table(result, adamw), "compiled_traffic": traffic_table(result)}
    return named | ({"compiled_others": windows_table(result, others)} if others else {})


def by_chip(found: Iterable[Result], name: str, cells: Callable[..., Any]) -> list[dict[str, str]]:
    """Returns rows of a table, in which a contender has the `cells(row, chip)` of all chips."""
    rows: dict[Any, dict[str, str]] = {}
    for row in sorted(found, key=lambda row: list(TITLES).index(row["target"])):
        one = rows.setdefault((row[name], row["name"]), {name: row[name], "contender": row["name"]})
        one |= cells(row, TITLES[row["target"]])
    return list(rows.values())


def windows_table(result: Result, found: list[Result]) -> str:
    def cells(row, chip):
        parts = (three_digits(row[x]) for x in ("hold", "release", "window"))
        return {chip: f"{' / '.join(parts)}; {round(row['temporaries'], 2):g}"}

    size = ", ".join({f"{row['parameter_bytes'] / 1e6:,.0f} MB" for row in found})
    legend = f"Cells: bytes of a hold / a release / a window; temporaries. All are in P, {size}."
    return table(by_chip(found, "inner", cells), legend, setting(result))


def traffic_table(result: Result) -> str:
    def cells(row, chip):
        wrong = {"contender": f"{row['name']} ‡"} if row["forgets"] else {}
        return wrong | {f"{chip}: {part}": sent(row[part], row) for part in ("hold", "window")}

    found = result["traffic"]
    return table(by_chip(found, "model", cells), *forgets(found), setting(result))


def forgets(found: list[Result]) -> list[str]:
    """Returns a note if a gradient is wrong."""
    return [FORGETS] if any(row.get("forgets") for row in found) else []


def sent(found: list[Result], row: Result) -> str:
    cells = [f"{kind} {size:.2f}" for kind, size in amounts(found, row).items() if size >= REDUCED]
    return ", ".join(cells) or ("scalars" if found else "none")


def amounts(found: list[Result], row: Result) -> Mapping[str, float]:
    """Returns the sizes in P of the arrays that are reduced or gathered, by kind.

    A kind says between how many devices, if not between all.
    """
    totals: Counter = Counter()
    for one in found:
        group = one.get("group") or row["devices"]
        # An array that is gathered is as many times larger as there are devices with a part of it.
        whole = group if one["kind"] == "all-gather" else 1
        kind = one["kind"] + (f" of {group}" if group < row["devices"] else "")
        totals[kind] += whole * one["bytes"] * one["times"] / row["parameter_bytes"]
    return totals


def setting(result: Result) -> str:
    remedies = result["left_out"].items()
    left_out = "".join(f" Left out: {TITLES[chip]}; `{remedy}`." for chip, remedy in remedies)
    return f"k = {result['every_k']}. Compiled with {versions(result)}{left_out}"
