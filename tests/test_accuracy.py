"""Loss and gradients are right to 2e-5 in float32 and 1e-11 in float64, in every form and on every path of it."""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import Tensor

from cktat_loss import _cpu
from cktat_loss.functional import cktat_loss
from tests import oracle
from tests.variants import DTYPES, EACH_VARIANT, FLOAT64, NOT_ON_KERNELS, Variant, compiled, labels

pytestmark = pytest.mark.kernels

SINGLE = torch.float32
SCALES = (0.05, 0.3, 1, 4, 20, 60)
SLOW = pytest.param((40, 1000), marks=pytest.mark.not_on("interpreter"))
TAU_BETA = ((0.7, 5.3), (5.3, 0.7))  # neither dyadic: 5 and 6 hide a scalar that lost precision

# On one thread, where a block holds some 50,000 elements.
SHAPES = {
    "few calls": [(7, 2), (7, 3), (7, 10), (40, 17), (8, 1000)],
    "one block": [(1000, 10), (9, 1000), (1, 21841)],
    "blocks, the last partial": [(7000, 10), (70, 1000)],
    "a row a block": [(3, 21841)],
}
SHAPES_AND_NAMES = [
    # The kernels have no blocks, but tiles: test_tiles.py has those, and few classes too.
    pytest.param(s, id=f"{name} {s[0]}x{s[1]}", marks=[NOT_ON_KERNELS] if "block" in name or s[1] < 10 else [])
    for name, group in SHAPES.items()
    for s in group
]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """NaN in new memory, so that what is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@lru_cache(maxsize=len(SCALES))  # the variants come one after the other
def case(shape: tuple[int, int], scale: float, dtype: torch.dtype, tau: float, beta: float, offset: float = 0.0):
    g = torch.Generator().manual_seed(shape[1])
    clean, adv, teacher = (
        (scale * torch.randn(shape, generator=g, dtype=torch.float64) + shift).to(dtype)
        for shift in (offset, -offset, offset / 2)
    )
    return clean, adv, teacher, tau, beta


@EACH_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_AND_NAMES)
def test_loss_and_gradients(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> None:
    for scale, (tau, beta) in zip(SCALES, cycle(TAU_BETA), strict=False):
        args = case(shape, scale, dtype, tau, beta)
        note = f"scale {scale}, tau {tau}, beta {beta}"
        oracle.assert_right(*variant(*args), variant.truth(*args), oracle.TOLERANCES[dtype], note=note)


@NOT_ON_KERNELS
@pytest.mark.parametrize(("shape", "dtype"), [*(((7, 10), dtype) for dtype in oracle.TOLERANCES), ((2, 50257), SINGLE)])
def test_compiled(shape: tuple[int, int], dtype: torch.dtype) -> None:
    args = *case(shape, 4, dtype, 0.7, 5.3), labels(torch.empty(shape))
    oracle.assert_right(*compiled(*args[:5]), compiled.truth(*args[:5]), oracle.TOLERANCES[dtype])
    oracle.assert_right(*compiled(*args), compiled.truth(*args), oracle.TOLERANCES[dtype])


@EACH_VARIANT
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7, 10), (40, 17), SLOW], ids=str)
def test_offset_of_1000(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> None:
    """Logits far from zero, and not on the same side, are as good as others: each is taken as it is."""
    args = case(shape, 4, dtype, 0.7, 5.3, offset=1000.0)
    oracle.assert_right(*variant(*args), variant.truth(*args), oracle.TOLERANCES[dtype])


@NOT_ON_KERNELS
@pytest.mark.parametrize("step", [0, 1, 7, 100])
@EACH_VARIANT
def test_blocks_have_no_seams(variant: Variant, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the block, and with a weight for each row, the rows come out in their places."""
    *args, beta = case((100, 100), 4, torch.float32, 0.7, 5.3)
    monkeypatch.setattr(_cpu, "BLOCK_ELEMENTS_PER_THREAD", step * 100)
    beta = beta if variant.labelled else torch.rand(100)
    oracle.assert_right(*variant(*args, beta), variant.truth(*args, beta), 2e-5)


def numerical_slopes(x: Tensor, loss) -> Iterator[tuple[tuple[int, int], float]]:
    """Central differences in float64, an entry at a time."""
    for i, j in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[i, j] = 1e-5
        yield (i, j), (loss(x + step) - loss(x - step)) / 2e-5


def test_oracle_gradients_are_slopes_of_its_loss() -> None:
    clean, adv, teacher = torch.randn(3, 2, 4, dtype=torch.float64)
    true = oracle.truth(clean, adv, teacher, 0.7, 5.3)
    for (i, j), slope in numerical_slopes(clean, lambda c: oracle.truth(c, adv, teacher, 0.7, 5.3).rows.sum()):
        assert math.isclose(true.d_clean[i, j], slope, abs_tol=1e-8)
    for (i, j), slope in numerical_slopes(adv, lambda a: oracle.truth(clean, a, teacher, 0.7, 5.3).rows.sum()):
        assert math.isclose(true.d_adv[i, j], slope, abs_tol=1e-8)


def test_oracle_by_hand() -> None:
    """p_t = (3/4, 1/4) after the temperature, p_c = (1/2, 1/2), p_a = (1/4, 3/4)."""
    log3 = math.log(3)
    clean, adv, teacher = torch.tensor([[[2.0, 2.0]], [[-log3, 0.0]], [[2 * log3, 0.0]]], dtype=torch.float64)
    expected = 0.75 * log3 - 0.25 * log3 + 10 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert math.isclose(oracle.truth(clean, adv, teacher, 2.0, 10.0).rows[0], expected, rel_tol=1e-14)
    assert math.isclose(cktat_loss(clean, adv, teacher, 2.0, 10.0).item(), expected, rel_tol=1e-14)
