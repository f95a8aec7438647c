"""mean is per sample, an empty batch is what torch makes of it, and one class has nothing to say."""

from typing import Any

import pytest
import torch

from cktat_loss.functional import cktat_loss, cktat_loss_and_grads, cktat_terms
from tests import oracle
from tests.forms import FORMS, Form

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("n", [1, 5, 400])
def test_reductions_of_the_same_rows(n: int) -> None:
    clean, adv, teacher = torch.randn(3, n, 10, dtype=torch.float64)
    rows = oracle.truth(clean, adv, teacher, 5.0, 6.0).rows
    assert oracle.loss_error(cktat_loss(clean, adv, teacher, reduction="none"), rows) < 1e-11
    assert oracle.loss_error(cktat_loss(clean, adv, teacher, reduction="sum"), rows.sum()) < 1e-11
    assert oracle.loss_error(cktat_loss(clean, adv, teacher, reduction="mean"), rows.sum() / n) < 1e-11
    assert torch.equal(cktat_loss(clean, adv, teacher), cktat_loss(clean, adv, teacher, reduction="mean"))
    assert cktat_loss(clean, adv, teacher).shape == ()
    assert cktat_loss(clean, adv, teacher, reduction="none").shape == (n,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 17, 1000])
def test_empty_batch(classes: int, dtype: torch.dtype) -> None:
    clean, adv = torch.empty(2, 0, classes, dtype=dtype).unbind()
    clean.requires_grad_()
    adv.requires_grad_()
    out = torch.float64 if dtype == torch.float64 else torch.float32
    for beta in (6.0, torch.ones(()), torch.ones(0)):
        for reduction in ("mean", "sum", "none"):
            loss = cktat_loss(clean, adv, clean, 5.0, beta, reduction=reduction)  # type: ignore[arg-type]
            expected = {"mean": torch.tensor(torch.nan), "sum": torch.tensor(0.0), "none": torch.empty(0)}[reduction]
            torch.testing.assert_close(loss.detach(), expected.to(out), equal_nan=True)
            for gradient in torch.autograd.grad(loss.sum(), (clean, adv)):
                assert gradient.shape == (0, classes)
                assert gradient.dtype == dtype
        loss, *gradients = cktat_loss_and_grads(clean, adv, clean, 5.0, beta)
        assert loss.isnan()
        assert [d.shape for d in gradients] == [(0, classes)] * 2
    terms = cktat_terms(clean, adv, clean)
    assert [term.shape for term in terms] == [(0,)] * 2
    for gradient in torch.autograd.grad(sum(terms).sum(), (clean, adv)):
        assert gradient.shape == (0, classes)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 5, 10000])
def test_one_class(n: int, dtype: torch.dtype, form: Form) -> None:
    clean, adv, teacher = (30 * torch.randn(3, n, 1)).to(dtype)
    for result in form(clean, adv, teacher, 0.7, 5.3):
        assert result.shape[0] == n
        assert (result == 0).all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000, 21841])
def test_one_sample(classes: int, dtype: torch.dtype, form: Form) -> None:
    args: list[Any] = [*(4 * torch.randn(3, 1, classes)).to(dtype), 0.7, 5.3]
    oracle.assert_right(*form(*args), oracle.truth(*args), oracle.TOLERANCES[dtype])
