"""The benchmarks run, and compare only what computes the same thing."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest

pytest.importorskip("rich")
pytest.importorskip("optax", "0.2.7", reason="aggregating.process came with optax 0.2.7")

from benchmarks import floor, overhead, peers
from benchmarks.inners import INNERS

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
CONTENDERS = {
    "optaccum.apply_gradients",
    "optaccum, two programs",
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
def quick_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("overhead") / "overhead.json"
    options = ["--quick", "--inner", "all", "--every-k", "3", "--leaves", "1", "--rounds", "2"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.overhead", *options, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text()), process.stdout


def test_quick_overhead_finds_every_equivalent_contender_equal_to_the_full_batch(quick_run):
    result, _ = quick_run
    has_keras = importlib.util.find_spec("keras") is not None
    names = CONTENDERS | ({KERAS} if has_keras else set())
    assert [run["inner"] for run in result["runs"]] == ["sgd", "adamw", "muon"]
    for run in result["runs"]:
        agrees = {row["name"]: row["agrees"] for row in run["contenders"]}
        assert agrees == {name: name != "optax.apply_every" for name in names}
        assert agrees == {row["name"]: row["equivalent"] for row in run["contenders"]}
        assert [missing["name"] for missing in run["left_out"]] == (
            [] if has_keras else ["keras_optimizer"]
        )


def test_quick_overhead_writes_the_layout_that_it_documents(quick_run):
    result, _ = quick_run
    assert (result["benchmark"], result["every_k"], result["leaves"]) == ("overhead", 3, 1)
    assert {"date", "device", "versions", "rounds"} <= result.keys()
    assert [row["every_k"] for row in result["compilation_of_apply_gradients"]] == [2, 8, 64, 1024]
    for run in result["runs"]:
        least = run["floor"]
        assert run["parameter_bytes"] == 4 * 160**2
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


def test_the_tables_name_every_contender_and_fit_into_100_columns(quick_run):
    _, printed = quick_run
    assert max(len(line) for line in printed.splitlines()) <= 100
    assert all(printed.count(name) == 6 for name in CONTENDERS - {"optaccum.apply_gradients"})


def test_a_contender_that_is_not_installed_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    found, left_out = overhead.find_contenders("sgd", 2)
    assert set(found) == CONTENDERS
    (missing,) = left_out
    assert missing["name"] == "keras_optimizer"
    assert "keras" in missing["why"]


def test_the_floor_is_the_bytes_at_the_bandwidth_of_the_triad():
    # 2 passes of 3 streams in 6 s: a second a stream.
    least = floor.floors({"triad": [6.0]}, 2, {"hold": 3, "release": 9}, every_k=4)
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
        (("--leaves", "few"), "invalid number value: 'few'"),
        (("--inner", "adam"), "invalid choice: 'adam'"),
        (("--rounds", "0"), "must be at least 1"),
        (("--output", "no/such/folder.json"), "not a file in an existing folder"),
    ],
)
def test_overhead_refuses_a_bad_argument(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        overhead.parse_args(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("inner", INNERS)
def test_a_contender_that_releases_the_sum_is_noticed(inner):
    tx, every_k = INNERS[inner].transformation, 3
    params = overhead.make_tree(0, leaves=1, megabytes=0.001)
    microbatches = [overhead.make_tree(seed, leaves=1, megabytes=0.001) for seed in (1, 2, 3)]
    expected = peers.full_batch(tx, every_k, params, microbatches)
    right = peers.hand_written(tx, every_k)
    assert peers.agrees(right, params, microbatches, expected)
    release_of_sum = peers.hand_written(tx, 1).programs[0]
    wrong = peers.Peer("wrong", right.init, (*right.programs[:-1], release_of_sum))
    assert not peers.agrees(wrong, params, microbatches, expected)


@pytest.mark.parametrize("fault", ["stale sums", "NaN in one leaf"])
def test_a_contender_that_differs_is_noticed(fault):
    inner, every_k = optax.adamw(1e-2, eps=0.1), 4
    params = {"a": jnp.ones(3), "b": jnp.arange(2.0)}
    microbatches = [{"a": jnp.array([0.1, -0.2, i]), "b": jnp.full(2, 0.3)} for i in range(4)]
    expected = peers.full_batch(inner, every_k, params, microbatches)
    right = peers.hand_written(inner, every_k)
    assert peers.agrees(right, params, microbatches, expected)

    *holds, release = right.programs
    if fault == "stale sums":
        release = peers.hand_written_overwriting(inner, every_k).programs[-1]
    else:
        microbatches[0] = microbatches[0] | {"b": jnp.array([0.3, jnp.nan])}
    wrong = peers.Peer("wrong", right.init, (*holds, release))
    assert not peers.agrees(wrong, params, microbatches, expected)
