"""Take the gradient of a whole batch in one call, one microbatch in memory at a time."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict, TypeVar, Unpack, overload

import jax

from optaccum import _call, _reduce_axes, _validate, _window
from optaccum._device_rows import as_shard, on_each_device
from optaccum._devices import Automatic
from optaccum._loop import Loop, Settings
from optaccum._outputs import as_loss, refuse_changes
from optaccum._overwritten import Overwritten, overwritten
from optaccum._trees import cast_floating
from optaccum._window import Sums

Params = TypeVar("Params")
Value = TypeVar("Value")  # the loss, or with `has_aux` `(loss, aux)`
Rest = ParamSpec("Rest")


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`value_and_grad` that have defaults, for type checkers."""

    batch_argnums: int | Sequence[int] | None
    batch_argnames: str | Sequence[str] | None
    batch_layout: Literal["rows", "uneven", "stacked"]
    weight_fn: Callable[..., Any] | None
    loss_reduction: Literal["mean", "sum"]
    rng_argnums: int | Sequence[int]
    carry_argnum: int | None
    accumulator_dtype: Any
    reduce_axes: str | tuple[str, ...]
    reduce_dtype: jax.typing.DTypeLike | None
    overlap_reduction: bool


@overload
def value_and_grad(
    fun: Callable[Concatenate[Params, Rest], Value],
    argnums: Literal[0] = 0,
    has_aux: bool = False,
    *,
    num_microbatches: int | Callable[..., Any],
    **options: Unpack[Options],
) -> Callable[Concatenate[Params, Rest], tuple[Value, Params]]: ...


@overload
def value_and_grad(
    fun: Callable[Rest, Value],
    argnums: int | Sequence[int],
    has_aux: bool = False,
    *,
    num_microbatches: int | Callable[..., Any],
    **options: Unpack[Options],
) -> Callable[Rest, tuple[Value, Any]]: ...


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    num_microbatches: int | Callable[..., Any],
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    batch_layout: Literal["rows", "uneven", "stacked"] = "rows",
    weight_fn: Callable[..., Any] | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    rng_argnums: int | Sequence[int] = (),
    carry_argnum: int | None = None,
    accumulator_dtype: Any = None,
    reduce_axes: str | tuple[str, ...] = (),
    reduce_dtype: jax.typing.DTypeLike | None = None,
    overlap_reduction: bool = False,
) -> Callable[..., Any]:
    """Return `jax.value_and_grad(fun)` that runs the batch in n microbatches, by one scan.

    For the microbatches i = 0..n-1 of the batch, with losses l_i, gradients g_i and weights w_i::

        loss = (sum_i w_i l_i) / (sum_i w_i)        gradient = (sum_i w_i g_i) / (sum_i w_i)

    This is what the full batch gives if `fun` is a mean over w_i examples or tokens. If `fun`
    compares rows, as contrastive losses do, use :func:`optaccum.microbatched`. If microbatches come
    one call at a time, use :func:`optaccum.accumulate`. Call the result inside `jax.jit`: outside
    it, every call compiles the scan. Any optimizer can step on the gradients.

    >>> import jax.numpy as jnp, optaccum
    >>> def loss_fn(w, batch):
    ...     return jnp.sum(batch["mask"] * (w - batch["x"]) ** 2) / jnp.sum(batch["mask"])
    >>> batch = {"x": jnp.array([1.0, 2.0, 3.0, 9.0]), "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
    >>> value_and_grad = optaccum.value_and_grad(
    ...     loss_fn, num_microbatches=2, weight_fn=lambda w, batch: jnp.sum(batch["mask"]))
    >>> loss, grad = value_and_grad(5.0, batch)
    >>> print(f"{loss:.4f} {grad:.4f}")
    9.6667 6.0000

    Guarantees:
        * Loss and gradients have the shapes and dtypes that `jax.value_and_grad` gives. They are
          summed in `accumulator_dtype`, by default the dtype promoted to at least float32.
        * Microbatch i holds the rows i, i + n, i + 2n, ... of every batch leaf, so an axis that is
          sharded over devices stays in place: splitting it costs no communication if n divides the
          rows of a device. A float32 batch is not copied.
        * With `reduce_axes` the devices reduce gradients, weights and loss once, after the scan.
          In a plain `jax.jit`, under `jax.set_mesh` with automatic axes, `fun` and `weight_fn` get
          the rows of one device, and leaves of `aux` are [n, devices, ...]. Parameters that are
          divided over these axes are gathered once, and their sums are scattered once; other
          axes stay with the compiler. Each device folds its index into its keys.
          In `jax.shard_map` (with its `check_vma`) `fun` gets the rows of its device and returns
          their loss; loss and gradients are weighted over all devices, and alike on all. Under
          explicit sharding, gradients with respect to `jax.reshard(p, P(..., reduced={axis}))`
          come out reduced; without `reduce_axes` they come out unreduced, for one `jax.reshard`.
        * Layers in a `lax.scan` need no stack of gradients beside the sums: the backward scan adds
          each layer's gradient to them. A weighted lookup needs no second table.
        * `fun` is traced once (twice with `overlap_reduction`). Keys do not depend on data.
        * Derivatives of any order, in any mode (but not in reverse mode if `num_microbatches` is a
          function). A microbatch without weight has none, whatever its rows are: its `aux`, which
          is kept, is a constant in reverse mode.
        * Gradients of Flax's FP8 collection, which are its new values, are the elementwise largest
          of the microbatches that count: one entry in the histories per step, as for one batch.

    `docs/semantics.md` has a table of all cases.

    `aux` is stacked, never reduced: its leaves, arrays or numbers, get a leading axis of length n,
    at n = 1 too. Means over equal microbatches are `jnp.mean(a, 0)`, counts `jnp.sum(a, 0)`.
    Outputs of shape [n, rows / n, ...] are in the order of the batch again after
    `a.swapaxes(0, 1).reshape(rows, ...)`.

    `carry_argnum` names an argument that each microbatch passes on to the next, such as the batch
    statistics of a model. `fun` then returns `(loss, (carry, aux))`, and so does the result::

        def loss_fn(params, stats, batch):
            logits, new = model.apply({"params": params, "batch_stats": stats}, batch["image"],
                                      mutable=["batch_stats"])
            return cross_entropy(logits, batch["label"]), (new["batch_stats"], logits)

        step = optaccum.value_and_grad(
            loss_fn, has_aux=True, num_microbatches=8, batch_argnums=2, carry_argnum=1)
        (loss, (stats, logits)), grads = step(params, stats, batch)

    `weight_fn` sees arguments only. To drop a microbatch because of its gradient, use
    :func:`optaccum.accumulate` with `should_skip_update_fn`.

    Args:
        fun: A function that returns a real scalar, or with `has_aux` `(scalar, aux)`.
        argnums: What to differentiate: a position or several, as in `jax.value_and_grad`.
        has_aux: Whether `fun` returns `(scalar, aux)`.
        num_microbatches: N, an integer >= 1. If microbatches are stacked, it may be a function,
            called as `fun` is with all arguments, that returns how many of them are real: an
            integer[], which may be traced and is clipped to 0..n. The others are not run.
        batch_argnums: Positions of the pytrees to split. All their leaves have the same leading
            axis, which n divides. None for the argument 1, and then no other positional argument
            may have as many rows: pass 1 to give it to every microbatch whole. (None for no
            position, if `batch_argnames` has names and argument 1 is missing or has a role.)
        batch_argnames: Names of the keyword arguments to split; one that a call leaves out has
            its default. None for none of them, and then none may have as many rows: pass () to
            give it to every microbatch whole.
        batch_layout: "rows" if all leaves of the batch have the same number of rows. "uneven" if
            some have more: n divides the rows of each, and microbatch i holds the rows i, i + n,
            ... of each. "stacked" if they come in microbatches, [n, m, ...] with any m.
        weight_fn: Called as `fun` is, with the arguments of each microbatch; returns how much it
            counts, a scalar >= 0 such as its unpadded tokens. None for 1 each. Weights are summed
            in float32, token counts up to 2**24 exactly, or in float64 with `jax_enable_x64`. Sum
            masks in float32 or integers: bfloat16 rounds a count to 8 bits.
        loss_reduction: "mean" if `fun` is a mean over w_i examples or tokens; "sum" if it is a sum,
            and loss = (sum_i l_i) / (sum_i w_i), and the gradient likewise.
        rng_argnums: Positions of keys, or pytrees of them such as `{"dropout": key}`: in
            microbatch i each key is `jax.random.fold_in(key, i)`. Typed keys elsewhere are
            refused; raw ones (`jax.random.PRNGKey`) cannot be told from data.
        carry_argnum: Position of the carry, or None. It keeps its types. `fun` advances the keys
            in it, as `flax.nnx.Rngs` does by its counts.
        accumulator_dtype: Dtype of the sums, as in :func:`optaccum.accumulate`. A tree, or the
            paths for a function, are like the gradients.
        reduce_axes: Mesh axes over which to reduce once, as in :func:`optaccum.accumulate`. `aux`
            and the carry are not reduced: each device returns what it has. (A carry needs
            `jax.shard_map`.)
        reduce_dtype: Dtype in which sums are sent, as in :func:`optaccum.accumulate`.
        overlap_reduction: Whether to run the last microbatch after the scan, so that compilers can
            reduce the sums of a layer during the backward pass of the layers before it. This pays
            on GPUs for layers that are not in a `lax.scan`. It takes the memory of the gradients
            of one microbatch, and `fun` is compiled twice.

    Returns:
        A function with the arguments of `fun` that returns `(loss, gradients)`, or with `has_aux`
        `((loss, aux), gradients)`.

    Raises:
        TypeError, ValueError: here for options that do not fit; when traced for rows that cannot be
            split or that nobody named, keys in the wrong place, an object that `fun` changes in
            place, and a weight, carry, loss, gradient or mesh axis that does not fit.

    References: `optax.microbatch`; github.com/google-research/t5x `trainer.py`.
    """
    dtype = _validate.check_accumulator_dtype(accumulator_dtype)
    settings = Settings.checked(fun, weight_fn, num_microbatches, has_aux, loss_reduction, dtype)
    axes = _validate.check_axes(reduce_axes)
    reduce_dtype = _validate.check_reduce_dtype(reduce_dtype, axes)
    settings = settings._replace(reduce_dtype=reduce_dtype, overlap_reduction=overlap_reduction)
    _validate.check_flag("`overlap_reduction`", overlap_reduction)
    if overlap_reduction and not axes:
        raise ValueError(
            "`overlap_reduction` needs `reduce_axes`: nothing is reduced after the scan"
        )
    if overlap_reduction and callable(num_microbatches):
        raise ValueError(
            "`overlap_reduction` runs the last microbatch apart, but `num_microbatches` is a "
            "function, so which one is last is not known; leave one of them out"
        )
    positions = _call.check_roles(
        batch_argnames,
        has_aux,
        batch_layout,
        argnums=argnums,
        batch_argnums=batch_argnums,
        rng_argnums=rng_argnums,
        carry_argnum=carry_argnum,
    )

    @functools.wraps(fun)
    def value_and_grad_fn(*args, **kwargs):
        call = _call.Call(fun, positions, args, kwargs)
        devices = _reduce_axes.check_mesh(axes)
        if isinstance(devices, Automatic):
            return from_jit(call, devices)
        return make_loop(call, call.args, *settings.of_call(call))()

    def of_trained(call, values):
        """Returns what belongs to the arguments that are differentiated: one value, or a tuple."""
        several = tuple(values[j] for j in call.roles.trained)
        return several if isinstance(argnums, tuple | list) else several[0]

    def make_loop(call, args, of_call, count):
        trained, carry = call.roles.trained, call.roles.carry
        devices, *_ = [_reduce_axes.check_sums(args[j], axes) for j in trained]
        # Of parameters that all devices share JAX would sum the gradients, each time.
        varied = [devices.vary(x) if j in (*trained, *carry) else x for j, x in enumerate(args)]
        loss_fn = as_loss(call.by_position(fun), has_aux)
        loss_fn = refuse_changes(loss_fn, call.title, carry)
        at, params = of_trained(call, range(len(args))), of_trained(call, varied)
        return Loop(
            settings=of_call,
            args=call.roles.split(varied, of_call.n),
            roles=call.roles,
            params=params,
            differentiate=jax.value_and_grad(loss_fn, at, has_aux),
            weight_fn=None if weight_fn is None else call.by_position(weight_fn, "`weight_fn`"),
            devices=devices,
            overwritten=Overwritten.among(overwritten(params), axes),
            count=count,
        )

    def from_jit(call, devices):
        """Returns value and gradients under automatic sharding."""
        if call.roles.carry:
            raise ValueError(
                "`carry_argnum` cannot be used with `reduce_axes` under automatic sharding, since "
                "each device has a carry of its rows; use jax.shard_map and reduce the carry "
                "(jax.lax.pmean), or leave `reduce_axes` out"
            )
        of_call = settings.of_call(call, devices.count)

        def on_device(args):
            loop = make_loop(call, args, *of_call)
            sums, each, _ = loop.sums()
            _, (total, loss) = loop.devices.reduce((), (sums.weight, sums.args))
            _, loss = _window.mean(Sums(total, (), loss), Sums(None, (), each.loss))
            grads = cast_floating(sums.grads, reduce_dtype)
            return loss, total, as_shard(grads, devices), as_shard(each.aux, devices, axis=1)

        out_specs = jax.P(), jax.P(), jax.P(devices.axes), jax.P(None, devices.axes)
        loss, total, grads, aux = on_each_device(on_device, devices, call, out_specs)
        # Reduced out here, sums can be scattered to where their parameters are divided.
        sums = devices.reduce_stored(Sums((), grads, ()), None)._replace(weight=total)
        grads, _ = _window.mean(sums, Sums(None, of_trained(call, call.args), ()))
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad_fn


@overload
def grad(
    fun: Callable[Concatenate[Params, Rest], Any],
    argnums: Literal[0] = 0,
    has_aux: Literal[False] = False,
    *,
    num_microbatches: int | Callable[..., Any],
    **options: Unpack[Options],
) -> Callable[Concatenate[Params, Rest], Params]: ...


@overload
def grad(
    fun: Callable[Rest, Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    num_microbatches: int | Callable[..., Any],
    **options: Unpack[Options],
) -> Callable[Rest, Any]: ...


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """Return `jax.grad(fun)` that runs the batch in microbatches.

    Args:
        fun: As in :func:`value_and_grad`, and so are the others.
        argnums: What to differentiate.
        has_aux: Whether `fun` returns `(scalar, aux)`.
        **options: The keyword arguments of :func:`value_and_grad`.

    Returns:
        A function with the arguments of `fun` that returns the gradients, or with `has_aux`
        `(gradients, aux)`.

    Raises:
        Exception: what :func:`value_and_grad` raises.
    """
    value_and_grad_fn = value_and_grad(fun, argnums, has_aux, **options)

    @functools.wraps(fun)
    def grad_fn(*args, **kwargs):
        value, grads = value_and_grad_fn(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn
