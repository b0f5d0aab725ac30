"""Losses that compare rows: the gradient of a contrastive loss, whole and in microbatches.

Two towers embed pairs, and the loss compares every pair with every other. Each contender returns
its loss and gradient. The JSON:

    benchmark, date, device, versions      as of every benchmark
    rows, num_microbatches, rounds         the batch, and how it is divided
    budget_factor                          memory for the largest batch, in our peak on this one
    models[]                               for each model and contender
      model, name                          which
      loss_error, gradient_error           relative, to the full batch; the gradient's in its norm
      temporary_bytes                      of the compiled program
      time_to_full_batch                   {q1, median, q3}
      largest_batch, capped                rows that fit, and whether the search was cut short
"""

import argparse
from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from benchmarks import harness, training
from benchmarks.contenders import FULL_BATCH, VALUE_AND_GRAD
from benchmarks.programs import peak_bytes
from benchmarks.tables import Table, median, where
import optaccum

OURS, REMAT, CONCAT = "optaccum.microbatched", "lax.map(checkpoint)", "optax.microbatch, CONCAT"
WIDTH, TOKENS, HEADS, EMBEDDING, LAYERS = 256, 32, 4, 128, 4
DEFAULTS = {  # quick, CPU, GPU or TPU
    "rows": (32, 256, 4096),
    "rounds": (1, 9, 15),
    "doublings": (1, 3, 4),
}


def normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / shape[-2] ** 0.5


def mlp_params(key: jax.Array) -> Any:
    sizes = (WIDTH, 2 * WIDTH), (2 * WIDTH, 2 * WIDTH), (2 * WIDTH, EMBEDDING)
    return [normal(key, *size) for key, size in zip(jax.random.split(key, 3), sizes, strict=True)]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    x = x[:, 0]
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def transformer_params(key: jax.Array) -> Any:
    keys = jax.random.split(key, 5)
    shapes = {
        "qkv": (LAYERS, WIDTH, 3 * WIDTH),
        "out": (LAYERS, WIDTH, WIDTH),
        "up": (LAYERS, WIDTH, 4 * WIDTH),
        "down": (LAYERS, 4 * WIDTH, WIDTH),
    }
    blocks = {name: normal(k, *s) for k, (name, s) in zip(keys[1:], shapes.items(), strict=True)}
    return {"blocks": blocks, "head": normal(keys[0], WIDTH, EMBEDDING)}


def transformer(params: Any, x: jax.Array) -> jax.Array:
    def block(x, p):
        y = jax.nn.standardize(x) @ p["qkv"]
        q, k, v = jnp.split(y.reshape(*y.shape[:2], HEADS, -1), 3, axis=-1)
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"], None

    x, _ = lax.scan(block, x, params["blocks"])
    return x.mean(axis=1) @ params["head"]


MODELS = {"mlp": (mlp_params, mlp), "transformer": (transformer_params, transformer)}


def contrast(z: jax.Array, other: jax.Array) -> jax.Array:
    z, other = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (z, other))
    similarity = 10 * z @ other.T
    return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity))


def in_map(tower: Callable[..., Any], n: int) -> Callable[..., Any]:
    """Returns the recipe of JAX: rows microbatch by microbatch, each computed again."""

    def run(params, x):
        parts = x.reshape(n, -1, *x.shape[1:])
        found = lax.map(jax.checkpoint(lambda rows: tower(params, rows)), parts)
        return found.reshape(-1, *found.shape[2:])

    return run


def in_concat(tower: Callable[..., Any], n: int) -> Callable[..., Any]:
    """Returns the forward pass of `optax.microbatch`, which JAX then differentiates."""

    def run(params, x):
        concat = optax.microbatching.AccumulationType.CONCAT  # pyright: ignore
        size = len(x) // n
        return optax.microbatch(tower, 1, size, concat)(params, x)  # pyright: ignore

    return run


def make_steps(tower: Callable[..., Any], n: int) -> dict[str, Callable[..., Any]]:
    """Returns `(params, batch) -> (loss, gradient)` for each contender."""

    def loss(encode, params, batch):
        return contrast(encode(params[0], batch[0]), encode(params[1], batch[1]))

    encoders = {
        FULL_BATCH: tower,
        OURS: optaccum.microbatched(tower, num_microbatches=n),
        REMAT: in_map(tower, n),
    }
    if hasattr(optax, "microbatch"):
        encoders[CONCAT] = in_concat(tower, n)
    steps = {
        name: jax.value_and_grad(functools.partial(loss, encode))
        for name, encode in encoders.items()
    }
    whole = functools.partial(loss, tower)
    return steps | {VALUE_AND_GRAD: optaccum.value_and_grad(whole, num_microbatches=n)}


def measure(args: argparse.Namespace) -> Iterator[harness.Result]:
    """Yields the figures of more and more models."""
    n, rows = args.num_microbatches, args.rows
    result = harness.origin("coupled") | {
        **{"rows": rows, "num_microbatches": n, "rounds": args.rounds},
        **{"budget_factor": args.budget_factor, "models": []},
    }
    keys = jax.random.split(jax.random.key(0), 4)
    for model, (make, tower) in MODELS.items():
        params = make(keys[0]), make(keys[1])
        x = jax.random.normal(keys[2], (rows, TOKENS, WIDTH))
        batch = x, x + jax.random.normal(keys[3], x.shape)

        def compiled(name, rows, n, tower=tower, params=params):
            half = jax.ShapeDtypeStruct((rows, TOKENS, WIDTH), jnp.float32)
            step: Any = jax.jit(make_steps(tower, n)[name])
            return step.lower(params, (half, half)).compile()

        programs = {name: compiled(name, rows, n) for name in make_steps(tower, n)}
        found = {name: program(params, batch) for name, program in programs.items()}
        turns = {name: functools.partial(one, params, batch) for name, one in programs.items()}
        seconds = harness.take_turns(turns, args.rounds)
        loss, grads = found[FULL_BATCH]
        budget = args.budget_factor * peak_bytes(programs[OURS])
        for name, program in programs.items():

            def peak_of(more, name=name, rows=rows, n=n, compiled=compiled):
                return peak_bytes(compiled(name, more, max(n * more // rows, 1)))

            largest, capped = training.largest_batch(peak_of, rows, budget, args.doublings)
            difference = optax.tree.norm(optax.tree.sub(found[name][1], grads))
            result["models"].append(
                {
                    **{"model": model, "name": name},
                    "loss_error": abs(float(found[name][0] / loss) - 1),
                    "gradient_error": float(difference / optax.tree.norm(grads)),
                    "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                    "time_to_full_batch": harness.ratios(seconds, name, FULL_BATCH),
                    **{"largest_batch": largest, "capped": capped},
                }
            )
            yield result


def tables(result: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns one table, of all models."""
    rows = [
        {
            "model": row["model"],
            "contender": row["name"],
            "error of loss": f"{row['loss_error']:.1e}",
            "of gradient": f"{row['gradient_error']:.1e}",
            "temp. MB": f"{row['temporary_bytes'] / 1e6:,.1f}",
            "time to full batch": median(row["time_to_full_batch"]),
            "batch that fits": f"{'≥ ' if row['capped'] else ''}{row['largest_batch']:,}",
        }
        for row in result["models"]
    ]
    note = (
        f"{result['rows']} pairs in {result['num_microbatches']} microbatches. The batch that fits "
        f"is in {result['budget_factor']:g} times the peak memory of optaccum.microbatched, with "
        f"microbatches of one size. {where(result)}"
    )
    return {"coupled": [Table(rows, "A contrastive loss", [note])]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, what it leaves open filled in for the device."""
    parser = harness.make_parser("coupled", __doc__)
    add, at_least = parser.add_argument, harness.at_least
    add("--rows", type=at_least(2), help="pairs in a batch")
    add("--num-microbatches", type=at_least(2), default=16, help="microbatches of a batch (16)")
    add("--budget-factor", type=at_least(1.0), default=2.0, help="memory for the largest batch (2)")
    add("--doublings", type=at_least(1), help="of the batch, at most")
    return harness.parse_args(parser, DEFAULTS, argv)


def main() -> None:
    """Runs the benchmark."""
    harness.run("coupled", parse_args(), measure, tables)


if __name__ == "__main__":
    main()
