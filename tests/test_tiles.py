"""Every tile that the launcher chooses, to its last row and column, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from cktat_loss import _autograd, kernels
from tests import oracle, variants

launch = pytest.importorskip("cktat_loss.kernels.launch", reason="needs Triton")
pytestmark = [pytest.mark.kernels, pytest.mark.not_on("torch", "gpu")]

BOTH = pytest.mark.parametrize("variant", [variants.rows, variants.labelled], ids=["rows", "labels"])


@pytest.fixture(autouse=True)
def _tiles_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autograd, "choose", lambda *_: kernels)  # other tests have tall ones


def check(variant: variants.Variant, n: int, classes: int, dtype: torch.dtype = torch.float32) -> None:
    logits = (3 * torch.randn(3, n, classes)).to(dtype)
    oracle.assert_right(*variant(*logits, 0.7, 5.3), variant.truth(*logits, 0.7, 5.3), 2e-5, note=f"N={n}, C={classes}")


@BOTH
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 10, 16, 17, 31, 33, 64, 65, 100, 127, 128, 129, 257])
def test_few_classes(classes: int, variant: variants.Variant) -> None:
    tile = launch.rows_tile(classes, 4, 257)
    assert classes <= tile.strips * tile.width
    for n in {1, tile.rows - 1, tile.rows, tile.rows + 1} - {0}:
        check(variant, n, classes)


@BOTH
@pytest.mark.parametrize("classes", [511, 512, 1000, 1001, 1024, 2049, launch.ROWS_UP_TO - 1, launch.ROWS_UP_TO])
def test_a_row_a_program(classes: int, variant: variants.Variant) -> None:
    check(variant, 2, classes)


@BOTH
@pytest.mark.parametrize("classes", [launch.ROWS_UP_TO + 1, launch.ROWS_UP_TO + 8, 5003, 6144, 21841])
def test_rows_in_chunks(classes: int, variant: variants.Variant) -> None:
    for dtype in (torch.float32, torch.float16):
        check(variant, 2, classes, dtype)


@pytest.mark.parametrize("residue", range(8))
def test_rows_of_odd_length_start_anywhere(residue: int) -> None:
    """Also where a row is shorter than what sticks out of its aligned interior, or just as long."""
    for classes in (1 + residue, 8 + residue, 40 + residue):
        with variants.in_chunks(classes):
            check(variants.rows, 8, classes)


def test_every_tile_fits() -> None:
    """Powers of two that cover the row, whole warps, and no more than 16 positions a thread where rows are long."""
    for classes in [*range(1, 200), 255, 256, 257, 1000, 1001, 2048, launch.ROWS_UP_TO - 1, launch.ROWS_UP_TO]:
        for size in (2, 4):
            for n in (1, 64, 256, 257):
                tile = launch.rows_tile(classes, size, n)
                assert all(x & (x - 1) == 0 for x in tile)
                columns = tile.strips * tile.width
                assert classes <= columns < 2 * classes or columns == 4 > classes or classes == 1
                assert 16 * 32 * tile.warps >= columns * tile.rows or classes < 16
