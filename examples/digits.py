"""Train a small CNN on handwritten digits, with and without gradient accumulation.

The same 256 examples make one gradient step in four ways: as one batch, as equal microbatches, as
ragged microbatches, and with the optimizer outside `accumulate`, which is a mistake. The first
three agree to float32 rounding, and a microbatch needs a fraction of the full batch's temporaries.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
import sys
import time
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
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

BATCH_SIZE = 256


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.gelu(self.conv1(images[..., None]))
        x = nnx.gelu(self.conv2(x))
        return self.linear(x.reshape(x.shape[0], -1))


class Way(NamedTuple):
    """A way to take one gradient step: an optimizer, and the sizes of its microbatches."""

    name: str
    tx: optax.GradientTransformation
    sizes: list[int]


class Result(NamedTuple):
    params: Any
    losses: list[float]
    held_out: list[float]
    accuracy: float
    temporaries: int
    seconds: float


def make_ways(every_k: int, steps: int) -> list[Way]:
    """Return the four ways. The full batch is the first."""
    adamw = optax.adamw(optax.cosine_decay_schedule(3e-3, decay_steps=steps))
    equal = [BATCH_SIZE // every_k] * every_k
    ends = np.round((BATCH_SIZE - every_k) * np.linspace(0, 1, every_k + 1) ** 1.5)
    ragged = [1 + int(extra) for extra in np.diff(ends)]
    return [
        Way("full batch", adamw, [BATCH_SIZE]),
        Way("accumulate(k, adamw)", optaccum.accumulate(every_k, adamw), equal),
        Way("the same, ragged", optaccum.accumulate(every_k, adamw), ragged),
        # The trap: adamw sees every microbatch, and takes the zeros of a hold for gradients. They
        # make its moments decay, and its learning rate schedule ends k times too early.
        Way("chain(accumulate(k), adamw)", optax.chain(optaccum.accumulate(every_k), adamw), equal),
    ]


def make_train_step(model: nnx.GraphDef, tx: optax.GradientTransformation):
    """Return the jitted step that takes one microbatch. It is the same for any optimizer."""

    def loss_fn(params, images, labels, mask):
        logits = nnx.merge(model, params)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(where=mask)

    def train_step(params, opt_state, images, labels, mask):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels, mask)
        # A microbatch's gradient is the mean over its real examples. If it is weighted with their
        # number, a window's gradient is the mean over all examples, however they were split.
        params, opt_state = optaccum.apply_gradients(
            tx, grads, opt_state, params, weight=mask.sum()
        )
        return params, opt_state, loss

    # XLA pairs donated buffers with outputs in order, so return them in the order of the arguments.
    return jax.jit(train_step, donate_argnums=(0, 1))


def evaluate(model: nnx.GraphDef, params: Any, images: Any, labels: Any) -> tuple[Any, Any]:
    """Return loss and accuracy on held-out examples."""
    logits = nnx.merge(model, params)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(axis=-1) == labels).mean()


def cut_up(images: np.ndarray, labels: np.ndarray, sizes: list[int]) -> Iterator[tuple]:
    """Yield microbatches with their masks, padded to one size so that one program serves all."""
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        mask = np.arange(max(sizes)) < size
        rows = np.where(mask, end - size + np.arange(max(sizes)), 0)
        yield images[rows], labels[rows], mask


def train(way: Way, data: Any, batches: list[np.ndarray], advance: Callable) -> Result:
    """Train a CNN from the same initial parameters, one gradient step per batch."""
    images, test_images, labels, test_labels = data
    model, params = nnx.split(CNN(nnx.Rngs(0)), nnx.Param)
    opt_state = way.tx.init(params)
    example = next(cut_up(images, labels, way.sizes))
    train_step: Any = make_train_step(model, way.tx).lower(params, opt_state, *example).compile()

    test = jax.jit(evaluate, static_argnums=0)
    losses, held_out, seconds, accuracy = [], [], 0.0, 0.0
    for rows in batches:
        window, start = [], time.perf_counter()
        for microbatch in cut_up(images[rows], labels[rows], way.sizes):
            params, opt_state, loss = train_step(params, opt_state, *microbatch)
            window.append(loss)
        losses.append(float(np.average(jax.device_get(window), weights=way.sizes)))
        seconds += time.perf_counter() - start
        loss, accuracy = map(float, test(model, params, test_images, test_labels))
        held_out.append(loss)
        advance()
    temporaries = train_step.memory_analysis().temp_size_in_bytes
    return Result(params, losses, held_out, accuracy, temporaries, seconds)


def train_all(every_k: int, steps: int) -> dict[str, Result]:
    """Train in all four ways, on the same examples in the same order."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    data = train_test_split(images, labels.astype(np.int32), test_size=0.2, random_state=0)
    rng = np.random.default_rng(0)
    batches = [rng.permutation(len(data[0]))[:BATCH_SIZE] for _ in range(steps)]
    results = {}
    # `apply_gradients` rightly warns of the trap, which is set on purpose here.
    warnings.filterwarnings("ignore", "`accumulate` stands in front", UserWarning)
    # Accelerators may round float32 products coarsely, and differently for each batch size.
    with Progress() as progress, jax.default_matmul_precision("highest"):
        for way in make_ways(every_k, steps):
            task = progress.add_task(way.name, total=steps)
            results[way.name] = train(way, data, batches, lambda task=task: progress.advance(task))
    return results


def print_table(results: dict[str, Result]) -> None:
    table = Table("", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for header in ("loss", "accuracy", "max |Δp|", "temporaries", "time"):
        table.add_column(header, justify="right", no_wrap=True)
    full_batch = next(iter(results.values()))
    for name, result in results.items():
        difference = optax.tree.sub(result.params, full_batch.params)
        distance = float(optax.tree.norm(difference, ord="inf"))
        cells = f"{result.losses[-1]:.6f}", f"{result.accuracy:.1%}", f"{distance:.2g}"
        table.add_row(name, *cells, filesize.decimal(result.temporaries), f"{result.seconds:.1f} s")
    Console().print(table)


def draw_losses(results: dict[str, Result], every_k: int, output: Path) -> None:
    """Draw the losses, each line thinner than the line below it, so that equal lines all show."""
    figure = Figure(figsize=(9, 3.8), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = [("#9fd3f3", 8, "-"), ("#0072b2", 3, "-"), ("black", 1.2, "--"), ("#d55e00", 1.7, "-")]
    for (name, result), (color, width, dash) in zip(results.items(), styles, strict=True):
        style = {"color": color, "linewidth": width, "label": name}
        left.plot(result.losses, dash, **style)
        right.plot(result.held_out, dash, **style)
    for axes, title in ((left, "Training loss"), (right, "Loss on held-out digits")):
        axes.set(yscale="log", xlabel="gradient step", title=title)
        axes.grid(alpha=0.3)
    right.legend(handlelength=3.5)
    figure.suptitle(f"A batch of {BATCH_SIZE}, whole or as k = {every_k} microbatches")
    figure.savefig(output)


def parse_args() -> argparse.Namespace:
    """Parse the command line, and raise errors before any training begins."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=150, help="gradient steps")
    add("--every-k", type=int, default=8, help=f"microbatches per step; divides {BATCH_SIZE}")
    add("--output", type=Path, default=Path("digits.png"), help="where to write the figure")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"argument --steps: must be >= 1, got {args.steps}")
    if args.every_k < 1 or BATCH_SIZE % args.every_k:
        parser.error(f"argument --every-k: must divide {BATCH_SIZE}, got {args.every_k}")
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
        results = train_all(args.every_k, args.steps)
    except KeyboardInterrupt:
        sys.exit(130)
    print_table(results)
    draw_losses(results, args.every_k, args.output)
    print(f"Wrote {args.output.resolve()}")
