"""The recipes that compute something of their own give what they promise. test_docs.py runs the whole page."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from cktat_loss import functional
from tests.test_docs import ROOT, the_readers_own

PAGE = (ROOT / "docs" / "recipes.md").read_text()


def after(section: str) -> dict[str, Any]:
    """Run the page's first block and the blocks of one section. Return the variables."""
    first, rest = PAGE.split("\n## ", 1)
    text = re.search(rf"^## {section}\n.*?(?=^## |\Z)", rest, re.DOTALL | re.MULTILINE)
    assert text
    variables: dict[str, Any] = the_readers_own()
    for block in re.findall(r"^```python\n(.*?)^```$", first + "\n" + text[0], re.DOTALL | re.MULTILINE):
        exec(block, variables)
    return variables


def gradient(variables: dict[str, Any], name: str) -> Tensor:
    (found,) = torch.autograd.grad(variables["loss"], variables[name], retain_graph=True)
    return found


def test_rows_that_do_not_count() -> None:
    """The loss is that of the other rows alone, and no gradient reaches the rows that don't count."""
    got = after("Rows that don't count")
    counts, y = got["counts"], got["y"]
    assert counts.tolist() == [k % 4 != 0 for k in range(len(y))]
    logits = [tensor[counts] for tensor in (got["clean_logits"], got["adv_logits"], got["teacher"].eval()(got["x"]))]
    alone = functional.cktat_loss(*logits, tau=2.0, y=y[counts], detach_clean=True)
    torch.testing.assert_close(got["loss"], alone)
    rows = gradient(got, "adv_logits").abs().sum(1)
    assert ((rows > 0) == counts).all()


def test_mixup() -> None:
    """Each sample's weight is beta times the mixed label's share of the adversarial prediction."""
    got = after("Mixup")
    share, order, y, adv = got["share"], got["order"], got["y"], got["adv_mixed"]
    one_hot = torch.nn.functional.one_hot(y, 10).float()
    soft = share * one_hot + (1 - share) * one_hot[order]
    weights = 6.0 * (soft * adv.softmax(1)).sum(1).detach()
    teacher_logits = got["teacher"].eval()(share * got["x"] + (1 - share) * got["x"][order])
    terms = functional.cktat_terms(got["clean_mixed"], adv, teacher_logits, tau=2.0, detach_clean=True)
    torch.testing.assert_close(got["loss"], (terms.guidance + weights * terms.consistency).mean())
    assert (gradient(got, "adv_mixed").abs().sum(1) > 0).all()
