"""The training benchmark trains, and compares only what learns the same parameters."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("flax")

from flax import nnx

from benchmarks import train_step, trainers, transformer

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
CONTENDERS = {
    "full batch",
    "optax.MultiSteps",
    "optaccum, drop-in update",
    "optaccum.apply_gradients",
    "optaccum, static release",
    "optaccum.flax.TrainState",
    "optaccum.flax.Optimizer",
    "flax.nnx.Optimizer, drop-in",
    "hand-written loop",
    "hand-written, no zeroing",
}
CONFIG = dataclasses.replace(transformer.PRESETS["100k"], vocabulary=64, width=16, sequence=8)


def make_tokens():
    """Returns 4 sequences of random tokens."""
    return jax.random.randint(jax.random.key(1), (4, 9), 0, CONFIG.vocabulary)


def test_quick_run_finds_every_contender_equal_to_the_full_batch(tmp_path):
    output = tmp_path / "train_step.json"
    options = ["--quick", "--every-k", "3", "--output", str(output)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(output.read_text())
    assert result["benchmark"] == "train_step"
    assert (result["preset"], result["every_k"], result["reference"]) == ("100k", 3, "full batch")
    rows = {row["name"]: row for row in result["contenders"]}
    assert {name: row["agrees"] for name, row in rows.items()} == dict.fromkeys(CONTENDERS, True)
    for row in rows.values():
        assert row["peak_bytes"] > 3 * 4 * result["parameters"]  # parameters and two moments
        assert row["tokens_per_second"]["q1"] <= row["tokens_per_second"]["median"]
    assert rows["optax.MultiSteps"]["time_to_multi_steps"]["median"] == 1
    assert rows["hand-written loop"]["time_to_hand_written"]["median"] == 1
    largest = {row["name"]: row for row in result["largest"]}
    assert largest.keys() == CONTENDERS
    for name, row in largest.items():
        assert row["effective_batch"] == row["microbatch"] * (1 if name == "full batch" else 3)
        over = rows[name]["peak_bytes"] > result["budget_bytes"]
        assert name == "full batch" or (row["microbatch"] == 0) == over
    assert max(len(line) for line in process.stdout.splitlines()) <= 100
    assert all(name in process.stdout for name in CONTENDERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parameters", "10b"), "invalid choice: '10b'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--every-k", "1"), "must be at least 2"),
        (("--microbatch", "0"), "must be at least 1"),
        (("--sequence", "long"), "invalid number value: 'long'"),
        (("--rounds", "0"), "must be at least 1"),
        (("--budget", "nan"), "must be at least 1.0"),
        (("--output", "no/such/folder.json"), "not a file in an existing folder"),
    ],
)
def test_a_bad_argument_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train_step.parse_args(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "size"), [("100k", 1e5), ("10m", 1e7), ("350m", 3.5e8), ("1b", 1e9)]
)
def test_a_preset_is_as_large_as_its_name_says(name, size):
    config = dataclasses.replace(transformer.PRESETS[name], sequence=64)
    model = nnx.eval_shape(lambda: transformer.Transformer(config, nnx.Rngs(0)))
    parameters = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert parameters == pytest.approx(size, rel=0.25)


def test_no_token_sees_a_later_one():
    model = transformer.Transformer(CONFIG, nnx.Rngs(0))
    tokens = jnp.arange(8)[None]
    changed = tokens.at[0, 5].set(60)
    same = np.isclose(model(tokens), model(changed), atol=1e-6).all(axis=(0, 2))
    assert same.tolist() == [True] * 5 + [False] * 3


def test_rematerialised_blocks_have_the_same_gradient():
    graph, params = transformer.build(CONFIG)
    remat, _ = transformer.build(dataclasses.replace(CONFIG, remat=True))
    tokens = make_tokens()

    def gradient(graph):
        def loss(params):
            return transformer.mean_loss(nnx.merge(graph, params), tokens)

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradient(graph), gradient(remat)
    )


def test_a_contender_that_differs_is_noticed_even_in_bfloat16():
    config = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    graph, params = transformer.build(config)
    tokens = make_tokens()
    full, *_, right, not_zeroing = trainers.make_contenders(4)
    release_the_sum = trainers.make_contenders(1)[-2].applies[-1]
    keep_the_sums = not_zeroing.applies[-1]

    def error(contender, window):
        trainer = trainers.Trainer(contender, graph, params, (len(window[0]), 8), optimized=False)
        trained, _ = trainers.train_alone(trainer, params, window)
        return trainers.largest_error(trained, expected, params, config)

    trainer = trainers.Trainer(full, graph, params, (4, 8), optimized=False)
    expected, _ = trainers.train_alone(trainer, params, [tokens])
    window = [part[None] for part in tokens]
    assert error(right, window) <= 1
    assert error(right, window[:3] + window[:1]) > 1
    for wrong in (release_the_sum, keep_the_sums):
        contender = dataclasses.replace(right, applies=(*right.applies[:3], wrong))
        assert error(contender, window) > 1
    poisoned = jax.tree.map(lambda p: np.full_like(p, np.nan), params)
    assert not trainers.largest_error(poisoned, expected, params, config) <= 1


@pytest.mark.parametrize(
    ("start", "budget", "largest", "capped"),
    [(1, 9, 8, False), (3, 9, 8, False), (8, 3, 2, False), (4, 0, 0, False), (1, 99, 16, True)],
)
def test_the_largest_power_of_two_within_the_budget_is_found(start, budget, largest, capped):
    assert train_step.largest_batch(lambda batch: batch, start, budget, 4) == (largest, capped)
