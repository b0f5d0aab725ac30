"""The README's code runs, its commands can be pasted, and its files are there."""

import pathlib
import re

from benchmarks import report
import optaccum

TEXT = report.README.read_text()


def test_the_examples_run_as_they_say(capsys):
    """One after the other, as somebody would who pastes them into one session."""
    first, *others = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [[str(i), str(i in (3, 7))] for i in range(8)]
    for code in others:
        exec(compile(code, "README.md", "exec"), names)
    assert (int(names["state"].mini_step), int(names["optimizer"].mini_step)) == (1, 1)
    assert float(optaccum.get_state(names["state"].opt_state).weight) == 32


def test_each_command_sets_up_all_that_it_needs():
    commands = re.findall(r"```sh\n(.*)\n```", TEXT)
    examples = (f"examples/{name}.py" for name in ("digits", "lm", "multihost"))
    programs = *examples, "-m pytest -q -n 2"
    for command, program in zip(commands, programs, strict=True):
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(program)


def test_every_file_it_names_exists():
    for name in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert pathlib.Path(report.ROOT, name).exists(), name
