"""Sphinx configuration: `make docs` runs every example of these pages and builds the site."""

import shutil
from pathlib import Path

from irw_optim import __version__

# Sphinx reads its own folder alone: the notebook of the examples comes here, as it is kept.
NOTEBOOK = "first_steps.ipynb"
shutil.copy2(Path(__file__).parents[1] / "examples" / NOTEBOOK, Path(__file__).with_name(NOTEBOOK))

project = "irw-optim"
author = "The irw-optim developers"
project_copyright = author
release = __version__

extensions = [
    "myst_nb",  # myst_parser, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # after mathjax: the site needs no other host to show its formulas
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "off"  # the tests run it

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a described attribute is not described again by autodoc

doctest_test_doctest_blocks = ""  # those in docstrings are pytest's, with their module's names
doctest_global_setup = """
import warnings

# torch says this of Opacus' hooks on a first layer, whose input needs no gradient
warnings.filterwarnings("ignore", message="Full backward hook is firing")
"""

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"irw-optim {release}"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
