"""The benchmarks run, and compare only what computes the same thing."""

import dataclasses
import functools
import importlib.util
import json
import sys

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
    collectives,
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
    targets,
    training,
    transformer,
)
from benchmarks.contender import INNERS
from benchmarks.contenders import APPLY_GRADIENTS
from benchmarks.tables import table

pytestmark = pytest.mark.slow

HAS_KERAS = importlib.util.find_spec("keras") is not None
HAS_RESHARD = hasattr(jax, "reshard")
EXPLICIT = contenders.CALLS_EXPLICIT, contenders.IN_STEP_EXPLICIT
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
    *_, result = report.BENCHMARKS[name].measure(0)
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


def test_overhead_finds_every_equivalent_contender_equal_to_the_full_batch():
    result, tables = quick("overhead")
    names = [name for name in overhead.NAMES if HAS_KERAS or name != contenders.KERAS]
    streams = {"sgd": 5, "adamw": 9, "muon": 7}
    assert [run["inner"] for run in result["runs"]] == list(streams)
    for run in result["runs"]:
        agrees = {name: name != "optax.apply_every" for name in names}
        assert agreement(run["contenders"]) == agrees
        assert list(run["left_out"]) == ([] if HAS_KERAS else [contenders.KERAS])
        assert run["floor"]["streams"]["release"] == pytest.approx(streams[run["inner"]], rel=2e-3)
        assert run["floor"]["bandwidth_bound"] == (run["inner"] != "muon")
        for row in run["contenders"]:
            assert row["ratio_to_floor"].keys() == {"window", "hold", "release"}
            assert row["hold_ms"]["q1"] <= row["hold_ms"]["median"] <= row["hold_ms"]["q3"]
    assert [row["every_k"] for row in result["compilation_of_apply_gradients"]] == [2, 8, 64, 1024]
    assert all(name in tables["overhead_times"] for name in names)


def test_a_call_for_each_microbatch_trains_like_the_full_batch():
    result, tables = quick("train_step")
    rows = {row["name"]: row for row in result["contenders"]}
    assert agreement(rows.values()) == dict.fromkeys(training.CALLS, True)
    assert rows["optax.MultiSteps"]["time_to_multi_steps"]["median"] == 1
    assert rows["hand-written loop"]["time_to_hand_written"]["median"] == 1
    largest = {row["name"]: row for row in result["largest"]}
    for name, row in rows.items():
        assert row["peak_bytes"] > 3 * 4 * result["parameters"]  # parameters and two moments
        over = row["peak_bytes"] > result["budget_bytes"]
        assert name == "full batch" or (largest[name]["microbatch"] == 0) == over
        assert name in tables["train_step"]


def test_accumulating_in_one_step_trains_like_the_full_batch_and_needs_less_memory():
    result, tables = quick("in_step")
    rows = {row["name"]: row for row in result["contenders"]}
    assert agreement(rows.values()) == dict.fromkeys(training.IN_STEP, True)
    ours, by_hand = rows["optaccum.value_and_grad"], rows["hand-written scan"]
    # Scalars, and the few hundred bytes that XLA aligns them to.
    assert ours["temporary_bytes"] <= by_hand["temporary_bytes"] + 4096
    assert by_hand["temporary_bytes"] < rows["full batch"]["temporary_bytes"]
    full, accumulated = result["largest"]
    assert accumulated["batch"] > full["batch"] >= 1
    drift = {row["name"]: row["relative_error"] for row in result["drift"]}
    assert drift["optaccum.value_and_grad"] < 0.01 < 0.1 < drift["hand-written scan"]
    assert all(name in tables["in_step"] for name in rows)


# Sizes of the parameters that a window of 4 reduces, and that a hold does.
REDUCED = {
    "full batch": (1, None),
    "optax.MultiSteps": (4, 1),
    "optaccum.apply_gradients": (4, 1),
    "optaccum.apply_gradients, shard_map": (1, 0),
    "optaccum.apply_gradients, explicit": (1, 0),
    "optaccum.value_and_grad": (4, 1),
    "optaccum.value_and_grad, shard_map": (1, 0),
    "optaccum.value_and_grad, explicit": (1, 0),
    "hand-written, shard_map": (1, 0),
}


def reduced(found, size):
    """Returns how many sizes of the parameters are reduced; besides there may be token counts."""
    assert {one["kind"] for one in found} <= {"all-reduce"}
    assert all(one["bytes"] <= 12 or one["bytes"] >= 1e-3 * size for one in found)
    return collectives.total([one for one in found if one["bytes"] > 12]) / size


def test_devices_reduce_once_a_window_where_it_is_deferred():
    result, tables = quick("collectives")
    size = result["parameter_bytes"]
    expected = {x: of for x, of in REDUCED.items() if HAS_RESHARD or x not in EXPLICIT}
    rows = {row["name"]: row for row in result["contenders"]}
    assert agreement(rows.values()) == dict.fromkeys(expected, True)
    for name, (window, hold) in expected.items():
        assert reduced(rows[name]["window"], size) == pytest.approx(window, rel=1e-4), name
        if hold is None:
            assert rows[name]["hold"] is None
        else:
            assert reduced(rows[name]["hold"], size) == pytest.approx(hold, rel=1e-4), name
    assert all((rows[x]["hold"] == []) == x.endswith("shard_map") for x in rows)
    lengths = {row["name"]: row["bytes"] / size for row in result["by_every_k"]}
    assert lengths == {
        "optax.MultiSteps": pytest.approx(16, rel=1e-3),
        "optaccum.apply_gradients, shard_map": pytest.approx(1, rel=1e-3),
        "optaccum.value_and_grad, shard_map": pytest.approx(1, rel=1e-3),
    }
    assert ("Left out" in tables["collectives"]) != HAS_RESHARD


def test_losses_that_compare_rows_are_exact_or_found_not_to_be():
    result, _ = quick("coupled")
    rows = {(row["model"], row["name"]): row for row in result["models"]}
    for model in ("mlp", "transformer"):
        ours = rows[model, coupled.OURS]
        assert rows[model, "optaccum.value_and_grad"]["gradient_error"] > 0.05
        assert ours["gradient_error"] < 1e-5
        assert ours["temporary_bytes"] <= 1.05 * rows[model, coupled.REMAT]["temporary_bytes"]
    drift = {row["name"]: row["relative_error"] for row in result["drift"]}
    assert drift[coupled.OURS] < 0.005 < 0.01 < drift[coupled.REMAT]


def test_scaling_compares_what_agrees_at_every_point():
    result, _ = quick("scaling")
    sweeps = result["sweeps"]
    for sweep, figures in sweeps.items():
        for row in figures["rows"]:
            assert row["agrees"] is (None if row["name"] == "AdamW alone" else True), (sweep, row)
            assert (row["hold_ms"] is None) == (row.get("every_k") == 1)
    # Parameters and Adam's moments halve; the accumulator stays float32.
    wide, _, narrow, _ = sweeps["dtype"]["rows"]
    size = wide["parameter_bytes"]
    assert narrow["parameter_bytes"] == size // 2
    assert wide["state_bytes"] - narrow["state_bytes"] == pytest.approx(size, abs=64)


def test_every_contender_compiles_and_a_hold_moves_three_sizes():
    result, tables = quick("compiled")
    assert (result["left_out"], len(result["training"])) == ({}, len(compiled.TRAINING))
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
    listed = "blocks in a list"
    assert sent[listed, "optaccum.apply_gradients, shard_map"] == ["none", "all-reduce 1.00"]
    assert sent[listed, "optax.microbatch"] == ["all-reduce 1.00", "all-reduce 8.00"]
    for name in contenders.FSDP, contenders.ZERO_2:
        assert "gather" in sent[listed, name][1], sent[listed, name]
    assert all(name in tables["compiled"] for name in rows)


def test_a_release_counts_once_a_window_and_a_scan_once_a_microbatch(monkeypatch):
    class Program:
        def __init__(self, found):
            self.as_text = lambda: found

    monkeypatch.setattr(hlo, "collectives", list)
    calls = Program([hlo.Collective("all-reduce", size, 1, size > 100) for size in (100, 900)])
    hold = {"kind": "all-reduce", "bytes": 100, "group": 0, "times": 1}
    release = {"kind": "all-reduce", "bytes": 900, "group": 0, "times": 1}
    found = collectives.traffic([calls] * 3, 3)
    assert found == {"hold": [hold], "window": [release, hold | {"times": 3}]}
    found = collectives.traffic([Program([hlo.Collective("all-gather", 5, 3, False)])], 3)
    gather = {"kind": "all-gather", "bytes": 5, "group": 0}
    assert found == {"hold": [gather | {"times": 1}], "window": [gather | {"times": 3}]}


def agrees(task):
    """Returns which loops agree: right, releasing the sum, and keeping the sums of old windows."""
    right, of_sum, stale = (
        contenders.hand_written(task.inner, every_k, zeroing)
        for every_k, zeroing in ((task.every_k, True), (1, True), (task.every_k, False))
    )
    found = {
        name: dataclasses.replace(right, steps=(*right.steps[:-1], one.steps[-1]))
        for name, one in {"right": right, "of sum": of_sum, "stale": stale}.items()
    }
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
    task = training.make_task(training.Sizes("tiny", "bfloat16", 3, 1, 8, 1))
    assert agrees(task) == {"right": True, "of sum": False, "stale": False}


def test_a_contender_that_is_not_installed_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    found, left_out = contenders.make(overhead.NAMES, INNERS["sgd"], 2)
    assert set(found) == {*overhead.NAMES} - {contenders.KERAS}
    assert "keras" in left_out[contenders.KERAS]


def test_the_floor_is_the_bytes_at_the_bandwidth_of_the_triad():
    # 2 passes of 3 streams in 6 s: a second a stream.
    least = overhead.floors({"triad": [6.0]}, 2, {"hold": 3, "release": 9}, every_k=4)
    seconds = {part: list(found) for part, found in least.items()}
    assert seconds == {"hold": [3.0], "release": [9.0], "window": [18.0]}


@pytest.mark.parametrize(
    ("start", "budget", "largest", "capped"),
    [(1, 9, 8, False), (4, 9, 8, False), (8, 3, 2, False), (4, 0, 0, False), (1, 99, 16, True)],
)
def test_the_largest_power_of_two_within_the_budget_is_found(start, budget, largest, capped):
    found = programs.largest_batch(lambda batch: batch, start, start, budget, 4)
    assert found == (largest, capped)


def test_slopes_are_powers():
    rows = [
        {"name": "linear", "parameters": n, "hold_ms": {"median": 3.0 * n}, "release_ms": None}
        | {"release_ms": {"median": 5.0 if n < 1000 else 50.0}}
        for n in (1, 10, 100, 1000)
    ]
    hold, release = scaling.slopes("parameters", rows)
    assert (hold["quantity"], release["quantity"]) == ("hold_ms", "release_ms")
    assert (hold["slope"], hold["slope_of_largest"]) == pytest.approx((1, 1))
    assert (release["slope"], release["slope_of_largest"]) == pytest.approx((0.3, 0.5))


@pytest.mark.parametrize(
    ("name", "size"), [("100k", 1e5), ("3m", 3e6), ("10m", 1e7), ("110m", 1.1e8), ("350m", 3.5e8)]
)
def test_a_preset_is_as_large_as_its_name_says(name, size):
    tied = name not in ("3m", "110m")  # as they are trained
    config = dataclasses.replace(transformer.PRESETS[name], tied=tied)
    shapes = jax.tree.leaves(transformer.param_shapes(config))
    assert sum(leaf.size for leaf in shapes) == pytest.approx(size, rel=0.25)


def test_no_token_sees_a_later_one():
    params, tokens = transformer.make_params(MODEL), jnp.arange(8)[None]
    features = functools.partial(MODEL.features, params, params["embedding"])
    same = np.isclose(features(tokens), features(tokens.at[0, 5].set(60)), atol=1e-6)
    assert same.all(axis=(0, 2)).tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("option", ["remat", "one_hot", "scanned"])
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
    assert list(compiled.measure(1)) == []


def test_a_single_device_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="needs at least 2 devices, found 1"):
        next(collectives.measure(0))


def interrupted(*figures):
    yield from figures
    raise KeyboardInterrupt


@pytest.fixture
def benchmark(monkeypatch):
    def tables(result):
        return {"rows": table([{"contender": str(row)} for row in result["rows"]])}

    monkeypatch.setitem(report.BENCHMARKS, "some", report.Benchmark(interrupted, tables))


def test_ctrl_c_saves_what_is_done_and_ends_without_a_traceback(benchmark, tmp_path, capsys):
    figures, file = interrupted({"rows": [1]}, {"rows": [1, 2]}), tmp_path / "some-cpu.json"
    with pytest.raises(SystemExit) as exit_info:
        __main__.measure("some", figures, file)
    assert exit_info.value.code == 130
    result = json.loads(file.read_text())
    assert (result["rows"], result["complete"]) == ([1, 2], False)
    assert [path.name for path in tmp_path.iterdir()] == ["some-cpu.json"]
    assert "| 2" in capsys.readouterr().out


def test_a_run_that_ends_with_nothing_leaves_the_committed_figures(benchmark, tmp_path):
    file = tmp_path / "some-cpu.json"
    file.write_text("committed")
    with pytest.raises(SystemExit):
        __main__.measure("some", interrupted(), file)
    assert file.read_text() == "committed"


def test_benchmarks_run_by_name_and_refuse_others(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(__main__, "run", lambda *arguments: started.append(arguments))
    __main__.main(["--quick", "scaling", "compiled"])
    assert started == [("scaling", "--quick"), ("compiled", "--quick")]
    started.clear()
    __main__.main([])
    assert started == [(name,) for name in report.BENCHMARKS]
    with pytest.raises(SystemExit) as exit_info:
        __main__.main(["overheads"])
    assert exit_info.value.code == 2
    assert "no such benchmark: overheads" in capsys.readouterr().err


def test_a_quick_run_writes_nothing_and_another_the_figures_and_the_report(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    monkeypatch.setattr(__main__, "measure", lambda *given: found.append((given[0], given[2])))
    monkeypatch.setattr(report, "write", lambda: found.append("report"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    __main__.main(["scaling", "--quick"])
    assert found == [("scaling", None)]
    __main__.main(["scaling"])
    assert found[1:] == [("scaling", tmp_path / "scaling-tpu.json"), "report"]


def test_a_benchmark_starts_in_a_process_of_its_own(capfd):
    with pytest.raises(SystemExit) as exit_info:
        __main__.run("none", "--quick")
    assert exit_info.value.code == 2
    assert "no such benchmark: none" in capfd.readouterr().err
