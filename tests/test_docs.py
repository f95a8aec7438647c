"""Every example that the documentation shows runs, and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import cktat_loss

README = Path(__file__).parents[1] / "README.md"
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
        ("functional", "cktat_loss_and_grads"),
        ("schedules", "adaptive_beta"),
        ("transfer", "warm_start"),
    ],
)
def test_what_is_public_has_an_example(module, name):
    module = importlib.import_module(f"cktat_loss.{module}")
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(module, name), name, module)
    assert found.examples


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_readme(tmp_path, monkeypatch):
    """All its Python, from top to bottom, as a reader would paste it."""
    text = README.read_text()
    blocks = [*re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that an error names README.md's own line
        exec(compile("\n" * above + block[1], README, "exec"), namespace)
