"""Who may import whom, and what `import convexprune` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convexprune

PACKAGE = Path(convexprune.__file__).parent
BOTTOM = {
    "curve",
    "extras",
    "forms",
    "knapsack",
    "layer",
    "layout",
    "moments",
    "options",
    "patterns",
    "problem",
    "products",
    "quadratic",
    "rounding",
    "solution",
    "spectrum",
}
TOP = {
    "allocate",
    "certify",
    "cli",
    "command",
    "evaluate",
    "__main__",
    "defaults",
    "distill",
    "factorise",
    "merge",
    "prune",
    "pruning",
    "prune_within",
    "report",
    "risk_goal",
    "",
}
# what each part may import besides itself; a part that is not here is named in TOP, or the test says so
ALLOWED = {
    "rounding": set(),
    "products": {"rounding"},
    "spectrum": set(),
    "moments": {"products", "rounding", "spectrum"},
    "quadratic": {"moments", "rounding"},
    "layer": {"moments", "options", "products", "quadratic", "rounding"},
    "patterns": {"options"},
    "layout": {"patterns"},
    "solution": set(),
    "curve": {"options"},
    "knapsack": {"rounding"},
    "options": set(),
    "extras": set(),
    "whole_file": set(),
    "version": set(),
    "problem": {"layer", "patterns", "solution"},
    "forms": {"problem", "patterns", "curve"},
    "problems": BOTTOM,
    "solvers": BOTTOM,
    "bounds": BOTTOM,
    "network": {"layer", "moments", "products", "rounding", "whole_file", "bounds", "options"},
    "solve": {"forms", "problem", "solution"},
    "testing": {"forms", "layer", "options", "problem", "solution", "solve"},
    "datasets": set(),
}
HEAVY = {
    "cvxpy",
    "matplotlib",
    "rich",
    "click",
    "safetensors",
    "scipy",
    "transformers",
    "tokenizers",
    "joblib",
}


def part(path):
    """The name under convexprune that a file belongs to: "problems", "layer", "" for the package itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(node):
    """The dotted names that an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute, so that they can be read"
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def ours(path):
    """The parts of convexprune that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported(node):
            pieces = name.split(".")
            if pieces[0] == "convexprune" and len(pieces) > 1:
                yield pieces[1]


def at_import(tree):
    """The import statements that run when the module is loaded: not in functions, not for the type checker."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
            continue
        yield node
        pending += ast.iter_child_nodes(node)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_forbidden_arrow(path):
    here = part(path)
    if here in TOP:
        return
    assert here in ALLOWED, f"{here} has no place in the import rule; see CONTRIBUTING.md"
    parts = {part(file) for file in FILES} - {""}
    forbidden = {name for name in ours(path) if name in parts} - ALLOWED[here] - {here}
    assert not forbidden, f"{path.name} imports {sorted(forbidden)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_inside_functions(path):
    loaded = {name.split(".")[0] for node in at_import(ast.parse(path.read_text())) for name in imported(node)}
    # click's commands are decorators, and nothing imports the command line but the command itself
    assert not loaded & (HEAVY - {"click"} if part(path) in ("cli", "command") else HEAVY)


def test_the_rule_sees_a_forbidden_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from convexprune.solvers import ADMM\n")
    assert set(ours(file)) == {"solvers"}
    lazy = "import torch\ndef f():\n    import cvxpy\nif TYPE_CHECKING:\n    import cvxpy\n"
    lazy += "try:\n    import rich\nfinally:\n    pass"
    loaded = [name for node in at_import(ast.parse(lazy)) for name in imported(node)]
    assert sorted(loaded) == ["rich", "torch"]


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, convexprune; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
