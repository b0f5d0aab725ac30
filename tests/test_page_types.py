"""The programs of the pages pass a type checker, as readers' editors run one; types are kept."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = re.compile(r"```(?:python|\{code-cell\}[^\n]*)\n(.*?)```", re.DOTALL)

TYPED = """
from typing import Any, NamedTuple, assert_type

import jax
import optax
import optaccum


class Params(NamedTuple):
    w: jax.Array


def loss(params: Params, x: jax.Array) -> jax.Array:
    return (params.w * x).sum()


def with_aux(params: Params, x: jax.Array) -> tuple[jax.Array, str]:
    return loss(params, x), ""


def check(params: Params, x: jax.Array, tx: optax.GradientTransformation) -> None:
    assert_type(optaccum.grad(loss, num_microbatches=2)(params, x), Params)
    value_and_grad = optaccum.value_and_grad(with_aux, has_aux=True, num_microbatches=2)
    assert_type(value_and_grad(params, x), tuple[tuple[jax.Array, str], Params])
    assert_type(optaccum.microbatched(loss, num_microbatches=2)(params, x), jax.Array)
    assert_type(optaccum.microbatched_loss(loss, num_microbatches=2)(params, x), jax.Array)
    step = optaccum.value_and_apply(tx, loss)
    assert_type(step(params, tx.init(params), x), tuple[jax.Array, Params, Any])
"""


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
    (tmp_path / "typed.py").write_text(TYPED)
    assert len([*tmp_path.iterdir()]) > 25
    # Pages define a step more than once.
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic", "reportRedeclaration": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
