"""Logits of any size and any temperature give numbers, and saturated rows the right ones."""

import itertools

import pytest
import torch
from torch import Tensor

from cktat_loss import functional
from tests import oracle
from tests.variants import EACH_VARIANT, FLOAT64, NOT_ON_KERNELS, Variant, compiled

pytestmark = pytest.mark.kernels

DTYPES = (FLOAT64, torch.float32, torch.bfloat16)
SINGLE_AND_DOUBLE = pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
# Few calls, one block, several.
WIDTHS = (10, 1000, pytest.param(3000, marks=pytest.mark.not_on("interpreter")))


def saturated(width: int, size: float) -> list[Tensor]:
    """Every combination of rows that are sure of one class, of another, of none, or sure which it is not."""
    kinds = torch.zeros(4, width)
    kinds[0, 1] = kinds[1, 2] = size
    kinds[2] = size * torch.randn(width).sign()
    kinds[3, 0] = -size
    combinations = [*itertools.product(kinds, repeat=3)]
    shuffled = [combinations[i] for i in torch.randperm(len(combinations))]  # only the first rows are streamed
    return [torch.stack(rows) for rows in zip(*shuffled, strict=True)]


@EACH_VARIANT
@SINGLE_AND_DOUBLE
@pytest.mark.parametrize("size", [30.0, 110.0, 200.0, 1e4])
@pytest.mark.parametrize("width", WIDTHS)
def test_saturated_rows(width: int, size: float, dtype: torch.dtype, variant: Variant) -> None:
    logits = [x.to(dtype) for x in saturated(width, size)]
    for tau, beta in ((1.0, 5.3), (0.7, 0.7), (5.3, 5.3)):
        true = variant.truth(*logits, tau, beta)
        oracle.assert_right(*variant(*logits, tau, beta), true, oracle.TOLERANCES[dtype], note=f"tau {tau}")


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_results_of_saturated_rows_are_in_the_dtype_of_all_others(
    width: int, dtype: torch.dtype, needs_grad: bool
) -> None:
    """Whatever they were computed in."""
    clean, adv, teacher = (x.to(dtype).requires_grad_(needs_grad) for x in saturated(width, 200.0))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in ("mean", "sum", "none"):
        assert functional.cktat_loss(clean, adv, teacher, reduction=reduction).dtype == wanted
    assert {term.dtype for term in functional.cktat_terms(clean, adv, teacher)} == {wanted}
    _, terms = functional.cktat_loss(clean, adv, teacher, y=torch.zeros(64).long(), return_terms=True)
    assert {term.dtype for term in terms} == {wanted}


@NOT_ON_KERNELS
def test_saturated_rows_compiled() -> None:
    logits = saturated(17, 200.0)
    oracle.assert_right(*compiled(*logits, 0.7, 5.3), oracle.truth(*logits, 0.7, 5.3), 2e-5)


@EACH_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_hot_teachers(width: int, dtype: torch.dtype, variant: Variant) -> None:
    """The guidance is the cross-entropy if the teacher has -inf for the other classes."""
    labels = torch.arange(12) % width
    teacher = torch.full((12, width), -torch.inf, dtype=dtype).scatter(1, labels[:, None], 3.0)
    clean, adv = (4 * torch.randn(2, 12, width)).to(dtype)
    rows, d_clean, d_adv = variant(clean, adv, teacher, 0.7, 0.0)
    entropy = torch.nn.functional.cross_entropy(adv.double(), labels, reduction="none")
    assert oracle.loss_error(rows, entropy.numpy()) < oracle.TOLERANCES[dtype]
    assert (d_clean == 0).all()
    oracle.assert_right(rows, d_clean, d_adv, variant.truth(clean, adv, teacher, 0.7, 0.0), oracle.TOLERANCES[dtype])


@EACH_VARIANT
@SINGLE_AND_DOUBLE
@pytest.mark.parametrize("tau", [1e-40, 1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("width", WIDTHS)
def test_extreme_temperatures(width: int, tau: float, dtype: torch.dtype, variant: Variant) -> None:
    """Towards 0 the teacher is one-hot, with ties shared, and towards infinity uniform."""
    clean, adv, teacher = (3 * torch.randn(3, 12, width)).to(dtype)
    teacher[0] = 0.0
    teacher[1, :3] = 20.0
    oracle.assert_right(
        *variant(clean, adv, teacher, tau, 5.3), variant.truth(clean, adv, teacher, tau, 5.3), oracle.TOLERANCES[dtype]
    )
