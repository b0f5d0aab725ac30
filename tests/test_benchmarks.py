"""The benchmarks run, and compare only what computes the same thing."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest

pytest.importorskip("rich")
pytest.importorskip("optax", "0.2.7", reason="aggregating.process came with optax 0.2.7")

from benchmarks import overhead, peers

ROOT = pathlib.Path(__file__).parent.parent
CONTENDERS = {
    "optaccum.apply_gradients",
    "optaccum, drop-in update",
    "optax.MultiSteps",
    "aggregating.process",
    "hand-written loop",
    "hand-written, no zeroing",
}


def test_quick_overhead_finds_every_contender_equal_to_the_full_batch(tmp_path):
    output = tmp_path / "overhead.json"
    options = ["--quick", "--every-k", "3", "--output", str(output)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.overhead", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(output.read_text())
    assert {row["name"]: row["agrees"] for row in result["contenders"]} == dict.fromkeys(
        CONTENDERS, True
    )
    assert result["every_k"] == 3
    assert [row["every_k"] for row in result["compilation_of_apply_gradients"]] == [2, 8, 64, 1024]
    assert max(len(line) for line in process.stdout.splitlines()) <= 100
    assert all(name in process.stdout for name in CONTENDERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--every-k", "1"), "must be at least 2"),
        (("--megabytes", "nan"), "must be at least 0.001"),
        (("--leaves", "few"), "invalid number value: 'few'"),
        (("--rounds", "0"), "must be at least 1"),
        (("--output", "no/such/folder.json"), "not a file in an existing folder"),
    ],
)
def test_overhead_refuses_a_bad_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        overhead.parse_args(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["sums instead of means", "stale sums", "NaN in one leaf"])
def test_a_contender_that_differs_is_noticed(fault):
    inner, every_k = optax.adamw(1e-2, eps=0.1), 4
    params = {"a": jnp.ones(3), "b": jnp.arange(2.0)}
    microbatches = [{"a": jnp.array([0.1, -0.2, i]), "b": jnp.full(2, 0.3)} for i in range(4)]
    expected = peers.full_batch(inner, every_k, params, microbatches)
    right = peers.hand_written(inner, every_k)
    assert peers.agrees(right, params, microbatches, expected)

    *holds, release = right.programs
    if fault == "sums instead of means":
        release = peers.hand_written(inner, 1).programs[0]
    elif fault == "stale sums":
        release = peers.hand_written_overwriting(inner, every_k).programs[-1]
    else:
        microbatches[0] = microbatches[0] | {"b": jnp.array([0.3, jnp.nan])}
    wrong = peers.Peer("wrong", right.init, (*holds, release))
    assert not peers.agrees(wrong, params, microbatches, expected)
