# SPDX-License-Identifier: Apache-2.0
"""
How Sphinx makes the site: `make docs` writes it to output/site, which opens without a server.

The tutorials are percent scripts; they are executed, with their pictures, as the site is made.
"""

import logging
import os
import re
import shutil
import sys
from pathlib import Path

import jupytext

import pyro_mpis

here = Path(__file__).parent
sys.path.insert(0, str(here))  # for _gallery

# Sphinx reads only what lies in its folder, and notebooks rather than scripts.
notebooks = here / "tutorials"
shutil.rmtree(notebooks, ignore_errors=True)
notebooks.mkdir()
for script in sorted((here.parent / "tutorials").glob("[0-9]*.py")):
    notebook = jupytext.read(script)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("# SPDX")]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["language_info"] = {"name": "python"}
    jupytext.write(notebook, notebooks / f"{script.stem}.ipynb")

# What kernels and notebook clients tell of themselves is not about the pages.
profile = notebooks / ".ipython" / "profile_default"
profile.mkdir(parents=True)
(profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
os.environ["IPYTHONDIR"] = str(profile.parent)
logging.getLogger("traitlets").setLevel(logging.WARNING)

project = "pyro_mpis"
author = "the pyro_mpis contributors"
copyright = f"2026, {author}"
version = release = pyro_mpis.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "_gallery",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "pyro_mpis"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("NB_EXECUTION_MODE", "force")  # "off": look at the text alone
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def with_links(app, what, name, obj, options, lines):
    """Make a link of each page that a docstring names."""
    lines[:] = [re.sub(r"docs/(\w+)\.md", r":doc:`/\1`", line) for line in lines]


def changes(app, docname, source):
    """Make a link of each page that the changelog names."""
    if docname == "changelog":
        text = (here.parent / "CHANGELOG.md").read_text()
        source[0] = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)


def setup(app):
    """Register what docstrings and pages pass through."""
    app.connect("autodoc-process-docstring", with_links)
    app.connect("source-read", changes)
