"""The benchmarks run, and compare only what computes the same thing."""

import dataclasses
import importlib.util
import json
import sys

from helpers.benchmarks import quick_run
import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("rich")
pytest.importorskip("tabulate")
pytest.importorskip("flax")
pytest.importorskip("optax", "0.2.7", reason="aggregating.process came with optax 0.2.7")

from benchmarks import __main__, contenders, harness, overhead, programs, training
from benchmarks.contenders import INNERS
from benchmarks.tables import Table

pytestmark = pytest.mark.slow

CONTENDERS = {
    "optaccum.apply_gradients",
    "optaccum, Python-bool release",
    "optaccum, drop-in update",
    "optax.MultiSteps",
    "aggregating.process",
    "optax.apply_every",
    "hand-written loop",
    "hand-written, no zeroing",
}
KERAS = "Keras, accumulation steps"
STREAMS = {
    "sgd": {"hold": 3, "release": 5},
    "adamw": {"hold": 3, "release": 9},
    "muon": {"hold": 3, "release": 7},
}
QUARTILES = {"q1", "median", "q3"}


@pytest.fixture(scope="module")
def overhead_run():
    return quick_run("overhead", "--every-k", "3", "--leaves", "1", "--rounds", "2")


@pytest.mark.slow
def test_quick_overhead_finds_every_equivalent_contender_equal_to_the_full_batch(overhead_run):
    result, _ = overhead_run
    has_keras = importlib.util.find_spec("keras") is not None
    names = CONTENDERS | ({KERAS} if has_keras else set())
    assert [run["inner"] for run in result["runs"]] == ["sgd", "adamw", "muon"]
    for run in result["runs"]:
        agrees = {row["name"]: row["agrees"] for row in run["contenders"]}
        assert agrees == {name: name != "optax.apply_every" for name in names}
        assert agrees == {row["name"]: row["equivalent"] for row in run["contenders"]}
        assert list(run["left_out"]) == ([] if has_keras else [KERAS])


@pytest.mark.slow
def test_quick_overhead_writes_the_layout_that_it_documents(overhead_run):
    result, _ = overhead_run
    assert (result["benchmark"], result["every_k"], result["leaves"]) == ("overhead", 3, 1)
    assert {"date", "device", "versions", "rounds"} <= result.keys()
    assert [row["every_k"] for row in result["compilation_of_apply_gradients"]] == [2, 8, 64, 1024]
    for run in result["runs"]:
        least = run["floor"]
        assert run["parameter_bytes"] == 4 * (40 if run["inner"] == "muon" else 160) ** 2
        assert least["streams"] == pytest.approx(STREAMS[run["inner"]], rel=1e-3)
        assert least["bandwidth_bound"] == (run["inner"] != "muon")
        assert least["bandwidth"].keys() == {"triad", "copy"}
        assert least["dispatch_ms"].keys() == QUARTILES
        for row in [least, *run["contenders"]]:
            for part in ("window", "hold", "release"):
                assert row[f"{part}_ms"].keys() == QUARTILES
        for row in run["contenders"]:
            for unit in ("floor", "multi_steps", "hand_written", "hand_written_no_zeroing"):
                ratio = row[f"ratio_to_{unit}"]
                assert ratio.keys() == {"window", "hold", "release"}
                assert all(quartiles.keys() == QUARTILES for quartiles in ratio.values())
            assert row["compile_s"] > 0
            assert row["temporaries"] >= 0


@pytest.mark.slow
def test_the_tables_name_every_contender_and_fit_into_120_columns(overhead_run):
    _, printed = overhead_run
    assert max(len(line) for line in printed.splitlines()) <= 120
    assert all(printed.count(name) == 4 for name in CONTENDERS - {"optaccum.apply_gradients"})


def test_a_contender_that_is_not_installed_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    found, left_out = contenders.make(overhead.NAMES, INNERS["sgd"], 2)
    assert set(found) == CONTENDERS
    assert left_out.keys() == {KERAS}
    assert "keras" in left_out[KERAS]


def test_the_floor_is_the_bytes_at_the_bandwidth_of_the_triad():
    # 2 passes of 3 streams in 6 s: a second a stream.
    least = overhead.floors({"triad": [6.0]}, 2, {"hold": 3, "release": 9}, every_k=4)
    assert {part: list(seconds) for part, seconds in least.items()} == {
        "hold": [3.0],
        "release": [9.0],
        "window": [18.0],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--every-k", "1"), "must be at least 2"),
        (("--megabytes", "nan"), "must be at least 0.001"),
        (("--leaves", "few"), "invalid int value: 'few'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--rounds", "0"), "must be at least 1"),
        (("--output", "no/such/folder.json"), "No such file or directory"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        harness.parse_args("some", None, overhead.OPTIONS | training.OPTIONS, arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def error(contender, inner, params, microbatches):
    """Returns how far two windows of a contender are from the full batch."""
    expected = programs.full_batch(inner, 4, params, microbatches)
    trained = programs.Window(contender, params, params).train(params, microbatches)
    return programs.largest_error(trained, expected, params, overhead.TOLERANCE)


@pytest.mark.parametrize("inner", INNERS)
def test_a_contender_that_releases_the_sum_is_noticed(inner):
    params, *microbatches = overhead.matrices(5, 1, 0.001)
    tx, right = INNERS[inner].transformation, contenders.hand_written(INNERS[inner], 4)
    assert error(right, tx, params, microbatches) <= 1
    release_of_sum = contenders.hand_written(INNERS[inner], 1).steps[-1]
    wrong = dataclasses.replace(right, steps=(*right.steps[:-1], release_of_sum))
    assert error(wrong, tx, params, microbatches) > 1


@pytest.mark.parametrize("fault", ["stale sums", "NaN in one leaf"])
def test_a_contender_that_differs_is_noticed(fault):
    inner = INNERS["adamw"]
    params = {"a": jnp.ones(3), "b": jnp.arange(2.0)}
    microbatches = [{"a": jnp.array([0.1, -0.2, i]), "b": jnp.full(2, 0.3)} for i in range(4)]
    right = contenders.hand_written(inner, 4)
    assert error(right, inner.transformation, params, microbatches) <= 1
    expected = programs.full_batch(inner.transformation, 4, params, microbatches)

    wrong = right
    if fault == "stale sums":
        keeps_them = contenders.hand_written(inner, 4, zeroing=False).steps[-1]
        wrong = dataclasses.replace(right, steps=(*right.steps[:-1], keeps_them))
    else:
        microbatches[0] = microbatches[0] | {"b": jnp.array([0.3, jnp.nan])}
    trained = programs.Window(wrong, params, params).train(params, microbatches)
    assert not programs.largest_error(trained, expected, params, overhead.TOLERANCE) <= 1


def test_ctrl_c_saves_what_is_done_and_ends_without_a_traceback(tmp_path, capsys):
    def measure(args):
        yield {"rows": [1]}
        yield {"rows": [1, 2]}
        raise KeyboardInterrupt

    def tables(result):
        return {"rows": [Table([{"contender": str(row)} for row in result["rows"]])]}

    output = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as exit_info:
        harness.main("none", None, {}, measure, tables, ["--output", str(output)])
    assert exit_info.value.code == 130
    result = json.loads(output.read_text())
    assert (result["rows"], result["complete"]) == ([1, 2], False)
    printed = capsys.readouterr()
    assert "contender" in printed.out
    assert printed.err.splitlines() == [
        "No committed run says how long this takes.",
        "Stopped: these are the figures so far.",
    ]


def test_a_run_that_ends_with_nothing_leaves_the_folder_as_it_was(tmp_path):
    def measure(args):
        assert not list(tmp_path.iterdir())
        raise KeyboardInterrupt
        yield

    arguments = ["--output", str(tmp_path / "figures.json")]
    with pytest.raises(SystemExit):
        harness.main("none", None, {}, measure, lambda result: {}, arguments)
    assert not list(tmp_path.iterdir())
    for nowhere in (tmp_path, tmp_path / "missing" / "figures.json"):
        with pytest.raises(SystemExit) as exit_info:
            harness.parse_args("none", None, {}, ["--output", str(nowhere)])
        assert exit_info.value.code == 2


def test_a_run_says_how_long_the_committed_one_took_and_that_quick_means_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    (tmp_path / "some-cpu.json").write_text('{"seconds": 300, "device": "a chip"}')
    for argv in ([], ["--quick"]):
        harness.main("some", None, {}, lambda args: iter(()), lambda result: {}, argv)
    took, nothing = capsys.readouterr().err.splitlines()
    assert took == "The committed run took 5 minutes on a chip."
    assert "Its numbers mean nothing." in nothing


@pytest.mark.parametrize(("backend", "rounds"), [("cpu", 2), ("gpu", 3), ("tpu", 3)])
def test_a_gpu_and_a_tpu_get_large_sizes(backend, rounds, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    options = {"rounds": ("timed rounds", 1, 1, 2, 3)}
    assert harness.parse_args("some", None, options, []).rounds == rounds
    assert harness.parse_args("some", None, options, ["--quick"]).rounds == 1


def test_benchmarks_run_by_name_and_refuse_others(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(__main__, "run", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "scaling", "compiled"])
    __main__.main()
    assert started == [("scaling", "--quick"), ("compiled", "--quick")]
    started.clear()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "scaling", "compiled"])
    __main__.main()
    files = "scaling-cpu.json", "compiled.json"
    outputs = [("--output", str(harness.RESULTS / file)) for file in files]
    assert started == [("scaling", *outputs[0]), ("compiled", *outputs[1]), ("report",)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "overheads"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "no such benchmark: overheads" in capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_starts_in_a_process_of_its_own(capfd):
    __main__.run("scaling", "--help")
    assert "--leaves" in capfd.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        __main__.run("scaling", "--rounds", "0")
    assert exit_info.value.code == 2
