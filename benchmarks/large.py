"""Compile training steps of transformers of 1B and 7B parameters, for chips that are not here.

Nothing runs. Layers are scanned and computed again for the gradient, in bfloat16, with parameters
and sums in float32: one row of 2,048 tokens for each device in each of 8 microbatches. Bytes are in
P, the size of the parameters. Activations are constrained to the rows of the batch, as trainers do
it.
"""

import dataclasses
from typing import Any

import jax

from benchmarks import contenders, hlo, targets, transformer
from benchmarks.compiled import EVERY_K, by_program, forgets, model_task, moved, sent, traffic
from benchmarks.contender import AXIS, INSIDE
from benchmarks.contenders import ADAPTERS, LEVANTER, MAXTEXT, REDUCED_ONCE, VALUE_AND_GRAD
from benchmarks.programs import Window, progress
from benchmarks.tables import Result, rows_of, table, versions
from benchmarks.targets import TITLES

ONE = (
    contenders.MULTI_STEPS,
    contenders.MICROBATCH,
    contenders.SCAN,
    VALUE_AND_GRAD,
    contenders.VALUE_AND_APPLY,
)
SHARED = contenders.SCAN, VALUE_AND_GRAD, REDUCED_ONCE
REPLICATED, FSDP, HSDP = "replicated", "FSDP", "HSDP, 2 replicas"
FREE = ", activations not constrained"
DIVIDED = *SHARED, MAXTEXT, LEVANTER
JOBS = [  # model, chip, devices, parameters, contenders
    ("1b", targets.H100, 1, REPLICATED, ONE),
    ("1b", targets.H100, 8, REPLICATED, SHARED),
    ("7b", targets.H100, 8, FSDP, (VALUE_AND_GRAD + FREE, *DIVIDED)),
    ("7b", targets.H100, 8, HSDP, (VALUE_AND_GRAD, REDUCED_ONCE)),
    ("1b", targets.V5E, 16, FSDP, DIVIDED),
    ("7b", targets.V5E, 256, FSDP, (VALUE_AND_GRAD, MAXTEXT, LEVANTER)),
    ("1b", targets.V6E, 8, FSDP, (VALUE_AND_GRAD, REDUCED_ONCE, LEVANTER)),
]


def row(model: str, target: str, devices: int, placed: str, name: str, tokens: int) -> Result:
    """Returns what a window needs and sends."""
    axes = {REPLICATED: (), FSDP: (AXIS,), HSDP: (AXIS, INSIDE)}[placed]
    if name == REDUCED_ONCE:
        axes = tuple(axis for axis in axes if axis != AXIS)  # which is the loop's
    elif name.endswith(FREE):
        axes = ()
    config = dataclasses.replace(transformer.PRESETS[model], axes=axes)
    task = model_task(target, config, 1, tokens, devices)
    result: Result = {"model": model, "target": target, "devices": devices, "placed": placed}
    result |= {"name": name, "parameter_bytes": task.size}
    contender = ADAPTERS[name.removesuffix(FREE)](task.inner, EVERY_K)
    if placed != REPLICATED and name not in (MAXTEXT, LEVANTER):
        inside = 1 if placed == FSDP else devices // 2
        contender = contenders.fully_sharded(contender, task.inner, inside)
    try:
        window = Window(contender, task)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"fits": False}
    hidden = by_program(hlo.hidden, window)[-1] if target == targets.H100 else None
    return result | {
        **{"fits": True, "peak_bytes": window.peak_bytes, "hidden": hidden},
        **{"temporaries": window.temporaries, "moved": moved(window)["window"]},
        **traffic(window, EVERY_K),
    }


def cells(row: Result) -> tuple[str, str]:
    """Returns what is sent in each microbatch, and once in a window."""
    if row["devices"] == 1 or not row["fits"]:
        return "-", "-"
    left = {(one["kind"], one["bytes"], one["group"]): dict(one) for one in row["window"]}
    for one in row["hold"]:
        left[one["kind"], one["bytes"], one["group"]]["times"] -= EVERY_K * one["times"]
    return sent(row["hold"], row), sent([one for one in left.values() if one["times"]], row)


def measure(scale: int) -> Result:
    remedies = {x: targets.missing(x) for x in (targets.H100, targets.V5E, targets.V6E)}
    jobs = [
        (*setting, name) for *setting, names in JOBS for name in names if not remedies[setting[1]]
    ]
    tokens = 2048
    if not scale:
        jobs, tokens = [("100k", targets.CPU, 8, FSDP, name) for name in SHARED], 32
    rows = [row(*job, tokens) for job in progress(jobs, "Compiling")]
    return {"every_k": EVERY_K, "rows": rows}


def tables(result: Result) -> dict[str, str]:
    columns: dict[str, Any] = {
        "model": lambda row: row["model"].upper(),
        "target": lambda row: f"{row['devices']} {TITLES[row['target']]}",
        "parameters": lambda row: row["placed"],
        "contender": lambda row: row["name"] + (" ‡" if row.get("forgets") else ""),
        "peak, GB a device": lambda row: (
            f"{row['peak_bytes'] / 1e9:.1f}" if row["fits"] else "does not fit"
        ),
        "temporaries, P": ("temporaries",),
        "moved, P": ("moved", "{:.0f}"),
        "sent in each microbatch": lambda row: cells(row)[0],
        "once": lambda row: cells(row)[1],
        "hidden": lambda row: "{} of {}".format(*row["hidden"]) if row.get("hidden") else "-",
    }
    setting = f"A window of n = {result['every_k']} microbatches, AdamW. Compiled with "
    notes = *forgets(result["rows"]), setting + versions(result)
    return {"large": table(rows_of(result["rows"], columns), *notes)}
