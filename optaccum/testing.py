"""Does this program accumulate right, and if not, why not?

`check_loss` compares a loss on microbatches with the loss on the full batch. `check_step` compares
whole training steps, optimizer included. Use them in tests, on a small model and a few rows. Import
the module by its name: `import optaccum` does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

from optaccum._testing import loss as _loss, step as _step
from optaccum._testing.report import Finding, Report

__all__ = ("Finding", "Report", "assert_equivalent", "check_loss", "check_step")


def check_loss(
    fun: Callable[..., Any],
    *args: Any,
    num_microbatches: int | None = None,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    weight_fn: Callable[..., Any] | None = None,
    rng_argnums: int | Sequence[int] = (),
    tolerance: float | None = None,
) -> Report:
    """Say whether microbatches give the gradient that `fun` has on the full batch."""
    return _loss.check(
        fun,
        args,
        num_microbatches,
        argnums,
        batch_argnums,
        has_aux,
        weight_fn,
        rng_argnums,
        tolerance,
    )


def assert_equivalent(fun: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Raise AssertionError unless :func:`check_loss` finds the gradients exact."""
    report = check_loss(fun, *args, **options)
    if report.exact is not True:
        raise AssertionError(str(report))


def check_step(
    make_step: Callable[[Any, int], tuple[Any, Callable[[Any, Any], Any]]],
    params: Any,
    batch: Any,
    *,
    every_k: int,
    inside_step: bool = False,
    get_params: Callable[[Any], Any] | None = None,
    tolerance: float | None = None,
) -> Report:
    """Say whether a training step, optimizer included, does with microbatches what it does without."""
    return _step.check(make_step, params, batch, every_k, inside_step, get_params, tolerance)
