"""Programs that tests run or look into: examples and workers."""

import importlib.util
import os
import pathlib
import socket
import subprocess
import tempfile
from typing import Any

import pytest

# Programs that are run several times compile what they run once.
CACHE = tempfile.TemporaryDirectory(prefix="optaccum-programs-")
REPOSITORY = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "COLUMNS": "100",
    "JAX_COMPILATION_CACHE_DIR": CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def load(path: pathlib.Path) -> Any:
    """Returns the module that a script is."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as where the script is run
        spec.loader.exec_module(module)
    return module


def run(*command: Any, cwd: pathlib.Path | None = None) -> str:
    """Returns what a program prints that runs to its end."""
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, encoding="utf-8", capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_address() -> str:
    """Returns an address on this machine where nobody listens, or skips the test."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return f"127.0.0.1:{server.getsockname()[1]}"
    except OSError as error:
        pytest.skip(f"cannot listen on loopback: {error}", allow_module_level=True)
