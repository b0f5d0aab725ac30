"""Train two towers with a contrastive loss, in a batch that is eight times what fits.

Which lower half of a handwritten digit belongs to which upper half? One tower embeds the upper
halves of a batch and one the lower halves, and the loss compares every upper half with every lower
half. Training runs on the full batch, on microbatches by `optaccum.microbatched`, and on
microbatches whose gradients are averaged. The first two agree to float32 rounding. The third
compares only within microbatches, which is a different loss.
"""

import argparse
from collections.abc import Callable, Mapping
import itertools
from pathlib import Path
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
from rich import box, filesize
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaccum

BATCH_SIZE = 1024
WIDTHS = 32, 384, 384, 64
FULL_BATCH, COUPLED, NAIVE = "full batch", "microbatched", "averaged gradients"


class Result(NamedTuple):
    params: Any
    losses: list[float]
    loss: float
    accuracy: float
    distances: list[float]
    temporaries: int
    seconds: float


def init(key: jax.Array) -> Any:
    """Return the parameters of both towers, and the logarithm of a temperature."""

    def tower(key):
        shapes = [*itertools.pairwise(WIDTHS)]
        keys = zip(jax.random.split(key, len(shapes)), shapes, strict=True)
        return [jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5 for key, shape in keys]

    upper, lower = jax.random.split(key)
    return {"upper": tower(upper), "lower": tower(lower), "scale": jnp.log(10.0)}


def encode(params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return a unit vector for each upper and each lower half."""

    def embed(layers, x):
        *hidden, last = layers
        for w in hidden:
            x = jax.nn.gelu(x @ w)
        x = x @ last
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    return {name: embed(params[name], x) for name, x in batch.items()}


def contrast(z: dict[str, jax.Array], scale: jax.Array) -> jax.Array:
    """Return CLIP's loss: each half must find its other half among all of them."""
    similarity = jnp.exp(scale) * z["upper"] @ z["lower"].T
    labels = jnp.arange(len(similarity))
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()
        for x in (similarity, similarity.T)
    ]
    return (losses[0] + losses[1]) / 2


def full_loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return contrast(encode(params, batch), params["scale"])


def make_ways(n: int) -> dict[str, Callable[..., Any]]:
    """Return, for each way, a function of parameters and batch that returns loss and gradient."""
    in_microbatches = optaccum.microbatched(encode, num_microbatches=n)

    def coupled_loss(params, batch):
        return contrast(in_microbatches(params, batch), params["scale"])

    return {
        FULL_BATCH: jax.value_and_grad(full_loss),
        COUPLED: jax.value_and_grad(coupled_loss),
        # The trap: a half finds its other half within its microbatch, which is n times easier.
        NAIVE: optaccum.value_and_grad(full_loss, num_microbatches=n),
    }


def read_halves() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the halves of the digits to train on, and of the digits to test on."""
    images, _ = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    parts: Any = train_test_split(images, test_size=0.2, random_state=0)
    train, test = (
        {"upper": x[:, :4].reshape(-1, 32), "lower": x[:, 4:].reshape(-1, 32)} for x in parts
    )
    return train, test


def train_all(n: int, steps: int) -> dict[str, Result]:
    """Train in all three ways, on the same halves in the same order."""
    train, test = read_halves()
    rng = np.random.default_rng(0)
    batches = [rng.permutation(len(train["upper"]))[:BATCH_SIZE] for _ in range(steps)]
    results: dict[str, Result] = {}
    reference: list[Any] = []

    @jax.jit
    def judge(params, rows):
        z = encode(params, test)
        found = (z["upper"] @ z["lower"].T).argmax(axis=1) == jnp.arange(len(z["upper"]))
        return full_loss(params, rows), found.mean()

    # Accelerators may round float32 products coarsely, and differently for each batch size.
    with Progress() as progress, jax.default_matmul_precision("highest"):
        for name, value_and_grad in make_ways(n).items():
            task = progress.add_task(name, total=steps)
            tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.1)

            def step(params, state, batch, value_and_grad=value_and_grad, tx=tx):
                loss, grads = value_and_grad(params, batch)
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state, loss

            params = init(jax.random.key(0))
            state = tx.init(params)
            rows = jax.tree.map(lambda x: x[batches[0]], train)
            program: Any = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, rows).compile()
            losses, distances, seconds = [], [], 0.0
            for i, chosen in enumerate(batches):
                rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], train)
                start = time.perf_counter()
                params, state, loss = jax.block_until_ready(program(params, state, rows))
                seconds += time.perf_counter() - start
                losses.append(float(loss))
                if name == FULL_BATCH:
                    reference.append(jax.device_get(params))
                difference = optax.tree.sub(params, reference[i])
                distances.append(float(optax.tree.norm(difference, ord="inf")))
                progress.advance(task)
            temporaries = program.memory_analysis().temp_size_in_bytes
            loss, found = map(float, judge(params, rows))
            results[name] = Result(params, losses, loss, found, distances, temporaries, seconds)
    return results


def print_table(results: dict[str, Result]) -> None:
    table = Table("", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for header in ("reported", "loss", "found", "max |Δp|", "temporaries", "time"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, result in results.items():
        cells = f"{result.losses[-1]:.4f}", f"{result.loss:.6f}", f"{result.accuracy:.1%}"
        cells += f"{result.distances[-1]:.2g}", filesize.decimal(result.temporaries)
        table.add_row(name, *cells, f"{result.seconds:.1f} s")
    Console().print(table)


def draw(results: dict[str, Result], n: int, output: Path) -> None:
    """Draw each line thinner than the line below it, so that equal lines all show."""
    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = [("#9fd3f3", 8, "-"), ("black", 1.5, "--"), ("#d55e00", 1.7, "-")]
    for (name, result), (color, width, dash) in zip(results.items(), styles, strict=True):
        left.plot(result.losses, dash, color=color, linewidth=width, label=name)
        if name != FULL_BATCH:
            right.plot(result.distances, dash, color=color, linewidth=width, label=name)
    left.set(xlabel="gradient step", ylabel="contrastive loss, as it is reported")
    right.set(yscale="log", xlabel="gradient step", ylabel="distance to the full batch, max |Δp|")
    left.legend(handlelength=3.5)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"A batch of {BATCH_SIZE} pairs, whole or in {n} microbatches")
    figure.savefig(output)


def parse_args() -> argparse.Namespace:
    """Parse the command line, and raise errors before any training begins."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=80, help="gradient steps")
    add("--microbatches", type=int, default=8, help=f"microbatches; divides {BATCH_SIZE}")
    add("--output", type=Path, default=Path("clip.png"), help="where to write the figure")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"argument --steps: must be >= 1, got {args.steps}")
    if args.microbatches < 1 or BATCH_SIZE % args.microbatches:
        parser.error(f"argument --microbatches: must divide {BATCH_SIZE}, got {args.microbatches}")
    if args.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --output: must end in .png, .svg or .pdf, got {args.output}")
    try:
        is_new = not args.output.exists()
        args.output.open("ab").close()
        if is_new:  # so that a stopped run leaves no empty figure
            args.output.unlink()
    except OSError as error:
        parser.error(f"argument --output: {error}")
    return args


if __name__ == "__main__":
    args = parse_args()
    try:
        results = train_all(args.microbatches, args.steps)
    except KeyboardInterrupt:
        sys.exit(130)
    print_table(results)
    draw(results, args.microbatches, args.output)
    print(f"Wrote {args.output.resolve()}")
