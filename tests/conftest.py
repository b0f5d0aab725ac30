"""Settings of the whole suite: eight CPU devices, meshes of them, and a switch to 64 bits."""

import gc
import importlib.metadata
import os
import tempfile

# Read when JAX is imported, so before anything here imports it.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # Cheap machine code, which takes two thirds of the time to compile: how code is optimised for a
    # CPU changes no semantics and no buffer.
    "--xla_backend_optimization_level=0",
    # One piece of machine code for a program, not one for each core: half the time for small ones.
    "--xla_cpu_parallel_codegen_split_count=1",
]
if [int(x) for x in importlib.metadata.version("jaxlib").split(".")[:2]] <= [0, 10]:
    # Code for fusions as older versions made it, in a quarter of the time. Loops, buffers and
    # collectives are the same; later versions have no choice, and are tested as they are.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), *FLAGS]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import targets

targets.prepare()

from helpers import meshes
import jax
from jax.sharding import AxisType
import pytest

# Many tests compile the same program: each process keeps what it has compiled.
CACHE = tempfile.TemporaryDirectory(prefix="optaccum-tests-")
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, default=1, metavar="N", help="run each N-th test")


def pytest_collection_modifyitems(config, items):
    chosen = items[:: config.option.sample]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_collection_finish():
    """Spares what is imported from collections of garbage, which took 7 % of the time."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each process a stretch of the tests, for modules share what they have made."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture
def x64():
    """Enables 64-bit types for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    """Eight devices along "data", sharded by the compiler or as part of the types."""
    return meshes.make_mesh(request.param)
