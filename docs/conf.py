import importlib
import logging
import os
import re
import sys
from pathlib import Path

from sphinx.errors import ConfigError
from sphinx.ext.napoleon import Config, GoogleDocstring

# the examples are small: on a busy machine their threads would mostly wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")

logging.getLogger("convexprune").setLevel(logging.WARNING)  # the gallery would show every event
sys.path.insert(0, str(Path(__file__).parent))  # mathml

project = "convexprune"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "mathml",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "convexprune"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]
smartquotes = False
exclude_patterns = ["_build", "gallery", "papers"]

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

GOOGLE = Config(napoleon_use_ivar=True, napoleon_use_rtype=False, napoleon_custom_sections=["Source"])
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Examples?|Notes?|Source):")
PUBLIC = importlib.import_module("convexprune").__all__


def process(app, what, name, obj, options, lines):
    """A docstring with Google's sections is prose with $formulas$; one without is shown as it is written."""
    if any(SECTION.fullmatch(line.rstrip()) for line in lines):
        escape(lines)
        lines[:] = GoogleDocstring(lines, GOOGLE, app, what, name, obj, options).lines()
    elif lines:
        plain(lines)


def escape(lines):
    """Escape what reStructuredText would take for markup, everywhere but in examples, and mark the formulas."""
    example = False
    for number, line in enumerate(lines):
        text = line.strip()
        example = bool(text) and (example or text.startswith(">>>"))
        if text.startswith("$$"):
            lines[number] = line.replace("$$", ".. math:: ", 1).replace("$$", "")
        elif not example:
            lines[number] = prose(line)


def plain(lines):
    """The first line is prose, what follows is a block of text."""
    first, rest = prose(lines[0]), lines[1:]
    while rest and not rest[-1].strip():
        rest.pop()
    while rest and not rest[0].strip():
        rest.pop(0)
    lines[:] = [first, ""]
    if rest:
        lines += [".. code-block:: text", "", *("   " + line for line in rest), ""]


def prose(line):
    """A line of text: `code`, linked where it is a public name, $formulas$, and no other markup."""
    pieces = re.split(r"(`[^`]+`|\$[^$]+\$)", line)
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", piece)
        elif piece.startswith("$"):
            pieces[index] = f":math:`{piece[1:-1]}`"
        else:
            name = piece[1:-1].removesuffix("()")
            pieces[index] = f":py:obj:`~convexprune.{name}`" if name in PUBLIC else f"`{piece}`"
    return "".join(pieces)


def complete(app, env):
    """Every public name has its place in the reference."""
    known = {name.removeprefix("convexprune.") for name in env.get_domain("py").objects}
    package = importlib.import_module("convexprune")
    missing = sorted({name for name in package.__all__ if not name.startswith("_")} - known)
    if missing:
        raise ConfigError(f"docs/reference.md lacks {', '.join(missing)}, which convexprune exports")


def setup(app):
    app.connect("autodoc-process-docstring", process)
    app.connect("env-check-consistency", complete)
