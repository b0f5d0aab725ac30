"""Train with a batch that does not fit: its memory on an H100, and the losses of both ways.

`memory`: a step of a transformer, compiled for an H100. Nothing runs. `losses`: a small transformer
trained here, on whole batches and on microbatches with different numbers of tokens.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import targets, transformer
from benchmarks.compiled import model_task
from benchmarks.contenders import ADAPTERS, APPLY_GRADIENTS, FULL_BATCH, MULTI_STEPS
from benchmarks.programs import Window
from benchmarks.tables import Result, rows_of, table, versions
from benchmarks.targets import TITLES
from optaccum import accumulate, apply_gradients

EVERY_K = 8  # of the losses
# GPT-3 Medium, roughly, with the batch of half a million tokens that its authors used.
LARGE = dataclasses.replace(transformer.PRESETS["350m"], dtype=jnp.bfloat16, scanned=True)
SMALL = transformer.Model(vocabulary=64, width=64, layers=1, heads=2)


def memory(target: str, model: transformer.Model, every_k: int, rows: int, sequence: int) -> Result:
    """Returns the peak bytes of AdamW's step for the same batch, whole and in microbatches."""
    task = model_task(target, model, rows, sequence, every_k=every_k)
    peaks = {
        name: Window(ADAPTERS[name](task.inner, every_k), task).peak_bytes
        for name in (FULL_BATCH, MULTI_STEPS, APPLY_GRADIENTS)
    }
    figures = {"target": target, "every_k": every_k, "microbatch": rows, "sequence": sequence}
    return figures | {"parameters": task.size // 4, "peak_bytes": peaks}


def make_batches(count: int, rows: int, sequence: int) -> list[Any]:
    """Returns batches of sequences with different lengths, in which four tokens may follow each."""
    noise, batches = np.random.default_rng(0), []
    for _ in range(count):
        tokens = [noise.integers(SMALL.vocabulary, size=rows)]
        for _ in range(sequence):
            tokens.append((5 * tokens[-1] + noise.integers(4, size=rows)) % SMALL.vocabulary)
        lengths = noise.integers(1, sequence + 1, size=(rows, 1))
        mask = (np.arange(sequence) < lengths).astype(np.float32)
        batches.append({"tokens": np.stack(tokens, axis=1).astype(np.int32), "mask": mask})
    return batches


def losses(every_k: int, batches: list[Any]) -> list[float]:
    """Returns the loss of each batch in a training that takes it in so many microbatches."""
    tx = accumulate(every_k, optax.adamw(1e-2))

    @jax.jit
    def step(params, opt_state, batch):
        tokens = SMALL.tokens_of(params, batch)
        loss, grads = jax.value_and_grad(SMALL.mean_loss)(params, batch)
        params, opt_state = apply_gradients(tx, grads, opt_state, params, weight=tokens)
        return params, opt_state, (loss, tokens)

    params = jax.tree.map(jnp.asarray, transformer.make_params(SMALL))
    opt_state, found = tx.init(params), []
    for batch in batches:
        window = []
        for i in range(every_k):
            rows = jax.tree.map(lambda x, i=i: x[i::every_k], batch)
            params, opt_state, figures = step(params, opt_state, rows)
            window.append(figures)
        values, tokens = np.array(jax.device_get(window), np.float64).T
        found.append(float(np.average(values, weights=tokens)))
    return found


def measure(scale: int) -> Result:
    if scale and (remedy := targets.missing(targets.H100)):
        sys.exit(f"compiling for an H100 needs packages: {remedy}")
    found = (
        memory(targets.H100, LARGE, 64, 8, 1024)
        if scale
        else memory(targets.CPU, SMALL, EVERY_K, 1, 32)
    )
    batches = make_batches(80 if scale else 3, 4 * EVERY_K, 32)
    ways = {FULL_BATCH: 1, APPLY_GRADIENTS: EVERY_K}
    trained = {name: losses(every_k, batches) for name, every_k in ways.items()}
    return {"memory": found, "every_k": EVERY_K, "losses": trained}


def apart(result: Result) -> float:
    """Returns the largest relative difference of the losses."""
    whole, ours = (np.array(result["losses"][name]) for name in (FULL_BATCH, APPLY_GRADIENTS))
    return float(np.max(np.abs(ours - whole) / whole))


def tables(result: Result) -> dict[str, str]:
    of, losses = result["memory"], result["losses"]
    columns = {
        "contender": lambda one: one[0],
        "peak GB": lambda one: f"{one[1] / 1e9:.1f}",
        "last loss": lambda one: f"{losses[one[0]][-1]:.6f}" if one[0] in losses else "-",
    }
    notes = (
        f"Peak: one step of AdamW for {of['parameters'] / 1e6:.0f} million parameters and "
        f"{of['every_k'] * of['microbatch']} sequences of {of['sequence']:,} tokens, whole or as "
        f"{of['every_k']} microbatches, compiled for {TITLES[of['target']]}.",
        f"Loss: a small transformer after {len(losses[FULL_BATCH])} steps, whole or as "
        f"{result['every_k']} microbatches. No loss differs by more than {apart(result):.0e}.",
        f"Made with {versions(result)}",
    )
    return {"headline": table(rows_of(of["peak_bytes"].items(), columns), *notes)}
