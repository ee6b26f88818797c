"""Formulas as MathML, which browsers draw themselves: a page needs no script and no network.

A formula that docutils cannot read fails the build.
"""

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml, wrap_math_code
from sphinx.errors import SphinxError
from sphinx.util.math import get_node_equation_number

SPELT = {r"\dots": r"\ldots"}  # what docutils knows by another name


def rendered(node, block):
    """The formula of a node."""
    text = node.astext()
    for name, known in SPELT.items():
        text = text.replace(name, known)
    if block and r"\\" in text and r"\begin" not in text:  # several lines
        text = wrap_math_code(text, as_block=True)
    try:
        return latex2mathml.tex2mathml(text, as_block=block)
    except MathError as error:
        raise SphinxError(f"{node.source}:{node.line}: the formula {text!r} cannot be drawn: {error}") from error


def inline(translator, node):
    """Within a line."""
    translator.body.append(rendered(node, block=False))
    raise nodes.SkipNode


def displayed(translator, node):
    """On a line of its own, with its number if it has a label."""
    number = ""
    if node.get("number"):
        number = f'<span class="eqno">({get_node_equation_number(translator, node)})</span>'
    translator.body.append(translator.starttag(node, "div", CLASS="math-display"))
    translator.body.append(f"{number}{rendered(node, block=True)}</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(displayed, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
