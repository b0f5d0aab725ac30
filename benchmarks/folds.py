"""Compile steps of models with stacked layers, in the forms that people write, for three targets.

Nothing runs. A step of SGD takes a batch in microbatches. A form folds if `value_and_grad` adds the
gradients of its layers to the sums where the backward pass makes them. A scan by hand needs one P
more, the size of the parameters, because it first stacks these gradients.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from benchmarks import stacks, targets
from benchmarks.contenders import SCAN, VALUE_AND_GRAD
from benchmarks.programs import nbytes, progress
from benchmarks.tables import Result, table, versions
from benchmarks.targets import TITLES
import optaccum

N, ROWS, TOKENS = 4, 8, 4
LARGE, SMALL = stacks.Sizes(8, 1024, 4096, 1024), stacks.Sizes(4, 32, 64, 16)
SAVED = 0.2  # of P; a stack of gradients in bfloat16 is half of one
FORMS = stacks.SCANNED | stacks.OTHERS


def tokens_of(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.sum(ids > 0)


def by_hand(loss_fn: Any, weighted: bool, params: Any, ids: jax.Array) -> Any:
    """The usual scan over microbatches."""

    def body(sums, rows):
        weight = tokens_of(params, rows).astype(jnp.float32) if weighted else jnp.ones([])
        found = optax.tree.scale(weight, jax.value_and_grad(loss_fn)(params, rows))
        return optax.tree.add(sums, (weight, *found)), None

    zeros = jnp.zeros([]), jnp.zeros([]), optax.tree.zeros_like(params)
    (total, *sums), _ = lax.scan(body, zeros, ids.reshape(N, -1, TOKENS))
    return optax.tree.scale(1 / total, sums)


def temporaries(target: str, name: str, sizes: stacks.Sizes) -> dict[str, float]:
    """Returns the temporaries of both ways, in P."""
    (device,) = targets.devices(target)
    loss_fn, init = FORMS[name](sizes)
    weighted = name.endswith("weighted")
    options: Any = {"weight_fn": tokens_of} if weighted else {}
    ways = {
        VALUE_AND_GRAD: optaccum.value_and_grad(loss_fn, num_microbatches=N, **options),
        SCAN: lambda params, ids: by_hand(loss_fn, weighted, params, ids),
    }
    sharding = jax.sharding.SingleDeviceSharding(device)
    given = jax.eval_shape(init), jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), given
    )
    found = {}
    for way, gradient in ways.items():

        def step(params, ids, gradient=gradient):
            loss, grads = gradient(params, ids)
            return optax.tree.add_scale(params, -1e-2, grads), loss

        program: Any = jax.jit(step, donate_argnums=0).lower(*placed).compile()
        found[way] = program.memory_analysis().temp_size_in_bytes / nbytes(given[0])
    return found


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
        needs = row["temporaries"].values()
        saved = min(of[SCAN] - of[VALUE_AND_GRAD] for of in needs)
        cells = (f"{of[VALUE_AND_GRAD]:.2f} / {of[SCAN]:.2f}" for of in needs)
        chips = dict(zip((TITLES[target] for target in row["temporaries"]), cells, strict=True))
        rows.append({"model": row["name"], **chips, "saves": "yes" if saved >= SAVED else "no"})
    note = f"Cells: temporaries of {VALUE_AND_GRAD} / of a scan by hand, in P. A window of n = "
    note += f"{result['num_microbatches']} microbatches. Compiled with {versions(result)}"
    return {"folds": table(rows, note)}
