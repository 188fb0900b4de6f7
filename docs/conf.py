"""Sphinx: `make docs` builds these pages and the API reference; a warning is an error."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any

from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import fastwrs

project = "fastwrs"
version = release = fastwrs.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["figures"]

# Formulas are fenced as forges read them, and links may name a heading.
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

# What a docstring refers to has to exist. Of types in signatures only ours are on these pages.
nitpicky = True
nitpick_ignore = [("py:class", "fastwrs.nn.Module")]  # a type variable
nitpick_ignore_regex = [("py:(class|data|exc|obj)", r"(?!fastwrs\.).*")]
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"fastwrs {release}"
html_copy_source = html_show_copyright = html_show_sphinx = False


class LinksOutOfHere(SphinxTransform):
    """Links to Markdown of the tree that is no page here, README.md say, become downloads, as those to other files."""

    default_priority = 5

    def apply(self, **_: Any) -> None:
        """Looks at all links of a page. A file that does not exist is a warning of myst already."""
        for link in list(self.document.findall(pending_xref)):
            file = Path(f"{link['reftarget']}.md")
            if link.get("refdomain") == "doc" and file.is_absolute():
                target = os.path.relpath(file, Path(self.env.doc2path(self.env.docname)).parent)
                link.replace_self(download_reference("", "", *link.children, reftarget=target, refdoc=link["refdoc"]))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_transform(LinksOutOfHere)
