"""Sphinx: `make docs` builds these pages, strictly, into docs/_build/html."""

from importlib.metadata import version as installed_version

project = "distseg"
author = "the distseg authors"
copyright = author
version = release = installed_version("distseg")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# the pages are read in a repository browser too: links are those of files, and headings get anchors
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
html_theme = "furo"
html_title = "distseg"
html_static_path = ["_static"]
html_css_files = ["phone.css"]
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# pages outside of docs/ that are named as files of the repository
suppress_warnings: list[str] = []
nitpicky = False


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: what reads as markup in them is not, but for `code`."""
    for index, line in enumerate(lines):
        parts = line.split("`")
        # outside of backticks, every second part
        parts[::2] = [part.replace("*", r"\*").replace("|", r"\|") for part in parts[::2]]
        lines[index] = "``".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", plain_text)
