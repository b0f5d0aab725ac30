"""Train states of Flax that accumulate: `TrainState` for linen, `Optimizer` for nnx.

Change the import, build `tx` with :func:`optaccum.accumulate`, and call the training step once for
each microbatch. What changes from call to call and what changes from window to window:

* **Learning-rate schedules** inside `inner` count windows: `optax.cosine_decay_schedule(1e-3,
  steps)` spans `steps * k` calls.
* **Hyperparameters** that `optax.inject_hyperparams` keeps are those of the last release:
  `optaccum.get_state(state.opt_state).inner_state.hyperparams["learning_rate"]`.
* **Averages of parameters** must move once per window, as only a release changes parameters::

      ema = jax.lax.cond(
          state.has_released,
          lambda: optax.incremental_update(state.params, ema, step_size=1e-3),
          lambda: ema,
      )

  An average that is kept inside `inner` moves by itself and costs a hold nothing. `optax.ema` is
  none: it averages updates.
* **Keys** are folded from `step`, which counts calls. A count of the optimizer's stands still
  within a window, so that its microbatches would share their noise.
* **BatchNorm** computes with, and averages, the statistics of each microbatch. Its averages move
  with every call, `state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])` in
  linen and by themselves in nnx: for a momentum of m a window pass m ** (1 / k).

A state of `optax.MultiSteps`, from a checkpoint of Flax's train states, is taken over by::

    state = state.replace(tx=tx, opt_state=from_multi_steps(tx, state.opt_state, state.params))

in linen (`state` one of ours; `opt_state` and `params` those that were saved), and in nnx by::

    pure = nnx.as_pure  # nnx.pure in Flax 0.12.0
    opt_state, params = pure(old.opt_state), pure(nnx.state(model, nnx.Param))
    optimizer = Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(from_multi_steps(tx, opt_state, params)))

To go on with another `every_k`, set `state.replace(tx=new)` or `optimizer.tx = new`. An
`Optimizer` whose `every_k` was the constant 1 keeps no sums: make a new one, and
`nnx.update(new.opt_state, nnx.state(old.opt_state))`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

try:
    from flax import nnx
    from flax.training import train_state
except ModuleNotFoundError as error:
    raise ImportError(
        "optaccum.flax needs Flax, which is not installed; install it with "
        "`pip install 'optaccum[flax]'`"
    ) from error

from optaccum import _flax_fp8
from optaccum._accumulate import apply_gradients
from optaccum._flax_fp8 import OVERWRITE_WITH_GRADIENT, OverwriteState
from optaccum._spelling import check_fields
from optaccum._state import AccumulateState, get_state, has_released

__all__ = ("Optimizer", "OverwriteState", "TrainState")


class TrainState(train_state.TrainState):
    """Drop-in for `flax.training.train_state.TrainState` that accumulates.

    With an :func:`optaccum.accumulate` as `tx`, `apply_gradients` is
    :func:`optaccum.apply_gradients`: a hold neither writes zeros nor touches the parameters. With
    any other transformation it computes what Flax's does.

    >>> import jax, jax.numpy as jnp, optax
    >>> from optaccum import accumulate
    >>> from optaccum.flax import TrainState
    >>> tx = accumulate(2, optax.sgd(0.5))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = TrainState.create(apply_fn=lambda params, x: x @ params["w"], params=params, tx=tx)
    >>> @jax.jit
    ... def train_step(state, x):
    ...     grads = jax.grad(lambda params: state.apply_fn(params, x))(state.params)
    ...     return state.apply_gradients(grads=grads)
    >>> for x in ([1.0, 0.0], [3.0, 2.0]):
    ...     state = train_step(state, jnp.array(x))
    ...     print(state.step, state.mini_step, state.gradient_step, state.params["w"])
    1 1 0 [1. 2.]
    2 0 1 [0.  1.5]

    Flax's FP8 layers keep their scales and histories in a collection whose "gradients" are its
    new values. Flax overwrites it with every call. Here it is overwritten when a window is
    released, with the largest values that the window's microbatches gave, which JAX too takes
    where such a value is used twice. So all microbatches of a window compute with the same scales,
    as one batch would, its largest activations enter the history, in one entry, and a microbatch
    that is rejected or has a weight of 0 leaves no trace.

    Attributes:
        step: i32[] or int, calls of `apply_gradients`, as in Flax.

    A subclass cannot have fields named like the arguments and properties here.
    """

    def apply_gradients(self, *, grads: Any, weight: Any = None, release: Any = None, **kwargs):
        """Take in one microbatch.

        Args:
            grads: gradients, a tree like `params`.
            weight: how much the microbatch counts; see :func:`optaccum.accumulate`.
            release: whether to close the window; see :func:`optaccum.accumulate`.
            **kwargs: fields to replace, as in Flax. Others, which Flax does not take, are extra
                arguments for the transformation, such as `value=loss`.

        Returns:
            A state with `step` one higher and the parameters, the optimizer's state and the named
            fields replaced.

        Raises:
            TypeError: for an argument that is almost a field or an argument of the transformation,
                and for `batch_stats` without such a field.
            ValueError: if the parameters hold a collection to be overwritten but the state was
                not made with `create`.
            Exception: what the `update` of the transformation raises.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: value for name, value in kwargs.items() if name in names}
        extra_args = {name: value for name, value in kwargs.items() if name not in names}
        given = {"weight": weight, "release": release}
        extra_args |= {name: value for name, value in given.items() if value is not None}
        check_fields(type(self), names, self.tx.update, extra_args)
        step = functools.partial(apply_gradients, self.tx, **extra_args)

        if not _flax_fp8.holds(grads):
            params, opt_state = step(grads, self.opt_state, self.params)
            return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)

        state: Any = self.opt_state
        wrapped = isinstance(state, OverwriteState)
        before = state.opt_state if wrapped else state
        if not wrapped and _accumulates(before):
            raise ValueError(
                f"the optimizer state has no room for a window of {OVERWRITE_WITH_GRADIENT!r}; "
                "make the train state with `optaccum.flax.TrainState.create`, or give it one as "
                "`optaccum.flax.OverwriteState` says"
            )
        params, opt_state = step(grads["params"], before, self.params["params"])
        overwritten = grads[OVERWRITE_WITH_GRADIENT]
        if wrapped:
            overwritten, opt_state = _flax_fp8.take_in(
                self.params[OVERWRITE_WITH_GRADIENT], overwritten, weight, state, opt_state
            )
        return self.replace(
            step=self.step + 1,
            params={"params": params, OVERWRITE_WITH_GRADIENT: overwritten},
            opt_state=opt_state,
            **fields,
        )

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: optax.GradientTransformation, **kwargs):
        """Return a state with `step` 0 and a fresh optimizer state.

        Args:
            apply_fn: usually the model's `apply`.
            params: the parameters.
            tx: any Optax transformation.
            **kwargs: the fields that a subclass adds.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        if _flax_fp8.holds(params) and _accumulates(state.opt_state):
            get_state(state.opt_state)  # of several windows, none could say when to overwrite
            # A copy: one buffer cannot be donated as a parameter and as a state.
            largest = jax.tree.map(jnp.copy, params[OVERWRITE_WITH_GRADIENT])
            state = state.replace(opt_state=OverwriteState(largest, state.opt_state))
        return state

    @property
    def mini_step(self) -> jax.Array:
        """i32[], microbatches in the open window."""
        return get_state(self.opt_state).mini_step

    @property
    def gradient_step(self) -> jax.Array:
        """i32[], windows released so far."""
        return get_state(self.opt_state).gradient_step

    @property
    def has_released(self) -> jax.Array:
        """bool[], whether the last call released a window."""
        return has_released(self.opt_state)


class Optimizer(nnx.Optimizer):
    """Drop-in for `flax.nnx.Optimizer` that accumulates.

    With an :func:`optaccum.accumulate` in `tx`, `update` is :func:`optaccum.apply_gradients`: a
    hold neither writes zeros nor touches the parameters. Any other transformation is left to
    Flax's own `update`.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> from optaccum import accumulate
    >>> from optaccum.flax import Optimizer
    >>> class Model(nnx.Module):
    ...     def __init__(self):
    ...         self.w = nnx.Param(jnp.array([1.0, 2.0]))
    >>> model = Model()
    >>> optimizer = Optimizer(model, accumulate(2, optax.sgd(0.5)), wrt=nnx.Param)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x):
    ...     grads = nnx.grad(lambda model: x @ model.w)(model)
    ...     optimizer.update(model, grads)
    >>> for x in ([1.0, 0.0], [3.0, 2.0]):
    ...     train_step(model, optimizer, jnp.array(x))
    ...     print(optimizer.mini_step, optimizer.gradient_step, model.w[...])
    1 0 [1. 2.]
    0 1 [0.  1.5]

    Attributes:
        step: calls of `update`, as in Flax.
    """

    def update(self, model: Any, grads: Any, /, **extra_args: Any) -> Any:
        """Take in one microbatch: update `model` and the optimizer's state in place.

        Args:
            model: the module that the optimizer was made for.
            grads: what `nnx.grad` returns for the variables that `wrt` selects.
            **extra_args: passed on to the transformation; `weight=` and `release=` for
                :func:`optaccum.accumulate`.

        Returns:
            Where `tx` accumulates, what changed in the parameters, new less old: the updates as
            far as rounding let them in. Under `jit` it costs nothing unless it is used. Otherwise
            what Flax returns.

        Raises:
            Exception: what the `update` of the transformation raises.
        """
        if not _accumulates(self.opt_state):
            return super().update(model, grads, **extra_args)
        options = {"graph": self.graph} if hasattr(self, "graph") else {}  # of newer Flax
        old = _as_arrays(nnx.state(model, self.wrt, **options))
        chosen = (self.wrt,) if hasattr(nnx, "as_pure") else ()  # newer Flax selects in grads too
        new, opt_state = apply_gradients(
            self.tx,
            _as_arrays(nnx.state(grads, *chosen, **options)),
            _as_arrays(self.opt_state),
            old,
            **_as_arrays(extra_args),
        )
        nnx.update(model, new)
        nnx.update(self.opt_state, nnx.state(opt_state, **options))
        self.step[...] += 1
        return jax.tree.map(lambda x, y: jnp.where(x == y, 0, x - y).astype(x.dtype), new, old)

    @property
    def mini_step(self) -> jax.Array:
        """i32[], microbatches in the open window."""
        return _as_arrays(get_state(self.opt_state).mini_step)

    @property
    def gradient_step(self) -> jax.Array:
        """i32[], windows released so far."""
        return _as_arrays(get_state(self.opt_state).gradient_step)

    @property
    def has_released(self) -> jax.Array:
        """bool[], whether the last call released a window."""
        return has_released(self.opt_state)


def _accumulates(opt_state: Any) -> bool:
    return bool(optax.tree.get_all_with_path(opt_state, AccumulateState.__name__))


def _as_arrays(tree: Any) -> Any:
    """Returns a tree of arrays for one of the variables of nnx."""
    if hasattr(nnx, "as_pure"):
        return nnx.as_pure(tree)
    return getattr(nnx, "to_arrays")(nnx.pure(tree))  # noqa: B009  (Flax 0.12.0)
