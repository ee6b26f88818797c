"""The pieces of code in the README and the pages run, one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest
import torch

import convexprune as cp

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/tour.md", "docs/risk.md", "docs/index.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def given():
    """What a page that begins in the middle takes for granted."""
    torch.manual_seed(0)
    network = torch.nn.Sequential()
    for name, module in {"fc1": torch.nn.Linear(8, 6), "relu": torch.nn.ReLU(), "fc2": torch.nn.Linear(6, 3)}.items():
        network.add_module(name, module)
    return {"torch": torch, "cp": cp, "model": network, "batches": [torch.rand(60, 8)]}


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    names = given()
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_readme_is_a_front_door():
    """Short, and every path that it names is there."""
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 5 * 1024
    for path in re.findall(r"(?:docs|benchmarks)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path
