"""Quick runs of benchmarks in this process, whose compiler spends little on machine code."""

import contextlib
import functools
import importlib
import io
import json
import pathlib
import tempfile
from typing import Any
from unittest import mock

import jax

SETTINGS = "jax_enable_compilation_cache", "jax_default_matmul_precision"  # which benchmarks change


@functools.cache
def cheap() -> dict[str, Any]:
    """Returns options that compile for a CPU in a third of the time, where this jax has them."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1).lower(1.0).compile(options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def quick_run(name: str, *options: str) -> tuple[dict[str, Any], str]:
    """Returns the figures of a quick run, and what it printed."""
    from benchmarks import harness, programs  # here, where their packages have been found

    of = importlib.import_module(f"benchmarks.{name}")
    before = {setting: getattr(jax.config, setting) for setting in SETTINGS}
    # Programs whose bytes are compared with the compiler's own count are those of users.
    counts = name == "compiled"
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()) as out,
        mock.patch.object(harness, "WARMUP_ROUNDS", 1),
        mock.patch.object(programs, "options", lambda best, *_: {} if best and counts else cheap()),
    ):
        output = pathlib.Path(folder) / "figures.json"
        argv = ["--quick", "--output", str(output), *options]
        try:
            harness.main(name, of.__doc__, of.OPTIONS, of.measure, of.tables, argv)
        finally:
            for setting, value in before.items():
                jax.config.update(setting, value)
        return json.loads(output.read_text()), out.getvalue()
