"""Train a small CNN on handwritten digits with and without gradient accumulation.

The same 256 examples make one gradient step in four ways: as one batch, as equal microbatches, as
ragged microbatches, and as equal microbatches with the optimizer on the wrong side of
`accumulate`. The first three agree to float32 rounding; the microbatches need a fraction of the
memory.

    python examples/digits.py --help
"""

import argparse
from collections.abc import Callable
import os
from pathlib import Path
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.filesize import decimal
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaccum

BATCH_SIZE = 256


class CNN(nnx.Module):
    """Two convolutions and a linear layer, for 8x8 grey images."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.gelu(self.conv1(images[..., None]))
        x = nnx.gelu(self.conv2(x))
        return self.linear(x.reshape(x.shape[0], -1))


class Way(NamedTuple):
    """One way to take a gradient step from a batch: an optimizer and how the batch is cut up."""

    name: str
    tx: optax.GradientTransformation
    sizes: list[int]


class Result(NamedTuple):
    """What one training run gave."""

    params: Any
    losses: list[float]
    accuracy: float
    temporary_bytes: int
    seconds: float


def make_ways(every_k: int, steps: int) -> list[Way]:
    """Returns the four ways; the first is the reference for the others."""
    adamw = optax.adamw(optax.cosine_decay_schedule(3e-3, decay_steps=steps))
    equal = [BATCH_SIZE // every_k] * every_k
    ends = np.round((BATCH_SIZE - every_k) * (np.arange(every_k + 1) / every_k) ** 1.5)
    ragged = [1 + int(extra) for extra in np.diff(ends)]
    return [
        Way("full batch", adamw, [BATCH_SIZE]),
        Way("accumulate(k, adamw)", optaccum.accumulate(every_k, adamw), equal),
        Way("the same, ragged", optaccum.accumulate(every_k, adamw), ragged),
        # A trap: adamw runs on every microbatch. It takes a held gradient, which is zero, for a
        # real one, so its moments decay and its learning rate schedule ends k times too early.
        Way("chain(accumulate(k), adamw)", optax.chain(optaccum.accumulate(every_k), adamw), equal),
    ]


def make_train_step(model: nnx.GraphDef, tx: optax.GradientTransformation) -> Callable:
    """Returns the jitted step on one microbatch; the same for every optimizer."""

    def loss_fn(params, images, labels, mask):
        logits = nnx.merge(model, params)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(where=mask)

    def train_step(params, opt_state, images, labels, mask):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels, mask)
        # The gradient is a mean over the real examples, so their number is its weight: the
        # window's mean is then the mean over all of its examples, however they were split.
        params, opt_state = optaccum.apply_gradients(
            tx, grads, opt_state, params, weight=mask.sum()
        )
        return params, opt_state, loss

    # Donated buffers are reused in order: return params and opt_state as they were taken.
    return jax.jit(train_step, donate_argnums=(0, 1))


def microbatches(images: np.ndarray, labels: np.ndarray, sizes: list[int]):
    """Cuts one batch up, padding every microbatch to the largest size; the mask marks the rest."""
    ends = np.cumsum(sizes)
    for size, end in zip(sizes, ends, strict=True):
        mask = np.arange(max(sizes)) < size
        padded = np.where(mask, np.arange(end - size, end - size + max(sizes)), 0)
        yield images[padded], labels[padded], mask


def train(way: Way, data, batches: np.ndarray, advance: Callable[[], None]) -> Result:
    """Trains a fresh CNN, always from the same parameters, one gradient step per batch."""
    train_images, test_images, train_labels, test_labels = data
    model, params = nnx.split(CNN(nnx.Rngs(0)), nnx.Param)
    opt_state = way.tx.init(params)

    example = next(microbatches(train_images, train_labels, way.sizes))
    train_step = make_train_step(model, way.tx).lower(params, opt_state, *example).compile()
    memory = train_step.memory_analysis()

    losses = []
    start = time.perf_counter()
    for batch in batches:
        window = []
        for microbatch in microbatches(train_images[batch], train_labels[batch], way.sizes):
            params, opt_state, loss = train_step(params, opt_state, *microbatch)
            window.append(loss)
        losses.append(float(np.average(jax.device_get(window), weights=way.sizes)))
        advance()
    seconds = time.perf_counter() - start

    predictions = nnx.merge(model, params)(test_images).argmax(axis=-1)
    accuracy = float(np.mean(predictions == test_labels))
    return Result(params, losses, accuracy, memory.temp_size_in_bytes, seconds)


def train_all(every_k: int, steps: int, console: Console) -> dict[str, Result]:
    """Trains in all four ways, on the same examples in the same order."""
    digits = load_digits()
    images, labels = digits.images.astype(np.float32) / 16, digits.target.astype(np.int32)
    data = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    rng = np.random.default_rng(0)
    batches = np.stack([rng.permutation(len(data[0]))[:BATCH_SIZE] for _ in range(steps)])

    results = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        for way in make_ways(every_k, steps):
            task = progress.add_task(way.name, total=steps)
            results[way.name] = train(way, data, batches, lambda task=task: progress.advance(task))
    return results


def max_difference(a: Any, b: Any) -> float:
    """Returns the largest absolute difference between two trees of parameters."""
    return max(map(float, jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y).max(), a, b))))


def results_table(results: dict[str, Result]) -> Table:
    """Returns one row per way, compared with the first."""
    table = Table("", title="Handwritten digits, one gradient step per 256 examples")
    for header in ("final loss", "test acc.", "max |Δparam|", "temporaries", "seconds"):
        table.add_column(header, justify="right")
    full_batch = next(iter(results.values()))
    for name, result in results.items():
        difference = max_difference(result.params, full_batch.params)
        table.add_row(
            name,
            f"{result.losses[-1]:.6f}",
            f"{result.accuracy:.1%}",
            "-" if result is full_batch else f"{difference:.1e}",
            decimal(result.temporary_bytes),
            f"{result.seconds:.1f}",
        )
    return table


def draw_losses(results: dict[str, Result], every_k: int, output: Path) -> None:
    """Draws the loss curves; thinner lines lie on top, so that equal curves all show."""
    styles = (
        {"color": "#56b4e9", "linewidth": 9, "alpha": 0.55, "solid_capstyle": "round"},
        {"color": "#0072b2", "linewidth": 3.5},
        {"color": "black", "linewidth": 1.5, "linestyle": (0, (4, 3))},
        {"color": "#d55e00", "linewidth": 2},
    )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, result), style in zip(results.items(), styles, strict=True):
        axes.plot(range(1, len(result.losses) + 1), result.losses, label=name, **style)
    axes.set_yscale("log")
    axes.set_xlabel("gradient step", fontsize=13)
    axes.set_ylabel("training loss", fontsize=13)
    axes.set_title(f"One batch of {BATCH_SIZE}, or k = {every_k} microbatches", fontsize=15)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=12, handlelength=3.5, frameon=False, loc="best")
    figure.savefig(output, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; what cannot work is refused here, before any training."""
    parser = argparse.ArgumentParser(
        description="Train a small CNN on handwritten digits as one full batch, as microbatches, "
        "as ragged microbatches, and wrongly; compare the results."
    )
    parser.add_argument(
        "--steps", type=int, default=150, metavar="N", help="gradient steps (default: %(default)s)"
    )
    parser.add_argument(
        "--every-k",
        type=int,
        default=8,
        metavar="K",
        help=f"microbatches per gradient step, a divisor of {BATCH_SIZE} (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("digits.png"),
        metavar="FILE",
        help="where to write the figure of the losses (default: %(default)s)",
    )
    args = parser.parse_args()

    if args.steps < 1:
        parser.error(f"--steps must be >= 1, got {args.steps}")
    if args.every_k < 1 or BATCH_SIZE % args.every_k:
        parser.error(f"--every-k must be a positive divisor of {BATCH_SIZE}, got {args.every_k}")
    formats = Figure().canvas.get_supported_filetypes()
    if args.output.suffix[1:].lower() not in formats:
        parser.error(f"--output must end in one of {', '.join(formats)}, got {args.output}")
    target = args.output if args.output.exists() else args.output.parent
    if args.output.is_dir() or not args.output.parent.is_dir() or not os.access(target, os.W_OK):
        parser.error(f"--output cannot be written: {args.output}")
    return args


def main() -> None:
    """Trains, prints the table and writes the figure."""
    args = parse_arguments()
    console = Console()
    # On a GPU or TPU float32 products are otherwise rounded coarsely, and differently per shape.
    with jax.default_matmul_precision("highest"):
        results = train_all(args.every_k, args.steps, console)
    console.print(results_table(results))
    draw_losses(results, args.every_k, args.output)
    console.print(f"Wrote {args.output.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
