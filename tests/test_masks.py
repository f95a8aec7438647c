"""-inf masks a class, with 0 log 0 = 0; what has no answer is NaN in its own row and nowhere else."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.variants import EACH_VARIANT, FLOAT64, NOT_ON_KERNELS, Variant, compiled

pytestmark = pytest.mark.kernels

INF, NAN = float("inf"), float("nan")
# Few calls, one block, several.
WIDTHS = (10, 500, pytest.param(3000, marks=pytest.mark.not_on("interpreter")))
ROWS = 24
ALL_DTYPES = pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.float16], ids=str)
SINGLE_AND_DOUBLE = pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
ALL_WIDTHS = pytest.mark.parametrize("width", WIDTHS)


def logits(width: int, dtype: torch.dtype) -> list[Tensor]:
    return [(3 * torch.randn(ROWS, width)).to(dtype) for _ in range(3)]


def a_third(width: int) -> Tensor:
    """Some classes, others in each row, but never the first; and a row without any."""
    mask = torch.rand(ROWS, width) < 1 / 3
    mask[:, 0] = mask[0] = False
    mask[1, 1:] = True
    return mask


@EACH_VARIANT
@SINGLE_AND_DOUBLE
@ALL_WIDTHS
@pytest.mark.parametrize("masked", ["cat", "t", "c", "ct", "cat+t", "cat+c"])
def test_masks_that_leave_an_answer(masked: str, width: int, dtype: torch.dtype, variant: Variant) -> None:
    c, a, t = logits(width, dtype)
    for where in masked.split("+"):
        mask = a_third(width)
        c, a, t = (x.masked_fill(mask, -INF) if name in where else x for x, name in zip((c, a, t), "cat", strict=True))
    rows, d_clean, d_adv = variant(c, a, t, 0.7, 5.3)
    assert rows.isfinite().all()
    oracle.assert_right(rows, d_clean, d_adv, variant.truth(c, a, t, 0.7, 5.3), oracle.TOLERANCES[dtype])
    assert (d_clean[c == -INF] == 0).all()


@NOT_ON_KERNELS
def test_masks_compiled() -> None:
    c, a, t = logits(17, torch.float32)
    everywhere = a_third(17)
    args = [x.masked_fill(everywhere | more, -INF) for x, more in ((c, a_third(17)), (a, everywhere), (t, a_third(17)))]
    oracle.assert_right(*compiled(*args, 0.7, 5.3), oracle.truth(*args, 0.7, 5.3), 2e-5)


@EACH_VARIANT
@ALL_DTYPES
@ALL_WIDTHS
def test_a_tiny_kl_under_masks(width: int, dtype: torch.dtype, variant: Variant) -> None:
    base, mask = 3 * torch.randn(ROWS, width), a_third(width)
    base[2:, 1] = base[2:].logsumexp(1) - 7  # small enough to leave out, too large to overlook
    c, a, t = ((base + 1e-2 * torch.randn(ROWS, width)).masked_fill(mask, -INF).to(dtype) for _ in range(3))
    oracle.assert_right(*variant(c, a, t, 1.0, 5.3), variant.truth(c, a, t, 1.0, 5.3), oracle.TOLERANCES[dtype])
    fewer = [x.index_fill(1, torch.tensor([1]), -INF) for x in (c, t)]
    true = variant.truth(fewer[0], a, fewer[1], 1.0, 5.3)
    oracle.assert_right(*variant(fewer[0], a, fewer[1], 1.0, 5.3), true, oracle.TOLERANCES[dtype])
    for result in variant(c, c, c, 1.0, 5.3):
        assert (result == 0).all()


@EACH_VARIANT
@ALL_DTYPES
@ALL_WIDTHS
def test_masked_in_the_adversarial_alone(width: int, dtype: torch.dtype, variant: Variant) -> None:
    """Probability where the prediction rules it out: infinitely wrong, and so said."""
    c, a, t = logits(width, dtype)
    a[1, 2] = a[2, 3] = t[2, 3] = a[21, 4] = c[21, 4] = -INF  # not in c and t, not in c, not in t
    rows, d_clean, d_adv = variant(c, a, t, 0.7, 5.3)
    assert (rows[[1, 2, 21]] == INF).all()
    assert_others_unharmed([1, 2, 21], (rows, d_clean, d_adv), variant.truth(c, a, t, 0.7, 5.3), dtype)


@EACH_VARIANT
@ALL_DTYPES
@ALL_WIDTHS
@pytest.mark.parametrize("bad", ["all masked", "NaN", "+inf"])
def test_no_answer(bad: str, width: int, dtype: torch.dtype, variant: Variant) -> None:
    """A row without an answer in any one input is NaN, as are its gradients for that input."""
    args = logits(width, dtype)
    for row, x in zip((1, 3, 21), args, strict=True):
        x[row, slice(None) if bad == "all masked" else 4] = {"all masked": -INF, "NaN": NAN, "+inf": INF}[bad]
    rows, d_clean, d_adv = variant(*args, 0.7, 5.3)
    assert rows[[1, 3, 21]].isnan().all()
    assert_others_unharmed([1, 3, 21], (rows, d_clean, d_adv), variant.truth(*args, 0.7, 5.3), dtype)


def assert_others_unharmed(
    rows: list[int], result: tuple[Tensor, Tensor, Tensor], true: oracle.Truth, dtype: torch.dtype
) -> None:
    others = np.setdiff1d(np.arange(ROWS), rows)
    oracle.assert_right(
        *(x[others] for x in result), oracle.Truth(*(x[others] for x in true)), oracle.TOLERANCES[dtype]
    )
