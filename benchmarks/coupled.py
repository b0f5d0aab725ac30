"""Losses that compare rows: the gradient of a contrastive loss, whole and in microbatches.

Two towers embed pairs, and the loss compares every pair with every other. Loss and gradient of each
contender are compared with the full batch. Then all take turns.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import transformer
from benchmarks.contenders import FULL_BATCH, VALUE_AND_GRAD
from benchmarks.programs import take_turns
from benchmarks.tables import Result, ratios, rows_of, table, where
import optaccum

OURS, REMAT, CONCAT = "optaccum.microbatched", "lax.map(checkpoint)", "optax.microbatch, CONCAT"
CONFIG = transformer.Model(vocabulary=512, width=256, layers=2, heads=4, scanned=True)
TOKENS = 32
# Pairs in a batch, microbatches, rounds, layers: with --quick, on a CPU, elsewhere.
SIZES = (8, 4, 1, 1), (256, 16, 9, 2), (4096, 16, 15, 2)
Tower = Callable[..., Any]  # (params, rows) -> rows


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]


def make_mlp() -> Any:
    noise, shapes = np.random.default_rng(0), ((CONFIG.width, 512), (512, 512), (512, 128))
    return [jnp.asarray(noise.normal(size=(m, n)) / m**0.5, jnp.float32) for m, n in shapes]


def make_tasks(rows: int, layers: int) -> dict[str, tuple[Tower, Any, Any]]:
    """Returns each model, its parameters, and pairs that are half the same."""
    config = dataclasses.replace(CONFIG, layers=layers)

    def embed(params, tokens):
        return config.features(params, params["embedding"], tokens).mean(axis=1)

    noise = np.random.default_rng(1)
    x = noise.normal(size=(2, rows, CONFIG.width)).astype(np.float32)
    tokens = noise.integers(CONFIG.vocabulary, size=(2, rows, TOKENS), dtype=np.int32)
    tokens[1, :, TOKENS // 2 :] = tokens[0, :, TOKENS // 2 :]
    return {
        "mlp": (mlp, make_mlp(), (x[0], x.sum(axis=0))),
        "transformer": (embed, transformer.make_params(config), tuple(tokens)),
    }


def contrast(z: jax.Array, other: jax.Array) -> jax.Array:
    z, other = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (z, other))
    similarity = 10 * z @ other.T
    return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity))


def make_steps(tower: Tower, n: int) -> dict[str, Callable[..., Any]]:
    """Returns `(params, batch) -> (loss, gradient)` for each contender."""

    def in_map(params, x):  # as JAX's users write it: each microbatch is computed again
        parts = x.reshape(n, -1, *x.shape[1:])
        found = lax.map(jax.checkpoint(lambda rows: tower(params, rows)), parts)
        return found.reshape(-1, *found.shape[2:])

    def in_concat(params, x):  # a forward pass, which JAX then differentiates
        concat = optax.microbatching.AccumulationType.CONCAT
        return optax.microbatch(tower, 1, len(x) // n, concat)(params, x)

    def loss_of(encode):
        return lambda params, batch: contrast(*map(encode, params, batch))

    ours = optaccum.microbatched(tower, num_microbatches=n)
    ways = {FULL_BATCH: tower, OURS: ours, REMAT: in_map, CONCAT: in_concat}
    steps = {name: jax.value_and_grad(loss_of(encode)) for name, encode in ways.items()}
    naive = optaccum.value_and_grad(loss_of(tower), num_microbatches=n)
    return steps | {VALUE_AND_GRAD: naive}


def rows_of_model(scale: int, tower: Tower, one: Any, batch: Any) -> list[Result]:
    """Returns the figures of each contender with towers of one kind."""
    _, n, rounds, _ = SIZES[scale]
    given = (one, one), list(batch)
    found: Any = {
        name: jax.jit(step).lower(*given).compile() for name, step in make_steps(tower, n).items()
    }
    turns = {name: functools.partial(program, *given) for name, program in found.items()}
    results = {name: turn() for name, turn in turns.items()}
    seconds = take_turns(turns, rounds)
    loss, grads = results[FULL_BATCH]
    norm = optax.tree.norm
    return [
        {
            "name": name,
            "loss_error": abs(float(results[name][0] / loss) - 1),
            "gradient_error": float(norm(optax.tree.sub(results[name][1], grads)) / norm(grads)),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            **ratios(seconds, name, {"time_to_full_batch": FULL_BATCH}),
        }
        for name, program in found.items()
    ]


def measure(scale: int) -> Result:
    pairs, n, rounds, layers = SIZES[scale]
    result: Result = {"rows": pairs, "num_microbatches": n, "rounds": rounds, "models": []}
    for model, task in make_tasks(pairs, layers).items():
        result["models"] += [{"model": model} | row for row in rows_of_model(scale, *task)]
    return result


def tables(result: Result) -> dict[str, str]:
    columns = {
        "model": ("model",),
        "contender": ("name",),
        "error of loss": ("loss_error", "{:.1e}"),
        "of gradient": ("gradient_error", "{:.1e}"),
        "temp. MB": ("temporary_bytes", "{:,.1f}", 1e6),
        "time to full batch": ("time_to_full_batch",),
    }
    note = f"{result['rows']} pairs in {result['num_microbatches']} microbatches. {where(result)}"
    return {"coupled": table(rows_of(result["models"], columns), note)}
