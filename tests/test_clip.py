"""The contrastive example: `microbatched` trains like the full batch, averaged gradients do not."""

import os
from pathlib import Path
import re
import subprocess
import sys

from helpers import scripts
import pytest

pytestmark = pytest.mark.slow

for requirement in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(requirement)

REPOSITORY = Path(__file__).parents[1]
CLIP = REPOSITORY / "examples" / "clip.py"


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    return tmp_path_factory.mktemp("clip") / "clip.png"


@pytest.fixture(scope="module")
def table(figure):
    """The printed table: {name: (reported loss, loss, largest difference, temporaries)}."""
    done = subprocess.run(
        [sys.executable, CLIP, "--steps", "3", "--output", figure],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"},
        encoding="utf-8",
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    row = r"(?m)^ *(\S.*?)  +([\d.]+) +([\d.]+) +[\d.]+% +(\S+) +([\d.]+) MB"
    found = re.findall(row, done.stdout)
    return {name: tuple(map(float, cells)) for name, *cells in found}


def test_microbatched_trains_like_the_full_batch(table):
    full, coupled, naive = table.values()
    assert coupled[0] == pytest.approx(full[0], abs=1e-4)
    # Three steps of 3e-3, each divided by |g|, some of which are near zero.
    assert coupled[2] < 1e-3 < naive[2]
    assert abs(naive[0] - full[0]) > 1


def test_it_needs_less_memory(table):
    assert table["microbatched"][3] < 0.6 * table["full batch"][3]


def test_it_writes_the_figure(table, figure):
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--microbatches", "3"),
        ("--output", "missing/clip.png"),
        ("--output", "clip.txt"),
    ],
)
def test_it_refuses_what_cannot_work(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clip.py", option, value])
    with pytest.raises(SystemExit):
        scripts.load(CLIP).parse_args()
    assert f"argument {option}: " in capsys.readouterr().err
