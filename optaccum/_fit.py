"""Find how many microbatches a batch needs to fit in memory, before anything runs."""

from collections.abc import Callable, Iterable
import math
import numbers
import re
from typing import Any, NamedTuple

import jax

from optaccum._validate import check_count, check_function


class Fit(NamedTuple):
    """What :func:`fit_num_microbatches` found.

    Attributes:
        num_microbatches: the fewest microbatches that fit.
        step: the step with that many, compiled (by whoever jitted it): call it with arguments as
            they were lowered.
        peak_bytes: {candidate: bytes on each device}, of those that were compiled; infinite where
            the compiler itself found that they cannot fit.
        memory_limit: the bytes that it had to fit in.
    """

    num_microbatches: int
    step: Any
    peak_bytes: dict[int, float]
    memory_limit: float


def fit_num_microbatches(
    make_step: Callable[[int], Any],
    candidates: Iterable[int],
    *args: Any,
    memory_limit: float | str | None = None,
) -> Fit:
    """Return the fewest microbatches with which a training step fits in memory.

    Compiles the step ahead of time for one candidate after the other, fewest first, and stops at
    the first whose peak, on each device, is within the limit::

        peak = arguments + outputs - donated outputs + temporaries

    where arrays that the step closes over are arguments. Nothing runs and no array is needed. What
    else lies on the device is not in the sum.

    >>> import jax, jax.numpy as jnp, optaccum
    >>> def make_step(n):
    ...     loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    ...     return jax.jit(optaccum.value_and_grad(loss_fn, num_microbatches=n))
    >>> w = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    >>> x = jax.ShapeDtypeStruct((1024, 8), jnp.float32)
    >>> fit = optaccum.fit_num_microbatches(make_step, [1, 2, 4, 8, 16], w, x, memory_limit=2**20)
    >>> fit.num_microbatches, [peak <= fit.memory_limit for peak in fit.peak_bytes.values()]
    (16, [False, False, False, False, True])

    Args:
        make_step: returns the step with that many microbatches: a function, best one of `jax.jit`
            with the donation that it will run with.
        candidates: numbers of microbatches to try; each has to divide the rows of the batch.
        *args: the arguments of the step: arrays, or `jax.ShapeDtypeStruct`s with the shardings
            that they will have.
        memory_limit: bytes on each device, a number or text like "8GB" (10**9 bytes each) or
            "16GiB" (2**30); None for what the device gives the process (a CPU does not say).

    Returns:
        A :class:`Fit`.

    Raises:
        TypeError: if a candidate is not an integer.
        ValueError: if there is no candidate, one is below 1, none fits, or the limit is not a
            number above 0 and the device does not say how much memory it has.
        Exception: what `make_step` and the tracing of its step raise.
    """
    check_function("`make_step`", make_step)
    if not isinstance(candidates, Iterable):
        raise TypeError(f"`candidates` must be several integers, got {candidates!r}")
    counts = sorted({check_count("each of `candidates`", n) for n in candidates})
    if not counts:
        raise ValueError("`candidates` must hold at least one number of microbatches, got none")
    limit = _limit(memory_limit)
    peaks: dict[int, float] = {}
    for n in counts:
        step: Any = make_step(n)
        if not hasattr(step, "lower"):
            check_function("what `make_step` returns", step)
            step = jax.jit(step)
        try:
            compiled = step.lower(*args).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            peaks[n] = math.inf
            continue
        # `equinox.filter_jit` puts the compiled program into one of its own.
        program = compiled if hasattr(compiled, "memory_analysis") else compiled.compiled
        sizes = program.memory_analysis()
        given = sizes.argument_size_in_bytes + _bytes_closed_over(step, args)
        kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        peaks[n] = given + kept + sizes.temp_size_in_bytes
        if peaks[n] <= limit:
            return Fit(n, compiled, peaks, limit)
    table = ", ".join(f"{n}: {peak:,}" for n, peak in peaks.items())
    raise ValueError(
        f"none of `candidates` fits in {limit:,} bytes; peak bytes by number of microbatches are "
        f"{table}; try more, or `jax.checkpoint`"
    )


def _limit(given: Any) -> Any:
    """Returns the bytes that a `memory_limit` means."""
    limit = _device_limit() if given is None else given
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kmgt]?)(i?)b\s*", given, re.IGNORECASE)
        if match:
            number, prefix, binary = match.groups()
            power = " kmgt".index(prefix.lower() or " ")
            limit = float(number) * (1024 if binary else 1000) ** power
    if not isinstance(limit, numbers.Real) or isinstance(limit, bool) or not float(limit) > 0:
        raise ValueError(
            f"`memory_limit` must be a number of bytes > 0, got {given!r}; text is like '8GB'"
        )
    return limit


def _bytes_closed_over(step: Any, args: tuple) -> int:
    """Returns the bytes on a device of the arrays that a jitted function has not as arguments."""
    traced = step.trace(*args) if hasattr(step, "trace") else None
    consts = getattr(getattr(traced, "jaxpr", None), "consts", ())
    arrays = [x for x in consts if isinstance(x, jax.Array)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def _device_limit() -> float:
    """Returns the bytes that the device with the least memory gives this process."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    if not all(limits):
        raise ValueError(
            f"`memory_limit` is needed: {jax.local_devices()[0].device_kind} does not say how much "
            "memory it has; pass that of the device to train on, such as memory_limit='80GB'"
        )
    return min(limits)
