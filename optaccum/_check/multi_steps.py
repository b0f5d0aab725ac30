"""Names and orders of `optax.MultiSteps`, with what they are here."""

from collections.abc import Callable
import functools
import inspect
from typing import Any, ParamSpec, TypeVar

import optax

P = ParamSpec("P")
R = TypeVar("R")


def explain_order(factory: Callable[P, R]) -> Callable[P, R]:
    """Returns the factory, which refuses a call that is written as for `optax.MultiSteps`."""
    parameters = inspect.signature(factory)

    @functools.wraps(factory)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs.get("every_k")
        k = kwargs.get("every_k_schedule", kwargs.get("every_k", 4) if args else 4)
        if callable(getattr(first, "init", None)) and callable(getattr(first, "update", None)):
            k = args[1] if len(args) > 1 else k
            raise TypeError(
                "`every_k` comes first and the optimizer second, unlike in optax.MultiSteps: "
                f"accumulate({k if isinstance(k, int) else 'every_k'}, optimizer)"
            )
        if "every_k_schedule" in kwargs:
            raise TypeError(
                "`every_k_schedule` of optax.MultiSteps is `every_k` here, and comes first: "
                f"accumulate({k if isinstance(k, int) else 'every_k'}, optimizer)"
            )
        parameters.bind(*args, **kwargs)
        return factory(*args, **kwargs)

    return checked


NAMES = {
    "`accumulate`": {
        "has_updated": "optaccum.has_released(state)",
        "inner_opt": "the optimizer that you passed to `accumulate`",
        "gradient_transformation": "it as it is: it is a gradient transformation",
    },
    "AccumulateState": {
        "inner_opt_state": "`inner_state`",
        "acc_grads": "`grad_sum`, the weighted sum; the mean is `grad_sum / weight`",
    },
}


def renamed(owner: str, name: str) -> AttributeError:
    """Returns the error for an attribute that is not there, with the one that is meant."""
    if name in NAMES[owner]:
        ours = NAMES[owner][name]
        return AttributeError(f"{owner} has no `{name}`, which is of optax.MultiSteps; use {ours}")
    return AttributeError(f"{owner} has no attribute {name!r}")


class Accumulate(optax.GradientTransformationExtraArgs):
    """What `accumulate` returns: `init` and `update`, and a word on the names of MultiSteps."""

    def __getattr__(self, name: str) -> Any:
        raise renamed("`accumulate`", name)
