"""Losses that compare rows: the gradient of a contrastive loss, whole and in microbatches.

Two towers embed pairs, and the loss compares every pair with every other. Loss and gradient of each
contender are compared with the full batch. Then all take turns. The largest batch needs at most
twice the peak memory of `optaccum.microbatched`, with microbatches of one size.
"""

from collections.abc import Callable, Iterator
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
from benchmarks.programs import largest_batch, peak_bytes, progress, take_turns
from benchmarks.tables import Result, fitting, name_of, ratios, rows_of, table, where
import optaccum

OURS, REMAT, CONCAT = "optaccum.microbatched", "lax.map(checkpoint)", "optax.microbatch, CONCAT"
CONFIG = transformer.Model(vocabulary=512, width=256, layers=2, heads=4, scanned=True)
TOKENS, BUDGET_FACTOR, DRIFT_MICROBATCHES = 32, 2, 512
# Pairs in a batch, microbatches, rounds, layers, doublings: with --quick, on a CPU, elsewhere.
SIZES = (8, 4, 1, 1, 0), (256, 16, 9, 2, 3), (4096, 16, 15, 2, 4)
Tower = Callable[..., Any]  # (params, rows) -> rows


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]


def make_mlp(dtype: Any) -> Any:
    noise, shapes = np.random.default_rng(0), ((CONFIG.width, 512), (512, 512), (512, 128))
    return [jnp.asarray(noise.normal(size=(m, n)) / m**0.5, dtype) for m, n in shapes]


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
        "mlp": (mlp, make_mlp(jnp.float32), (x[0], x.sum(axis=0))),
        "transformer": (embed, transformer.make_params(config), tuple(tokens)),
    }


def contrast(z: jax.Array, other: jax.Array) -> jax.Array:
    z, other = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (z, other))
    similarity = 10 * z @ other.T
    return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity))


def encoders(tower: Tower, n: int) -> dict[str, Tower]:
    """Returns towers in microbatches, of which a loss sees all rows."""

    def in_map(params, x):  # as JAX's users write it: each microbatch is computed again
        parts = x.reshape(n, -1, *x.shape[1:])
        found = lax.map(jax.checkpoint(lambda rows: tower(params, rows)), parts)
        return found.reshape(-1, *found.shape[2:])

    def in_concat(params, x):  # a forward pass, which JAX then differentiates
        concat = optax.microbatching.AccumulationType.CONCAT
        return optax.microbatch(tower, 1, len(x) // n, concat)(params, x)

    ours = optaccum.microbatched(tower, num_microbatches=n)
    return {FULL_BATCH: tower, OURS: ours, REMAT: in_map, CONCAT: in_concat}


def make_steps(tower: Tower, n: int) -> dict[str, Callable[..., Any]]:
    """Returns `(params, batch) -> (loss, gradient)` for each contender."""

    def loss_of(encode):
        return lambda params, batch: contrast(*map(encode, params, batch))

    steps = {name: jax.value_and_grad(loss_of(x)) for name, x in encoders(tower, n).items()}
    naive = optaccum.value_and_grad(loss_of(tower), num_microbatches=n)
    return steps | {VALUE_AND_GRAD: naive}


def relative_error(found: Any, expected: Any) -> float:
    """Returns the distance of two trees in the norm of the second, in float32."""
    found, expected = (optax.tree.cast(tree, jnp.float32) for tree in (found, expected))
    return float(optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected))


def drift() -> list[dict[str, Any]]:
    """Returns how far bfloat16 gradients, summed row by row, are from those by one product."""
    x = np.random.default_rng(2).normal(size=(DRIFT_MICROBATCHES, CONFIG.width))
    x, params = jnp.asarray(x, jnp.bfloat16), make_mlp(jnp.bfloat16)

    def grads(encode):
        return jax.jit(jax.grad(lambda p: jnp.mean(encode(p, x).astype(jnp.float32) ** 2)))(params)

    found = {name: grads(encode) for name, encode in encoders(mlp, DRIFT_MICROBATCHES).items()}
    whole = found.pop(FULL_BATCH)
    return [{"name": x, "relative_error": relative_error(one, whole)} for x, one in found.items()]


def rows_of_model(scale: int, tower: Tower, one: Any, batch: Any) -> Iterator[dict[str, Any]]:
    """Yields the figures of each contender with towers of one kind."""
    pairs, n, rounds, _, doublings = SIZES[scale]
    given = (one, one), list(batch)

    def compiled(name, rows):
        shapes = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in batch]
        step = make_steps(tower, max(n * rows // pairs, 1))[name]
        return jax.jit(step).lower(given[0], shapes).compile()

    found: Any = {name: compiled(name, pairs) for name in make_steps(tower, n)}
    turns = {name: functools.partial(program, *given) for name, program in found.items()}
    results = {name: turn() for name, turn in turns.items()}
    seconds = take_turns(turns, rounds)
    budget, (loss, grads) = BUDGET_FACTOR * peak_bytes(found[OURS]), results[FULL_BATCH]
    for name, program in progress(found.items(), "Compiling larger batches"):
        peak_of = lambda rows, x=name: peak_bytes(compiled(x, rows))  # noqa: E731
        largest, capped = largest_batch(peak_of, pairs, peak_bytes(program), budget, doublings)
        yield {
            **{"name": name, "largest_batch": largest, "capped": capped},
            "loss_error": abs(float(results[name][0] / loss) - 1),
            "gradient_error": relative_error(results[name][1], grads),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            **ratios(seconds, name, {"time_to_full_batch": FULL_BATCH}),
        }


def measure(scale: int) -> Iterator[Result]:
    pairs, n, rounds, layers, _ = SIZES[scale]
    result: Result = {"rows": pairs, "num_microbatches": n, "rounds": rounds}
    result |= {"budget_factor": BUDGET_FACTOR, "drift": drift(), "models": []}
    for model, task in make_tasks(pairs, layers).items():
        for row in rows_of_model(scale, *task):
            result["models"].append({"model": model} | row)
            yield result


def tables(result: Result) -> dict[str, str]:
    """Returns one table of all models, and one of the drift."""
    columns = {
        "model": ("model",),
        "contender": name_of,
        "error of loss": ("loss_error", "{:.1e}"),
        "of gradient": ("gradient_error", "{:.1e}"),
        "temp. MB": ("temporary_bytes", "{:,.1f}", 1e6),
        "time to full batch": ("time_to_full_batch",),
        "batch that fits": functools.partial(fitting, name="largest_batch"),
    }
    drifts = {"contender": name_of, "relative error": ("relative_error", "{:.4f}")}
    note = (
        f"{result['rows']} pairs in {result['num_microbatches']} microbatches. The batch that fits "
        f"is in {result['budget_factor']:g} times the peak memory of optaccum.microbatched, with "
        f"microbatches of one size. {where(result)}"
    )
    models = table(rows_of(result["models"], columns))
    return {"coupled": f"{models}\n\n{table(rows_of(result['drift'], drifts), note)}"}
