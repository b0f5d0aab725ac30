"""Train a small language model on Python's documentation, and survive being stopped.

A microbatch holds paragraphs of uneven length, so its weight is its number of bytes. Training saves
checkpoints. Ctrl-C and SIGTERM save one more and exit with 130 and 143. `--resume` goes on from the
last checkpoint, even in mid-window, and ends with the same parameters, bit for bit (on an
accelerator you may have to ask for additions in a fixed order). Then the first gradient steps are
taken again in three ways: on full batches, on microbatches weighted with their bytes, and on
unweighted microbatches. The last gives the mean of means, not the gradient of the full batch.

`--noise` trains with windows that grow, and draws the gradient noise scale beside the loss.
"""

import argparse
import functools
from pathlib import Path
from pydoc_data.topics import topics
import signal
import sys
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import lm_noise
from matplotlib.figure import Figure
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
from rich.progress import Progress, TextColumn, track

import optaccum
from optaccum.flax import Optimizer

END, PADDING = 0, 1  # a token is a byte, and no text has these two
LENGTH = 128  # tokens that the model sees at once
HEAD_WIDTH = 32
SETTINGS = ("steps", "every_k", "batch_size", "width", "layers", "noise")  # resume with the same
FULL_BATCH, WEIGHTED, UNWEIGHTED = "full batch", "weight=tokens", "no weight (mean of means)"


class Block(nnx.Module):
    """Causal attention, then a perceptron."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention_in = linear(width, 3 * width)
        self.attention_out = linear(width, width)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp_in = linear(width, 4 * width)
        self.mlp_out = linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.attention_in(self.attention_norm(x)).reshape(*x.shape[:2], 3, -1, HEAD_WIDTH)
        seen = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + self.attention_out(seen.reshape(x.shape))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Maps tokens, i32[batch, length], to logits of the next ones, f32[batch, length, 256]."""

    def __init__(self, width: int, layers: int, rngs: nnx.Rngs):
        self.token = nnx.Embed(256, width, rngs=rngs)
        self.position = nnx.Embed(LENGTH, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def read_paragraphs() -> tuple[np.ndarray, np.ndarray]:
    """Return the paragraphs of Python's documentation, to train on and held out, one per row.

    A row is END, the bytes, END and padding. Long paragraphs are split into several. Topics repeat
    each other's paragraphs. Each is taken once, so that none is both held out and trained on.
    """
    texts = [text.strip(b"\n") for text in "\n\n".join(topics.values()).encode().split(b"\n\n")]
    pieces = {text[i : i + LENGTH]: None for text in texts for i in range(0, len(text), LENGTH)}
    rows = np.full((len(pieces), LENGTH + 2), PADDING, np.int32)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece) + 2] = [END, *piece, END]
    held_out = np.arange(len(rows)) % 16 == 0
    return rows[~held_out, :-1], rows[held_out, :-1]


def read_microbatch(rows: np.ndarray, number: int, args: argparse.Namespace) -> np.ndarray:
    """Return a microbatch that depends only on its number, so that a resumed run reads on.

    The paragraphs of a window are sorted by length, as in loaders that cut off the padding. Here
    the padding stays, so that one program serves all microbatches, but their weights differ a lot.
    To measure the noise scale, paragraphs are not sorted: the samples must be independent.
    """
    window, i = divmod(number, args.every_k)
    size = args.every_k * args.batch_size
    drawn = rows[np.random.default_rng(window).choice(len(rows), size, replace=False)]
    if args.noise:
        return drawn[i * args.batch_size : (i + 1) * args.batch_size]
    order = np.argsort((drawn != PADDING).sum(axis=1), kind="stable")
    return drawn[order[i * args.batch_size : (i + 1) * args.batch_size]]


def loss_fn(model: LanguageModel, rows: Any) -> tuple[jax.Array, jax.Array]:
    """Return the mean loss over the tokens to predict, in nats, and their number."""
    logits, targets = model(rows[:, :-1]), rows[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    real = targets != PADDING
    return losses.mean(where=real), real.sum()


@functools.partial(nnx.jit, donate_argnums=(0, 1), static_argnames="weighted")
def train_step(
    model: LanguageModel, optimizer: Optimizer, rows: Any, weighted: bool, noise: Any = None
):
    """Take one microbatch. Return its loss, number of tokens and, if passed, the noise scale."""
    (loss, tokens), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, rows)
    optimizer.update(model, grads, weight=tokens if weighted else None, loss=loss)
    if noise is not None:
        state = optimizer.opt_state
        noise = optaccum.update_noise_scale(noise, grads, state, weight=tokens)
    return loss, tokens, noise


evaluate = nnx.jit(loss_fn)
predict = nnx.jit(lambda model, tokens: model(tokens))


def make_optimizer(model: LanguageModel, args: argparse.Namespace, whole: bool = False):
    """Return an optimizer that steps once per window or, for whole batches, in every call."""
    # Inside `accumulate` it clips the mean of a window, and its schedule counts gradient steps.
    schedule = optax.cosine_decay_schedule(5e-3, decay_steps=args.steps)
    length = functools.partial(lm_noise.window_length, every_k=args.every_k, steps=args.steps)
    rate = (lambda i: schedule(i) * jnp.sqrt(length(i) / args.every_k)) if args.noise else schedule
    # With Adam's usual 1e-8, a gradient that is only a rounding error would make a whole step.
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, eps=1e-6))
    tx = optaccum.accumulate(
        length if args.noise else args.every_k,
        inner,
        should_skip_update_fn=optax.skip_not_finite,
        metrics=("loss",),
    )
    return Optimizer(model, optax.with_extra_args_support(inner) if whole else tx, wrt=nnx.Param)


def catch_signals() -> list[int]:
    """Collect SIGINT and SIGTERM in a list, which loops read when nothing is half done."""
    caught: list[int] = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def train(model: LanguageModel, rows: np.ndarray, args: argparse.Namespace, caught: list[int]):
    """Train from the last checkpoint, if any, to the end, and save checkpoints on the way.

    Returns the windows of this run, if their noise is measured.
    """
    optimizer = make_optimizer(model, args)
    columns = *Progress.get_default_columns(), TextColumn("{task.fields[report]}")
    run = {"model": model, "optimizer": optimizer}
    noise = optaccum.init_noise_scale() if args.noise else None
    start, last, windows = 0, args.steps * args.every_k, []
    if args.noise:
        steps = np.arange(args.steps)
        last = int(lm_noise.window_length(steps, args.every_k, args.steps).sum())
    with open_checkpoints(args.checkpoints) as checkpoints, Progress(*columns) as progress:
        if checkpoints.latest is not None:
            start = checkpoints.latest.step
            state, noise = checkpoints.load(start, (nnx.state(run), noise))
            nnx.update(run, state)
        task = progress.add_task("Training", total=last, completed=start, report="")
        tokens, since = 0, time.perf_counter()
        for number in range(start, last):
            microbatch = read_microbatch(rows, number, args)
            _, count, noise = train_step(model, optimizer, microbatch, weighted=True, noise=noise)
            tokens += count
            progress.update(task, advance=1)
            if optimizer.has_released:
                window = optaccum.window_metrics(optimizer.opt_state)
                loss, speed = float(window["loss"]), float(tokens) / (time.perf_counter() - since)
                report = f"loss {loss:.3f}, {speed:,.0f} tokens/s"
                if noise is not None:
                    scale = float(noise.batch_size)
                    step, weight = int(window["gradient_step"]), float(window["weight"])
                    windows.append(lm_noise.Window(step, loss, weight, scale))
                    report += f", noise scale {scale:,.0f} tokens"
                progress.update(task, report=report)
                tokens, since = 0, time.perf_counter()
            done = number + 1
            if caught or done % args.save_every == 0 or done == last:
                state = nnx.state(run), noise
                checkpoints.save(done, state, force=True, custom_metadata=args.settings)
            if caught:
                progress.console.print(f"Saved after microbatch {done}; go on with --resume.")
                sys.exit(128 + caught[0])
    return windows


def open_checkpoints(folder: Path) -> ocp.training.Checkpointer:
    keep: Any = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(str(folder.resolve()), preservation_policy=keep)


def compare(rows: np.ndarray, args: argparse.Namespace, caught: list[int]) -> dict[str, Any]:
    """Return {way: (losses, largest differences of a parameter from the full batch's)}."""
    ways = {}
    for name in (FULL_BATCH, WEIGHTED, UNWEIGHTED):
        model = LanguageModel(args.width, args.layers, nnx.Rngs(0))
        ways[name] = model, make_optimizer(model, args, whole=name == FULL_BATCH)
    curves = {name: ([], []) for name in ways}
    for step in track(range(args.compare_steps), "Comparing"):
        numbers = range(step * args.every_k, (step + 1) * args.every_k)
        window = [read_microbatch(rows, number, args) for number in numbers]
        for name, (model, optimizer) in ways.items():
            batches = [np.concatenate(window)] if name == FULL_BATCH else window
            weighted = name != UNWEIGHTED
            results = [train_step(model, optimizer, batch, weighted=weighted) for batch in batches]
            losses, tokens, _ = zip(*jax.device_get(results), strict=True)
            params, exact = (nnx.state(m, nnx.Param) for m in (model, ways[FULL_BATCH][0]))
            distance = optax.tree.norm(optax.tree.sub(params, exact), ord="inf")
            curves[name][0].append(np.average(losses, weights=tokens))
            curves[name][1].append(float(distance))
        if caught:
            sys.exit(128 + caught[0])
    return curves


def draw(curves: dict[str, Any], every_k: int, output: Path) -> None:
    """Draw losses and distances, each line thinner than the line below it so that all show."""
    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = [("#9fd3f3", 7), ("#0072b2", 2), ("#d55e00", 2)]
    for (name, (losses, distances)), (color, width) in zip(curves.items(), styles, strict=True):
        steps, few = np.arange(1, len(losses) + 1), min(10, len(losses))
        smooth = np.convolve(losses, np.ones(few) / few, mode="valid")
        left.plot(steps[few - 1 :], smooth, color=color, linewidth=width, label=name)
        if name != FULL_BATCH:
            right.plot(steps, distances, color=color, linewidth=2, label=name)
    left.set(xlabel="gradient step", ylabel="nats per byte, mean of 10 steps")
    left.set_title("Training loss")
    right.set(xlabel="gradient step", ylabel="largest difference of a parameter", yscale="log")
    right.set_title(f"k = {every_k} microbatches against the full batch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output)


def write_paragraph(model: LanguageModel) -> str:
    """Return a paragraph by the model, with each byte drawn from its predictions."""
    tokens = np.full(LENGTH, END, np.int32)
    for i in range(LENGTH - 1):
        key = jax.random.fold_in(jax.random.key(0), i)
        tokens[i + 1] = jax.random.categorical(key, predict(model, tokens[None])[0, i] / 0.7)
        if tokens[i + 1] == END:
            break
    return bytes(tokens[tokens > PADDING].tolist()).decode(errors="replace")


def parse_args() -> argparse.Namespace:
    """Parse the command line, and raise errors before any training begins."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="gradient steps")
    add("--every-k", type=int, default=4, help="microbatches per gradient step")
    add("--batch-size", type=int, default=4, help="paragraphs per microbatch")
    add("--width", type=int, default=64, help=f"of the model; a multiple of {HEAD_WIDTH}")
    add("--layers", type=int, default=2, help="of the model")
    add("--save-every", type=int, default=500, help="microbatches per checkpoint")
    add("--compare-steps", type=int, default=100, help="gradient steps to compare; 0 for none")
    add("--checkpoints", type=Path, default=Path("lm-checkpoints"), help="where to keep them")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--noise", action="store_true", help="measure the noise scale, draw it, compare nothing")
    add("--output", type=Path, default=Path("lm.png"), help="where to write the figure")
    args = parser.parse_args()
    for name in (*SETTINGS, "save_every", "compare_steps"):
        value, least = getattr(args, name), 0 if name in ("compare_steps", "noise") else 1
        if value < least:
            parser.error(f"argument --{name.replace('_', '-')}: must be >= {least}, got {value}")
    if args.width % HEAD_WIDTH:
        parser.error(f"argument --width: must be a multiple of {HEAD_WIDTH}, got {args.width}")
    if args.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --output: must end in .png, .svg or .pdf, got {args.output}")
    args.settings, found = {name: getattr(args, name) for name in SETTINGS}, None
    if args.checkpoints.is_dir():
        with open_checkpoints(args.checkpoints) as checkpoints:
            if checkpoints.latest is not None:
                found = checkpoints.metadata(checkpoints.latest).custom_metadata
    if found and not args.resume:
        parser.error(f"argument --checkpoints: {args.checkpoints} holds a run; delete or --resume")
    if args.resume and found != args.settings:
        holds = f"a run of {found}, not {args.settings}" if found else "no checkpoint"
        parser.error(f"argument --resume: {args.checkpoints} holds {holds}")
    try:
        is_new = not args.output.exists()
        args.output.open("ab").close()
        if is_new:  # so that a stopped run leaves no empty figure
            args.output.unlink()
    except OSError as error:
        parser.error(f"argument --output: {error}")
    return args


if __name__ == "__main__":
    args, caught = parse_args(), catch_signals()
    rows, held_out = read_paragraphs()
    # Accelerators may round float32 products coarsely, and differently for each batch size.
    with jax.default_matmul_precision("highest"):
        model = LanguageModel(args.width, args.layers, nnx.Rngs(0))
        windows = train(model, rows, args, caught)
        bits = float(evaluate(model, held_out)[0]) / np.log(2)
        print(f"Held out: {bits:.3f} bits per byte. It writes:\n\n{write_paragraph(model)}\n")
        if args.noise and windows:
            lm_noise.draw(windows, args.output)
            print(f"Noise scale: {windows[-1].noise_scale:,.0f} bytes. A step had", end=" ")
            print(f"{windows[-1].tokens:,.0f}. Wrote {args.output.resolve()}")
        elif args.compare_steps:
            curves = compare(rows, args, caught)
            draw(curves, args.every_k, args.output)
            for name, (losses, distances) in curves.items():
                print(f"{name}: loss {losses[-1]:.4f}, parameters", end=" ")
                print(f"within {distances[-1]:.1e} of the full batch's")
            print(f"Wrote {args.output.resolve()}")
