"""Accumulate the gradients of a window of microbatches, then let the optimizer step once."""

from collections.abc import Callable, Mapping
import types
from typing import Any, Literal, Protocol, TypeVar
import warnings

import jax
import optax

from optaccum import _callbacks, _validate
from optaccum._accumulator import Accumulator, Arguments
from optaccum._extra_args import ExtraArgs
from optaccum._spelling import OURS, named_by
from optaccum._state import AccumulateState, has_sums
from optaccum._trees import apply_updates
from optaccum._window_of_one import WindowOfOne

Params = TypeVar("Params")
State = TypeVar("State")


class _Init(Protocol):
    def __call__(self, params: Any) -> AccumulateState: ...


class _Update(Protocol):
    def __call__(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AccumulateState]: ...


class Accumulate(optax.GradientTransformationExtraArgs):
    """What :func:`accumulate` returns: type checkers know its state."""

    init: _Init
    update: _Update


def accumulate(
    every_k: int | jax.Array | Callable[[jax.Array], jax.typing.ArrayLike],
    inner: optax.GradientTransformation | None = None,
    *,
    use_grad_mean: bool = True,
    loss_reduction: Literal["mean", "sum"] = "mean",
    should_skip_update_fn: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None = None,
    accumulator_dtype: Any = None,
    cast_mean: bool = True,
    average_args: tuple[str, ...] | Mapping[str, Any] = (),
    metrics: tuple[str, ...] | Mapping[str, Any] = (),
    window_args: tuple[str, ...] = (),
    reduce_axes: str | tuple[str, ...] = (),
    reduce_dtype: jax.typing.DTypeLike | None = None,
) -> Accumulate:
    """Accumulate the gradients of a window of microbatches, then step `inner` once.

    For the accepted microbatches i = 1..n of a window, with gradients g_i and weights w_i, the
    inner optimizer is given::

        G = (sum_i w_i g_i) / (sum_i w_i)        use_grad_mean=True, the default
        G =  sum_i w_i g_i                       use_grad_mean=False

    G is the gradient of the whole window as one batch if each loss is a mean over w_i examples or
    tokens. The microbatch that makes `mini_step >= every_k` closes the window. The window is then
    *released*: `inner` steps once, on G, with the `params` and extra arguments of that call, except
    that an extra argument `grad` is replaced by G. All other calls *hold*.

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
        * `inner` never takes a function of one microbatch, such as the `value_fn` of a line search,
          for one of the window. If it calls such a function, the trace of `update` raises.
        * Nothing of one window, a NaN included, reaches the next.
        * The sums are at least float32, and no leaf of the state ever changes its dtype.
        * One fused addition per microbatch. With :func:`optaccum.apply_gradients` and donated
          buffers no call allocates another copy of the parameters on CPUs, GPUs and TPUs, except
          what `inner` and `should_skip_update_fn` need. (With `reduce_axes` a release has the
          reduced sums, and a GPU copies unreduced sums.)

    `docs/semantics.md` has a table of all cases, `docs/many_devices.md` has programs for
    `jax.shard_map` and explicit sharding.

    The optimizer belongs inside. Without `inner` the transformation emits zeros until a window is
    released, then G. Put it only in front of transformations that are stateless and map zeros to
    zeros: `optax.chain(accumulate(4), optax.sgd(0.1))`. Adam would take the zeros for gradients,
    and weight decay would act on every hold.

    Args:
        every_k: Microbatches per window: an integer >= 1, an integer array of shape [] (which may
            be traced), or a function of `gradient_step`, i32[], that returns one of these.
        inner: The optimizer that steps once per window; None for `optax.identity()`. It gets every
            extra argument but `weight`, `release` and `metrics`. Schedules inside it count
            releases.
        use_grad_mean: Whether G is the weighted mean or the weighted sum.
        loss_reduction: "mean" if each loss is a mean over w_i examples or tokens. "sum" if it is a
            sum over them; then G = (sum_i g_i) / (sum_i w_i), and `average_args` are treated as
            sums, too.
        should_skip_update_fn: `(grads, gradient_step, params) -> (bool[], report)`, Optax's
            protocol: `optax.skip_not_finite`, `functools.partial(optax.skip_large_updates,
            max_squared_norm=...)`. The report is kept in `skip_state`.
        accumulator_dtype: Dtype of the sums; None for the parameter's dtype promoted to at least
            float32. A narrower one saves memory and loses bits. To choose for each parameter, pass
            a tree of dtypes and None, like the parameters or a prefix of them, or a function
            `(path, parameter) -> dtype | None` with the key paths of `jax.tree_util`.
        cast_mean: Whether G and the means of `average_args` are cast to the dtypes that the
            microbatch brings. False leaves them in the dtypes of the sums, for an `inner` with
            float32 masters of bfloat16 parameters. (At the constant `every_k` 1, which has no sums,
            G gets the dtype that they would have.)
        average_args: Names of scalar extra arguments that `inner` should see as the window's
            weighted mean, not as the last microbatch's value: `("value",)` for a loss. For trees,
            pass a dict from each name to a tree of arrays or `jax.ShapeDtypeStruct`s. `"grad"` is
            like the parameters and costs one more accumulator. Name it only if it differs from the
            updates, as it does behind a link that clips.
        metrics: Names of scalar extra arguments that are averaged in the same way for
            :func:`optaccum.window_metrics` alone: `inner` does not get them. For another reduction
            pass a dict, `{"loss": "mean", "tokens": "sum", "logit": "max", "accuracy": "ratio"}`.
            "sum", "max" and "ratio" are over the microbatches that count and do not weigh them. A
            "ratio" is given (numerator, denominator) and divides their sums. For a tree pass a
            pair, `"load": ("sum", jax.ShapeDtypeStruct((experts,), jnp.float32))`.
        window_args: Names of extra arguments that belong to the whole window and reach `inner` as
            they are: `("value_fn",)` for the loss of all its data, which a line search needs.
        reduce_axes: Mesh axes over which gradients are not reduced yet. They are reduced once per
            window. Under automatic sharding :func:`optaccum.value_and_apply` makes the gradients.
        reduce_dtype: Dtype in which sums are sent; None for their own. With bfloat16 devices send
            half as much, and G has a relative error of 2**-8 for each of the additions.

    Returns:
        An `optax.GradientTransformationExtraArgs` with state :class:`AccumulateState`. Its `update`
        takes two more extra arguments.

        * `weight`: scalar >= 0, how much this microbatch counts (default 1). Weights are summed
          in float32, token counts up to 2**24 exactly. The derivative with respect to a weight
          of 0 is 0.
        * `release`: None to count (the default). True closes the window now, False keeps it open.
          A Python bool compiles without a conditional; a bool[] is decided when the program runs.
          To close only the last window of an epoch early, pass `True if last else None`.

    Warns:
        UserWarning: if `inner` is an `optax.MultiSteps`, which would accumulate windows.

    Raises:
        TypeError, ValueError: in the factory for static arguments; when `init` or `update` is
            traced for trees, dtypes, weights and axes that do not fit. No error touches the state.

    References: `optax.MultiSteps`; github.com/google-deepmind/optax issues 320 and 472.
    """
    every_k = _validate.check_every_k(every_k)
    inner = optax.identity() if inner is None else inner
    _validate.check_transformation("`inner`", inner)
    if isinstance(getattr(inner.update, "__self__", None), optax.MultiSteps):
        message = (
            "`inner` is an optax.MultiSteps, which accumulates too, so that the optimizer steps "
            "once in several windows; pass the optimizer that is inside it"
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    _validate.check_flag("`use_grad_mean`", use_grad_mean)
    _validate.check_flag("`cast_mean`", cast_mean)
    axes = _validate.check_axes(reduce_axes)
    single = isinstance(every_k, int) and every_k == 1 and not axes
    accumulator = (WindowOfOne if single else Accumulator)(
        every_k=every_k,
        inner=_callbacks.as_inner(inner),
        extra_args=ExtraArgs.named(average_args, metrics, window_args, named_by(inner.update)),
        use_grad_mean=use_grad_mean,
        summed=_validate.check_loss_reduction(loss_reduction) == "sum",
        judge=_callbacks.as_judge(should_skip_update_fn),
        accumulator_dtype=_validate.check_accumulator_dtype(accumulator_dtype),
        cast_mean=cast_mean,
        reduce_axes=axes,
        reduce_dtype=_validate.check_reduce_dtype(reduce_dtype, axes),
    )
    return Accumulate(accumulator.init, accumulator.update)


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: State,
    params: Params,
    /,
    **extra_args: Any,
) -> tuple[Params, State]:
    """Update the parameters: `tx.update` and `optax.apply_updates` in one.

    For any Optax transformation it computes what the two calls do. If `tx` is an
    :func:`accumulate`, the parameters are updated inside its release branch, so that a hold
    neither writes zeros nor touches the parameters. If `accumulate` is wrapped, in an `optax.chain`
    for example, `apply_gradients` saves nothing. A parameter whose update is None is kept.

    Donate `params` and `opt_state`, and return them in the order of the arguments: XLA pairs
    donated inputs with outputs of the same shape in order, and copies those that cross.

    >>> import jax, jax.numpy as jnp, optax
    >>> from optaccum import accumulate, apply_gradients
    >>> tx = accumulate(2, optax.sgd(0.125))
    >>> @jax.jit
    ... def step(params, opt_state, x):
    ...     grads = jax.grad(lambda params: jnp.sum((params - x) ** 2))(params)
    ...     return apply_gradients(tx, grads, opt_state, params)
    >>> params = jnp.zeros(2)
    >>> opt_state = tx.init(params)
    >>> for x in (1.0, 3.0):
    ...     params, opt_state = step(params, opt_state, x)
    ...     print(params)
    [0. 0.]
    [0.5 0.5]

    Args:
        tx: Any Optax transformation.
        grads: Gradients, a tree like `params`.
        opt_state: The state of `tx`.
        params: Parameters. Their dtypes are kept.
        **extra_args: Passed on to `tx.update`; `weight=` and `release=` for :func:`accumulate`.

    Returns:
        `(params, opt_state)`.

    Warns:
        UserWarning: if in an `optax.chain` an :func:`accumulate` of a stateless optimizer stands
            before a link that keeps state.

    Raises:
        TypeError: if `tx` is not a transformation, or parameters are missing.
        Exception: what `tx.update` raises.
    """
    if params is None and jax.tree.leaves(grads):
        raise TypeError(
            "`apply_gradients` needs the parameters, got None; the order is (tx, grads, state, "
            "params)"
        )
    accumulator = accumulator_of(tx)
    if accumulator is not None:
        ours = {name: extra_args.pop(name, None) for name in OURS}
        call = Arguments(grads, opt_state, params, **ours, extra_args=extra_args)
        return accumulator.for_state(opt_state).apply(call)
    _validate.check_transformation("`tx`", tx)
    _warn_if_misplaced(opt_state)
    tree: Any = params
    state: Any = opt_state
    updates, state = tx.update(grads, state, tree, **extra_args)
    return apply_updates(tree, updates), state


def accumulator_of(tx: Any) -> Accumulator | None:
    """Returns the accumulator if `tx` is an `accumulate`."""
    # Asked of the method, not of the tuple: `flax.nnx` takes tuples apart and builds new ones.
    update = getattr(tx, "update", None)
    owner = update.__self__ if isinstance(update, types.MethodType) else None
    return owner if isinstance(owner, Accumulator) else None


def _warn_if_misplaced(state: Any) -> None:
    """Warns of a chain in which zeros of an accumulator reach a link that keeps state."""
    bare = False
    for link in jax.tree.leaves(state, is_leaf=lambda x: type(x) is not tuple):
        if isinstance(link, AccumulateState):
            # With `every_k` 1, which keeps no sums, nothing holds.
            bare = has_sums(link) and not jax.tree.leaves(link.inner_state)
        elif bare and jax.tree.leaves(link):
            message = (
                "`accumulate` stands in front of a link that keeps state, "
                f"{type(link).__name__}, which takes the zeros of every hold for gradients; put "
                "the links after it inside: `accumulate(k, optax.chain(...))`"
            )
            warnings.warn(message, UserWarning, stacklevel=3)
            return
