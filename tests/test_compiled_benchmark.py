"""The benchmark of compiled programs compiles every contender, and counts what is known by hand."""

import argparse

from helpers.benchmarks import quick_run
import jax.numpy as jnp
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="aggregating.process came with optax 0.2.7")

from benchmarks import compiled, contenders, hlo, programs, targets
from benchmarks.contenders import INNERS

LEAVES = 2, 64, 128


@pytest.mark.slow
def test_quick_run_compiles_every_contender_and_writes_the_layout_that_it_documents():
    result, printed = quick_run("compiled")
    assert (result["benchmark"], result["left_out"]) == ("compiled", {})
    assert [row["name"] for row in result["optimizer"]] == list(compiled.OPTIMIZER)
    for row in result["optimizer"]:
        assert row["window"] == pytest.approx(7 * row["hold"] + row["release"], rel=0.1)
        assert row["reported_release"] == pytest.approx(row["release"], rel=0.05)
    assert [row["name"] for row in result["training"]] == list(compiled.TRAINING)
    sent = {
        (row["model"], row["name"]): [compiled.sent(row[x], row) for x in ("hold", "window")]
        for row in result["traffic"]
    }
    # A CPU's compiler leaves the reduction in the scan; deferred, there is one for each window.
    listed = "blocks in a list"
    assert sent[listed, "optaccum.apply_gradients"] == ["all-reduce 1.00", "all-reduce 8.00"]
    assert sent[listed, "optaccum.apply_gradients, shard_map"] == ["none", "all-reduce 1.00"]
    assert sent[listed, "optaccum.value_and_grad"] == ["all-reduce 1.00", "all-reduce 8.00"]
    assert sent[listed, "optaccum.value_and_grad, shard_map"] == ["none", "all-reduce 1.00"]
    assert sent["blocks in a scan", "optax.microbatch"] == ["all-reduce 1.00", "all-reduce 8.00"]
    assert all(name in printed for name in compiled.OPTIMIZER)


def test_a_hold_moves_three_sizes_of_the_parameters():
    row = compiled.optimizer_row("cpu", "adamw", contenders.APPLY_GRADIENTS, LEAVES)
    assert row["hold"] == pytest.approx(3, rel=0.01)
    assert row["temporaries"] < 0.01
    assert row["disagreement"] < 0.05
    theirs = compiled.optimizer_row("cpu", "adamw", contenders.MULTI_STEPS, LEAVES)
    assert theirs["window"] > 3 * row["window"]


def test_the_bytes_of_a_program_written_by_hand():
    params = {"w": jnp.zeros((64, 128))}
    window = programs.Window(contenders.hand_written(INNERS["sgd"], 3), params, params)
    add, _, step = (hlo.moved(program.as_text()) for program in window.programs)
    assert add.hold == add.release == 3 * params["w"].nbytes
    assert step.kernels_of_hold == step.kernels_of_release > 0


@pytest.mark.parametrize("target", targets.TARGETS)
def test_a_target_compiles_or_says_what_to_install(target):
    if remedy := targets.missing(target):
        assert remedy.startswith("pip install ")
        with pytest.raises(ImportError, match=f"compiling for {target} needs packages"):
            targets.devices(target)


def test_targets_that_are_not_installed_are_named_and_left_out(monkeypatch):
    monkeypatch.setattr(targets, "missing", lambda target: f"pip install {target}-compiler")
    assert list(compiled.measure(argparse.Namespace(quick=False))) == []
