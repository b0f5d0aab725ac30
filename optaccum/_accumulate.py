"""Hold gradients back for a window of microbatches, then let the optimizer step once."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaccum._check import arguments, devices as check_devices, extra_args as check_args
from optaccum._check.gradients import Options, check_microbatch, check_parameters
from optaccum._check.multi_steps import Accumulate, explain_order
from optaccum._core import window
from optaccum._core.traced import (
    both,
    branch,
    cast_like,
    shapes_of_updates,
    strongly_typed,
    take_apart,
)
from optaccum._core.window import Sums
from optaccum._state import AccumulateState


@explain_order
def accumulate(
    every_k: int | jax.Array | Callable[[jax.Array], jax.typing.ArrayLike],
    inner: optax.GradientTransformation | None = None,
    *,
    use_grad_mean: bool = True,
    loss_reduction: str = "mean",
    should_skip_update_fn: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    average_args: tuple[str, ...] = (),
    reduce_axes: str | tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Accumulate the gradients of a window of microbatches, then step `inner` once.

    For the accepted microbatches i = 1..n of a window, with gradients g_i and weights w_i, the
    inner optimizer is given

        G = (sum_i w_i g_i) / (sum_i w_i)        use_grad_mean=True, the default
        G =  sum_i w_i g_i                       use_grad_mean=False

    which is the gradient of the whole window as one batch, if g_i is that of a mean over w_i
    examples or tokens. The window closes with the microbatch that makes `mini_step >= every_k`,
    or where `release` says so. It is then *released*: `inner` steps once, on G, with that
    microbatch's `params` and extra arguments. All other calls *hold*.

    >>> import jax.numpy as jnp, optax
    >>> from optaccum import accumulate, apply_gradients, has_released
    >>> tx = accumulate(2, optax.sgd(0.5))
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> params, state = apply_gradients(tx, jnp.array([1.0, 0.0]), state, params)
    >>> print(params, has_released(state))
    [1. 2.] False
    >>> params, state = apply_gradients(tx, jnp.array([3.0, 2.0]), state, params)
    >>> print(params, has_released(state))
    [0.  1.5] True

    Guarantees:
        * A hold does not run `inner` nor touch its state; its updates are exact zeros of the
          shapes and dtypes that a release returns. (Under `jax.vmap` conditionals become
          selects: `inner` runs for all members, and its result is kept for those that release.)
        * Sums are kept in `accumulator_dtype`, by default the parameter's dtype promoted to at
          least float32; G is cast back to the gradient's dtype. State leaves, the inner ones
          included, keep the dtype that `init` gave them: the state can be carried by `scan`.
        * Windows are opened by overwriting, so nothing of one window, a NaN included, reaches
          the next.
        * A microbatch costs one fused pass over the sums. With `optaccum.apply_gradients` and
          donated buffers the compiled step has no parameter-sized temporary but those of `inner`
          and `should_skip_update_fn`; with `update` it has the updates.

    ============================================  ==============================================
    case                                          result
    ============================================  ==============================================
    `every_k` the constant 1                      `inner` with a few scalars; no accumulator
    `every_k` shrinks below an open `mini_step`   the next accepted microbatch closes the window;
                                                  a state with sums keeps them at `every_k` 1 too
    `every_k`, traced, is below 1                 as 1
    `release=True`                                closes the window, divided by what it holds
    `release=False`                               keeps it open, however many it holds
    `release` a Python bool                       decided when traced; no conditional compiled
                                                  (where a window may be dropped, a select,
                                                  for which XLA may keep temporaries)
    `weight` 0                                    adds nothing, not even a NaN, but is counted
    weights of the window sum to 0                dropped when it closes: zero updates, `inner`
                                                  untouched, `gradient_step` unmoved
    `weight` below 2**-100                        as 0
    `weight` negative, inf or NaN, or one that    the microbatch is rejected
    takes their sum above 2**126; a Python        (of one device in `jax.shard_map`: counts 0, and
    number, of NumPy or a `jax.Array` alike       its sum is bounded by 2**126 / devices)
    `should_skip_update_fn` says skip             the microbatch is rejected
    rejected                                      the window stays as it was, `skipped` counts
                                                  it, nothing is released (`release=True` too)
    a None gradient                               adds nothing; `inner` gets the None
    ============================================  ==============================================

    Schedules inside `inner` count releases. Without `inner` the transformation emits zeros until
    a window is released, then G: right only in front of *stateless* transformations,
    `optax.chain(accumulate(4), optax.sgd(0.1))`. To a stateful one like Adam zeros are gradients,
    which decay its moments and count as steps. It, and all that acts on every call (`optax.ema`,
    `optax.lookahead`, `optax.contrib.schedule_free`), belongs inside `inner`.

    State made eagerly, or under explicit sharding, is sharded like the parameters. Under
    `jax.jit` with automatic sharding the compiler places zeros where it likes, so say where:
    `jax.jit(tx.init, out_shardings=optaccum.state_shardings(tx, params))(params)`.

    Args:
        every_k: microbatches a window: an integer >= 1, an integer array of shape [] (traced
            too), or a function of `gradient_step`, i32[], that returns one of these.
        inner: the optimizer that steps once a window; None for `optax.identity()`. It gets every
            extra argument but `weight` and `release`.
        use_grad_mean: whether G is the weighted mean or the weighted sum.
        loss_reduction: "mean" where g_i is the gradient of a mean over w_i examples or tokens;
            "sum" where it is that of a sum, and G = (sum_i g_i) / (sum_i w_i). `average_args` are
            taken for sums like the loss then, too.
        should_skip_update_fn: `(grads, gradient_step, params) -> (bool[], report)`, Optax's
            protocol: `optax.skip_not_finite`, `functools.partial(optax.skip_large_updates,
            max_squared_norm=...)`. The report is kept in `skip_state`.
        accumulator_dtype: dtype of the sums. A narrower one saves memory, loses bits and may
            overflow (a float16 sum with token weights). Pass a wider one where gradients are
            wider than their parameters: they are cast to the sum's dtype.
        average_args: names of scalar extra arguments that `inner` should see as the window's
            weighted mean and not as the last microbatch's, `("value",)` for a loss. They are
            summed in float32.
        reduce_axes: mesh axes over which gradients arrive as parts of a sum, one a device, to be
            reduced once a window: in `jax.shard_map` they vary over them by their type, under
            explicit sharding they are unreduced. In `jax.shard_map` each device gives its own
            `weight`, one that is none counts 0 there, and what `should_skip_update_fn` rejects on
            one is rejected on all. Programs for each: docs/many_devices.md.

    Returns:
        An `optax.GradientTransformationExtraArgs` with state :class:`AccumulateState`, whose
        `update` takes two extra arguments of its own.

        * `weight`: scalar >= 0, how much this microbatch counts (default 1). Weights are summed
          in float32, token counts up to 2**24 exactly. The derivative with respect to a weight
          of 0 is 0.
        * `release`: None to count (the default), a bool, or a bool[]. False is not None: to
          close only the last window of an epoch early, pass `True if last else None`.

    Raises:
        TypeError: (here) for an `every_k`, `inner` or `accumulator_dtype` of another kind; (when
            `update` is traced) for integer, boolean or float0 gradients, for a `weight`,
            `release` or averaged argument that is not a scalar of its kind, and for gradients
            that are reduced over `reduce_axes` already, or unreduced over others.
        ValueError: (here) for an `every_k` below 1; (in `init`) for a real `accumulator_dtype` on
            a complex parameter; (when `update` is traced) for gradients that do not fit the
            state, a missing averaged argument, a `release` but None or True at `every_k` 1,
            `reduce_axes` that the mesh has not. No error touches the state.

    References: `optax.MultiSteps`; github.com/google-deepmind/optax issues 320 and 472.
    """
    inner = optax.identity() if inner is None else inner
    arguments.check_transformation("`inner`", inner)
    options = Options(
        arguments.check_every_k(every_k),
        check_args.check_average_args(average_args),
        check_devices.check_axes(reduce_axes),
        check_args.named_by(inner.update),
    )
    inner = arguments.as_inner(inner)
    summed = arguments.check_loss_reduction(loss_reduction) == "sum"
    judge = arguments.as_judge(should_skip_update_fn)
    accumulator_dtype = arguments.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params):
        trained, i32 = _trained(params), jnp.int32
        check_parameters(trained, accumulator_dtype)
        over = check_devices.check_sums(trained, options.reduce_axes)
        report = ()
        if judge is not None:
            step = jax.ShapeDtypeStruct((), i32)
            _, report = jax.eval_shape(judge, trained, step, params)
        zeros = Sums(
            jnp.zeros([], jnp.float32),
            window.open_sums(trained, accumulator_dtype) if options.keeps_sums else (),
            {name: jnp.zeros([], jnp.float32) for name in options.average_args},
        )
        weight, grad_sum, arg_sums = over.open(zeros)
        return AccumulateState(
            mini_step=jnp.zeros([], i32),
            gradient_step=jnp.zeros([], i32),
            released=jnp.zeros([], jnp.bool_),
            skipped=jnp.zeros([], i32),
            weight=weight,
            grad_sum=grad_sum,
            arg_sums=arg_sums,
            skip_state=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report),
            inner_state=jax.tree.map(strongly_typed, inner.init(params)),
        )

    def advance(grads, state, params, weight, release, extra_args, *, apply):
        """Takes in one microbatch; returns updates, or with `apply` parameters, and the state."""
        trained = None if params is None else _trained(params)
        given = check_microbatch(options, grads, state, trained, weight, release, extra_args)
        weight, over, alone = given.weight, given.devices, given.alone

        # Does it count?
        accept, skip_state = True, state.skip_state
        if judge is not None:
            verdict = judge(grads, state.gradient_step, params, skip_state)
            skip, report = over.agree(*verdict)
            accept, skip_state = ~skip, cast_like(report, skip_state)
        grads = over.as_parts(grads)
        first = alone or state.mini_step == 0
        if isinstance(weight, jax.Array):
            before = 0.0 if alone else jnp.where(first, 0, over.load(jnp.asarray(state.weight)))
            valid, weight = over.admit(weight, before)
            accept = both(accept, valid)

        # Does the window close?
        count = jnp.asarray(optax.safe_increment(state.mini_step))
        due = count >= given.length if given.due is None else given.due
        closes = both(accept, due)

        # Add it.
        certain = weight is None or (isinstance(weight, float) and weight > 0)
        factor = None if weight is None else jnp.asarray(weight, jnp.float32)
        one = factor if summed and factor is not None else jnp.float32(1)
        values = Sums(one, () if alone else grads, given.args)
        sums = window.add(
            Sums(state.weight, state.grad_sum, state.arg_sums),
            over.store(values),
            factor,
            first=first,
            accept=accept,
            summed=summed,
        )
        total = over.total(sums, due, closes)
        steps = closes if certain else both(closes, total > 0)

        # Step, or hold.
        arrays, join = take_apart(params)

        def step(params, inner_state):
            kept = over.load(sums)
            grad_sum, args = over.reduce(kept.grads, kept.scalars, trained)
            mean, args = window.mean(Sums(total, grad_sum, args), values, of_grads=use_grad_mean)
            if alone:
                mean = window.alone(grads, factor, summed=summed, of_mean=use_grad_mean)
            params = join(params) if apply else params
            updates, new = inner.update(mean, inner_state, params, **{**extra_args, **args})
            result = take_apart(apply_updates(params, updates))[0] if apply else updates
            return result, cast_like(new, inner_state)

        def zeros(step):
            if step is None:
                given = grads, state.inner_state, params, extra_args
                shapes = shapes_of_updates(inner.update, *given)
            else:
                shapes = jax.eval_shape(step, state.inner_state)[0]
            return (optax.tree.zeros_like(shapes),)

        if apply:
            result, inner_state = branch(due, steps, step, (arrays, state.inner_state))
            result = join(result)
        else:
            update = functools.partial(step, params)
            result, inner_state = branch(due, steps, update, (state.inner_state,), zeros)
        return result, AccumulateState(
            mini_step=jnp.where(closes, 0, jnp.where(accept, count, state.mini_step)),
            gradient_step=jnp.where(
                steps, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            released=jnp.asarray(steps),
            skipped=jnp.where(accept, state.skipped, optax.safe_increment(state.skipped)),
            weight=sums.weight,
            grad_sum=sums.grads,
            arg_sums=sums.scalars,
            skip_state=skip_state,
            inner_state=inner_state,
        )

    def update_fn(updates, state, params=None, *, weight=None, release=None, **extra_args):
        return advance(updates, state, params, weight, release, extra_args, apply=False)

    def apply_fn(grads, state, params, /, *, weight=None, release=None, **extra_args):
        return advance(grads, state, params, weight, release, extra_args, apply=True)

    vars(update_fn)["_apply"] = update_fn, apply_fn
    return Accumulate(init_fn, update_fn)


def find_apply(update: Any) -> Callable[..., tuple[Any, AccumulateState]] | None:
    """Returns the `update` of an :func:`accumulate` in the form that ends in parameters.

    It is kept on the function, not on the tuple: `flax.nnx` takes tuples apart and builds new
    ones. A function that wraps another may have got its attributes, so the owner is compared.
    """
    owner, apply = getattr(update, "_apply", (None, None))
    return apply if owner is update else None


def apply_updates(params: Any, updates: optax.Updates) -> Any:
    """Returns `optax.apply_updates`, and the parameter itself where an update is None."""
    return jax.tree.map(
        lambda u, p: p if u is None else optax.apply_updates(p, u),
        updates,
        params,
        is_leaf=lambda u: u is None,
    )


def _trained(params: Any) -> Any:
    """Returns the tree that gradients are taken of: lookahead's slow copy has none."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params
