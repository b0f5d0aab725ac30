"""The training benchmark trains, and compares only what learns the same parameters."""

import dataclasses

from helpers.benchmarks import cheap, quick_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.contenders has options of optax 0.2.7")

from benchmarks import contenders, programs, training, transformer

pytestmark = pytest.mark.slow

CONTENDERS = {
    "full batch",
    "optax.MultiSteps",
    "optaccum, drop-in update",
    "optaccum.apply_gradients",
    "optaccum, Python-bool release",
    "optaccum.flax.TrainState",
    "optaccum.flax.Optimizer",
    "flax.nnx.Optimizer, drop-in",
    "hand-written loop",
    "hand-written, no zeroing",
}
CONFIG = dataclasses.replace(transformer.PRESETS["100k"], vocabulary=64, width=16)


def make_task(config=CONFIG, every_k=4):
    return training.Task(config, transformer.make_params(config), every_k, 1, 8)


@pytest.mark.slow
def test_quick_run_finds_every_contender_equal_to_the_full_batch():
    result, printed = quick_run("train_step", "--every-k", "3")
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
        over = rows[name]["peak_bytes"] > result["budget_bytes"]
        assert name == "full batch" or (row["microbatch"] == 0) == over
    assert max(len(line) for line in printed.splitlines()) <= 120
    assert all(name in printed for name in CONTENDERS)


@pytest.mark.parametrize(
    ("name", "size", "tied"),
    [
        *(("100k", 1e5, True), ("10m", 1e7, True), ("350m", 3.5e8, True)),
        *(("3m", 3e6, False), ("110m", 1.1e8, False)),
    ],
)
def test_a_preset_is_as_large_as_its_name_says(name, size, tied):
    config = dataclasses.replace(transformer.PRESETS[name], tied=tied)
    shapes = jax.tree.leaves(transformer.param_shapes(config))
    assert sum(leaf.size for leaf in shapes) == pytest.approx(size, rel=0.25)


def gradient(config, params):
    (batch,) = transformer.make_window(config, 1, 4, 8, ragged=True)
    return jax.jit(jax.grad(config.mean_loss))(params, batch)


def test_no_token_sees_a_later_one():
    params, tokens = transformer.make_params(CONFIG), jnp.arange(8)[None]
    logits = CONFIG.logits
    changed = tokens.at[0, 5].set(60)
    same = np.isclose(logits(params, tokens), logits(params, changed), atol=1e-6)
    assert same.all(axis=(0, 2)).tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("option", ["remat", "one_hot"])
def test_how_a_model_computes_does_not_change_its_gradient(option):
    params, changed = transformer.make_params(CONFIG), dataclasses.replace(CONFIG, **{option: True})
    found, expected = gradient(changed, params), gradient(CONFIG, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)


def test_blocks_in_a_scan_have_the_same_gradient():
    config = dataclasses.replace(CONFIG, layers=2)
    params = transformer.make_params(config)
    stack = params | {"blocks": jax.tree.map(lambda *x: np.stack(x), *params["blocks"])}
    scanned = gradient(dataclasses.replace(config, scanned=True), stack)
    listed = gradient(config, params)
    for i, block in enumerate(listed["blocks"]):
        for name, leaf in block.items():
            np.testing.assert_allclose(scanned["blocks"][name][i], leaf, atol=1e-6)


def test_a_contender_that_differs_is_noticed_even_in_bfloat16(monkeypatch):
    monkeypatch.setattr(programs, "options", lambda *_: cheap())
    task = make_task(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    full, right, not_zeroing, release_the_sum = (
        contenders.ADAPTERS[name](training.INNER, every_k)
        for name, every_k in [
            *((name, 4) for name in (contenders.FULL_BATCH, contenders.HAND_WRITTEN)),
            *((contenders.NOT_ZEROING, 4), (contenders.HAND_WRITTEN, 1)),
        ]
    )

    def train(contender, repeat=False):
        window = task.compile(contender, optimized=False)
        batches = task.batches(window)
        return window.train(task.params, batches[:3] + batches[:1] if repeat else batches)

    expected, allowed = train(full), training.tolerance(task.model)

    def error(*args):
        return programs.largest_error(train(*args), expected, task.params, allowed)

    assert error(right) <= 1
    assert error(right, True) > 1
    for wrong in (release_the_sum, not_zeroing):
        steps = (*right.steps[:3], wrong.steps[-1])
        assert error(dataclasses.replace(right, steps=steps)) > 1
    poisoned = jax.tree.map(lambda p: np.full_like(p, np.nan), task.params)
    assert not programs.largest_error(poisoned, expected, task.params, allowed) <= 1


@pytest.mark.parametrize(
    ("start", "budget", "largest", "capped"),
    [(1, 9, 8, False), (3, 9, 8, False), (8, 3, 2, False), (4, 0, 0, False), (1, 99, 16, True)],
)
def test_the_largest_power_of_two_within_the_budget_is_found(start, budget, largest, capped):
    found = training.largest_batch(lambda batch: batch, start, start, budget, 4)
    assert found == (largest, capped)
