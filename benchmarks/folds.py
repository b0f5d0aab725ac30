"""Compile steps of models with stacked layers, in the forms that people write, for three targets.

Nothing runs. A step of SGD takes a batch in microbatches. A form folds if `value_and_grad` adds the
gradients of its layers to the sums where the backward pass makes them. A scan by hand needs one P
more, the size of the parameters, because it first stacks these gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contenders, stacks, targets
from benchmarks.contender import INNERS
from benchmarks.contenders import SCAN, VALUE_AND_GRAD
from benchmarks.programs import Task, Window, progress
from benchmarks.tables import Result, table, versions
from benchmarks.targets import TITLES

N, ROWS, TOKENS = 4, 8, 4
LARGE, SMALL = stacks.Sizes(8, 1024, 4096, 1024), stacks.Sizes(4, 32, 64, 16)
SAVED = 0.2  # of P; a stack of gradients in bfloat16 is half of one
FORMS = stacks.SCANNED | stacks.OTHERS
WAYS = {VALUE_AND_GRAD: contenders.in_step, SCAN: contenders.scan}


def tokens_of(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.sum(ids > 0)


def temporaries(target: str, name: str, sizes: stacks.Sizes) -> dict[str, float]:
    """Returns the temporaries of both ways, in P."""
    loss_fn, init = FORMS[name](sizes)
    ids = jax.ShapeDtypeStruct((ROWS // N, TOKENS), jnp.int32)
    given: Any = {"loss_fn": loss_fn, "devices": targets.devices(target)}
    task = Task(jax.eval_shape(init), [ids], N, INNERS["sgd"], **given)
    options: Any = {"weight_fn": tokens_of} if name.endswith("weighted") else {}
    made = {way: make(task.inner, N, **options) for way, make in WAYS.items()}
    return {way: Window(contender, task).temporaries for way, contender in made.items()}


def measure(scale: int) -> Result:
    chips = (targets.H100, targets.V5E, targets.CPU) if scale else (targets.CPU,)
    found = [chip for chip in chips if not targets.missing(chip)]
    sizes = LARGE if scale else SMALL
    rows = [
        {"name": name, "temporaries": {x: temporaries(x, name, sizes) for x in found}}
        for name in progress(FORMS, "Compiling")
    ]
    return {"num_microbatches": N, "rows": rows}


def tables(result: Result) -> dict[str, str]:
    rows = []
    for row in result["rows"]:
        needs = {TITLES[target]: of for target, of in row["temporaries"].items()}
        cells = {x: f"{of[VALUE_AND_GRAD]:.2f} / {of[SCAN]:.2f}" for x, of in needs.items()}
        saved = min(of[SCAN] - of[VALUE_AND_GRAD] for of in needs.values())
        rows.append({"model": row["name"], **cells, "saves": "yes" if saved >= SAVED else "no"})
    note = f"Cells: temporaries of {VALUE_AND_GRAD} / of a scan by hand, in P. A window of n = "
    note += f"{result['num_microbatches']} microbatches. Compiled with {versions(result)}"
    return {"folds": table(rows, note)}
