"""Under autocast, as outside it, the loss is float32 of whatever logits come."""

import itertools

import pytest
import torch
from torch import nn

from cktat_loss.functional import cktat_loss, cktat_terms
from tests import oracle
from tests.variants import EACH_VARIANT, NOT_ON_KERNELS, ON_KERNELS, Variant

pytestmark = pytest.mark.kernels

HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
DTYPES_OF_TORCH = pytest.param((*oracle.TOLERANCES,), marks=NOT_ON_KERNELS, id="4 dtypes")
DTYPES_OF_KERNELS = pytest.param((torch.float32, torch.float16, torch.bfloat16), marks=ON_KERNELS, id="3 dtypes")
TAU, BETA = 0.7, 5.3


@HALF
@EACH_VARIANT
@pytest.mark.parametrize("shape", [(5, 10), (8, 1000)], ids=str)
def test_autocast_changes_nothing(shape: tuple[int, int], variant: Variant, half: torch.dtype) -> None:
    """Neither the dtype nor a digit: near the minimum, a loss computed in half precision would be noise."""
    base = 3 * torch.randn(shape)
    clean, adv, teacher = ((base + 0.01 * torch.randn(shape)).to(d) for d in (torch.float32, half, torch.float32))
    outside = variant(clean, adv, teacher, 1.0, BETA)
    with torch.autocast("cpu", dtype=half):
        inside = variant(clean, adv, teacher, 1.0, BETA)
    for x, y in zip(inside, outside, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    assert inside[0].dtype == torch.float32


@HALF
@EACH_VARIANT
def test_accuracy_inside(variant: Variant, half: torch.dtype) -> None:
    args = *(3 * torch.randn(3, 40, 100)).to(half).unbind(), TAU, BETA
    with torch.autocast("cpu", dtype=half):
        result = variant(*args)
    oracle.assert_right(*result, variant.truth(*args), oracle.TOLERANCES[half])


@HALF
def test_training_step(half: torch.dtype) -> None:
    """A step as in a training loop: model and loss inside autocast, backward outside."""
    student, teacher, x = nn.Linear(8, 10), nn.Linear(8, 10), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=half):
        clean, adv = student(x[0]), student(x[1])
        with torch.no_grad():
            target = teacher(x[0])
        assert clean.dtype == half
        loss = cktat_loss(clean, adv, target, TAU, BETA)
        terms = cktat_terms(clean, adv, target, TAU)
    true = oracle.truth(clean, adv, target, TAU, BETA)
    assert {x.dtype for x in (loss, *terms)} == {torch.float32}
    assert oracle.loss_error(loss, true.rows.mean()) <= 2e-5
    loss.backward()
    d_clean, d_adv = (torch.from_numpy(d / 5).to(half).float() for d in (true.d_clean, true.d_adv))
    expected = d_clean.t() @ x[0].to(half).float() + d_adv.t() @ x[1].to(half).float()
    torch.testing.assert_close(student.weight.grad, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.not_on("gpu")
@EACH_VARIANT
@pytest.mark.parametrize("dtypes", [DTYPES_OF_TORCH, DTYPES_OF_KERNELS])
@pytest.mark.parametrize("shape", [(5, 10), (8, 1000)], ids=str)
def test_mixed_dtypes(shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], variant: Variant) -> None:
    """Every dtype of one of the logits meets every dtype of another one."""
    for i, j in itertools.product(range(len(dtypes)), repeat=2):
        mixed = dtypes[i], dtypes[j], dtypes[(i + j) % len(dtypes)]
        logits = [(3 * torch.randn(shape, dtype=torch.float64)).to(dtype) for dtype in mixed]
        rows, d_clean, d_adv = variant(*logits, TAU, BETA)
        assert rows.dtype == (torch.float64 if torch.float64 in mixed else torch.float32)
        assert (d_clean.dtype, d_adv.dtype) == mixed[:2]
        true = variant.truth(*logits, TAU, BETA)
        tolerance = min(oracle.TOLERANCES[dtype] for dtype in mixed)
        oracle.assert_right(rows, d_clean, d_adv, true, tolerance, note=str(mixed))
