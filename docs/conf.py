"""How the site is built: `python -m sphinx -W docs site`. Warnings are errors."""

import os
import re
from typing import Any

from sphinx.pycode import ModuleAnalyzer

import optaccum

# Notebooks run on a CPU, wherever the site is built.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

project = "optaccum"
author = "The optaccum authors"
copyright = f"2026, {author}"
version = release = optaccum.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
smartquotes_action = "D"  # dashes alone: a quoted word may be a string of Python
nitpicky = True  # of our own names; other projects are not linked
nitpick_ignore_regex = [
    ("py:.*", r"(?!optaccum).*"),
    ("py:class", r"optaccum\._\w+\.(Outputs|Params|Value)"),  # type variables
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # a machine may be busy
nb_merge_streams = True
nb_output_stderr = "remove"  # XLA greets there, on machines with compilers for GPUs

default_role = "code"
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Guarantees"]
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> "

html_theme = "sphinx_book_theme"
html_title = "optaccum"
html_static_path = ["_static"]
html_css_files = ["optaccum.css"]
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}


# Names in which types are shown; Python hands over what they stand for.
ARRAY = "~jax.jaxlib._jax.Array"
NUMBERS = "~numpy.ndarray | ~numpy.bool | ~numpy.number | bool | int | float | complex"
ARRAY_LIKE = f"{ARRAY} | {NUMBERS}"
TYPES = {
    f"{ARRAY_LIKE} | ~typing.Iterable[ArrayTree] | ~typing.Mapping[~typing.Any, ArrayTree]": (
        "optax.OptState"
    ),
    "str | type[~typing.Any] | ~numpy.dtype | ~jax._src.typing.SupportsDType": (
        "jax.typing.DTypeLike"
    ),
    ARRAY_LIKE: "jax.typing.ArrayLike",
    ARRAY: "jax.Array",
    "~optax._src.base.": "optax.",
    "~flax.core.frozen_dict.FrozenDict[str, ~typing.Any]": "~typing.Any",
    "~optaccum._accumulate.Accumulate": "optax.GradientTransformationExtraArgs",
    "~optaccum._accumulate.Params": "Params",
    "~optaccum._accumulate.State": "State",
    "[[...], ": "[..., ",
}


def name_types(app, what, name, obj, options, signature, returned):
    """Replace types by the names that users write."""
    for long, short in TYPES.items():
        signature = signature and signature.replace(long, short)
        returned = returned and returned.replace(long, short)
    return signature, returned


def mark_up(app, what, name, obj, options, lines):
    """Link pages, and let code end inside a word, as in `str`s."""
    code = r"(:\w+:)?(`+)([^`]+)\2(?=(\w?))"
    text = re.sub(code, lambda m: m[0] + ("\\ " if m[4] else ""), "\n".join(lines))
    text = re.sub(r"`docs/([\w/]+)\.md`", r":doc:`/\1`", text)
    lines[:] = text.split("\n")


def drop_folders(app, relative_path, parent, content):
    """Name a folder of the repository that an included page links to: it is no page of the site."""
    content[0] = content[0].replace("[results](results)", "`benchmarks/results`")


def link_benchmarks(app, page, source):
    """Link the page of the site that includes the benchmarks' README, which a repository shows."""
    source[0] = re.sub(r"\]\((\.\./)+benchmarks/README\.md", "](/benchmarks.md", source[0])


def setup(app):
    """Let the hooks in, and show one signature where overloads serve type checkers."""
    analyzer = ModuleAnalyzer.for_module("optaccum._value_and_grad")
    analyzer.analyze()
    analyzer.overloads.clear()
    app.connect("include-read", drop_folders)
    app.connect("source-read", link_benchmarks)
    app.connect("autodoc-process-signature", name_types)
    app.connect("autodoc-process-docstring", mark_up)
