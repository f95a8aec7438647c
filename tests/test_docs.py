"""Every example that the documentation shows runs, and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import cktat_loss

ROOT = Path(__file__).parents[1]
MODULES = ["cktat_loss", *(m.name for m in pkgutil.walk_packages(cktat_loss.__path__, "cktat_loss."))]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    failed, _ = doctest.testmod(importlib.import_module(name), raise_on_error=False, verbose=False)
    assert failed == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("loss", "CKTATLoss"),
        ("functional", "cktat_loss"),
        ("functional", "cktat_terms"),
        ("functional", "adaptive_beta"),
        ("_warm_start", "warm_start"),
    ],
)
def test_what_is_public_has_an_example(module, name):
    module = importlib.import_module(f"cktat_loss.{module}")
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(module, name), name, module)
    assert found.examples


# What a reader would paste, from top to bottom. docs/migrate_from_trades.md is tested with the examples.
PAGES = ("README.md", "docs/getting_started.md", "docs/recipes.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, tmp_path, monkeypatch):
    if not (ROOT / page).exists():
        pytest.skip(f"there is no {page}")
    text = (ROOT / page).read_text()
    blocks = [*re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page", **the_readers_own()}
    before = [p.clone() for p in namespace["student"].parameters()]
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that an error names the page's own line
        exec(compile("\n" * above + block[1], page, "exec"), namespace)
    if "optimizer.step()" in text:
        assert all((p != q).any() for p, q in zip(before, namespace["student"].parameters(), strict=True))


def the_readers_own():
    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def attack(student, x, y):
        return (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)

    student = net()
    return {
        "student": student,
        "teacher": net(),
        "attack": attack,
        "loader": [(torch.rand(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(3)],
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
    }
