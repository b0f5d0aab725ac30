"""The programs of the pages pass a type checker, as readers' editors run one."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = re.compile(r"```(?:python|\{code-cell\}[^\n]*)\n(.*?)```", re.DOTALL)


def program(page):
    """Returns the blocks of a page as one program, in the lines that they have on the page."""
    lines = [""] * page.count("\n")
    for block in PROGRAM.finditer(page):
        first = page.count("\n", 0, block.start(1))
        code = re.sub(r"(?m)^:tags:.*$", "", block[1]).splitlines()
        lines[first : first + len(code)] = code
    # JAX shows sets here; its types want frozen ones.
    return re.sub(r"reduced=(\{[^}]+\})", r"reduced=frozenset(\1)", "\n".join(lines))


@pytest.mark.slow
def test_every_program_passes(tmp_path):
    pytest.importorskip("pyright", reason="part of `.[dev]`; the gate runs this with its lint")
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        text = program(page.read_text())
        if text.strip():
            name = "-".join(page.relative_to(ROOT).with_suffix(".py").parts)
            (tmp_path / name).write_text(text)
    assert len([*tmp_path.iterdir()]) > 25
    # Pages define a step more than once.
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic", "reportRedeclaration": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
