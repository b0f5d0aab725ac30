"""The READMEs' figures and tables are those of the committed results."""

import json
import re

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("optax", "0.2.7", reason="benchmarks.contenders has options of optax 0.2.7")
pytest.importorskip("rich")
pytest.importorskip("tabulate")

from benchmarks import report
from benchmarks.contender import INNERS
from benchmarks.tables import NOT_EQUIVALENT

pytestmark = pytest.mark.slow


def quartiles(median):
    return {"q1": 0.5 * median, "median": median, "q3": 2.0 * median}


def by_part(window, hold, release):
    return {"window": quartiles(window), "hold": quartiles(hold), "release": quartiles(release)}


ORIGIN = {"date": "2030-01-02T03:04:05Z", "device": "cpu", "versions": {"jax": "1.2.3"}}
MEASURED = "Measured on: cpu, jax 1.2.3, 2030-01-02."


def contender(name, scale, *, equivalent=True):
    times = {"window_ms": 100 * scale, "hold_ms": 1.234 * scale, "release_ms": 5 * scale}
    units = ("floor", "multi_steps", "hand_written", "hand_written_no_zeroing")
    return {
        "name": name,
        "equivalent": equivalent,
        "agrees": equivalent,
        "temporaries": scale,
        "compile_s": 0.25,
        **{key: quartiles(value) for key, value in times.items()},
        **{f"ratio_to_{unit}": by_part(scale, scale / 2, scale / 4) for unit in units},
    }


def overhead(device="cpu"):
    least = {f"{part}_ms": quartiles(1.0) for part in ("window", "hold", "release")}
    run = {
        "inner": "adamw",
        "parameter_bytes": 25_000_000,
        "floor": {
            "bandwidth_bound": True,
            "bandwidth": {"triad": quartiles(2e10), "copy": quartiles(1e10)},
            "dispatch_ms": quartiles(0.3),
            **least,
        },
        "contenders": [
            contender("optaccum.apply_gradients", 1.0),
            contender("optax.MultiSteps", 2.0),
            contender("optax.apply_every", 3.0, equivalent=False),
        ],
    }
    muon = run | {"inner": "muon", "floor": run["floor"] | {"bandwidth_bound": False}}
    return ORIGIN | {
        "device": device,
        "every_k": 8,
        "leaves": 24,
        "rounds": 15,
        "runs": [muon, run],
        "compilation_of_apply_gradients": [{"every_k": 1024, "compile_s": 1.0, "temporaries": 0.0}],
    }


def compiled():
    ours = {
        **{"target": "v5e", "inner": "adamw", "name": "optaccum.apply_gradients"},
        **{"equivalent": True, "parameter_bytes": 512_000_000},
        **{"hold": 3.0, "release": 10.0, "window": 31.0, "reported_release": 10.01},
        **{"disagreement": 0.001, "temporaries": 0.0, "compile_s": 1.5},
        **{"kernels_of_hold": 4, "kernels_of_release": 8},
    }
    theirs = ours | {"name": "optax.apply_every", "equivalent": False, "hold": 9.0, "window": 72.0}
    theirs |= {"target": "h100", "reported_release": None, "disagreement": None}
    step = {"target": "v5e", "parameter_bytes": 40_000_000, "temporaries": 1.0}
    step |= {"gradients": 50.0, "peak_bytes": 1_500_000_000}
    parts = {"hold": 1.23, "release": 8.0, "window": 16.0}
    in_step = {"hold": None, "release": None, "window": 20.0}
    sent = {"target": "v5e", "model": "blocks in a list", "devices": 8}
    sent |= {"parameter_bytes": 8_000_000, "name": "optaccum.apply_gradients, FSDP"}
    scalar = {"kind": "all-reduce", "bytes": 4, "times": 8}
    hold = [{"kind": "all-gather", "bytes": 1_000_000, "times": 1}, scalar]
    window = [{"kind": "reduce-scatter", "bytes": 8_000_000, "times": 2}, hold[0] | {"times": 8}]
    return ORIGIN | {
        "every_k": 8,
        "left_out": {"v6e": "pip install something"},
        "optimizer": [theirs, ours, ours | {"inner": "muon"}],
        "training": [
            step | parts | {"name": "optaccum.apply_gradients"},
            step | in_step | {"name": "optaccum.value_and_grad"},
        ],
        "traffic": [
            sent | {"hold": hold, "window": window, "forgets": False},
            sent | {"name": "a scan", "hold": [scalar], "window": [], "forgets": True},
        ],
    }


def scaling():
    rows = [
        {
            "name": "optax.MultiSteps",
            "every_k": k,
            "agrees": True,
            "hold_ms": quartiles(2.0) if k > 1 else None,
            "release_ms": quartiles(2.0),
            "microbatch_ms": quartiles(2.0),
        }
        for k in (1, 4)
    ]
    leaves = {
        "name": "optaccum.apply_gradients",
        "leaves": 1000,
        "agrees": True,
        "trace_s": 1.0,
        "compile_s": 3.0,
        "dispatch_ms": quartiles(12.0),
        "compilation_ms_a_leaf": 4.0,
        "dispatch_us_a_leaf": quartiles(12.0),
    }
    dtype = {
        "name": "optaccum.apply_gradients",
        "dtype": "bfloat16",
        "agrees": True,
        "hold_ms": quartiles(1.0),
        "release_ms": quartiles(123.4),
        "parameter_bytes": 20_000_000,
        "state_bytes": 80_000_000,
        "temporary_bytes": 0,
    }
    fit = {"quantity": "hold_ms", "name": "optax.MultiSteps", "slope": 0.01}
    sweeps = {
        "leaves": {"rows": [leaves], "slopes": []},
        "every_k": {"rows": rows, "slopes": [fit | {"slope_of_largest": 0.02}]},
        "dtype": {"rows": [dtype], "slopes": []},
    }
    return ORIGIN | {"sweeps": sweeps}


def train_step():
    ran = {
        "name": "optaccum.apply_gradients",
        "agrees": True,
        "tokens_per_second": quartiles(12345.6),
        "time_to_multi_steps": quartiles(0.5),
        "time_to_hand_written": quartiles(1.0),
        "peak_bytes": 200_000_000,
    }
    too_large = dict.fromkeys(ran) | {"name": "full batch", "peak_bytes": 900_000_000}
    return ORIGIN | {
        "parameters": 10_000_000,
        "dtype": "float32",
        "every_k": 8,
        "microbatch": 1,
        "sequence": 64,
        "contenders": [ran, ran | {"name": "optax.MultiSteps"}, too_large],
        "budget_bytes": 250_000_000,
        "largest": [
            {"name": "optaccum.apply_gradients", "microbatch": 4, "capped": True},
            {"name": "full batch", "microbatch": 0, "capped": False},
        ],
    }


def in_step():
    ours = {
        "name": "optaccum.value_and_grad",
        "agrees": True,
        "time_to_hand_written": quartiles(0.99),
        "time_to_microbatch": quartiles(0.98),
        "time_to_full_batch": None,
        "compile_to_hand_written": quartiles(1.05),
        "temporary_bytes": 66_000_000,
        "peak_bytes": 186_000_000,
    }
    return ORIGIN | {
        "parameters": 10_000_000,
        "dtype": "float32",
        "num_microbatches": 8,
        "microbatch": 1,
        "sequence": 64,
        "contenders": [ours],
        "budget_bytes": 250_000_000,
        "largest": [
            {"name": "full batch", "microbatch": None, "batch": 4, "capped": False},
            {"name": "optaccum.value_and_grad", "microbatch": 1, "batch": 512, "capped": True},
        ],
        "drift": [{"name": "optaccum.value_and_grad", "relative_error": 0.003}],
    }


def collectives():
    deferred = {
        "name": "optaccum.value_and_grad, shard_map",
        "agrees": True,
        "window": [{"kind": "all-reduce", "bytes": 4_000_000, "times": 1}],
        "hold": [],
        "window_ms": quartiles(1234.5),
        "time_to_multi_steps": quartiles(0.5),
        "time_to_hand_written": quartiles(1.0),
    }
    hold = [
        {"kind": "all-reduce", "bytes": 3_000_000, "times": 1},
        {"kind": "all-reduce", "bytes": 1_000_000, "times": 1},
        {"kind": "all-reduce", "bytes": 8, "times": 1},
        {"kind": "all-gather", "bytes": 2_000_000, "times": 1},
    ]
    window = [one | {"times": 16} for one in hold]
    reduced = deferred | {"name": "optax.MultiSteps", "window": window, "hold": hold}
    lengths = [{"name": "optax.MultiSteps", "every_k": k, "bytes": k * 6_000_000} for k in (4, 16)]
    return ORIGIN | {
        "devices": 8,
        "parameters": 1_000_000,
        "parameter_bytes": 4_000_000,
        "every_k": 16,
        "microbatch": 1,
        "sequence": 32,
        "left_out": {"another": "a reason"},
        "contenders": [deferred, reduced, deferred | {"name": "full batch", "hold": None}],
        "by_every_k": lengths,
    }


def large():
    def sent(kind, size, group, times):
        return {"kind": kind, "bytes": size, "group": group, "times": times}

    hold = [sent("all-gather", 1_000_000, 4, 2)]
    window = [sent("all-reduce", 1_000_000, 2, 1), sent("all-gather", 1_000_000, 4, 16)]
    row = {
        **{"model": "7b", "target": "h100", "devices": 8, "placed": "HSDP, 2 replicas"},
        **{"name": "optaccum.value_and_grad, reduce_axes", "parameter_bytes": 4_000_000},
        **{"fits": True, "peak_bytes": 30e9, "temporaries": 0.5, "moved": 100.2, "forgets": False},
        **{"hidden": [3, 5], "window": window, "hold": hold},
    }
    other = row | {"name": "hand-written scan", "fits": False, "hidden": None}
    return ORIGIN | {"every_k": 8, "rows": [row, other]}


@pytest.fixture
def results(tmp_path):
    files = {
        "compiled": compiled(),
        "large-jax0.10": large(),
        "overhead-cpu": overhead(),
        "scaling-cpu": scaling(),
        "train_step-cpu": train_step(),
        "in_step-cpu": in_step(),
        "collectives-cpu": collectives(),
    }
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return report.load(tmp_path)


# The line of each table that holds a row, written out by hand.
ROWS = {
    "compiled": "| optaccum.apply_gradients | - | 3 / 10 / 31 | - / 0 |",
    "compiled_others": "| muon | optaccum.apply_gradients | 3 / 10 / 31 | 0 |",
    "compiled_programs": "| optaccum.apply_gradients | - | - | 4 / 8 | 1.5 s |",
    "compiled_training": (
        "| TPU v5e | optaccum.apply_gradients | +1.2 | +8.0 | +16.0 | 1.00 | 1.50 GB |"
    ),
    "compiled_traffic": (
        "| blocks in a list | optaccum.apply_gradients, FSDP | all-gather 1.00 "
        "| reduce-scatter 2.00, all-gather 8.00 |"
    ),
    # 2 x 4 x 1 MB gathered in each of 8 microbatches, and 1 MB reduced once, of 4 MB.
    "large": (
        "| 7B | 8 H100 | HSDP, 2 replicas | optaccum.value_and_grad, reduce_axes | 30.0 | 0.50 "
        "| 100 | all-gather of 4 2.00 | all-reduce of 2 0.25 | 3 of 5 |"
    ),
    "overhead": "| optaccum.apply_gradients | 1.00 | 1.00 | 1.00 | 1.00 | 1.0 | 0.2 s | yes |",
    "overhead_times": (
        "| adamw | optax.apply_every † | 300 | 3.7 | 15 | 3.00 | 1.50 | 0.75 | NO |"
    ),
    "compilation": "| 1,024 | 0.0 | 1.0 s |",
    "train_step": (
        "| optaccum.apply_gradients | 12,346 | 0.50 | 1.00 | 200 MB | at least 4 | yes |"
    ),
    "in_step": "| optaccum.value_and_grad | 0.99 | 0.98 | - | 1.05 | 66.0 | 186.0 | yes |",
    "collectives": (
        "| optaccum.value_and_grad, shard_map | 1 x 1.00 | none | 1,234 | 0.50 | 1.00 | yes |"
    ),
    "slopes": "| hold, by k | optax.MultiSteps | 0.01 | 0.02 |",
    "leaves": "| 1,000 | optaccum.apply_gradients | 1.00 | 3.00 | 12.0 | 4.00 | 12.0 | yes |",
    "dtype": "| bfloat16 | optaccum.apply_gradients | 1.00 | 123 | 20.0 | 80.0 | 0.00 | yes |",
}


def lines_of(table):
    """Returns the lines of a table without the blanks that align it."""
    return [re.sub(" +", " ", line) for line in table.splitlines()]


def test_every_table_shows_the_figures(results):
    tables = report.render(results)
    assert tables.keys() == {*ROWS, "every_k"}
    for name, row in ROWS.items():
        head, rule, *lines = lines_of(tables[name])
        assert row in lines, tables[name]
        assert head.count("|") == rule.count("|") == row.count("|")
        assert "2030-01-02." in tables[name]
        if not name.startswith(("compiled", "large")):
            assert MEASURED in tables[name]


def test_a_table_says_what_needs_saying(results):
    tables = {name: "\n".join(lines_of(text)) for name, text in report.render(results).items()}
    assert "adamw, k = 8, 25 MB of parameters in 24 leaves." in tables["overhead"]
    assert NOT_EQUIVALENT in tables["overhead"]
    assert "| full batch | - | - | - | 900 MB | none | - |" in tables["train_step"]
    assert "largest microbatch in 250 MB" in tables["train_step"]
    assert "| optaccum.value_and_grad | 1 | at least 512 |" in tables["in_step"]
    assert "| optaccum.value_and_grad | 3.0e-03 |" in tables["in_step"]
    assert (
        "| optax.MultiSteps | 32 x 0.50 + 16 x 8 B + all-gather 16 x 0.50 "
        "| 2 x 0.50 + 1 x 8 B + all-gather 1 x 0.50 | 1,234 |"
    ) in tables["collectives"]
    assert "| full batch | 1 x 1.00 | - | 1,234 |" in tables["collectives"]
    assert "| optax.MultiSteps | 6.00 | 24.00 |" in tables["collectives"]
    assert "Left out: another, for a reason." in tables["collectives"]
    assert "report by at most: adamw 0.1%, muon 0.1%." in tables["compiled_programs"]
    assert "| optax.apply_every † | 9 / 10 / 72 | - | 0 / - |" in tables["compiled"]
    assert "| optaccum.value_and_grad | - | - | +20.0 |" in tables["compiled_training"]
    assert "| a scan ‡ | scalars | none |" in tables["compiled_traffic"]
    assert "‡ Its gradient of the embedding is wrong" in tables["compiled_traffic"]
    assert "Left out: TPU v6e; `pip install something`." in tables["compiled"]
    times = tables["overhead_times"]
    dispatch = "; a call that only passes all arrays through 0.3 ms."
    bandwidth = "bandwidth 20 GB/s (triad), 10 GB/s (copy)"
    assert f"adamw: 25 MB of parameters; {bandwidth}{dispatch}" in times
    assert f"{bandwidth}, which is not what bounds it{dispatch}" in times


def test_a_gpu_and_a_tpu_come_below_the_cpu(tmp_path):
    for kind in ("tpu", "gpu", "cpu"):
        (tmp_path / f"overhead-{kind}.json").write_text(json.dumps(overhead(f"a {kind}")))
    tables = report.render(report.load(tmp_path))
    assert re.findall(r"Measured on: (.*?),", tables["overhead"]) == ["a cpu", "a gpu", "a tpu"]
    assert "slopes" not in tables


def test_figures_of_a_run_that_was_stopped_are_marked(tmp_path):
    stopped = in_step() | {"complete": False, "largest": []}
    (tmp_path / "in_step-cpu.json").write_text(json.dumps(stopped))
    assert "Stopped before its end." in report.render(report.load(tmp_path))["in_step"]


def test_fill_replaces_what_is_between_markers_and_nothing_else():
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n"
    filled = report.fill(text, {"x": "new", "y": "other", "z": "unused"})
    assert filled == (
        "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n<!-- y: begin -->\nother\n<!-- y: end -->\n"
    )
    assert "x: begin -->\nNo result is committed.\n" in report.fill(text, {"y": "other"})


FIGURES = {"compiled.png", "large.png", "overhead.png", "memory.png", "scaling.png"}


@pytest.mark.slow
def test_figures_are_drawn_from_what_there_is(results, tmp_path):
    report.draw(results, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {*FIGURES, "compilation.png"}
    none = tmp_path / "none"
    none.mkdir()
    report.draw({name: [] for name in results}, none)
    assert not list(none.iterdir())


def test_help_does_not_write_the_report(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", "--help"])
    monkeypatch.setattr(report, "load", lambda: pytest.fail("the report was run"))
    with pytest.raises(SystemExit) as exit_info:
        report.main()
    assert exit_info.value.code == 0
    assert "tables and figures" in capsys.readouterr().out


def test_counted_bytes_agree_with_those_that_tpu_compilers_report():
    """Of products they count an operand once for each side, so Muon's differ."""
    (result,) = report.load()["compiled"]
    bound = [row for row in result["optimizer"] if INNERS[row["inner"]].bandwidth_bound]
    on_tpus = [row for row in bound if row["target"] in ("v5e", "v6e")]
    assert {row["target"] for row in on_tpus} == {"v5e", "v6e"}
    assert max(row["disagreement"] for row in on_tpus) <= 0.05


@pytest.mark.parametrize("readme", report.READMES, ids=lambda path: path.parent.name)
def test_the_tables_are_the_committed_results(readme):
    text = readme.read_text()
    assert report.fill(text, report.render(report.load())) == text


def test_every_file_that_the_readme_of_the_benchmarks_names_exists():
    readme = report.READMES[1]
    for name in re.findall(r"\]\(([\w./-]+)\)", readme.read_text()):
        assert (readme.parent / name).exists(), name
