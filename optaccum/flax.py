"""Train states of Flax that accumulate: `TrainState` for linen, `Optimizer` for nnx.

Change the import, build `tx` with :func:`optaccum.accumulate`, and call the training step once for
each microbatch. What moves with every call, and what once per window:

* **Learning-rate schedules** inside `inner` count windows. `optax.cosine_decay_schedule(1e-3,
  steps)` spans `steps * k` calls.
* **Hyperparameters** of `optax.inject_hyperparams` are those of the last release, in
  `optaccum.get_state(state.opt_state).inner_state.hyperparams`.
* **Averages of parameters** must move once per window, as only a release changes parameters::

      ema = jax.lax.cond(
          state.has_released,
          lambda: optax.incremental_update(state.params, ema, step_size=1e-3),
          lambda: ema,
      )

  An average inside `inner` does so by itself (but `optax.ema` averages updates).
* **Keys** are folded from `step`, which counts calls. With a count of windows the microbatches of
  a window would share their noise.
* **BatchNorm** normalizes with the statistics of each microbatch, and its averages move with every
  call. For a momentum of m per window pass m ** (1 / k). In linen hand the averages on with
  `state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])`.

To change `every_k`, set `state.replace(tx=new)` or `optimizer.tx = new`. An `Optimizer` whose
`every_k` was the constant 1 has no sums, so make a new one and
`nnx.update(new.opt_state, nnx.state(old.opt_state))`.

`docs/how_to/old_checkpoints.md` shows how to go on from a checkpoint of `optax.MultiSteps`.
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
from optaccum._flax_fp8 import OverwriteState
from optaccum._outputs import as_loss, refuse_changes
from optaccum._spelling import OURS, check_fields
from optaccum._state import accumulates, get_state, has_released
from optaccum._value_and_apply import check_one_weight, value_and_apply, with_value

__all__ = ("Optimizer", "OverwriteState", "TrainState")


class _Counters:
    """The counters of the :func:`optaccum.accumulate` in `opt_state`."""

    @property
    def mini_step(self: Any) -> jax.Array:
        """i32[], microbatches in the open window."""
        return _as_arrays(get_state(self.opt_state).mini_step)

    @property
    def gradient_step(self: Any) -> jax.Array:
        """i32[], windows released so far."""
        return _as_arrays(get_state(self.opt_state).gradient_step)

    @property
    def has_released(self: Any) -> jax.Array:
        """bool[], whether the last call released a window."""
        return has_released(self.opt_state)


class TrainState(_Counters, train_state.TrainState):
    """Drop-in for `flax.training.train_state.TrainState` that accumulates.

    `apply_gradients` is :func:`optaccum.apply_gradients`, so a hold neither writes zeros nor
    touches the parameters. With a `tx` that does not accumulate it computes what Flax's does.

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

    Flax's FP8 layers keep scales and histories in a collection whose "gradients" are its new
    values, and Flax overwrites it in every call. Here a release overwrites it, with the
    elementwise largest values of the window (as JAX does if a value is used twice). So a window
    computes with one set of scales and adds one entry to the histories, as one batch would, and
    microbatches that are rejected or have weight 0 leave no trace.

    A subclass cannot have fields named like the arguments and properties here.
    """

    def apply_gradients(self, *, grads: Any, weight: Any = None, release: Any = None, **kwargs):
        """Take in one microbatch.

        Args:
            grads: Gradients, a tree like `params`.
            weight: How much the microbatch counts, as in :func:`optaccum.accumulate`.
            release: Whether to close the window, as in :func:`optaccum.accumulate`.
            **kwargs: Fields to replace, as in Flax. All others are extra arguments of the
                transformation, such as `value=loss`.

        Returns:
            The state after this call, with `step` one higher.

        Raises:
            TypeError: for an argument that is almost a field or an argument of the transformation,
                and for `batch_stats` without such a field.
            ValueError: if a collection is to be overwritten in a state that `create` did not make.
        """
        fields, extra_args = self._divide({"weight": weight, "release": release, **kwargs})
        step = functools.partial(apply_gradients, self.tx, **extra_args)
        if _flax_fp8.holds(grads):
            step = functools.partial(_flax_fp8.step, step, weight)
        params, opt_state = step(grads, self.opt_state, self.params)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)

    def value_and_apply(
        self,
        fun: Any,
        /,
        *args: Any,
        has_aux: bool = False,
        weight_fn: Any = None,
        batch_argnums: Any = None,
        rng_argnums: Any = (),
        **kwargs: Any,
    ):
        """Take in one microbatch by its loss, as :func:`optaccum.value_and_apply` does.

        Gradients are added to the window where the backward pass makes them (with an FP8 collection
        they are made first)::

            loss, state = state.value_and_apply(loss_fn, batch, weight=tokens)

        Args:
            fun: A loss: `(params, *args)` to a real scalar, or with `has_aux` to `(scalar, aux)`.
            *args: Arguments of `fun`.
            has_aux: Whether `fun` returns `(scalar, aux)`.
            weight_fn: As in :func:`optaccum.value_and_apply`, and so are the next two.
            batch_argnums: Positions of rows.
            rng_argnums: Positions of keys.
            **kwargs: As in `apply_gradients`.

        Returns:
            `(loss, state)`, or with `has_aux` `((loss, aux), state)`.

        Raises:
            TypeError: as `apply_gradients` does.
        """
        if _flax_fp8.holds(self.params):
            value, grads = jax.value_and_grad(fun, has_aux=has_aux)(self.params, *args)
            check_one_weight(kwargs.get("weight"), weight_fn)
            if weight_fn is not None:
                kwargs["weight"] = weight_fn(self.params, *args)
            kwargs = with_value(self.tx, kwargs, value[0] if has_aux else value)
            return value, self.apply_gradients(grads=grads, **kwargs)
        fields, extra_args = self._divide(kwargs)
        options = {"batch_argnums": batch_argnums, "rng_argnums": rng_argnums}
        step = value_and_apply(self.tx, fun, has_aux, weight_fn=weight_fn, **options)
        value, params, opt_state = step(self.params, self.opt_state, *args, **extra_args)
        new = self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)
        return value, new

    def _divide(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns which keywords are fields, and which are extra arguments of the optimizer."""
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: x for name, x in kwargs.items() if name in names}
        nothing = {name for name in OURS if kwargs.get(name) is None}
        extra_args = {name: x for name, x in kwargs.items() if name not in {*names, *nothing}}
        check_fields(type(self), names, self.tx.update, extra_args)
        return fields, extra_args

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: optax.GradientTransformation, **kwargs):
        """Return a state with `step` 0 and a fresh optimizer state, as in Flax."""
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        return state.replace(opt_state=_flax_fp8.init(params, state.opt_state))


class Optimizer(_Counters, nnx.Optimizer):
    """Drop-in for `flax.nnx.Optimizer` that accumulates.

    `update` is :func:`optaccum.apply_gradients`, so a hold neither writes zeros nor touches the
    parameters. With a `tx` that does not accumulate it is Flax's.

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
    """

    def update(self, model: Any, grads: Any, /, **extra_args: Any) -> Any:
        """Take in one microbatch: update `model` and the optimizer's state in place.

        Args:
            model: The module that the optimizer was made for.
            grads: What `nnx.grad` returns for the variables that `wrt` selects.
            **extra_args: Passed on to the transformation, such as `weight=` and `release=`.

        Returns:
            New parameters less old ones, if `tx` accumulates: the updates as far as rounding let
            them in. Under `jit` unused ones cost nothing. Otherwise what Flax returns.
        """
        if not accumulates(self.opt_state):
            return super().update(model, grads, **extra_args)
        old = _as_arrays(nnx.state(model, self.wrt, **self._options))
        chosen = (self.wrt,) if hasattr(nnx, "as_pure") else ()  # newer Flax selects in grads too
        new, opt_state = apply_gradients(
            self.tx,
            _as_arrays(nnx.state(grads, *chosen, **self._options)),
            _as_arrays(self.opt_state),
            old,
            **_as_arrays(extra_args),
        )
        self._replace(model, new, opt_state)
        return jax.tree.map(lambda x, y: jnp.where(x == y, 0, x - y).astype(x.dtype), new, old)

    def value_and_apply(
        self,
        model: Any,
        fun: Any,
        /,
        *args: Any,
        has_aux: bool = False,
        weight_fn: Any = None,
        batch_argnums: Any = None,
        rng_argnums: Any = (),
        **extra_args: Any,
    ) -> Any:
        """Take in one microbatch by its loss, as :func:`optaccum.value_and_apply` does.

        It replaces `nnx.value_and_grad` and `update`. Gradients are added to the window where the
        backward pass makes them. What `fun` changes in the model, such as batch statistics and
        counts of keys, is changed::

            loss = optimizer.value_and_apply(model, loss_fn, batch, weight=tokens)

        Args:
            model: The module that the optimizer was made for.
            fun: A loss: `(model, *args)` to a real scalar, or with `has_aux` to `(scalar, aux)`.
            *args: Arguments of `fun`, arrays.
            has_aux: Whether `fun` returns `(scalar, aux)`.
            weight_fn: Called as `fun` is; returns the `weight` of the microbatch.
            batch_argnums: Positions of rows, as in :func:`optaccum.value_and_apply`.
            rng_argnums: Positions of keys.
            **extra_args: As in `update`.

        Returns:
            The loss, or with `has_aux` `(loss, aux)`.

        Raises:
            TypeError: with `reduce_axes` if `fun` changes the model, which each device would change
                by its rows.
        """
        state, run = _as_arrays(self.opt_state), as_loss(fun, has_aux)
        per_device = accumulates(state) and jnp.ndim(get_state(state).weight)
        if per_device:
            run = refuse_changes(run, "argument {}".format, None)
        graphdef, trained, others = nnx.split(model, self.wrt, ...)
        structure = jax.tree.structure(trained)

        def merged(params):
            own = structure.unflatten(jax.tree.leaves(params))
            return nnx.merge(graphdef, own, jax.tree.map(jnp.asarray, others))

        def loss_fn(params, *args):
            copy = merged(params)
            value = run(copy, *args)
            loss, aux = value if has_aux else (value, ())
            return loss, (aux, () if per_device else nnx.split(copy, self.wrt, ...)[2])

        def weigh(params, *args):
            return weight_fn(merged(params), *args)

        options = {"batch_argnums": batch_argnums, "rng_argnums": rng_argnums}
        if weight_fn is not None:
            options["weight_fn"] = weigh
        step = value_and_apply(self.tx, loss_fn, has_aux=True, **options)
        (loss, (aux, changed)), new, opt_state = step(
            _as_arrays(trained), state, *args, **_as_arrays(extra_args)
        )
        if not per_device:
            nnx.update(model, changed)
        self._replace(model, new, opt_state)
        return (loss, aux) if has_aux else loss

    @property
    def _options(self) -> dict[str, Any]:
        """Options of `nnx.state`, in newer Flax."""
        return {"graph": self.graph} if hasattr(self, "graph") else {}

    def _replace(self, model: Any, params: Any, opt_state: Any) -> None:
        """Puts new parameters into the model, and a new state into the optimizer."""
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(opt_state, **self._options))
        self.step[...] += 1


def _as_arrays(tree: Any) -> Any:
    """Returns a tree of arrays for one of the variables of nnx."""
    if hasattr(nnx, "as_pure"):
        return nnx.as_pure(tree)
    return getattr(nnx, "to_arrays")(nnx.pure(tree))  # noqa: B009  (Flax 0.12.0)
