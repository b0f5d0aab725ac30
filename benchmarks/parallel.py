"""The ways of data-parallel training that `benchmarks.collectives` compares."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax

from benchmarks import harness
from benchmarks.product_model import Tree, mean_loss, sum_of_losses, tokens_of
from benchmarks.trainers import APPLY_GRADIENTS, FULL_BATCH, INNER, MULTI_STEPS
import optaccum

AXIS = "data"
CALLS, IN_STEP = APPLY_GRADIENTS, "optaccum.value_and_grad"
CALLS_DEFERRED, IN_STEP_DEFERRED = f"{CALLS}, shard_map", f"{IN_STEP}, shard_map"
CALLS_EXPLICIT, IN_STEP_EXPLICIT = f"{CALLS}, explicit", f"{IN_STEP}, explicit"
BY_HAND = "hand-written, shard_map"
Step = Callable[..., tuple[Any, Any, Any]]


def replicated(params: Tree) -> Any:
    """Returns the spec of a state that all devices have alike."""
    return P()


def as_made(params: Tree) -> Any:
    """Returns no spec."""
    return None


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        init: `params -> opt_state`.
        steps: for each call of a window, `(params, opt_state, batch) -> (params, opt_state, loss)`.
            A single step is given the whole batch, more are given a microbatch each.
        state_specs: of the parameters, where the leaves of the state lie: a prefix of its
            tree, or None for where `init` makes them. Called under `jax.set_mesh`.
        axis_type: Auto for `jax.jit`, Explicit for that under explicit sharding, or Manual: `init`
            and the steps run in `jax.shard_map`, and the loss is that of one device.
    """

    init: Callable[[Tree], Any]
    steps: tuple[Step, ...]
    state_specs: Callable[[Tree], Any] = replicated
    axis_type: AxisType = AxisType.Auto


def make_ways(every_k: int) -> tuple[dict[str, Way], dict[str, str]]:
    """Returns the ways to train by name, the full batch first, and why others are left out."""
    multi_steps, tx = optax.MultiSteps(INNER, every_k), optaccum.accumulate(every_k, INNER)
    deferred = optaccum.accumulate(every_k, INNER, reduce_axes=AXIS)
    differentiate = jax.value_and_grad(mean_loss)
    in_step = functools.partial(
        optaccum.value_and_grad, mean_loss, num_microbatches=every_k, weight_fn=tokens_of
    )

    def with_update(tx, differentiate, params, opt_state, batch):
        loss, grads = differentiate(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def with_apply_gradients(tx, prepare, params, opt_state, batch):
        loss, grads = differentiate(prepare(params), batch)
        weight = tokens_of(params, batch)
        new, opt_state = optaccum.apply_gradients(tx, grads, opt_state, params, weight=weight)
        return new, opt_state, loss

    def in_step_explicit(params, batch):
        return in_step(reduce_axes=AXIS)(hold_back(params), batch)

    def once(tx, differentiate):
        return (functools.partial(with_update, tx, differentiate),)

    def calls(tx, prepare):
        return (functools.partial(with_apply_gradients, tx, prepare),) * every_k

    specs = functools.partial(optaccum.state_shardings, deferred, shardings=P())
    explicit, manual = AxisType.Explicit, AxisType.Manual
    ways = {
        FULL_BATCH: Way(INNER.init, once(INNER, differentiate)),
        MULTI_STEPS: Way(multi_steps.init, once(multi_steps, differentiate) * every_k),
        CALLS: Way(tx.init, calls(tx, lambda params: params)),
        CALLS_DEFERRED: Way(deferred.init, calls(deferred, vary), specs, manual),
        CALLS_EXPLICIT: Way(deferred.init, calls(deferred, hold_back), as_made, explicit),
        IN_STEP: Way(INNER.init, once(INNER, in_step())),
        IN_STEP_DEFERRED: Way(INNER.init, once(INNER, in_step(reduce_axes=AXIS)), axis_type=manual),
        IN_STEP_EXPLICIT: Way(INNER.init, once(INNER, in_step_explicit), as_made, explicit),
        BY_HAND: by_hand(every_k),
    }
    left_out = {}
    if not hasattr(jax, "reshard"):
        version = harness.origin("")["versions"]["jax"]
        for name in (CALLS_EXPLICIT, IN_STEP_EXPLICIT):
            del ways[name]
            left_out[name] = f"jax {version} has no unreduced gradients"
    return ways, left_out


def by_hand(every_k: int) -> Way:
    """Returns the loop that a careful engineer would write.

    Each device adds up its gradients of summed losses and its tokens: the first microbatch
    overwrites the old sums, and the program of the last one has the only reduction.
    """

    def differentiate(params, batch):
        loss, grads = jax.value_and_grad(sum_of_losses)(vary(params), batch)
        return loss, (grads, tokens_of(params, batch))

    def load(state):
        return jax.tree.map(lambda x: x[0], state["sums"])

    def store(inner_state, sums):
        return {"inner": inner_state, "sums": jax.tree.map(lambda x: x[None], sums)}

    def init(params):
        return store(INNER.init(params), vary((params, jnp.zeros(()))))

    def overwrite(params, state, batch):
        loss, sums = differentiate(params, batch)
        return params, store(state["inner"], sums), loss

    def add(params, state, batch):
        loss, sums = differentiate(params, batch)
        return params, store(state["inner"], optax.tree.add(load(state), sums)), loss

    def release(params, state, batch):
        _, state, loss = add(params, state, batch)
        grads, tokens = lax.psum(load(state), AXIS)
        mean = optax.tree.scale(1 / jnp.maximum(tokens, 1), grads)
        updates, inner_state = INNER.update(mean, state["inner"], params)
        return optax.apply_updates(params, updates), state | {"inner": inner_state}, loss

    steps = (overwrite,) + (add,) * (every_k - 2) + (release,)
    return Way(init, steps, lambda _: {"inner": P(), "sums": P(AXIS)}, AxisType.Manual)


def vary(tree: Tree) -> Tree:
    """Returns replicated parameters such that each device keeps its own part of their gradients."""
    if hasattr(lax, "pcast"):
        return jax.tree.map(lambda x: lax.pcast(x, AXIS, to="varying"), tree)
    return jax.tree.map(lambda x: getattr(lax, "pvary")(x, AXIS), tree)  # noqa: B009  (jax 0.7.2)


def hold_back(tree: Tree) -> Tree:
    """Returns replicated parameters such that their gradients stay unreduced."""
    return jax.tree.map(
        lambda x: jax.reshard(x, P(*[None] * x.ndim, reduced=frozenset({AXIS}))), tree
    )


class Runner:
    """A way to train, compiled for one model and one window."""

    def __init__(
        self,
        way: Way,
        params: Tree,
        window: list[dict[str, Any]],
        optimized: bool = True,
    ):
        """Compiles each program of the window, the parameters and the state donated.

        Args:
            way: the way to train.
            params: the parameters, on the host.
            window: its microbatches, on the host; all devices share their rows.
            optimized: whether the CPU's code is optimised. That comes after the collectives are
                placed, so they are the same without.
        """
        manual, explicit = (way.axis_type is x for x in (AxisType.Manual, AxisType.Explicit))
        kind = AxisType.Explicit if explicit else AxisType.Auto
        mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(kind,))
        self.replicated, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
        if len(way.steps) == 1:
            window = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *window)]
        self.window = jax.device_put(window, rows)
        options: dict[str, str | bool] = {}
        if not optimized and jax.default_backend() == "cpu":
            options["xla_backend_optimization_level"] = "0"

        def place(f, in_specs, out_specs, **rest):
            if manual:
                f = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
            named = functools.partial(NamedSharding, mesh)
            return jax.jit(f, out_shardings=jax.tree.map(named, out_specs), **rest)

        def compile(f, *args):
            return f.lower(*args).compile(options)

        def with_loss(step, params, opt_state, batch):
            params, opt_state, loss = step(params, opt_state, batch)
            return params, opt_state, loss[None] if manual else loss

        with jax.set_mesh(mesh):
            state_specs, loss_spec = way.state_specs(params), P(AXIS) if manual else P()
            in_specs, out_specs = (P(), state_specs, P(AXIS)), (P(), state_specs, loss_spec)
            self.init = compile(place(way.init, P(), state_specs), self._put(params))
            shapes = self._put(params), self.init(self._put(params)), self.window[0]
            compiled = {
                step: compile(
                    place(
                        functools.partial(with_loss, step),
                        in_specs,
                        out_specs,
                        # Kept, or what overwrites a buffer could not be given that buffer.
                        donate_argnums=(0, 1),
                        keep_unused=True,
                    ),
                    *shapes,
                )
                for step in dict.fromkeys(way.steps)
            }
        self.programs = [compiled[step] for step in way.steps]

    def start(self, params: Tree) -> None:
        """Makes the state for a copy of `params`."""
        self.params = self._put(params)
        self.opt_state = self.init(self.params)

    def run_window(self) -> list[jax.Array]:
        """Trains on the window and returns the losses."""
        losses = []
        for program, batch in zip(self.programs, self.window, strict=True):
            self.params, self.opt_state, loss = program(self.params, self.opt_state, batch)
            losses.append(loss)
        return losses

    def _put(self, params: Tree) -> Tree:
        return jax.device_put(params, self.replicated)
