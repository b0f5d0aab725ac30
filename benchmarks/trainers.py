"""The ways to train that `benchmarks.train_step` compares: how each is built, run and checked."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import transformer
import optaccum
import optaccum.flax

# AdamW divides by sqrt(v) + eps, so a small `eps` turns the rounding of a small gradient into a
# step of full size, and hides whether the gradients were summed or averaged. This one is larger
# than the gradients: a step is nearly linear in them.
INNER = optax.adamw(1e-2, eps=0.1)
WINDOWS = 2
FULL_BATCH, MULTI_STEPS, HAND_WRITTEN = "full batch", "optax.MultiSteps", "hand-written loop"
APPLY_GRADIENTS = "optaccum.apply_gradients"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: what the tables call it.
        init: `params -> opt_state`.
        applies: for each call of a window, `(params, opt_state, grads) -> (params, opt_state)`.
    """

    name: str
    init: Callable[[Any], Any]
    applies: tuple[Callable[..., tuple[Any, Any]], ...]


def make_contenders(every_k: int) -> list[Contender]:
    """Returns all contenders, the full batch first."""

    def with_update(tx, params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def with_apply_gradients(params, opt_state, grads, release=None):
        return optaccum.apply_gradients(tx, grads, opt_state, params, release=release)

    def make_linen(params):
        return optaccum.flax.TrainState.create(apply_fn=lambda: None, params=params, tx=tx)

    def init_linen(params):
        state = make_linen(params)
        return jnp.asarray(state.step), state.opt_state

    def with_linen(params, opt_state, grads):
        step, opt_state = opt_state
        state = make_linen(params).replace(step=step, opt_state=opt_state)
        state = state.apply_gradients(grads=grads)
        return state.params, (state.step, state.opt_state)

    def init_nnx(optimizer, params):
        return nnx.split(optimizer(params, tx, wrt=nnx.Param))

    def with_nnx(params, opt_state, grads):
        optimizer = nnx.merge(*opt_state)
        optimizer.update(params, grads)  # in place: the parameters' tree will do for a model
        return params, nnx.split(optimizer)

    def init_by_hand(params):
        return INNER.init(params), optax.tree.zeros_like(params)

    def add(params, opt_state, grads):
        inner_state, sums = opt_state
        return params, (inner_state, optax.tree.add(sums, grads))

    def overwrite(params, opt_state, grads):
        return params, (opt_state[0], grads)

    def add_and_update(params, opt_state, grads):
        params, (inner_state, sums) = add(params, opt_state, grads)
        mean = optax.tree.scale(1 / every_k, sums)
        params, inner_state = with_update(INNER, params, inner_state, mean)
        return params, (inner_state, sums)

    def update_and_zero(params, opt_state, grads):
        params, (inner_state, sums) = add_and_update(params, opt_state, grads)
        return params, (inner_state, optax.tree.zeros_like(sums))

    tx, multi_steps = optaccum.accumulate(every_k, INNER), optax.MultiSteps(INNER, every_k)
    hold, release = (functools.partial(with_apply_gradients, release=x) for x in (False, True))
    update = functools.partial(with_update, tx)
    holds = every_k - 1
    return [
        Contender(FULL_BATCH, INNER.init, (functools.partial(with_update, INNER),)),
        Contender(
            MULTI_STEPS, multi_steps.init, (functools.partial(with_update, multi_steps),) * every_k
        ),
        Contender("optaccum, drop-in update", tx.init, (update,) * every_k),
        Contender(APPLY_GRADIENTS, tx.init, (with_apply_gradients,) * every_k),
        Contender("optaccum, static release", tx.init, (hold,) * holds + (release,)),
        Contender("optaccum.flax.TrainState", init_linen, (with_linen,) * every_k),
        *(
            Contender(name, functools.partial(init_nnx, optimizer), (with_nnx,) * every_k)
            for name, optimizer in {
                "optaccum.flax.Optimizer": optaccum.flax.Optimizer,
                "flax.nnx.Optimizer, drop-in": nnx.Optimizer,
            }.items()
        ),
        Contender(HAND_WRITTEN, init_by_hand, (add,) * holds + (update_and_zero,)),
        Contender(
            "hand-written, no zeroing",
            init_by_hand,
            (overwrite,) + (add,) * (holds - 1) + (add_and_update,),
        ),
    ]


class Trainer:
    """A contender, compiled for one model and one batch size."""

    def __init__(
        self,
        contender: Contender,
        graph: Any,
        params: Any,
        shape: tuple[int, int],
        optimized: bool = True,
    ):
        """Compiles each program of the window.

        Args:
            contender: the way to train.
            graph: the model without its parameters.
            params: its parameters, of which only shapes and dtypes are read.
            shape: sequences of a call, and tokens of a sequence.
            optimized: whether the CPU's code is optimised. That takes most of the time and comes
                after the memory is assigned, so the peak is the same without.
        """

        def step(apply, params, opt_state, tokens):
            def loss_of(params):
                return transformer.mean_loss(nnx.merge(graph, params), tokens)

            loss, grads = jax.value_and_grad(loss_of)(params)
            return *apply(params, opt_state, grads), loss

        batch, sequence = shape
        options: dict[str, str | bool] = {}
        if not optimized and jax.default_backend() == "cpu":
            options["xla_backend_optimization_level"] = "0"
        tokens = jax.ShapeDtypeStruct((batch, sequence + 1), jnp.int32)
        shapes = jax.eval_shape(lambda params: (params, contender.init(params)), params)
        compiled = {
            # Unused arguments are kept, or what overwrites a buffer could not be given that buffer.
            apply: jax.jit(functools.partial(step, apply), donate_argnums=(0, 1), keep_unused=True)
            .lower(*shapes, tokens)
            .compile(options)
            for apply in dict.fromkeys(contender.applies)
        }
        self.name, self.init = contender.name, contender.init
        self.programs = [compiled[apply] for apply in contender.applies]
        self.peak_bytes = max(peak_bytes(program) for program in compiled.values())

    def start(self, params: Any) -> None:
        """Makes the state for a copy of `params`."""
        self.params = jax.tree.map(jnp.array, params)
        self.opt_state = self.init(self.params)

    def run_window(self, window: list[jax.Array]) -> list[jax.Array]:
        """Trains on a window, i32[batch, sequence + 1] a program, and returns the losses."""
        losses = []
        for program, tokens in zip(self.programs, window, strict=True):
            self.params, self.opt_state, loss = program(self.params, self.opt_state, tokens)
            losses.append(loss)
        return losses


def peak_bytes(program: Any) -> int:
    """Returns the most memory that a compiled program needs, its arguments included."""
    sizes = program.memory_analysis()
    kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + kept + sizes.temp_size_in_bytes


def device_memory(name: str) -> int | None:
    """Returns an entry of the device's own account, if it keeps one."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


def train_alone(trainer: Trainer, params: Any, window: list[jax.Array]) -> tuple[Any, int | None]:
    """Returns the parameters after two windows, and the device's peak if they raised it."""
    before = device_memory("peak_bytes_in_use")
    trainer.start(params)
    for _ in range(WINDOWS):
        trainer.run_window(window)
    trained = jax.device_get(trainer.params)
    del trainer.params, trainer.opt_state
    after = device_memory("peak_bytes_in_use")
    return trained, after if after is not None and after > (before or 0) else None


def largest_error(trained: Any, expected: Any, params: Any, config: transformer.Config) -> float:
    """Returns how far `trained` is from `expected`, 1 being what rounding explains.

    A leaf's gradient has passed about 16 roundings a block. They are independent, so it is off by
    their unit times the square root of their number, and so is the step. Each window then rounds
    the new parameters to float32. The largest of all leaves counts.
    """
    unit = float(jnp.finfo(config.dtype).eps)
    if jax.default_backend() != "cpu":
        unit = max(unit, 2.0**-10)  # accelerators multiply float32 with fewer bits (TF32)
    steps_off = unit * np.sqrt(16 * config.layers)
    params_off = np.finfo(np.float32).eps * np.sqrt(WINDOWS)

    def error(x, y, start):
        x, y, start = (np.asarray(leaf, np.float64) for leaf in (x, y, start))
        allowed = steps_off * np.linalg.norm(y - start) + params_off * np.linalg.norm(y)
        return np.linalg.norm(x - y) / allowed

    return float(np.max(jax.tree.leaves(jax.tree.map(error, trained, expected, params))))
