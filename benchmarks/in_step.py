"""Accumulate inside one step: time, temporaries and compile time beside a scan written by hand.

A step gets the whole batch: forward, backward, accumulate and AdamW in one program, compiled ahead
of time with the parameters and the optimizer's state donated; for `apply_gradients` it is one
call a microbatch. All start from the same parameters, see the same tokens, and after two steps
have to agree with AdamW on the full batch. Then they take turns. `--output` writes, as JSON::

    benchmark, date, device, versions      as of every benchmark
    preset, parameters, leaves, dtype      the model, and what it computes in
    num_microbatches, microbatch           microbatches a batch, sequences a microbatch
    sequence, rounds                       tokens a sequence, timed rounds
    left_out                               {contender: why it is not here}
    reference                              the contender that the others have to agree with
    contenders: a list, and for each
        name, agrees                       what it is, and whether it agrees (null: it did not run)
        error                              its largest error, 1 being what rounding explains
        time_to_hand_written               time in that of the scan by hand {q1, median, q3}; null
                                           if one of them did not run, as the next two
        time_to_microbatch                 the same in that of optax.microbatch
        time_to_full_batch                 the same in that of the full batch
        compile_to_hand_written            time to trace and compile, in that of the scan by hand
        temporary_bytes                    of its hungriest program
        peak_bytes                         arguments + outputs - aliased + temporaries
    budget_bytes                           the memory that the next table is about
    largest: a list, and for each
        name, microbatch                   sequences a microbatch, or null for the whole batch
        batch                              the largest power of two of sequences that fits, or 0
        capped                             whether the search ended before the budget did
    drift: a list, and for each
        name, relative_error               of the gradient of a bfloat16 model over 1,024
                                           microbatches, largest, to its mean in float64
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness, in_step_tables, scaling_tables, trainers, transformer
from benchmarks.train_step import DEFAULTS, largest_batch
import optaccum

FULL_BATCH, HAND_WRITTEN, MICROBATCH = trainers.FULL_BATCH, "hand-written scan", "optax.microbatch"
IN_STEP, CROSS_CALL = "optaccum.value_and_grad", trainers.APPLY_GRADIENTS
DRIFT_MICROBATCHES = 1024

Transform = Callable[[Callable[..., Any], int], Callable[..., tuple[Any, Any]]]


def by_hand(loss_fn: Callable[..., Any], n: int) -> Callable[..., tuple[Any, Any]]:
    """The usual scan over microbatches, that sums in the dtype of the parameters."""

    def value_and_grad(params, batch):
        def body(sums, microbatch):
            return jax.tree.map(
                jnp.add, sums, jax.value_and_grad(loss_fn)(params, microbatch)
            ), None

        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        sums, _ = lax.scan(body, zeros, batch.reshape(n, -1, *batch.shape[1:]))
        return jax.tree.map(lambda x: x / n, sums)

    return value_and_grad


def by_optax(loss_fn: Callable[..., Any], n: int) -> Callable[..., tuple[Any, Any]]:
    """`optax.microbatch` with the accumulator that means what the full batch means."""

    def value_and_grad(params, batch):
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatch(jax.value_and_grad(loss_fn), 1, len(batch) // n, mean)(
            params, batch
        )

    return value_and_grad


def in_step(loss_fn: Callable[..., Any], n: int) -> Callable[..., tuple[Any, Any]]:
    """`optaccum.value_and_grad`."""
    return optaccum.value_and_grad(loss_fn, num_microbatches=n)


def transforms() -> tuple[dict[str, Transform], dict[str, str]]:
    """Returns the contenders that take the whole batch, and why others are left out."""
    found: dict[str, Transform] = {FULL_BATCH: lambda loss_fn, n: jax.value_and_grad(loss_fn)}
    left_out = {}
    if hasattr(optax, "microbatch"):
        found[MICROBATCH] = by_optax
    else:
        left_out[MICROBATCH] = f"optax {harness.origin('')['versions']['optax']} has none"
    found |= {HAND_WRITTEN: by_hand, IN_STEP: in_step}
    return found, left_out


class Stepper(trainers.Trainer):
    """A contender that takes the whole batch, compiled for one model and one batch size."""

    def __init__(
        self,
        name: str,
        transform: Transform,
        graph: Any,
        params: Any,
        shape: tuple[int, int],
        num_microbatches: int,
        optimized: bool = True,
    ):
        """Compiles the step; the arguments are those of `trainers.Trainer`."""

        def loss_fn(params, tokens):
            return transformer.mean_loss(nnx.merge(graph, params), tokens)

        def step(params, opt_state, tokens):
            loss, grads = transform(loss_fn, num_microbatches)(params, tokens)
            updates, opt_state = trainers.INNER.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        options: dict[str, str | bool] = {}
        if not optimized and jax.default_backend() == "cpu":
            options["xla_backend_optimization_level"] = "0"
        self.name, self.init = name, trainers.INNER.init
        shapes = jax.eval_shape(lambda params: (params, self.init(params)), params)
        tokens = jax.ShapeDtypeStruct((shape[0], shape[1] + 1), jnp.int32)
        step = jax.jit(step, donate_argnums=(0, 1))
        self.programs = [step.lower(*shapes, tokens).compile(options)]
        self.peak_bytes = trainers.peak_bytes(self.programs[0])


def drift() -> list[dict[str, Any]]:
    """Returns how far each gradient of a bfloat16 model is from the mean of its microbatches'.

    A microbatch is one row, and its row is its gradient: all error is that of accumulating.
    """
    found, _ = transforms()
    noise = np.random.default_rng(0).normal(size=(DRIFT_MICROBATCHES, 64))
    rows = jnp.asarray(0.01 * (1 + 0.1 * noise), jnp.bfloat16)
    exact = np.asarray(rows, np.float64).mean(axis=0)

    def error(transform):
        def loss_fn(params, batch):
            return jnp.mean(batch @ params)

        step = jax.jit(transform(loss_fn, DRIFT_MICROBATCHES))
        _, grads = step(jnp.zeros(64, jnp.bfloat16), rows)
        return float(np.max(np.abs(np.asarray(grads, np.float64) / exact - 1)))

    return [{"name": name, "relative_error": error(found[name])} for name in found]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns every figure of the benchmark, ready for JSON."""
    preset = transformer.PRESETS[args.parameters]
    config = dataclasses.replace(preset, sequence=args.sequence, dtype=jnp.dtype(args.dtype))
    graph, params = transformer.build(config)
    n, batch = args.num_microbatches, args.num_microbatches * args.microbatch
    shape = (n, args.microbatch, args.sequence + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocabulary)
    found, left_out = transforms()
    calls = {c.name: c for c in trainers.make_contenders(n)}[CROSS_CALL]
    names = [*found, CROSS_CALL]

    def compiled(name, n=n, batch=batch, optimized=not args.quick):
        if name == CROSS_CALL:
            size = (batch // n, args.sequence)
            return trainers.Trainer(calls, graph, params, size, optimized)
        return Stepper(name, found[name], graph, params, (batch, args.sequence), n, optimized)

    compiling: dict[str, list[float]] = {name: [] for name in names}
    ready = {}
    for turn in harness.progress(range(args.compilations), "Compiling"):
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            ready[name] = compiled(name)
            compiling[name].append(time.perf_counter() - start)
    peaks = {name: ready[name].peak_bytes for name in names}
    sizes = {name: [p.memory_analysis() for p in ready[name].programs] for name in names}
    temporaries = {name: max(x.temp_size_in_bytes for x in sizes[name]) for name in names}
    room = trainers.device_memory("bytes_limit")
    if room and peaks[FULL_BATCH] > room:
        del ready[FULL_BATCH]
    whole = [tokens.reshape(batch, -1)]
    windows = {name: list(tokens) if name == CROSS_CALL else whole for name in names}

    trained = {
        name: trainers.train_alone(trainer, params, windows[name])[0]
        for name, trainer in harness.progress(ready.items(), "Checking")
    }
    reference = FULL_BATCH if FULL_BATCH in ready else HAND_WRITTEN
    errors = {
        name: trainers.largest_error(tree, trained[reference], params, config)
        for name, tree in trained.items()
    }

    for trainer in ready.values():
        trainer.start(params)
    turns = {name: functools.partial(ready[name].run_window, windows[name]) for name in ready}
    seconds = harness.take_turns(turns, args.rounds)

    def ratio(name, unit):
        timed = name in seconds and unit in seconds
        return harness.ratios(seconds, name, unit) if timed else None

    def figures(name):
        return {
            "name": name,
            "agrees": errors[name] <= 1 if name in errors else None,
            "error": errors.get(name),
            "time_to_hand_written": ratio(name, HAND_WRITTEN),
            "time_to_microbatch": ratio(name, MICROBATCH),
            "time_to_full_batch": ratio(name, FULL_BATCH),
            "compile_to_hand_written": harness.ratios(compiling, name, HAND_WRITTEN),
            "temporary_bytes": temporaries[name],
            "peak_bytes": peaks[name],
        }

    rows = [figures(name) for name in names]
    budget = args.budget * 1e6 if args.budget else 1.25 * peaks[IN_STEP]
    del ready, turns  # a GPU tries out kernels when it compiles, and needs room for them

    def fitting(name):
        def peak_of(size):
            count = max(size // args.microbatch, 1)
            return compiled(name, count, size, optimized=False).peak_bytes

        doublings = 1 if args.quick else 6
        size, capped = largest_batch(functools.cache(peak_of), batch, budget, doublings)
        microbatch = None if name == FULL_BATCH else args.microbatch
        return {"name": name, "microbatch": microbatch, "batch": size, "capped": capped}

    given = "num_microbatches", "microbatch", "sequence", "rounds"
    return {
        **harness.origin("in_step"),
        "preset": args.parameters,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "leaves": len(jax.tree.leaves(params)),
        "dtype": args.dtype,
        **{name: getattr(args, name) for name in given},
        "left_out": left_out,
        "reference": reference,
        "contenders": rows,
        "budget_bytes": round(budget),
        "largest": [
            fitting(name) for name in harness.progress((FULL_BATCH, IN_STEP), "Compiling larger")
        ],
        "drift": drift(),
    }


def print_tables(result: dict[str, Any]) -> None:
    """Prints the figures as tables that fit into 100 columns."""
    model = f"{result['parameters'] / 1e6:,.1f} M parameters, {result['dtype']}"
    batch = f"{result['num_microbatches']} x {result['microbatch']} sequences"
    title = f"{model}, a batch of {batch} of {result['sequence']} tokens, on {result['device']}"
    scaling_tables.print_rows(in_step_tables.step_rows(result), title)
    scaling_tables.print_rows(in_step_tables.largest_rows(result), "The largest batch")
    title = f"A bfloat16 gradient over {DRIFT_MICROBATCHES:,} microbatches"
    scaling_tables.print_rows(in_step_tables.drift_rows(result), title)
    for name, reason in result["left_out"].items():
        print(f"Left out: {name}, for {reason}.")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line, what it leaves open filled in for the device."""
    parser = harness.make_parser("in_step", (__doc__ or "").split("\n\n")[0])
    add, at_least = parser.add_argument, harness.at_least
    add("--parameters", choices=transformer.PRESETS, help="the model (10m; GPU: 350m)")
    add("--dtype", choices=("float32", "bfloat16"), help="what the model computes in (GPU: bf16)")
    add("--num-microbatches", type=at_least(2), default=8, help="microbatches a batch (8)")
    add("--microbatch", type=at_least(1), help="sequences a microbatch (1; GPU: 4)")
    add("--sequence", type=at_least(1), help="tokens a sequence (64; GPU: 1024)")
    add("--budget", type=at_least(1.0), metavar="MB", help="memory that the largest batch fits in")
    args = harness.parse_args(parser, DEFAULTS, argv)
    args.compilations = 1 if args.quick else 5
    return args


def main() -> None:
    """Runs the benchmark."""
    harness.run(parse_args(), measure, print_tables)


if __name__ == "__main__":
    main()
