"""Hold gradients back for a window of microbatches, then let the optimizer step once."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaccum import _arguments, _parts, _reduce, _window
from optaccum._branch import both, branch
from optaccum._state import AccumulateState, cast_like, strongly_typed


def accumulate(
    every_k: int | jax.Array | Callable[[jax.Array], jax.typing.ArrayLike],
    inner: optax.GradientTransformation | None = None,
    *,
    use_grad_mean: bool = True,
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
    `weight` an array: negative, inf or NaN       the microbatch is rejected
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
          in float32, token counts up to 2**24 exactly.
        * `release`: None to count (the default), a bool, or a bool[]. False is not None: to
          close only the last window of an epoch early, pass `True if last else None`.

    Raises:
        TypeError: (here) for an `every_k`, `inner` or `accumulator_dtype` of another kind; (when
            `update` is traced) for integer, boolean or float0 gradients, for a `weight`,
            `release` or averaged argument that is not a scalar of its kind, and for gradients
            that are reduced over `reduce_axes` already, or unreduced over others.
        ValueError: (here) for an `every_k` below 1; (in `init`) for a real `accumulator_dtype` on
            a complex parameter; (when `update` is traced) for gradients that do not fit the
            state, a Python number `weight` that is negative or not finite, a missing averaged
            argument, a `release` but None or True at `every_k` 1, `reduce_axes` that the mesh
            has not. No error touches the state.

    References: `optax.MultiSteps`; github.com/google-deepmind/optax issues 320 and 472.
    """
    every_k = _arguments.check_every_k(every_k)
    inner = optax.identity() if inner is None else inner
    _arguments.check_transformation("`inner`", inner)
    inner = _arguments.with_extra_args(inner)
    _arguments.check_skip_fn(should_skip_update_fn)
    accumulator_dtype = _arguments.check_accumulator_dtype(accumulator_dtype)
    average_args = _arguments.check_average_args(average_args)
    axes = _parts.check_axes(reduce_axes)
    every_one = isinstance(every_k, int) and every_k == 1 and not axes

    def init_fn(params):
        trained = _trained(params)
        local = _parts.manual_axes(axes)
        _parts.check_shared(trained, local)
        skip_state = ()
        if should_skip_update_fn is not None:
            step = jax.ShapeDtypeStruct((), jnp.int32)
            _, report = jax.eval_shape(judge, trained, step, params)
            skip_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report)
        grad_sum = () if every_one else _window.open_sums(trained, accumulator_dtype)
        scalars = (
            jnp.zeros([], jnp.float32),
            {name: jnp.zeros([], jnp.float32) for name in average_args},
        )
        weight, arg_sums = _reduce.open_parts(scalars, local)
        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            released=jnp.zeros([], jnp.bool_),
            skipped=jnp.zeros([], jnp.int32),
            weight=weight,
            grad_sum=_reduce.open_parts(grad_sum, axes),
            arg_sums=arg_sums,
            skip_state=skip_state,
            inner_state=jax.tree.map(strongly_typed, inner.init(params)),
        )

    def judge(grads, gradient_step, params):
        """Returns whether to skip the microbatch, and the report on it."""
        assert should_skip_update_fn is not None
        return _arguments.as_verdict(should_skip_update_fn(grads, gradient_step, params))

    def advance(grads, state, params, weight, release, extra_args, apply):
        """Takes in one microbatch; returns updates, or new parameters to `apply`, and the state."""
        _arguments.check_state(state, grads, needs_sums=not every_one)
        # A state that came from a longer window has sums, perhaps of an open one: keep them.
        alone = every_one and not jax.tree.leaves(state.grad_sum)
        local = _parts.manual_axes(axes)
        like = grads if params is None else _trained(params)
        _parts.check_state(state.weight, local)
        sums = _reduce.load(state.grad_sum, local)
        _window.check_fits(grads, like if alone else sums)
        _parts.check_parts(grads, axes)
        weight, release = _arguments.as_weight(weight), _arguments.as_release(release)
        args = _arguments.averaged(average_args, extra_args)
        certain = weight is None or (isinstance(weight, float) and weight > 0)

        accept, skip_state = True, state.skip_state
        if should_skip_update_fn is not None:
            with _parts.explain_judging(grads):
                verdict = judge(grads, state.gradient_step, params)
            skip, report = _reduce.agree(*verdict, local)
            accept, skip_state = ~skip, cast_like("should_skip_update_fn", report, skip_state)
        grads, weight = _reduce.as_parts(grads, weight, axes)
        if not alone:
            _parts.check_placed(grads, sums)
        if isinstance(weight, jax.Array) and not _parts.is_part(weight, local):
            accept = both(accept, jnp.isfinite(weight) & (weight >= 0))
        if weight is not None:
            weight = jnp.asarray(weight, jnp.float32)

        count = jnp.asarray(optax.safe_increment(state.mini_step))
        if alone:
            first, due = True, _arguments.check_release_alone(release)
        else:
            first = state.mini_step == 0
            length = jnp.asarray(_arguments.window_length(every_k, state.gradient_step), jnp.int32)
            due = count >= length if release is None else release
            _parts.check_agreed(due, local)

        add = functools.partial(_window.add, first=first, accept=accept)
        # In the shape that the state has: reshaped sums are not updated in place.
        total, arg_sums = _reduce.store((jnp.float32(1) if weight is None else weight, args), local)
        total, arg_sums = add(state.weight, total), add(state.arg_sums, arg_sums, weight)
        grad_sum = () if alone else add(state.grad_sum, _reduce.store(grads, local), weight)
        closes = both(accept, due)
        everywhere = _reduce.weight_where(closes, due, total, local)
        steps = closes if certain else both(closes, jnp.greater(everywhere, 0))

        def step(params, inner_state):
            if not alone:
                place = None if params is None else _trained(params)
                whole = _reduce.whole(_reduce.load(grad_sum, local), axes, place)
                mean = _window.mean(whole, everywhere if use_grad_mean else None, like=grads)
            elif use_grad_mean or weight is None:
                mean = grads
            else:
                sums = _window.add(_window.open_sums(grads), grads, weight, first=True)
                mean = _window.mean(sums, None, like=grads)
            arg_totals = _reduce.whole(_reduce.load(arg_sums, local), local)
            means = _window.mean(arg_totals, everywhere, like=args)
            updates, new = inner.update(mean, inner_state, params, **{**extra_args, **means})
            result = apply_updates(params, updates) if apply else updates
            return result, cast_like("inner", new, inner_state)

        def hold():
            if apply:
                return params, state.inner_state
            if steps is True:
                return None, state.inner_state
            shapes = jax.eval_shape(step, params, state.inner_state)[0]
            return optax.tree.zeros_like(shapes), state.inner_state

        def update(_, inner_state):
            return step(params, inner_state)

        result, inner_state = branch(due, steps, step if apply else update, hold)
        return result, AccumulateState(
            mini_step=jnp.where(closes, 0, jnp.where(accept, count, state.mini_step)),
            gradient_step=jnp.where(
                steps, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            released=jnp.asarray(steps),
            skipped=jnp.where(accept, state.skipped, optax.safe_increment(state.skipped)),
            weight=total,
            grad_sum=grad_sum,
            arg_sums=arg_sums,
            skip_state=skip_state,
            inner_state=inner_state,
        )

    def update_fn(updates, state, params=None, *, weight=None, release=None, **extra_args):
        return advance(updates, state, params, weight, release, extra_args, apply=False)

    def apply_fn(grads, state, params, *, weight=None, release=None, **extra_args):
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


def _trained(params: Any) -> Any:
    """Returns what gradients are taken of: lookahead's slow copy has none."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def apply_updates(params: Any, updates: Any) -> Any:
    """Returns `optax.apply_updates`, and the parameter itself where an update is None."""
    return jax.tree.map(
        lambda u, p: p if u is None else optax.apply_updates(p, u),
        updates,
        params,
        is_leaf=lambda u: u is None,
    )
