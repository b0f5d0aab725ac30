"""Take the gradient of a whole batch in one call, one microbatch in memory at a time."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import jax
from jax import lax
import jax.numpy as jnp

from optaccum import _batch, _extra_args, _reduce_axes, _roles, _rows, _scatters, _validate, _window
from optaccum._cotangents import call_with_drops, drop_unless
from optaccum._mesh_axes import vary, varying
from optaccum._objects import unchanged
from optaccum._trees import cast_like, strongly_typed, where
from optaccum._window import Microbatch, Sums

Params = TypeVar("Params")
Rest = ParamSpec("Rest")


@overload
def value_and_grad(
    fun: Callable[Concatenate[Params, Rest], Any],
    argnums: Literal[0] = 0,
    has_aux: bool = False,
    *,
    num_microbatches: int,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    weight_fn: Callable[..., Any] | None = None,
    loss_reduction: str = "mean",
    rng_argnums: int | Sequence[int] = (),
    carry_argnum: int | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reduce_axes: str | tuple[str, ...] = (),
) -> Callable[Concatenate[Params, Rest], tuple[Any, Params]]: ...


@overload
def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool = False,
    *,
    num_microbatches: int,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    weight_fn: Callable[..., Any] | None = None,
    loss_reduction: str = "mean",
    rng_argnums: int | Sequence[int] = (),
    carry_argnum: int | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reduce_axes: str | tuple[str, ...] = (),
) -> Callable[..., Any]: ...


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    num_microbatches: int,
    batch_argnums: int | Sequence[int] | None = None,
    batch_argnames: str | Sequence[str] | None = None,
    weight_fn: Callable[..., Any] | None = None,
    loss_reduction: str = "mean",
    rng_argnums: int | Sequence[int] = (),
    carry_argnum: int | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    reduce_axes: str | tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Return `jax.value_and_grad(fun)` that runs the batch in n microbatches, by one scan.

    For the microbatches i = 0..n-1 of the batch, with losses l_i, gradients g_i and weights w_i::

        loss = (sum_i w_i l_i) / (sum_i w_i)        gradient = (sum_i w_i g_i) / (sum_i w_i)

    which are those of the full batch, if `fun` is a mean over w_i examples or tokens. Where it
    compares rows, as contrastive losses do, they are not: use :func:`optaccum.microbatched`. Needs
    the whole batch at once and no state: any optimizer steps on the result. Where microbatches come
    one call at a time, use :func:`optaccum.accumulate`. Call the result inside `jax.jit`; outside
    it the scan is compiled in every call.

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
        * Shapes and dtypes of loss and gradients are those of `jax.value_and_grad`. Sums are kept
          in `accumulator_dtype`, by default the dtype promoted to at least float32.
        * Microbatch i holds the rows i, i + n, i + 2n, ... of every batch leaf. So an axis that
          is sharded over devices stays where it is: no communication to split it, as long as n
          divides the rows of a device. A float32 batch is not copied.
        * With `reduce_axes` the devices reduce gradients, weights and loss once, after the scan.
          In `jax.shard_map` (with its `check_vma`) `fun` sees the rows of its device and returns
          the loss of these; loss and gradients come out weighted over all devices, and alike on
          all. Under explicit sharding gradients with respect to `jax.reshard(p, P(...,
          reduced={axis}))` come out reduced; without `reduce_axes` they come out unreduced, for
          one `jax.reshard` to where they are wanted.
        * `fun` is traced once. Keys do not depend on data.
        * Derivatives of any order, in any mode. A microbatch without weight has none, whatever its
          rows are: `aux`, which is kept, is a constant there in reverse mode.

    Documentation: "Semantics" has a table of all cases.

    `aux` is stacked, never reduced: each of its leaves, arrays or numbers, gets a leading axis of
    length n, at n = 1 too, so that code which reads it does not depend on n. Means over equal
    microbatches are `jnp.mean(a, 0)`; counts, `jnp.sum(a, 0)`; outputs of shape [n, rows / n, ...]
    are in the order of the batch again after `a.swapaxes(0, 1).reshape(rows, ...)`.

    What each microbatch passes on to the next, such as the batch statistics of a model, is the
    argument `carry_argnum`. `fun` then returns `(loss, (carry, aux))`, and so does the result::

        def loss_fn(params, stats, batch):
            logits, new = model.apply({"params": params, "batch_stats": stats}, batch["image"],
                                      mutable=["batch_stats"])
            return cross_entropy(logits, batch["label"]), (new["batch_stats"], logits)

        step = optaccum.value_and_grad(
            loss_fn, has_aux=True, num_microbatches=8, batch_argnums=2, carry_argnum=1)
        (loss, (stats, logits)), grads = step(params, stats, batch)

    To drop a microbatch for what its gradient holds, take it with :func:`optaccum.accumulate` and
    `should_skip_update_fn`: `weight_fn` sees arguments only.

    Args:
        fun: a function that returns a real scalar, or with `has_aux` `(scalar, aux)`.
        argnums: what to differentiate: a position or several, as in `jax.value_and_grad`.
        has_aux: whether `fun` returns `(scalar, aux)`.
        num_microbatches: n, an integer >= 1.
        batch_argnums: positions of the pytrees to split. All their leaves have the same leading
            axis, which n divides. None for the argument 1, and then no other positional argument
            may have as many rows: pass 1 to give it to every microbatch whole. (None for no
            position, if `batch_argnames` has names and there is no argument 1, or it has a role.)
        batch_argnames: names of the keyword arguments to split; one that a call leaves out has
            its default. None for none of them, and then none may have as many rows: pass () to
            give it to every microbatch whole.
        weight_fn: called as `fun` is, with the arguments of each microbatch; returns how much it
            counts, a scalar >= 0 such as its unpadded tokens. None for 1 each. Weights are summed
            in float32, token counts up to 2**24 exactly, or in float64 with `jax_enable_x64`. Sum
            masks in float32 or integers: bfloat16 rounds a count to 8 bits.
        loss_reduction: "mean" where `fun` is a mean over w_i examples or tokens; "sum" where it is
            a sum, and loss = (sum_i l_i) / (sum_i w_i), and the gradient likewise.
        rng_argnums: positions of keys, or pytrees of them such as `{"dropout": key}`: in
            microbatch i each key is `jax.random.fold_in(key, i)`. Typed keys elsewhere are
            refused; raw ones (`jax.random.PRNGKey`) cannot be told from data.
        carry_argnum: position of what is passed on, or None. Its types are kept. Keys in it are
            `fun`'s to advance, as the counts of `flax.nnx.Rngs` do.
        accumulator_dtype: dtype of the sums, as in :func:`optaccum.accumulate`.
        reduce_axes: mesh axes over which to reduce once, as in :func:`optaccum.accumulate`; `aux`
            and the carry stay each device's own.

    Returns:
        A function with the arguments of `fun` that returns `(loss, gradients)`, or with `has_aux`
        `((loss, aux), gradients)`.

    Raises:
        TypeError: (here) for arguments of another kind; (when traced) for a key in the wrong
            place, none in the right one, an object that `fun` changes in place, a weight that is no
            scalar or, in `jax.shard_map`, differs between devices whose gradients are summed, a
            carry that changes its type, or a loss or gradients that are reduced over `reduce_axes`
            already.
        ValueError: (here) for `num_microbatches` below 1, no batch, or a carry without `has_aux`;
            (when traced) for batch leaves that cannot be split, an argument with two roles or
            with rows that nobody named, or `reduce_axes` that the mesh has not,
            or not as Manual or Explicit ones.

    References: `optax.microbatch`; github.com/google-research/t5x `trainer.py`.
    """
    _validate.check_function("`fun`", fun)
    if weight_fn is not None:
        _validate.check_function("`weight_fn`", weight_fn)
    summed = _validate.check_loss_reduction(loss_reduction) == "sum"
    _validate.check_denominator("`weight_fn`", summed and weight_fn is None)
    n = _validate.check_count("`num_microbatches`", num_microbatches)
    accumulator_dtype = _validate.check_accumulator_dtype(accumulator_dtype)
    axes = _validate.check_axes(reduce_axes)
    roles = _roles.check_roles(
        {
            "`argnums`": argnums,
            "`batch_argnums`": batch_argnums,
            "`rng_argnums`": rng_argnums,
            "`carry_argnum`": () if carry_argnum is None else (carry_argnum,),
        },
        batch_argnames,
        has_aux,
    )
    dtype = jax.dtypes.canonicalize_dtype(float)  # of weights: float64 with `jax_enable_x64`

    @functools.wraps(fun)
    def value_and_grad_fn(*args, **kwargs):
        call = _roles.check_call(fun, roles, args, kwargs, n)
        trained, rows, rngs, carries = call.roles.values()
        over, *_ = [_reduce_axes.check_sums(args[j], axes) for j in trained]
        # Of parameters that all devices share JAX would sum the gradients, each time.
        args = [over.share(x) if j in (*trained, *carries) else x for j, x in enumerate(call.args)]
        at = trained if isinstance(argnums, tuple | list) else trained[0]
        params = args[at] if isinstance(at, int) else tuple(args[j] for j in at)
        split = {j: _batch.split(args[j], n) for j in rows if n > 1}
        loss_fn = unchanged(call.by_position(fun), call.title, carries)
        differentiate = jax.value_and_grad(loss_fn, at, has_aux)

        def pick(i, carry):
            """Returns the arguments of microbatch i, or of them all."""
            own = list(args)
            for j, leaves in split.items():
                own[j] = _batch.take(leaves, i)
            for j in rngs if n > 1 else ():
                own[j] = _batch.own_keys(args[j], i)
            for j in carries:
                own[j] = carry
            return own

        def weigh(own):
            weight = call.by_position(weight_fn)(*own) if weight_fn else 1.0
            return jnp.asarray(_extra_args.as_weight("`weight_fn(...)`", weight, dtype), dtype)

        def run(i, carry, before):
            """Returns loss, aux, carry, gradients, weight and whether it counts."""
            own = pick(i, carry)
            weight = valid = None
            if weight_fn is not None:
                weight = weigh(own)
                valid = _window.adds(weight, before, over.largest)
                weight = drop_unless(valid, weight)

            def differentiated():
                value, grads = differentiate(*own)
                loss, aux = value if has_aux else (value, None)
                _rows.check_aux(aux)
                return (loss, aux), grads

            found, holds = _scatters.trace(lambda: call_with_drops(valid, differentiated))
            (loss, aux), grads = found
            _reduce_axes.check_gradients(loss, grads, weight, over)
            if carries:
                new, aux = _as_carry_and_aux(aux)
                _rows.check_carry(new, carry)
                new = _scatters.fence(over.share(cast_like(new, carry)))
                carry = new if valid is None else where(valid, new, carry)
            if valid is None:  # else it is selected when it is added
                grads = _scatters.apart(grads, holds, before)
            return loss, aux, carry, grads, weight, valid

        carry = jax.tree.map(strongly_typed, args[carries[0]]) if carries else None
        if n == 1 and not axes:
            loss, aux, carry, grads, weight, valid = run(0, carry, 0)
            if valid is not None:
                if summed:
                    each = Sums(weight, grads, loss)
                    grads, loss = _window.mean(each, each)
                zeros = jax.tree.map(jnp.zeros_like, (loss, grads))
                loss, grads = where(valid, (loss, grads), zeros)
            aux = jax.tree.map(lambda x: jnp.asarray(x)[None], aux)
        else:

            def body(held, i):
                sums, before, carry = held
                loss, aux, carry, grads, weight, valid = run(i, carry, before)
                # The sums begin as zeros in this program, so nothing is there to overwrite.
                sums = _window.add(sums, grads, Microbatch(weight, adds=valid, summed=summed))
                before += 1 if valid is None else jnp.where(valid, jnp.asarray(weight), 0)
                return (sums, before, carry), (loss, aux, weight, valid)

            # Zeros of the gradients' type: where it is `unreduced`, that of `params` is not.
            zeros = jax.grad(lambda _: 0.0)(params)
            sums = _window.open_sums(zeros, accumulator_dtype)
            total = jnp.zeros([], dtype)
            if weight_fn is not None:
                total = vary(total, tuple(varying(jax.eval_shape(lambda: weigh(pick(0, carry))))))
            held, each = lax.scan(body, (sums, total, carry), jnp.arange(n))
            (sums, total, carry), (losses, aux, weights, valid) = held, each
            if weights is None:
                total = jnp.asarray(n, dtype)
            each = Microbatch(weights, opens=True, adds=valid, summed=summed)
            terms = _window.add(_window.open_sums(losses), losses, each).sum()
            sums, (total, terms) = over.reduce(sums, (total, terms))
            grads, loss = _window.mean(Sums(total, sums, terms), Sums(None, params, losses))
        aux = (carry, aux) if carries else aux
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad_fn


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """Return `jax.grad(fun)` that runs the batch in microbatches.

    Args:
        fun: as in :func:`value_and_grad`, and so are the others.
        argnums: what to differentiate.
        has_aux: whether `fun` returns `(scalar, aux)`.
        **options: the keyword arguments of :func:`value_and_grad`.

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


def _as_carry_and_aux(aux: Any) -> tuple[Any, Any]:
    """Returns what `fun` returned beside its loss, where it hands on a carry, as a pair."""
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise TypeError(
            "`fun` must return `(loss, (carry, aux))` with `carry_argnum`, where aux may be (), "
            f"got {_validate.describe(aux)} for `(carry, aux)`"
        )
    return aux
