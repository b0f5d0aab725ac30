"""Calls a function with the rows of each device, from a plain `jax.jit`.

Under automatic sharding `jax.jit` sums the gradients of every microbatch over the devices that hold
its rows. In a `jax.shard_map` over these mesh axes alone each device has the gradient of its rows.
The other axes stay with the compiler, and so do shardings of parameters over them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaccum._call import Call
from optaccum._devices import Automatic
from optaccum._mesh_axes import vary
from optaccum._passes import take_apart


def on_each_device(
    fun: Callable[..., Any],
    devices: Automatic,
    call: Call,
    out_specs: Any,
    more: tuple[Any, ...] = (),
    specs: tuple[Any, ...] = (),
) -> Any:
    """Returns `fun(args, *more)` for the rows of each device, with the shardings `out_specs`.

    `args` are those of the call. Each device folds its index into its keys, so that rows do not
    share their noise. `specs` are the shardings of `more`.
    """
    whole, rows, join = take_apart(call.args, call.roles)

    def body(index, whole, rows, more):
        try:
            return fun(join(index[0], *whole, *rows), *more)
        except ValueError as error:
            if "Auto axes" in str(error) or "`Manual`" in str(error):  # of JAX
                raise ValueError(
                    f"`fun` names an axis of `reduce_axes` {devices.axes} in a sharding "
                    "constraint, but it gets the rows of one device; leave these axes out of its "
                    "constraints, or leave `reduce_axes` out"
                ) from error
            raise

    along = jax.P(devices.axes)
    of_rows = jax.P(None, devices.axes) if call.roles.stacked else along
    mapped = jax.shard_map(
        body,
        in_specs=(along, jax.P(), of_rows, specs),
        out_specs=out_specs,
        axis_names={*devices.axes},
    )
    return jax.jit(mapped)(jnp.arange(devices.count), whole, rows, more)


def as_shard(tree: Any, devices: Automatic, axis: int = 0) -> Any:
    """Returns what a device has with an axis of length 1, for all devices to be put together."""
    return jax.tree.map(lambda x: jnp.expand_dims(vary(jnp.asarray(x), devices.axes), axis), tree)
