"""Parts of sums on the devices of two real processes are those of one process."""

import os
import pathlib
import subprocess
import sys

from helpers import scripts
from helpers.meshes import DEVICES
import jax
import numpy as np
import optax
import parts_program
import pytest

pytestmark = pytest.mark.slow


def one_batch_a_window():
    """Returns the parameters after the windows as full batches, without what is rejected."""
    batches = [
        (x, mask)
        for i, (x, mask) in enumerate(zip(parts_program.X, parts_program.MASK, strict=True))
        if i != parts_program.REJECTED
    ]
    inner = optax.adam(0.1, eps=1e-2)
    params = {"w": np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4), "b": np.zeros(4, "f")}
    state = inner.init(params)
    for start in (0, parts_program.EVERY_K):
        window = batches[start : start + parts_program.EVERY_K]
        x, mask = (np.concatenate(arrays) for arrays in zip(*window, strict=True))
        grads = jax.grad(parts_program.loss_fn)(params, x, mask)
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_two_processes_end_with_what_one_has(tmp_path):
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")
    address = scripts.free_address()
    repository = str(pathlib.Path(__file__).parents[1])
    flags = f"--xla_force_host_platform_device_count={DEVICES // 2}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": repository}
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, parts_program.__file__, address, "2", str(i), file],
            env=environment,
            encoding="utf-8",
            stdout=subprocess.DEVNULL,  # gloo reports to it
            stderr=subprocess.PIPE,
        )
        for i, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), errors
    first, second = (dict(np.load(file)) for file in files)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    alone = parts_program.train(jax.devices()[:DEVICES])
    counters = "mini_step", "gradient_step", "skipped", "released"
    for counted in (first, alone):
        assert [int(counted[name]) for name in counters] == [1, 2, 1, 0]
    for name, expected in one_batch_a_window().items():
        # Sums in another order, in steps of 0.1 that are divided by |g| + 1e-2.
        np.testing.assert_allclose(first[name], alone[name], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(first[name], expected, rtol=2e-5, atol=2e-5)
