"""Functions of the user's that `accumulate` calls, with their results checked."""

from collections.abc import Callable
import contextlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaccum._mesh_axes import unreduced
from optaccum._validate import (
    INT32_MAX,
    check_count,
    check_function,
    check_scalar,
    leaf_name,
    rank,
)


def as_inner(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` with extra arguments, and with its states checked."""
    parameters = inspect.signature(tx.update).parameters.values()
    # `optax.with_extra_args_support` asks for a class, and so drops those of optax.MultiSteps.
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        tx = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        try:
            updates, new = tx.update(updates, state, params, **extra_args)
        except Exception as error:
            _note_another_state(error, tx, state, params)
            raise
        _check_same_state("inner", new, state)
        return updates, new

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _note_another_state(error: Exception, tx: Any, state: Any, params: Any) -> None:
    """Adds to an error of `inner` that its state is not what it makes of the parameters."""
    with contextlib.suppress(Exception):
        wanted = jax.tree.structure(jax.eval_shape(tx.init, params))
        if wanted != (found := jax.tree.structure(state)):
            error.add_note(
                f"`inner_state` was made by another `inner`: it has the structure {found}, and "
                f"`inner.init` gives {wanted}"
            )


def as_judge(should_skip_update_fn: Any) -> Callable[..., tuple[jax.Array, Any]] | None:
    """Returns a function that judges a microbatch: whether to skip it, bool[], and the report."""
    if should_skip_update_fn is None:
        return None
    check_function(
        "`should_skip_update_fn`", should_skip_update_fn, " such as optax.skip_not_finite"
    )

    def judge(grads, gradient_step, params, last_report=None):
        with _explain_unreduced(grads):
            result = should_skip_update_fn(grads, gradient_step, params)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "`should_skip_update_fn` must return a pair (bool[], report), such as "
                f"`(jnp.any(bad), ())`, got {result!r}"
            )
        should_skip, report = result
        check_scalar("the first result of `should_skip_update_fn`", should_skip, jnp.bool_)
        if last_report is not None:
            if jax.tree.structure(report) != jax.tree.structure(last_report):
                raise ValueError(
                    "`should_skip_update_fn` reports a tree of the structure "
                    f"{jax.tree.structure(report)}, but the optimizer state keeps one of "
                    f"{jax.tree.structure(last_report)}: it was made with another function, or "
                    "with none; go on with "
                    "`state._replace(skip_state=tx.init(params).skip_state)`"
                )
            _check_same_state("should_skip_update_fn", report, last_report)
        return jnp.asarray(should_skip), report

    return judge


def length(every_k: Any, gradient_step: jax.Array) -> jax.Array:
    """Returns the length of the window after this many releases, i32[]."""
    if callable(every_k):
        found: Any = every_k(gradient_step)
        remedy = "; cast a float schedule with `.astype(int)`"
        check_scalar("`every_k(gradient_step)`", found, jnp.integer, remedy=remedy)
        traced = isinstance(found, jax.Array)
        every_k = found if traced else check_count("`every_k`", int(found))
    dtype = jnp.result_type(every_k)
    if isinstance(every_k, jax.Array) and jnp.iinfo(dtype).max > INT32_MAX:  # it would wrap
        every_k = jnp.clip(every_k, 1, jnp.asarray(INT32_MAX, dtype))
    return jnp.asarray(every_k, jnp.int32)


@contextlib.contextmanager
def _explain_unreduced(grads: Any) -> Any:
    """Says why `should_skip_update_fn` failed on unreduced gradients."""
    try:
        yield
    except Exception as error:
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if axes := unreduced(g):
                raise TypeError(
                    f"`should_skip_update_fn` failed on gradients such as leaf {leaf_name(path)}, "
                    f"which are unreduced over {sorted(axes)}: they can only be added up and "
                    "scaled, as optaccum.skip_not_finite does"
                ) from error
        raise


def _check_same_state(name: str, tree: Any, like: Any) -> None:
    """Raises unless a state that `name` returned has the structure and shapes it began with."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"`{name}` returned a state of the tree structure {jax.tree.structure(tree)}, but "
            f"began with {jax.tree.structure(like)}; the structure of a state cannot change"
        )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, x), y in zip(leaves, jax.tree.leaves(like), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"`{name}` returned a state whose leaf {leaf_name(path)} has the shape "
                f"{jnp.shape(x)}, but began with {jnp.shape(y)}; a state cannot change its shapes"
            )
        if rank(x) > rank(y):
            raise TypeError(
                f"`{name}` returned a state whose leaf {leaf_name(path)} is "
                f"{jnp.result_type(x)}, but began as {jnp.result_type(y)}, and a cast back would "
                f"lose a part of it; begin with {jnp.result_type(x)}"
            )
