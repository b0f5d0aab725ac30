"""Runs of benchmarks, each in a process of its own, as a user starts them."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent


def quick_run(name: str, *options: str) -> tuple[dict[str, Any], str]:
    """Returns the figures of a quick run, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--output", str(output)]
        # The devices of this process are not those of a user.
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        process = subprocess.run(
            [*command, *options], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        return json.loads(output.read_text()), process.stdout
