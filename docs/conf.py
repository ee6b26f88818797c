import importlib
import os

from sphinx.errors import ConfigError

# the examples are small: on a busy machine their threads would mostly wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "convexprune"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_gallery.gen_gallery"]
html_theme = "furo"
html_title = "convexprune"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]
smartquotes = False
exclude_patterns = ["_build", "gallery"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    # the examples show what the package does now, whether they or the package have changed
    "run_stale_examples": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "remove_config_comments": True,
}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
add_module_names = False


def plain(app, what, name, obj, options, lines):
    """Docstrings here are plain text with formulas: the first line is prose, what follows is shown as it is written."""
    if not lines:
        return
    first, rest = lines[0], lines[1:]
    pieces = first.split("`")
    for mark in "\\*_|":
        pieces[::2] = [piece.replace(mark, "\\" + mark) for piece in pieces[::2]]
    first = "".join(f"``{piece}``" if index % 2 else piece for index, piece in enumerate(pieces))
    while rest and not rest[-1].strip():
        rest.pop()
    while rest and not rest[0].strip():
        rest.pop(0)
    lines[:] = [first, ""]
    if rest:
        lines += [".. code-block:: text", "", *("   " + line for line in rest), ""]


def complete(app, env):
    """Every public name has its place in the reference."""
    known = {name.removeprefix("convexprune.") for name in env.get_domain("py").objects}
    package = importlib.import_module("convexprune")
    missing = sorted(set(package.__all__) - known)
    if missing:
        raise ConfigError(f"docs/reference.md lacks {', '.join(missing)}, which convexprune exports")


def setup(app):
    app.connect("autodoc-process-docstring", plain)
    app.connect("env-check-consistency", complete)
