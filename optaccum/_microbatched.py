"""Run a function of rows one microbatch at a time, exactly for losses that look at all rows."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optaccum import _batch, _call, _passes, _reduce_axes, _validate
from optaccum._batch import named_leaves
from optaccum._conditional import hoisted
from optaccum._outputs import refuse_changes

Outputs = TypeVar("Outputs")
Arguments = ParamSpec("Arguments")


def microbatched(
    fun: Callable[Arguments, Outputs],
    *,
    num_microbatches: int,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    rng_argnums: int | Sequence[int] = (),
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reduce_axes: str | tuple[str, ...] = (),
) -> Callable[Arguments, Outputs]:
    """Return `fun` that runs its rows in n microbatches, exactly for losses that couple all rows.

    For the microbatches i = 0..n-1 of the batch, a loss L of all outputs Y, and y-bar_i, the rows
    of dL/dY of microbatch i::

        Y = [fun(params, rows_i) for all i]        gradient = sum_i vjp_i(y-bar_i)

    where vjp_i belongs to `fun(params, rows_i)`, which is computed again for it. By the chain rule
    this is exact for every L: contrastive losses, balance of experts, dice, covariances. For means
    over rows :func:`optaccum.value_and_grad` is exact too, and runs `fun` once and not twice.
    Compute with all rows outside of `fun`, and call the result inside `jax.jit`: outside it, every
    call compiles the loops.

    >>> import jax, jax.numpy as jnp, optaccum
    >>> def encode(w, x):
    ...     return w * x
    >>> in_two = optaccum.microbatched(encode, num_microbatches=2)
    >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
    >>> loss, grad = jax.value_and_grad(lambda w: jnp.var(in_two(w, x)))(2.0)  # 4 Var(x), 4 Var(x)
    >>> print(f"{loss:.2f} {grad:.2f}")
    5.00 5.00
    >>> loss_fn = lambda w, x: jnp.var(encode(w, x))
    >>> loss, _ = optaccum.value_and_grad(loss_fn, num_microbatches=2)(2.0, x)
    >>> print(f"{loss:.2f}, as a variance within microbatches")
    4.00, as a variance within microbatches

    Guarantees:
        * Outputs and gradients are what `fun` gives for all rows, in the order of the batch, with
          its shapes and dtypes. Gradients are summed in `accumulator_dtype`, by default the dtype
          promoted to at least float32, and cast once.
        * Between the passes only the arguments are kept, and what the loss keeps of Y.
        * Microbatch i holds the rows i, i + n, i + 2n, ... of every batch leaf, as in
          :func:`optaccum.value_and_grad`: an axis that is sharded over devices stays in place.
        * Both passes see the same keys, so dropout drops the same units in both.
        * A gradient is exact or refused: if a value that `fun` closes over is differentiated, an
          error says so.
        * With `reduce_axes` in `jax.shard_map` (with its `check_vma`) the devices reduce the
          gradients of what they share once, after the loop, before the cast.
        * `fun` is traced once. Keys do not depend on data.

    ============================================  ==============================================
    case                                          result
    ============================================  ==============================================
    `num_microbatches` 1                          `fun` itself: no loop, the caller's keys
    an output leaf [rows / n, ...]                [rows, ...], in the order of the batch
    an output leaf [1, ...], such as a sum        [n, ...], one entry per microbatch
    an output of shape () or another length       an error; return `x[None]`, one per microbatch
    n does not divide the rows                    an error that names the nearest divisors
    a typed key outside `rng_argnums`             an error: microbatches would share their noise
    keyword arguments                             `batch_argnames` are split, others stay whole;
                                                  if left out, none may have as many rows
    an argument that `fun` changes in place       an error, as for BatchNorm of `flax.nnx`: each
                                                  microbatch gets a copy. A clone may change
    integer outputs and arguments, None leaves    as in `jax.grad`: no gradient
    second derivatives, such as `jax.hessian`     exact; `jax.jvp` of `jax.grad` needs the memory
                                                  of two microbatches, `jax.grad` of `jax.grad`
                                                  that of the full batch
    forward mode alone: `jax.jvp`, `jax.jacfwd`   an error of JAX; differentiate in reverse
    BatchNorm inside `fun`                        sees the rows of its microbatch
    ============================================  ==============================================

    If a loss needs a term from inside `fun`, return it as an output: the sums of expert loads as
    `loads[None]`, which come back as [n, experts], or router probabilities by row::

        def blocks(params, tokens):
            hidden, loads = model(params, tokens)
            return hidden, loads.sum(0)[None]

    Args:
        fun: A function of parameters and rows that returns a pytree of arrays, each with an entry
            for each row, or one.
        num_microbatches: N, an integer >= 1.
        batch_argnums: Positions of the pytrees to split. All their leaves have the same leading
            axis, which n divides. They may be differentiated too. None for the argument 1, and
            then no argument after it may have as many rows: pass 1 to give it to every microbatch
            whole.
        batch_argnames: Names of the keyword arguments to split, as in
            :func:`optaccum.value_and_grad`.
        rng_argnums: Positions of keys, or pytrees of them, as in :func:`optaccum.value_and_grad`:
            in microbatch i each key is `jax.random.fold_in(key, i)`.
        accumulator_dtype: Dtype of all sums; None for each argument's own promoted to at least
            float32.
        reduce_axes: Axes of `jax.shard_map` over which to reduce gradients once. They are summed,
            as JAX would sum them microbatch after microbatch. Under explicit sharding pass
            `jax.reshard(p, P(..., reduced={axis}))` instead.

    Returns:
        A function with the arguments of `fun` that returns its outputs for all rows.

    Raises:
        TypeError, ValueError: here for options that do not fit; when traced for rows that cannot be
            split or that nobody named, keys in the wrong place, an object that `fun` changes in
            place, an output without the rows of its microbatch or one entry, a differentiated value
            that `fun` closes over, and `reduce_axes` or an `accumulator_dtype` that does not fit.

    References: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup" (arXiv:2101.06983), who do it for contrastive losses.
    """
    _validate.check_function("`fun`", fun)
    n = _validate.check_count("`num_microbatches`", num_microbatches)
    accumulator_dtype = _validate.check_dtype(accumulator_dtype)
    axes = _validate.check_axes(reduce_axes)
    positions = _call.check_roles(
        batch_argnames, batch_argnums=batch_argnums, rng_argnums=rng_argnums
    )

    @functools.wraps(fun)
    def microbatched_fn(*args, **kwargs):
        call = _call.Call(fun, positions, args, kwargs)
        call.check(n, "pad the batch and drop the outputs of the padding")
        of_args = refuse_changes(call.by_position(fun), call.title, None)
        devices = _reduce_axes.check_in_shard_map(axes)
        if n == 1:
            outputs = of_args(*_passes.vary(call.args, devices))
            check_outputs(outputs, call.nums_rows[0])
            return outputs
        whole, rows, join = _passes.take_apart(call.roles.split(call.args, n), call.roles)
        first = jnp.int32(0)
        # What `fun` closes over becomes an argument of the rule, which can then tell whether it
        # is differentiated.
        of_arrays, closed_over, shapes = hoisted(
            lambda i, *arrays: of_args(*join(i, *arrays)),
            *(first, *_passes.vary(whole, devices), *_batch.take(rows, first)),
        )
        check_outputs(shapes, call.nums_rows[0] // n)
        check_joins(shapes, n)
        passes = _passes.Passes(of_arrays, devices, n, accumulator_dtype)
        rule = jax.custom_vjp(passes.run)
        rule.defvjp(passes.forward, passes.backward, symbolic_zeros=True)
        return _batch.join(rule(whole, rows, closed_over))

    return microbatched_fn


def check_outputs(outputs: Any, rows: int) -> None:
    """Raises unless every output has one entry for each row of its microbatch, or one in all."""
    for name, y in named_leaves({"": outputs}):
        name = name or "(the only leaf)"
        if not isinstance(y, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            kind = _validate.describe(y)
            raise TypeError(f"`fun` returned {kind} as output leaf {name}; return arrays")
        if not y.shape:
            raise TypeError(
                f"`fun` returned output leaf {name} of shape (), but it is called with one "
                "microbatch at a time and its outputs are joined along their leading axis; return "
                "`x[None]`, of which you get one entry per microbatch, or reduce over all rows "
                "outside of `fun`"
            )
        if y.shape[0] not in (1, rows):
            raise ValueError(
                f"`fun` returned output leaf {name} of shape {y.shape} for the {rows} rows of a "
                "microbatch, and outputs are joined along their leading axis as rows are; return "
                "`x[None]`, of which you get one entry per microbatch, or, with r entries for each "
                f"row, `x.reshape({rows}, r, ...)`"
            )


def check_joins(outputs: Any, n: int) -> None:
    """Raises if an object among the outputs of a microbatch cannot hold all rows."""

    def joined(y):
        return jax.tree.map(lambda y: jnp.concatenate([y] * n), y)

    for name, y in named_leaves({"": outputs}, _batch.is_object):
        if shape := _batch.stale_shape(y, joined):
            raise ValueError(
                f"`fun` returned output {name or '(the only one)'}, an object of type "
                f"{type(y).__name__}, which keeps the shape of its array, {shape}, in its tree "
                "structure, which stays when the arrays of all microbatches are joined; return its "
                "arrays (`x.array` of haliax), and build the object outside"
            )
