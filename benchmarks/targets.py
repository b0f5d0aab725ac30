"""Compile for chips that are not here: an H100 and TPUs, with nothing but packages.

JAX compiles ahead of time for a topology: `libtpu` (`jax[tpu]`) brings the compiler for TPUs, and
`jax-cuda12-plugin`, `jax-cuda12-pjrt` and `nvidia-cuda-nvcc-cu12` the one for NVIDIA GPUs. What
comes back is the optimised program with its memory analysis; it cannot run here.

Call `prepare()` before JAX makes a device: the compilers read the environment when they are loaded.
"""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from typing import Any

CPU, H100, V5E, V6E = "cpu", "h100", "v5e", "v6e"
TARGETS = (CPU, H100, V5E, V6E)
TITLES = {H100: "H100", V5E: "TPU v5e", V6E: "TPU v6e", CPU: "CPU"}
TPU_TOPOLOGIES = {
    V5E: {1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 256: "v5e:16x16"},
    V6E: {1: "v6e:2x2", 8: "v6e:2x4"},
}
H100_CONFIG = """gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 l2_cache_size: 52428800
  shared_memory_per_block_optin: 232448 device_memory_size: 84978434048 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 registers_per_core_limit: 65536 registers_per_block_limit: 65536
} platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3" """


def prepare() -> None:
    """Sets the environment in which the compilers for chips that are not here can be loaded."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    libtpu = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    libtpu |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in libtpu.items():
        os.environ.setdefault(name, value)
    if folder := _nvcc():
        flags = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    if "jax" in sys.modules:  # it has read its part of the environment
        sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def missing(target: str) -> str | None:
    """Returns what to install before programs can be compiled for a target, or None."""
    if target == CPU:
        return None
    if target in (V5E, V6E):
        return None if importlib.util.find_spec("libtpu") else "pip install libtpu"
    version = importlib.metadata.version("jaxlib")
    packages = "jax-cuda12-plugin", "jax-cuda12-pjrt"
    try:
        fits = all(importlib.metadata.version(package) == version for package in packages)
    except importlib.metadata.PackageNotFoundError:
        fits = False
    if fits and _nvcc():
        return None
    pinned = " ".join(f"{package}=={version}" for package in packages)
    return f"pip install --no-deps {pinned} nvidia-cuda-nvcc-cu12"


@functools.cache
def devices(target: str, count: int = 1) -> tuple[Any, ...]:
    """Returns devices that programs can be compiled for; a CPU's can run them too."""
    import jax
    from jax.experimental import topologies

    if remedy := missing(target):
        raise ImportError(f"compiling for {target} needs packages: {remedy}")
    if target == CPU:
        return tuple(jax.devices("cpu")[:count])
    if target == H100:
        options = {"target_config": H100_CONFIG, "topology": f"1x1x{count}"}
        topology = topologies.get_topology_desc("", "cuda", **options)
    else:
        topology = topologies.get_topology_desc(TPU_TOPOLOGIES[target][count], "tpu")
    return tuple(topology.devices[:count])


def _nvcc() -> pathlib.Path | None:
    """Returns the folder with `ptxas` and `libdevice`, if the package is installed."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        folder = pathlib.Path(place) / "cuda_nvcc"
        if (folder / "bin" / "ptxas").exists():
            return folder
    return None
