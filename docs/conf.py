"""Builds the documentation: ``python -m sphinx -W docs docs/_build``."""

import re
from importlib.metadata import version as version_of

from sphinx.application import Sphinx

project = "lightning_lars"
author = "The lightning_lars developers"
release = version = version_of("lightning_lars")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute", ".jupyter_cache"]

nitpicky = True
# Other projects' names are links where ``-t online`` may read their inventories.
_OTHERS = r"(collections\.abc|lightning|matplotlib|pathlib|rich|torch|torchmetrics)\..*"
nitpick_ignore_regex = [
    ("py:.*", _OTHERS),
    ("py:.*", r"Axes|Figure|MisconfigurationException|Path|Tensor|.*\.(Number|_Square)"),
]

# README's links are those of the pages' headings, as code hosts number them.
myst_heading_anchors = 4

# An error in a notebook fails the build.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

if tags.has("online"):  # noqa: F821  Sphinx defines it
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
    }

# Formulas in docstrings are no Python.
highlight_language = "none"

html_theme = "furo"
html_title = f"lightning_lars {release}"


def setup(app: Sphinx) -> None:
    app.connect("include-read", _links_from_here)


def _links_from_here(app: Sphinx, path: object, parent: str, content: list[str]) -> None:
    """Let the links of what pages include from the folder above start from this one."""
    target = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)]+")
    content[0] = target.sub(lambda link: _link_from_here(link[0]), content[0])


def _link_from_here(link: str) -> str:
    if link in ("CHANGELOG.md", "CONTRIBUTING.md"):
        return link.lower()  # pages that include them
    return link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"
