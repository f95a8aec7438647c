"""mean is per sample, an empty batch is what torch makes of it, and one class has nothing to say."""

from typing import Any

import pytest
import torch

from cktat_loss.functional import cktat_loss, cktat_terms
from tests import oracle
from tests.variants import DTYPES, EACH_VARIANT, FLOAT64, Variant

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 5, 400])
def test_reductions_of_the_same_rows(n: int, dtype: torch.dtype) -> None:
    clean, adv, teacher = torch.randn(3, n, 10, dtype=dtype)
    rows = oracle.truth(clean, adv, teacher, 5.0, 6.0).rows
    assert oracle.loss_error(cktat_loss(clean, adv, teacher, reduction="none"), rows) < oracle.TOLERANCES[dtype]
    assert oracle.loss_error(cktat_loss(clean, adv, teacher, reduction="sum"), rows.sum()) < oracle.TOLERANCES[dtype]
    assert (
        oracle.loss_error(cktat_loss(clean, adv, teacher, reduction="mean"), rows.sum() / n) < oracle.TOLERANCES[dtype]
    )
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
    for beta, y in ((6.0, None), (torch.ones(()), None), (torch.ones(0), None), (6.0, torch.empty(0).long())):
        for reduction in ("mean", "sum", "none"):
            loss = cktat_loss(clean, adv, clean, 5.0, beta, y=y, reduction=reduction)
            expected = {"mean": torch.tensor(torch.nan), "sum": torch.tensor(0.0), "none": torch.empty(0)}[reduction]
            torch.testing.assert_close(loss.detach(), expected.to(out), equal_nan=True)
            for gradient in torch.autograd.grad(loss.sum(), (clean, adv)):
                assert gradient.shape == (0, classes)
                assert gradient.dtype == dtype
        _, terms = cktat_loss(clean, adv, clean, 5.0, beta, y=y, return_terms=True)
        assert [term.shape for term in terms] == [(0,)] * 2
    terms = cktat_terms(clean, adv, clean)
    assert [term.shape for term in terms] == [(0,)] * 2
    for gradient in torch.autograd.grad(sum(terms).sum(), (clean, adv)):
        assert gradient.shape == (0, classes)


@EACH_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 5, 300])
def test_one_class(n: int, dtype: torch.dtype, variant: Variant) -> None:
    clean, adv, teacher = (30 * torch.randn(3, n, 1)).to(dtype)
    for result in variant(clean, adv, teacher, 0.7, 5.3):
        assert result.shape[0] == n
        assert (result == 0).all()


@EACH_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000, pytest.param(21841, marks=pytest.mark.not_on("interpreter"))])
def test_one_sample(classes: int, dtype: torch.dtype, variant: Variant) -> None:
    args: list[Any] = [*(4 * torch.randn(3, 1, classes)).to(dtype), 0.7, 5.3]
    oracle.assert_right(*variant(*args), variant.truth(*args), oracle.TOLERANCES[dtype])
