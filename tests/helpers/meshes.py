"""Eight devices: meshes of them, what lies where, and what this JAX can do with them."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
import pytest

DEVICES = 8

needs_reshard = pytest.mark.skipif(not hasattr(jax, "reshard"), reason="needs a newer JAX")
# For tests with the fixture `mesh` that are about automatic sharding alone.
only_auto = pytest.mark.parametrize("mesh", [AxisType.Auto], ids=["auto"], indirect=True)


def make_mesh(
    kind: AxisType, shape: int | tuple[int, ...] = DEVICES, names: tuple[str, ...] = ("data",)
) -> jax.sharding.Mesh:
    """Returns a mesh over the first devices, by default all along "data", or skips the test."""
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")
    shape = (shape,) if isinstance(shape, int) else shape
    count = 1
    for size in shape:
        count *= size
    chosen = jax.devices()[:count]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=chosen)


def named(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    """Returns the shardings over `mesh` that partition specs stand for."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def bytes_on_first(tree: Any) -> int:
    """Returns how much of `tree` the first device keeps."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def vary(tree: Any) -> Any:
    """Returns values that devices share as each device's own over the axis "data"."""
    if hasattr(jax.lax, "pcast"):
        return jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), tree)
    return jax.tree.map(lambda x: jax.lax.pvary(x, "data"), tree)
