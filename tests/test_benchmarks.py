"""The benchmarks run, and compare only what computes the same thing."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.contenders has options of optax 0.2.7")

from benchmarks import (
    __main__,
    compiled,
    contenders,
    coupled,
    headline,
    hlo,
    large,
    overhead,
    programs,
    report,
    scaling,
    stacks,
    targets,
    training,
    transformer,
)
from benchmarks.contender import INNERS
from benchmarks.contenders import APPLY_GRADIENTS
from benchmarks.tables import table

pytestmark = pytest.mark.slow

HAS_KERAS = importlib.util.find_spec("keras") is not None
MODEL = dataclasses.replace(transformer.PRESETS["100k"], vocabulary=64, width=16)


@pytest.fixture(autouse=True)
def _settings():
    """Sets back what a benchmark sets."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@functools.cache
def quick(name):
    """Returns the figures of a quick run, and its tables."""
    result = report.BENCHMARKS[name].measure(0)
    result = json.loads(json.dumps(__main__.origin(name) | result))
    return result, report.BENCHMARKS[name].tables(result)


def agreement(rows):
    return {row["name"]: row["agrees"] for row in rows}


def test_the_headline_compares_the_same_batch_whole_and_in_microbatches():
    result, _ = quick("headline")
    whole, ours = (result["memory"]["peak_bytes"][x] for x in ("full batch", APPLY_GRADIENTS))
    assert ours < whole
    assert headline.apart(result) < 1e-5
    assert report.draw_headline(result).axes[1].get_title(loc="left").endswith("less memory")


def test_a_large_model_is_gathered_and_reduced_once_or_does_not_fit(monkeypatch):
    monkeypatch.setattr(large, "SHARED", (contenders.REDUCED_ONCE,))
    result, tables = quick("large")
    (row,) = result["rows"]
    assert compiled.sent(row["window"], row) == "all-reduce 1.00, all-gather 1.00"
    result["rows"].append({**row, "fits": False, "name": "another"})
    assert "does not fit" in large.tables(result)["large"]
    assert "does not fit" not in tables["large"]


def test_layers_that_fold_need_less_than_a_scan_by_hand():
    result, tables = quick("folds")
    for row, line in zip(result["rows"], tables["folds"].splitlines()[2:], strict=False):
        saves = row["name"] in stacks.SCANNED or row["name"].endswith("weighted")
        assert line.endswith(" yes |" if saves else " no |"), line


def test_overhead_finds_every_contender_equal_to_the_full_batch():
    result, tables = quick("overhead")
    names = [name for name in overhead.NAMES if HAS_KERAS or name != contenders.KERAS]
    assert list(result["left_out"]) == ([] if HAS_KERAS else [contenders.KERAS])
    for inner, streams in {"sgd": 5, "adamw": 9, "muon": 7}.items():
        floor, *rows = (row for row in result["contenders"] if row["inner"] == inner)
        assert floor["streams"] == pytest.approx(streams, rel=2e-3)
        assert agreement(rows) == dict.fromkeys(names, True)
        for row in rows:
            assert row["hold_ms"]["q1"] <= row["hold_ms"]["median"] <= row["hold_ms"]["q3"]
    assert all(name in tables["overhead"] for name in names)


def test_every_way_of_accumulating_trains_like_the_full_batch_and_needs_less_memory():
    result, tables = quick("train_step")
    rows = {row["name"]: row for row in result["contenders"]}
    assert agreement(rows.values()) == dict.fromkeys(training.NAMES, True)
    assert rows["optax.MultiSteps"]["time_to_multi_steps"]["median"] == 1
    ours, by_hand = rows["optaccum.value_and_grad"], rows["hand-written scan"]
    # Scalars, and the few hundred bytes that XLA aligns them to.
    assert ours["peak_bytes"] <= by_hand["peak_bytes"] + 4096
    assert by_hand["peak_bytes"] < rows["full batch"]["peak_bytes"]
    for name, row in rows.items():
        assert row["peak_bytes"] > 3 * 4 * result["parameters"]  # parameters and two moments
        assert name in tables["train_step"]


def test_losses_that_compare_rows_are_exact_or_found_not_to_be():
    result, _ = quick("coupled")
    rows = {(row["model"], row["name"]): row for row in result["models"]}
    for model in ("mlp", "transformer"):
        ours = rows[model, coupled.OURS]
        assert rows[model, "optaccum.value_and_grad"]["gradient_error"] > 0.05
        assert ours["gradient_error"] < 1e-5
        assert ours["temporary_bytes"] <= 1.05 * rows[model, coupled.REMAT]["temporary_bytes"]


def test_scaling_compares_what_agrees_at_every_point():
    result, _ = quick("scaling")
    sweeps = result["sweeps"]
    for sweep, rows in sweeps.items():
        for row in rows:
            assert row["agrees"], (sweep, row)
            assert (row["hold_ms"] is None) == (row.get("every_k") == 1)
    # Parameters and Adam's moments halve; the accumulator stays float32.
    wide, _, narrow, _ = sweeps["dtype"]
    size = wide["parameter_bytes"]
    assert narrow["parameter_bytes"] == size // 2
    assert wide["state_bytes"] - narrow["state_bytes"] == pytest.approx(size, abs=64)


def test_every_contender_compiles_and_a_hold_moves_three_sizes(monkeypatch):
    listed = "blocks in a list"
    monkeypatch.setattr(compiled, "MODELS", {listed: compiled.MODELS[listed]})
    result, tables = quick("compiled")
    assert result["left_out"] == {}
    rows = {row["name"]: row for row in result["optimizer"]}
    assert list(rows) == list(compiled.OPTIMIZER)
    for row in rows.values():
        assert row["window"] == pytest.approx(7 * row["hold"] + row["release"], rel=0.1)
    ours, theirs = rows["optaccum.apply_gradients"], rows["optax.MultiSteps"]
    assert ours["hold"] == pytest.approx(3, rel=0.01)
    assert ours["temporaries"] < 0.01
    assert theirs["window"] > 3 * ours["window"]
    sent = {
        (row["model"], row["name"]): [compiled.sent(row[x], row) for x in ("hold", "window")]
        for row in result["traffic"]
    }
    # A CPU's compiler leaves the reduction in the scan; deferred, there is one for each window.
    assert sent[listed, contenders.APPLIED_ONCE] == ["none", "all-reduce 1.00"]
    assert sent[listed, "optax.microbatch"] == ["all-reduce 1.00", "all-reduce 8.00"]
    assert all(name in tables["compiled"] for name in rows)


def test_a_release_counts_once_a_window_and_a_scan_once_a_microbatch(monkeypatch):
    class Program:
        def __init__(self, found):
            self.as_text = lambda: found

    def found(*programs):
        window = types.SimpleNamespace(programs=programs)
        return compiled.traffic(window, 3)

    monkeypatch.setattr(hlo, "collectives", list)
    monkeypatch.setattr(hlo, "forgotten", lambda found: [])
    call = Program([hlo.Collective("all-reduce", size, 1, size > 100) for size in (100, 900)])
    hold = {"kind": "all-reduce", "bytes": 100, "group": 0, "times": 1}
    release = {"kind": "all-reduce", "bytes": 900, "group": 0, "times": 1}
    calls = {"hold": [hold], "window": [release, hold | {"times": 3}], "forgets": False}
    assert found(call, call, call) == calls
    gather = {"kind": "all-gather", "bytes": 5, "group": 0}
    scan = {"hold": [gather | {"times": 1}], "window": [gather | {"times": 3}], "forgets": False}
    assert found(Program([hlo.Collective("all-gather", 5, 3, False)])) == scan


def agrees(task):
    """Returns which loops agree: right, releasing the sum, and keeping the sums of old windows."""
    right, of_sum = (contenders.hand_written(task.inner, every_k) for every_k in (task.every_k, 1))
    _, hold, *_, last = right.steps
    steps = {
        "right": right.steps,
        "of sum": (*right.steps[:-1], of_sum.steps[-1]),
        "stale": (hold,) * (task.every_k - 1) + (last,),
    }
    found = {name: dataclasses.replace(right, steps=each) for name, each in steps.items()}
    _, rows = programs.check(found, task)
    return {name: row["agrees"] for name, row in rows.items()}


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [*((inner, "float32") for inner in INNERS.values()), (scaling.INNER, "bfloat16")],
    ids=[*INNERS, "bfloat16"],
)
def test_a_contender_that_differs_is_noticed(inner, dtype):
    params, *grads = programs.make_trees(5, 2, (8, 8), dtype)
    task = programs.Task(params, grads, 4, inner, scaling.TOLERANCE[dtype])
    assert agrees(task) == {"right": True, "of sum": False, "stale": False}


def test_nan_is_noticed():
    one, zero = {"w": np.ones(2)}, {"w": np.zeros(2, np.float32)}
    task = programs.Task(zero, [zero], 2)
    assert programs.largest_error(one, one, task) == 0
    assert not programs.largest_error({"w": np.array([1.0, np.nan])}, one, task) <= 1


def test_training_that_differs_is_noticed_even_in_bfloat16(monkeypatch):
    monkeypatch.setitem(transformer.PRESETS, "tiny", MODEL)
    task = training.make_task(training.Sizes("tiny", "bfloat16", 3, 8, 1))
    assert agrees(task) == {"right": True, "of sum": False, "stale": False}


def test_a_contender_that_is_not_installed_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    found, left_out = contenders.make(overhead.NAMES, INNERS["sgd"], 2)
    assert set(found) == {*overhead.NAMES} - {contenders.KERAS}
    assert "keras" in left_out[contenders.KERAS]


def test_the_floor_is_the_bytes_at_the_bandwidth_of_the_triad():
    # 2 passes of 3 streams in 6 s: a second a stream.
    assert overhead.floors(6.0, 2, 9) == {"hold": 3.0, "release": 9.0, "window": 12.0}


@pytest.mark.parametrize(
    ("name", "size"), [("100k", 1e5), ("10m", 1e7), ("350m", 3.5e8), ("1b", 1e9), ("7b", 7e9)]
)
def test_a_preset_is_as_large_as_its_name_says(name, size):
    shapes = jax.tree.leaves(transformer.param_shapes(transformer.PRESETS[name]))
    assert sum(leaf.size for leaf in shapes) == pytest.approx(size, rel=0.25)


def test_no_token_sees_a_later_one():
    params, tokens = transformer.make_params(MODEL), jnp.arange(8)[None]
    features = functools.partial(MODEL.features, params, params["embedding"])
    same = np.isclose(features(tokens), features(tokens.at[0, 5].set(60)), atol=1e-6)
    assert same.all(axis=(0, 2)).tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("option", ["remat", "scanned"])
def test_how_a_model_computes_does_not_change_its_gradient(option):
    model = dataclasses.replace(MODEL, layers=2)
    params = transformer.make_params(model)
    (batch,) = transformer.make_window(model, 1, 4, 8, ragged=True)
    expected = jax.jit(jax.grad(model.mean_loss))(params, batch)
    if option == "scanned":
        params, expected = (
            tree | {"blocks": jax.tree.map(lambda *x: np.stack(x), *tree["blocks"])}
            for tree in (params, expected)
        )
    changed = dataclasses.replace(model, **{option: True})
    found = jax.jit(jax.grad(changed.mean_loss))(params, batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_a_target_compiles_or_says_what_to_install(target):
    if remedy := targets.missing(target):
        assert remedy.startswith("pip install ")
        with pytest.raises(ImportError, match=f"compiling for {target} needs packages"):
            targets.devices(target)


def test_targets_that_are_not_installed_are_named_and_left_out(monkeypatch):
    monkeypatch.setattr(targets, "missing", lambda target: f"pip install {target}-compiler")
    assert compiled.measure(1)["left_out"]["h100"] == "pip install h100-compiler"


def test_benchmarks_run_in_a_process_each_and_others_are_refused(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command: started.append(command[3:]))
    __main__.main(["--quick", "scaling", "compiled"])
    assert started == [["scaling", "--quick"], ["compiled", "--quick"]]
    started.clear()
    __main__.main([])
    assert started == [[name] for name in report.BENCHMARKS]
    with pytest.raises(SystemExit) as exit_info:
        __main__.main(["overheads"])
    assert exit_info.value.code == 2
    assert "no such benchmark: overheads" in capsys.readouterr().err


def test_a_quick_run_writes_nothing_and_another_the_figures_and_the_report(
    monkeypatch, tmp_path, capsys
):
    some = types.SimpleNamespace(
        measure=lambda scale: {"scale": scale},
        tables=lambda result: {"rows": table([{"contender": str(result["scale"])}])},
    )
    written = []
    monkeypatch.setitem(report.BENCHMARKS, "some", some)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "write", lambda: written.extend(tmp_path.iterdir()))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    __main__.main(["some", "--quick"])
    assert "| 0" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == written == []
    __main__.main(["some"])
    assert written == [tmp_path / "some-tpu.json"]
    result = json.loads(written[0].read_text())
    assert (result["scale"], result["benchmark"]) == (2, "some")
