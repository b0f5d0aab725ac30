"""Run the first program of a README, with what is installed, and compare what it prints."""

import contextlib
import importlib.util
import io
import pathlib
import re
import sys

import optaccum

text = pathlib.Path(sys.argv[1]).read_text()
program, expected = re.findall(r"```(?:python|text)\n(.*?)```", text, re.DOTALL)[:2]
with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(compile(program, "quick_start.py", "exec"), {})
assert printed.getvalue().split() == expected.split(), printed.getvalue()
assert importlib.util.find_spec("flax") is None, "Flax is optional, and must not be installed"
print(f"optaccum {optaccum.__version__} from {pathlib.Path(optaccum.__file__).parent}: right")
