"""A tiny KL, as at the end of training, is right to 2e-3 and never negative; none at all is exactly zero."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.variants import DTYPES, EACH_VARIANT, NOT_ON_KERNELS, Variant, compiled

pytestmark = pytest.mark.kernels

SLOW = [pytest.param(s, marks=pytest.mark.not_on("interpreter")) for s in [(200, 100), (40, 1000), (3, 21841)]]
SHAPES = [(50, 10), (40, 100), *SLOW]


def nearly_equal(shape: tuple[int, int], gap: float, tau: float = 1.0) -> list[Tensor]:
    """Clean, adversarial and teacher logits ~ 30 +- 5, with a KL of about gap**2 / 2."""
    base = 30 + 5 * torch.randn(shape, dtype=torch.float64)
    clean, adv, teacher = (base + gap * torch.randn(shape, dtype=torch.float64) for _ in range(3))
    return [clean.float(), adv.float(), (tau * teacher).float()]


@EACH_VARIANT
@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small(shape: tuple[int, int], tau: float, variant: Variant) -> None:
    logits = nearly_equal(shape, gap=2e-3, tau=tau)
    clean, adv, teacher = logits
    assert 1e-7 < oracle.truth(*logits, tau, 1.0).guidance.mean() < 1e-5
    for args in ((clean, adv, teacher, tau, 0.0), (clean, adv, adv, 1.0, 1.0)):  # one term each
        assert np.max(np.abs(oracle.array(variant(*args)[0]) / variant.truth(*args).rows - 1)) < 2e-3


@NOT_ON_KERNELS
def test_small_compiled() -> None:
    logits = nearly_equal((40, 1000), gap=2e-3)
    rows, _, _ = compiled(*logits, 1.0, 1.0)
    assert np.max(np.abs(oracle.array(rows) / oracle.truth(*logits, 1.0, 1.0).rows - 1)) < 2e-3


@EACH_VARIANT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_tiny_to_ordinary(shape: tuple[int, int], variant: Variant) -> None:
    """No seam where the summation changes: a KL of 1e-2 is as right as one of 1."""
    for gap in (0.03, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0):
        logits = nearly_equal(shape, gap)
        oracle.assert_right(*variant(*logits, 1.0, 1.0), variant.truth(*logits, 1.0, 1.0), 2e-5, note=f"gap {gap}")


@EACH_VARIANT
def test_small_rows_among_others(variant: Variant) -> None:
    """Each summed from its own probabilities, also where a class of little weight is far off."""
    clean, adv, teacher = nearly_equal((200, 100), gap=2e-3)
    clean[:, 0] = clean.logsumexp(1) - 7
    adv[:, 0] = clean[:, 0] + 1
    adv[::2] += 3 * torch.randn(100, 100)
    oracle.assert_right(*variant(clean, adv, teacher, 1.0, 1.0), variant.truth(clean, adv, teacher, 1.0, 1.0), 2e-5)


@EACH_VARIANT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_never_negative(shape: tuple[int, int], variant: Variant) -> None:
    for gap in (1e-7, 1e-5, 1e-4):
        for scale in (0.05, 20):
            clean, adv, teacher = (scale * x for x in nearly_equal(shape, gap))
            assert (variant(clean, adv, teacher, 1.0, 1.0)[0] >= 0).all()


@NOT_ON_KERNELS
@EACH_VARIANT
def test_never_negative_in_float64(variant: Variant) -> None:
    """Logits whose plain sums round to either side of zero."""
    for gap in (1e-7, 1e-6, 1e-5):
        for scale in (1, 10, 30, 100):
            clean = scale * torch.randn(64, 17, dtype=torch.float64)
            adv = clean * (1 + gap * torch.randn_like(clean))
            assert (variant(clean, adv, clean, 1.0, 1.0)[0] >= 0).all()


@EACH_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_predictions_are_exactly_zero(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> None:
    for scale, tau in ((0.3, 1.0), (5, 2.0), (60, 2.0)):
        logits = (scale * torch.randn(shape)).to(dtype)
        for result in variant(logits, logits, logits * tau, tau, 5.3):
            assert (result == 0).all(), f"scale {scale}: {result.abs().max()}"


@NOT_ON_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_predictions_are_exactly_zero_compiled(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(40, 17)).to(dtype)
    for result in compiled(logits, logits, 2 * logits, 2.0, 5.3):
        assert (result == 0).all()
