"""The README's code runs, its commands can be pasted, and its files are there."""

import pathlib
import re

from benchmarks import report

TEXT = report.README.read_text()


def test_the_example_runs_as_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [[str(i), str(i in (3, 7))] for i in range(8)]


def test_two_commands_set_up_everything():
    commands = re.findall(r"```sh\n(.*)\n```", TEXT)
    assert len(commands) == 2
    for command, program in zip(commands, ("examples/digits.py", "-m pytest -q -n 2"), strict=True):
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(program)


def test_every_file_it_names_exists():
    for name in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert pathlib.Path(report.ROOT, name).exists(), name
