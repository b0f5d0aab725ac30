"""Run a function of rows one microbatch at a time, exactly for losses that look at all rows."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaccum import _batch, _devices, _gradients, _passes, _reduce_axes, _roles, _rows, _validate
from optaccum._conditional import hoisted
from optaccum._objects import check_joins, unchanged
from optaccum._trees import cast_like


def microbatched(
    fun: Callable[..., Any],
    *,
    num_microbatches: int,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    rng_argnums: int | Sequence[int] = (),
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reduce_axes: str | tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Return `fun` that runs its rows in n microbatches, exactly for losses that couple all rows.

    For the microbatches i = 0..n-1 of the batch, a loss L of all outputs Y, and its derivative
    y-bar_i by those of microbatch i::

        Y = [fun(params, rows_i) for all i]        gradient = sum_i vjp_i(y-bar_i)

    where vjp_i belongs to `fun(params, rows_i)`, which is computed again for it. That is the chain
    rule, so it is exact for every L: contrastive losses, balance of experts, dice, covariances.
    :func:`optaccum.value_and_grad` is exact for means over rows only, and runs `fun` once where
    this runs it twice. Compute with all rows outside of `fun`, and call the result inside
    `jax.jit`; outside it the loops are compiled in every call.

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
        * Outputs and gradients are those of `fun`, in the order of the batch, with their shapes and
          dtypes. Gradients are summed in `accumulator_dtype`, by default the dtype promoted to at
          least float32, and cast once.
        * Between the two passes only the arguments are kept, beside what the loss keeps of Y.
        * Microbatch i holds the rows i, i + n, i + 2n, ... of every batch leaf, as in
          :func:`optaccum.value_and_grad`: an axis that is sharded over devices stays where it is.
        * Both passes see the same keys, so that dropout drops the same units in both.
        * A gradient is exact or refused: where a value that `fun` closes over is differentiated, an
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
                                                  microbatch has its own. A copy may change
    integer outputs and arguments, None leaves    as in `jax.grad`: no gradient
    second derivatives, such as `jax.hessian`     exact; `jax.jvp` of `jax.grad` needs the memory
                                                  of two microbatches, `jax.grad` of `jax.grad`
                                                  that of the full batch
    forward mode alone: `jax.jvp`, `jax.jacfwd`   an error of JAX; differentiate in reverse
    BatchNorm inside `fun`                        sees the rows of its microbatch
    ============================================  ==============================================

    A loss that needs a term from inside `fun` takes it out as an output: the sums of expert loads
    as `loads[None]`, which come back as [n, experts], or router probabilities by row::

        def blocks(params, tokens):
            hidden, loads = model(params, tokens)
            return hidden, loads.sum(0)[None]

    Args:
        fun: a function of parameters and rows that returns a pytree of arrays, each with an entry
            for each row, or one.
        num_microbatches: n, an integer >= 1.
        batch_argnums: positions of the pytrees to split. All their leaves have the same leading
            axis, which n divides. They may be differentiated too. None for the argument 1, and
            then no argument after it may have as many rows: pass 1 to give it to every microbatch
            whole.
        batch_argnames: names of the keyword arguments to split, as in
            :func:`optaccum.value_and_grad`.
        rng_argnums: positions of keys, or pytrees of them, as in :func:`optaccum.value_and_grad`:
            in microbatch i each key is `jax.random.fold_in(key, i)`.
        accumulator_dtype: dtype of the sums, as in :func:`optaccum.accumulate`.
        reduce_axes: axes of `jax.shard_map` over which to reduce gradients once. They are summed,
            as JAX would sum them microbatch after microbatch. Under explicit sharding pass
            `jax.reshard(p, P(..., reduced={axis}))` instead.

    Returns:
        A function with the arguments of `fun` that returns its outputs for all rows.

    Raises:
        TypeError: (here) for arguments of another kind; (when traced) for a key in the wrong
            place, none in the right one, an object that `fun` changes in place, an output without
            a leading axis, a differentiated value that `fun` closes over, or `reduce_axes` without
            `check_vma`.
        ValueError: (here) for `num_microbatches` below 1 or no batch; (when traced) for batch
            leaves that cannot be split, an argument with two roles or with rows that nobody named,
            an output with neither the rows of its microbatch nor one entry, `reduce_axes` that are
            not those of a `jax.shard_map`, or an `accumulator_dtype` that drops an imaginary part.

    References: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup" (arXiv:2101.06983), who do it for contrastive losses.
    """
    _validate.check_function("`fun`", fun)
    n = _validate.check_count("`num_microbatches`", num_microbatches)
    accumulator_dtype = _validate.check_accumulator_dtype(accumulator_dtype)
    axes = _validate.check_axes(reduce_axes)
    given = {"`batch_argnums`": batch_argnums, "`rng_argnums`": rng_argnums}
    roles = _roles.check_roles(given, batch_argnames)

    @functools.wraps(fun)
    def microbatched_fn(*args, **kwargs):
        pad = "pad the batch and drop the outputs of the padding"
        called = _roles.check_call(fun, roles, args, kwargs, n, pad)
        rows, rngs = called.roles.values()
        of_args = unchanged(called.by_position(fun), called.title, None)
        count = jax.tree.leaves([called.args[j] for j in rows])[0].shape[0]
        over = _reduce_axes.check_shares(axes)
        if n == 1:
            outputs = of_args(*(share(x, over) for x in called.args))
            _rows.check_outputs(outputs, count)
            return outputs
        divided = _divide(called.args, rows, rngs, n)
        call = _Call(divided, rows, rngs)
        arrays = [x for x in jax.tree.leaves(divided) if _is_array(x)]

        def of_arrays(*arrays):
            return of_args(*call.fill(arrays))

        # What `fun` closes over becomes an argument of the rule, which can then tell whether it
        # is differentiated.
        example = call.own(call.share(arrays, over), jnp.int32(0))
        of_arrays, closed_over, shapes = hoisted(of_arrays, *example)
        _rows.check_outputs(shapes, count // n)
        check_joins(shapes)

        def run(arrays, closed_over):
            shared = call.share(arrays, over)
            return _passes.outputs(lambda i: of_arrays(closed_over, *call.own(shared, i)), n)

        def forward(arrays, closed_over):
            for x in closed_over:
                if x.perturbed:
                    raise TypeError(
                        f"`fun` closes over a value, {_validate.describe(x.value)}, that is being "
                        "differentiated, but only its arguments have gradients here; pass it as "
                        "an argument"
                    )
            closed_over, values = ([x.value for x in found] for found in (closed_over, arrays))
            trained = {k: x.value for k, x in enumerate(arrays) if x.perturbed}
            _gradients.check_parameters(call.only(trained), accumulator_dtype)
            return run(values, closed_over), (trained, values, closed_over)

        def backward(residuals, cotangents):
            trained, arrays, closed_over = residuals
            shared = call.share(arrays, over)

            def pull(i):
                own = call.own(shared, i)

                def of_trained(trained):
                    return of_arrays(closed_over, *(trained.get(k, x) for k, x in enumerate(own)))

                # With the fences of `jax.checkpoint` compilers go through the parts of `fun` one
                # after the other. Without, XLA:GPU keeps what two towers compute at the same time.
                of_trained = jax.checkpoint(of_trained)
                outputs, vjp = jax.vjp(of_trained, {k: own[k] for k in trained})
                (found,) = vjp(_passes.own_cotangents(outputs, cotangents, i))
                return call.divide(found)

            whole, rows = call.divide({k: shared[k] for k in trained})
            sums, of_rows = _passes.cotangents(pull, whole, rows, n, accumulator_dtype)
            sums = {k: _devices.reduce_like(s, arrays[k], over) for k, s in sums.items()}
            found = cast_like(sums, {k: arrays[k] for k in sums}) | of_rows
            return [found.get(k) for k in range(len(arrays))], [None for _ in closed_over]

        rule = jax.custom_vjp(run)
        rule.defvjp(forward, backward, symbolic_zeros=True)
        return _batch.join(rule(arrays, closed_over))

    return microbatched_fn


def _divide(args: list, rows: tuple, rngs: tuple, n: int) -> list[Any]:
    """Returns the arguments with their rows divided, [m, n, ...], and keys as arrays."""
    divided = [
        jax.tree.map(jnp.asarray, x) if j in (*rows, *rngs) else x for j, x in enumerate(args)
    ]
    for j in rows:
        divided[j] = _batch.split(divided[j], n)
    return divided


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


class _Call:
    """What does not change in the arguments of one call, and where their arrays belong.

    It keeps none of the arrays: rules of differentiation outlive the trace that these belong to.
    """

    def __init__(self, divided: list, rows: tuple, rngs: tuple):
        self.rows, self.rngs = rows, rngs
        leaves, self.treedef = jax.tree.flatten(divided)
        self.at = [k for k, x in enumerate(leaves) if _is_array(x)]
        self.leaves = [None if _is_array(x) else x for x in leaves]
        of_rows = [jax.tree.map(lambda _, j=j: j in rows, x) for j, x in enumerate(divided)]
        is_row = jax.tree.leaves(of_rows)
        self.is_row = [is_row[k] for k in self.at]

    def fill(self, arrays: Sequence[jax.Array]) -> list[Any]:
        """Returns the arguments with these arrays in them."""
        leaves = self.leaves.copy()
        for k, x in zip(self.at, arrays, strict=True):
            leaves[k] = x
        return self.treedef.unflatten(leaves)

    def only(self, some: dict[int, jax.Array]) -> list[Any]:
        """Returns arguments that are None but for some arrays."""
        leaves: list[Any] = [None] * len(self.leaves)
        for k, x in some.items():
            leaves[self.at[k]] = x
        return self.treedef.unflatten(leaves)

    def own(self, arrays: Sequence[jax.Array], i: jax.Array) -> list[jax.Array]:
        """Returns the arrays of microbatch i: its rows and keys, and all others whole."""
        args = self.fill(arrays)
        for j in self.rows:
            args[j] = _batch.take(args[j], i)
        for j in self.rngs:
            args[j] = _batch.own_keys(args[j], i)
        leaves = jax.tree.leaves(args)
        return [leaves[k] for k in self.at]

    def share(self, arrays: Sequence[jax.Array], over: _devices.Replicated) -> list[jax.Array]:
        """Returns arrays of which what has a gradient is each device's own, except for rows."""
        known = zip(arrays, self.is_row, strict=True)
        return [x if is_row else share(x, over) for x, is_row in known]

    def divide(self, some: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        """Returns what belongs to arrays that all microbatches share, and what to rows."""
        whole = {k: x for k, x in some.items() if not self.is_row[k]}
        return whole, {k: x for k, x in some.items() if self.is_row[k]}


def share(tree: Any, over: _devices.Replicated) -> Any:
    """Returns a tree of which every array that can have a gradient is each device's own."""

    def leaf(x):
        inexact = _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)
        return over.share(x) if inexact else x

    return jax.tree.map(leaf, tree)
