"""The user's source line of an equation."""

import pathlib
import sysconfig
from typing import Any

import optaccum

_PATHS = sysconfig.get_paths()
_LIBRARIES = (
    "<frozen",
    *(str(pathlib.Path(_PATHS[name]).resolve()) for name in ("purelib", "platlib", "stdlib")),
    str(pathlib.Path(optaccum.__file__).resolve().parent),
)


def find_line(equations: tuple[Any, ...]) -> str | None:
    """Returns "file.py:205" for the innermost of nested equations that has a line of the user's.

    A function under `jax.jit` is traced once and remembered, with the lines of its first caller.
    So lines beyond the frame that traced it say nothing of this caller, whose line the enclosing
    equation has.
    """
    for equation in reversed(equations):
        try:
            frames = equation.source_info.traceback.frames
        except AttributeError:  # JAX kept no traceback
            continue
        for frame in frames:
            if frame.function_name.startswith("trace_to_jaxpr"):
                break
            name = frame.file_name
            if not name.startswith(_LIBRARIES) and "/site-packages/" not in name:
                return f"{pathlib.PurePath(name).name}:{frame.line_num}"
    return None
