"""Sphinx's settings. Build with ``sphinx-build -n -W docs build/docs``; no other site is asked for anything."""

import os

import nbfftconv

os.environ.setdefault("KERAS_BACKEND", "torch")  # which is there for the pages on PyTorch

project = "nbfftconv"
author = "The nbfftconv developers"
copyright = "the nbfftconv developers"
version = release = nbfftconv.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "numpydoc", "myst_nb"]
html_theme = "furo"
html_title = f"nbfftconv {release}"
html_theme_options = {
    "source_repository": "https://github.com/nbfftconv/nbfftconv",
    "source_branch": "main",
    "source_directory": "docs/",
}

# Names in single backticks are links where there is something to link to. What is not of this package, or is an
# argument, need not be found; a full name of this package has to be.
default_role = "py:obj"
nitpick_ignore_regex = [("py:.*", r"(?!nbfftconv\.).*")]

autodoc_typehints = "none"  # the docstrings have them
autodoc_member_order = "bysource"
autosummary_generate = False
numpydoc_show_class_members = False
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# A page with code cells is run when it is built.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
