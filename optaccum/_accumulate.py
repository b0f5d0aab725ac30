"""Hold gradients back for a window of microbatches, then let the optimizer step once."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaccum import _extra_args, _reduce_axes, _validate, _window
from optaccum._check_microbatch import check_microbatch
from optaccum._conditional import both, branch, shapes_of_updates
from optaccum._gradients import check_parameters
from optaccum._state import AccumulateState, key_of
from optaccum._trees import cast_like, keep_untrained, own_arrays
from optaccum._window import Sums


def accumulate(
    every_k: int | jax.Array | Callable[[jax.Array], jax.typing.ArrayLike],
    inner: optax.GradientTransformation | None = None,
    *,
    use_grad_mean: bool = True,
    loss_reduction: str = "mean",
    should_skip_update_fn: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    average_args: tuple[str, ...] | Mapping[str, Any] = (),
    metrics: tuple[str, ...] = (),
    window_args: tuple[str, ...] = (),
    reduce_axes: str | tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Accumulate the gradients of a window of microbatches, then step `inner` once.

    For the accepted microbatches i = 1..n of a window, with gradients g_i and weights w_i, the
    inner optimizer is given::

        G = (sum_i w_i g_i) / (sum_i w_i)        use_grad_mean=True, the default
        G =  sum_i w_i g_i                       use_grad_mean=False

    which is the gradient of the whole window as one batch, if g_i is that of a mean over w_i
    examples or tokens. The microbatch that makes `mini_step >= every_k` closes the window. It is
    then *released*: `inner` steps once, on G, with that microbatch's `params` and extra arguments,
    but with G for `grad`. All other calls *hold*.

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
        * A hold does not run `inner` and does not touch its state. Its updates are exact zeros.
        * `inner` calls no function of one microbatch, such as a line search's `value_fn`, in place
          of the window's: where it would, the trace of `update` raises.
        * Nothing of one window, a NaN included, reaches the next.
        * The sums are at least float32, and no leaf of the state ever changes its dtype.
        * One fused addition per microbatch. With :func:`optaccum.apply_gradients` and donated
          buffers a call has no temporary of parameter size, on CPUs, GPUs and TPUs, but those of
          `inner` and `should_skip_update_fn`. (With `reduce_axes` a release has the reduced sums,
          and on GPUs a call with unreduced sums has copies.)

    Documentation: "Semantics" has a table of all cases, "On many devices" programs for
    `jax.shard_map` and explicit sharding.

    The optimizer belongs inside. Without `inner` the transformation emits zeros until a window is
    released, then G, which is right only in front of transformations that keep no state and make
    zeros of zeros: `optax.chain(accumulate(4), optax.sgd(0.1))`. To Adam the zeros are gradients,
    and weight decay would act on every hold.

    Args:
        every_k: microbatches per window: an integer >= 1, an integer array of shape [] (traced
            too), or a function of `gradient_step`, i32[], that returns one of these.
        inner: the optimizer that steps once per window; None for `optax.identity()`. It gets every
            extra argument but `weight`, `release` and `metrics`. Schedules inside it count
            releases.
        use_grad_mean: whether G is the weighted mean or the weighted sum.
        loss_reduction: "mean" where g_i is the gradient of a mean over w_i examples or tokens;
            "sum" where it is that of a sum, and G = (sum_i g_i) / (sum_i w_i). `average_args` are
            taken for sums like the loss then, too.
        should_skip_update_fn: `(grads, gradient_step, params) -> (bool[], report)`, Optax's
            protocol: `optax.skip_not_finite`, `functools.partial(optax.skip_large_updates,
            max_squared_norm=...)`. The report is kept in `skip_state`.
        accumulator_dtype: dtype of the sums; None for the parameter's dtype promoted to at least
            float32. A narrower one saves memory and loses bits.
        average_args: names of extra arguments of which `inner` should see the window's weighted
            mean, and not the last microbatch's: `("value",)` for a loss. They are scalars, but
            `grad`, which is like the parameters: name it where it is not what `update` is given
            (behind a link that clips), at the price of one more accumulator. For other trees pass
            a dict from each name to a tree of arrays or `jax.ShapeDtypeStruct`s like it.
        metrics: names of scalar extra arguments that are averaged in the same way for
            :func:`optaccum.window_metrics` alone: `inner` does not get them.
        window_args: names of extra arguments that stand for the whole window as they are:
            `("value_fn",)` for a loss of its whole data, as a line search needs one.
        reduce_axes: mesh axes over which gradients arrive as one part per device, to be reduced
            once per window.

    Returns:
        An `optax.GradientTransformationExtraArgs` with state :class:`AccumulateState`, whose
        `update` takes two extra arguments of its own.

        * `weight`: scalar >= 0, how much this microbatch counts (default 1). Weights are summed
          in float32, token counts up to 2**24 exactly. The derivative with respect to a weight
          of 0 is 0.
        * `release`: None to count (the default). True closes the window now, False keeps it open.
          A Python bool compiles without a conditional; a bool[] is decided when the program runs.
          To close only the last window of an epoch early, pass `True if last else None`.

    Raises:
        TypeError, ValueError: in the factory for static arguments; when `init` or `update` is
            traced for trees, dtypes, weights and axes that do not fit. No error touches the state.

    References: `optax.MultiSteps`; github.com/google-deepmind/optax issues 320 and 472.
    """
    every_k = _validate.check_every_k(every_k)
    inner = optax.identity() if inner is None else inner
    _validate.check_transformation("`inner`", inner)
    _validate.check_flag("`use_grad_mean`", use_grad_mean)
    axes = _reduce_axes.check_axes(reduce_axes)
    summed = _validate.check_loss_reduction(loss_reduction) == "sum"
    options = _validate.Options(
        every_k,
        *_extra_args.check_named(average_args, metrics, window_args),
        axes,
        _extra_args.named_by(inner.update),
        keeps_sums=bool(axes) or not (isinstance(every_k, int) and every_k == 1),
        needs_weight=summed and use_grad_mean,
    )
    inner = _validate.as_inner(inner)
    judge = _validate.as_judge(should_skip_update_fn)
    accumulator_dtype = _validate.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params):
        trained, i32 = _trained(params), jnp.int32
        check_parameters(trained, accumulator_dtype)
        over = _reduce_axes.check_sums(trained, axes)
        report = ()
        if judge is not None:
            step = jax.ShapeDtypeStruct((), i32)
            _, report = jax.eval_shape(judge, trained, step, params)
        zeros = Sums(
            jnp.zeros([], jnp.float32),
            _window.open_sums(trained, accumulator_dtype) if options.keeps_sums else (),
            {
                key_of(name): _window.open_sums(trained, accumulator_dtype)
                if like is None
                else _window.open_sums(like)
                for name, like in options.averages.items()
            },
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
            inner_state=own_arrays(inner.init(params), params),
        )

    def advance(grads, state, params, weight, release, extra_args, *, apply):
        """Takes in one microbatch; returns updates, or with `apply` parameters, and the state."""
        trained = None if params is None else _trained(params)
        given = check_microbatch(options, grads, state, trained, weight, release, extra_args, apply)
        weight, over, alone = given.weight, given.devices, given.alone
        extra_args = given.inner_args

        # Does it count?
        accept, skip_state = True, state.skip_state
        if judge is not None:
            verdict = judge(grads, state.gradient_step, params, skip_state)
            skip, report = over.agree(*verdict)
            accept, skip_state = ~skip, cast_like(report, skip_state)
        grads = given.parts
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
        sums = _window.add(
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
        def step(params, inner_state):
            kept = over.load(sums)
            grad_sum, args = over.reduce(kept.grads, kept.scalars, trained)
            mean, args = _window.mean(Sums(total, grad_sum, args), values, of_grads=use_grad_mean)
            if alone:
                mean = _window.alone(grads, factor, summed=summed, of_mean=use_grad_mean)
            args = extra_args | {name: args[key_of(name)] for name in options.average_args}
            if _extra_args.replaces_grad(options, args):
                args["grad"] = mean
            updates, new = inner.update(mean, inner_state, params, **args)
            result = apply_updates(params, updates) if apply else updates
            return result, cast_like(new, inner_state)

        def known_shapes():
            return (shapes_of_updates(inner.update, grads, state.inner_state, params, extra_args),)

        if apply:
            with _reduce_axes.explain_unreduced(grads, trained):
                result, inner_state = branch(due, steps, step, (params, state.inner_state))
            result = keep_untrained(params, result, grads)
        else:
            update = functools.partial(step, params)
            result, inner_state = branch(due, steps, update, (state.inner_state,), known_shapes)
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
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
