"""Every optimizer of Optax that a learning rate can build."""

from collections.abc import Callable, Iterator
import functools
import inspect
import types
from typing import Any
import warnings

import jax
import optax
import optax.contrib

LEARNING_RATE = 0.0625


def _optimizers() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Yields name, factory and learning-rate argument of what a learning rate can build.

    A factory that requires anything more than a base optimizer (per-example gradients for
    dpsgd) is not one of them, and `scale_by_*` are parts of optimizers.
    """
    for module in (optax, optax.contrib):
        for name, factory in sorted(vars(module).items()):
            is_factory = isinstance(factory, types.FunctionType | functools.partial)
            if not is_factory or name.startswith(("_", "scale_by")):
                continue
            parameters = inspect.signature(factory).parameters
            rate = {"learning_rate", "max_learning_rate"}.intersection(parameters)
            required = {p.name for p in parameters.values() if p.default is p.empty}
            if rate and required <= rate | {"base_optimizer"}:
                yield name, factory, rate.pop()


OPTIMIZERS = {name: (factory, rate) for name, factory, rate in _optimizers()}

# Beyond the learning rate: sizes that suit small parameters, a seed, and first steps that are not
# lost in rounding.
OPTIONS = {
    "adafactor": {"min_dim_size_to_factor": 2},
    "dadapt_adamw": {"estim_lr0": 0.1},
    "dog": {"init_step": ("distance", 0.1)},
    "galore": {"rank": 2},
    "noisy_sgd": {"key": 0},
    "prodigy": {"estim_lr0": 0.1},
}


def build(name: str) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of that name."""
    factory, rate = OPTIMIZERS[name]
    options = {rate: LEARNING_RATE, **OPTIONS.get(name, {})}
    parameters = inspect.signature(factory).parameters
    if "base_optimizer" in parameters and parameters["base_optimizer"].default is inspect._empty:
        options["base_optimizer"] = optax.sgd(LEARNING_RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # optax.optimistic_adam
        return optax.with_extra_args_support(factory(**options))


def reading(name: str) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that names an extra argument, and scales with it."""
    program = (
        f"def update(g, state, params=None, *, {name}=None, **_): return times(g, {name}), state"
    )
    names: dict[str, Any] = {
        "times": lambda g, x: jax.tree.map(lambda g: g * jax.tree.leaves(x)[0], g)
    }
    exec(program, names)
    return optax.GradientTransformationExtraArgs(optax.init_empty_state, names["update"])
