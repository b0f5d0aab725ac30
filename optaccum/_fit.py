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
        num_microbatches: The fewest microbatches that fit.
        step: The compiled step with that many. Call it with arguments as they were passed.
        peak_bytes: Bytes on each device by candidate, infinite if its compiler ran out of memory.
        memory_limit: The bytes that it had to fit in.
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

    It compiles the step ahead of time for each candidate, fewest first, until the peak on each
    device is within the limit. Nothing runs and nothing is allocated::

        peak = arguments + arrays closed over + outputs - donated outputs + temporaries

    Whatever else is on the device is not counted.

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
        make_step: Returns the step with that many microbatches, preferably jitted with the
            donation that it will run with.
        candidates: Numbers of microbatches to try. Each must divide the rows of the batch.
        *args: Arguments of the step, arrays or `jax.ShapeDtypeStruct`s, with their shardings.
        memory_limit: Bytes on each device, a number or text like "8GB" (8 * 10**9) or "16GiB"
            (16 * 2**30). None asks the devices, but a CPU does not know.

    Returns:
        A :class:`Fit`.

    Raises:
        TypeError: if a candidate is not an integer.
        ValueError: if `candidates` is empty, one is below 1, none fits, or the limit is unknown or
            not above 0.
    """
    check_function("`make_step`", make_step)
    if not isinstance(candidates, Iterable):
        raise TypeError(f"`candidates` must be several integers, got {candidates!r}")
    counts = sorted({check_count("each of `candidates`", n) for n in candidates})
    if not counts:
        raise ValueError("`candidates` must hold at least one number of microbatches, got none")
    limit = _bytes(memory_limit)
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
        peaks[n] = _peak_bytes(step, args, compiled)
        if peaks[n] <= limit:
            return Fit(n, compiled, peaks, limit)
    table = ", ".join(f"{n}: {peak:,}" for n, peak in peaks.items())
    raise ValueError(
        f"none of `candidates` fits in {limit:,} bytes; peak bytes by number of microbatches are "
        f"{table}; try more, or `jax.checkpoint`"
    )


def _bytes(limit: Any) -> Any:
    """Returns `memory_limit` as a number of bytes."""
    if limit is None:
        devices = jax.local_devices()
        limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
        if all(limits):
            return min(limits)
        raise ValueError(
            f"`memory_limit` is needed: {devices[0].device_kind} does not say how much memory it "
            "has; pass the memory of the device to train on, such as memory_limit='80GB'"
        )
    number = limit
    pattern = r"\s*(\d+\.?\d*)\s*([kmgt]?)(i?)b\s*"
    if isinstance(limit, str) and (match := re.fullmatch(pattern, limit, re.IGNORECASE)):
        digits, prefix, binary = match.groups()
        number = float(digits) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
    if not isinstance(number, numbers.Real) or isinstance(number, bool) or not float(number) > 0:
        raise ValueError(
            f"`memory_limit` must be a number of bytes > 0, got {limit!r}; text is like '8GB'"
        )
    return number


def _peak_bytes(step: Any, args: tuple, compiled: Any) -> int:
    """Returns the bytes that a step needs on each device, with the arrays that it closes over."""
    # `equinox.filter_jit` wraps the compiled program.
    program = compiled if hasattr(compiled, "memory_analysis") else compiled.compiled
    sizes = program.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    traced = step.trace(*args) if hasattr(step, "trace") else None
    consts = getattr(getattr(traced, "jaxpr", None), "consts", ())
    arrays = [x for x in consts if isinstance(x, jax.Array)]
    closed = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    return sizes.argument_size_in_bytes + closed + outputs + sizes.temp_size_in_bytes
