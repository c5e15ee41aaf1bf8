"""How the documentation is built: `sphinx-build -W --keep-going docs docs/_build`."""

import sys
from pathlib import Path

import ntt_sparse

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "ntt_sparse"
author = "The ntt_sparse authors"
copyright = author
release = ntt_sparse.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_parser",
    "docstrings",
]
exclude_patterns = ["_build", "_templates", "_extensions"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# One page for each module, private ones left out, found by walking the package.
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields of a class are listed in its docstring, and not once more below it.
napoleon_use_ivar = True
napoleon_preprocess_types = False

# A reference into this package that leads nowhere is an error. Other projects' names are not
# looked up: a build needs no network.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!ntt_sparse\b).*"), (r"py:.*", r".*\._.*")]
python_use_unqualified_type_names = True
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"ntt_sparse {release}"
html_show_copyright = False
html_copy_source = False
