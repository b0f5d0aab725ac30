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

pytestmark = pytest.mark.slow


def quartiles(median):
    return {"q1": 0.5 * median, "median": median, "q3": 2.0 * median}


ORIGIN = {"date": "2030-01-02T03:04:05Z", "device": "cpu", "versions": {"jax": "1.2.3"}}
MEASURED = "Measured on: cpu, jax 1.2.3, 2030-01-02."


def overhead(device="cpu"):
    row = {
        **{"inner": "adamw", "name": "optax.MultiSteps", "parameter_bytes": 25_000_000},
        **{"agrees": False, "temporaries": 3.0, "time_to_floor": quartiles(3.0)},
        **{"window_ms": quartiles(300), "hold_ms": quartiles(3.702), "release_ms": quartiles(15)},
    }
    floor = {key: row[key] for key in row if key not in ("agrees", "temporaries")}
    setting = {"device": device, "every_k": 8, "leaves": 24, "left_out": {"another": "a reason"}}
    return ORIGIN | setting | {"contenders": [floor | {"name": "floor"}, row]}


def compiled():
    ours = {
        **{"target": "v5e", "inner": "adamw", "name": "optaccum.apply_gradients"},
        **{"parameter_bytes": 512_000_000, "disagreement": 0.001},
        **{"hold": 3.0, "release": 10.0, "window": 31.0, "temporaries": 0.0},
    }
    theirs = ours | {"name": "optax.MultiSteps", "hold": 9.0, "window": 72.0, "temporaries": 0.25}
    sent = {"target": "v5e", "model": "blocks in a list", "devices": 8}
    sent |= {"parameter_bytes": 8_000_000, "name": "optaccum.apply_gradients"}
    scalar = {"kind": "all-reduce", "bytes": 4, "times": 8}
    hold = [{"kind": "all-gather", "bytes": 1_000_000, "times": 1}, scalar]
    window = [{"kind": "reduce-scatter", "bytes": 8_000_000, "times": 2}, hold[0] | {"times": 8}]
    return ORIGIN | {
        "every_k": 8,
        "left_out": {"v6e": "pip install something"},
        "optimizer": [theirs | {"target": "h100"}, theirs, ours, ours | {"inner": "muon"}],
        "traffic": [
            sent | {"hold": hold, "window": window, "forgets": False},
            sent | {"name": "a scan", "hold": [scalar], "window": [], "forgets": True},
        ],
    }


def folds():
    needs = {"optaccum.value_and_grad": 0.3, "hand-written scan": 1.1}
    rows = [
        {"name": "layers in checkpoints", "temporaries": {"h100": needs}},
        {"name": "layers in a list", "temporaries": {"h100": dict.fromkeys(needs, 0.5)}},
    ]
    return ORIGIN | {"num_microbatches": 4, "rows": rows}


def scaling():
    row = {
        **{"name": "optaccum.apply_gradients", "agrees": True, "temporaries": 0.0},
        **{"parameters": 1e6, "leaves": 1000, "dtype": "bfloat16"},
        **{"hold_ms": quartiles(1.0), "release_ms": quartiles(123.4)},
        **{"microbatch_ms": quartiles(2.0), "dispatch_ms": quartiles(12.0)},
        **{"trace_s": 1.0, "compile_s": 3.0},
        **{"parameter_bytes": 20_000_000, "state_bytes": 80_000_000},
    }
    sweeps = {sweep: [row] for sweep in ("parameters", "leaves", "dtype")}
    return ORIGIN | {"sweeps": sweeps | {"every_k": [row | {"every_k": 1, "hold_ms": None}]}}


def train_step():
    ran = {
        **{"name": "optaccum.value_and_grad", "agrees": True, "peak_bytes": 200_000_000},
        **{"time_to_microbatch": quartiles(0.5)},
    }
    setting = {"parameters": 10_000_000, "dtype": "float32", "every_k": 8}
    return ORIGIN | setting | {"sequence": 64, "contenders": [ran]}


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
        "folds-jax0.10": folds(),
        "overhead-cpu": overhead(),
        "scaling-cpu": scaling(),
        "train_step-cpu": train_step(),
    }
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return report.load(tmp_path)


# The line of each table that holds a row, written out by hand.
ROWS = {
    "compiled": "| adamw | optaccum.apply_gradients | - | 3 / 10 / 31; 0 |",
    "compiled_others": "| muon | optaccum.apply_gradients | 3 / 10 / 31; 0 |",
    "compiled_traffic": (
        "| blocks in a list | optaccum.apply_gradients | all-gather 1.00 "
        "| reduce-scatter 2.00, all-gather 8.00 |"
    ),
    # 2 x 4 x 1 MB gathered in each of 8 microbatches, and 1 MB reduced once, of 4 MB.
    "large": (
        "| 7B | 8 H100 | HSDP, 2 replicas | optaccum.value_and_grad, reduce_axes | 30.0 | 0.50 "
        "| 100 | all-gather of 4 2.00 | all-reduce of 2 0.25 | 3 of 5 |"
    ),
    "folds": "| layers in checkpoints | 0.30 / 1.10 | yes |",
    "overhead": "| adamw | optax.MultiSteps | 300 | 3.7 | 15 | 3.00 | 3.0 | NO |",
    "train_step": "| optaccum.value_and_grad | - | 0.50 | 200 MB | yes |",
    "parameters": "| 1,000,000 | optaccum.apply_gradients | 1 | 123 | 0.00 | yes |",
    "leaves": "| 1,000 | optaccum.apply_gradients | 1.00 | 3.00 | 12.00 | yes |",
    "every_k": "| 1 | optaccum.apply_gradients | - | 123 | 2 | yes |",
    "dtype": "| bfloat16 | optaccum.apply_gradients | 1 | 123 | 20 | 80 | 0.00 | yes |",
}


def lines_of(table):
    """Returns the lines of a table without the blanks that align it."""
    return [re.sub(" +", " ", line) for line in table.splitlines()]


def test_every_table_shows_the_figures(results):
    tables = report.render(results)
    assert tables.keys() == ROWS.keys()
    for name, row in ROWS.items():
        head, rule, *lines = lines_of(tables[name])
        assert row in lines, tables[name]
        assert head.count("|") == rule.count("|") == row.count("|")
        assert "2030-01-02." in tables[name]
        if not name.startswith(("compiled", "large", "folds")):
            assert MEASURED in tables[name]


def test_a_table_says_what_needs_saying(results):
    tables = {name: "\n".join(lines_of(text)) for name, text in report.render(results).items()}
    assert "Parameters: adamw 25 MB, in 24 leaves. k = 8." in tables["overhead"]
    assert "Left out: another, for a reason." in tables["overhead"]
    assert "| adamw | floor | 300 | 3.7 | 15 | 3.00 | - | - |" in tables["overhead"]
    assert "| adamw | optax.MultiSteps | 9 / 10 / 72; 0.25 | 9 /" in tables["compiled"]
    assert "| a scan ‡ | scalars | none |" in tables["compiled_traffic"]
    assert "‡ Its gradient of the embedding is wrong" in tables["compiled_traffic"]
    assert "Left out: TPU v6e; `pip install something`." in tables["compiled"]
    assert "| layers in a list | 0.50 / 0.50 | no |" in tables["folds"]


def test_a_gpu_and_a_tpu_come_below_the_cpu(tmp_path):
    for kind in ("tpu", "gpu", "cpu"):
        (tmp_path / f"overhead-{kind}.json").write_text(json.dumps(overhead(f"a {kind}")))
    tables = report.render(report.load(tmp_path))
    assert re.findall(r"Measured on: (.*?),", tables["overhead"]) == ["a cpu", "a gpu", "a tpu"]
    assert tables.keys() == {"overhead"}


def test_fill_replaces_what_is_between_markers_and_nothing_else():
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\n<!-- y: end -->\n"
    filled = report.fill(text, {"x": "new", "y": "other", "z": "unused"})
    assert filled == (
        "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n<!-- y: begin -->\nother\n<!-- y: end -->\n"
    )
    assert "x: begin -->\nNo result is committed.\n" in report.fill(text, {"y": "other"})


def test_figures_are_drawn_from_what_there_is(results, tmp_path):
    report.draw(results, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"compiled.png", "large.png"}


def test_help_does_not_write_the_report(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", "--help"])
    monkeypatch.setattr(report, "load", lambda: pytest.fail("the report was run"))
    with pytest.raises(SystemExit) as exit_info:
        report.main()
    assert exit_info.value.code == 0
    assert "tables and figures" in capsys.readouterr().out


def test_counted_bytes_agree_with_those_that_tpu_compilers_report():
    """Of products they count an operand once for each side, so Muon's differ."""
    found = [row for result in report.load()["compiled"] for row in result["optimizer"]]
    rows = [row for row in found if row["inner"] != "muon"]
    on_tpus = [row for row in rows if row["target"] in ("v5e", "v6e")]
    assert {row["target"] for row in on_tpus} == {"v5e", "v6e"}
    assert max(row["disagreement"] for row in on_tpus) <= 0.05


@pytest.mark.parametrize("readme", report.READMES, ids=lambda path: path.stem)
def test_the_tables_are_the_committed_results(readme):
    text = readme.read_text()
    assert report.fill(text, report.render(report.load())) == text


def test_every_file_that_the_readme_of_the_benchmarks_names_exists():
    readme = report.READMES[-1]
    for name in re.findall(r"\]\(([\w./-]+)\)", readme.read_text()):
        assert (readme.parent / name).exists(), name
