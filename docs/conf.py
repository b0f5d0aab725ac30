"""How the site is built: `python -m sphinx -W docs site`. Warnings are errors."""

import os
from typing import Any

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
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
suppress_warnings = ["toc.empty_glob"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> "

html_theme = "sphinx_book_theme"
html_title = "optaccum"
html_static_path = ["_static"]
html_css_files = ["optaccum.css"]
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
