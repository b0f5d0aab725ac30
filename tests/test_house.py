"""Which way imports go: the algorithm knows nothing of what is built on it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CORE = sorted((ROOT / "optaccum" / "_core").glob("*.py"))


def imported(path):
    """Yields the full name of every module, or name in a module, that a file imports."""
    package = [*path.parent.relative_to(ROOT).parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_there_is_a_core():
    assert CORE


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_nothing_else_of_ours(path):
    ours = [name for name in imported(path) if name.split(".")[0] == "optaccum"]
    assert [name for name in ours if not f"{name}.".startswith("optaccum._core.")] == []
