"""Forward and backward hold at most four elements a logit position at once, the two gradients included.

Counted by the profiler at the CPU allocator, so temporaries inside an operator count too.
"""

import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.speed import peak_bytes
from cktat_loss.functional import cktat_loss

SHAPES = pytest.mark.parametrize("shape", [(64, 21841), (512, 1000)], ids=str)


def per_position(step: Callable[[], object], shape: tuple[int, int]) -> float:
    """Elements of four bytes a logit position, at the peak."""
    step()  # what is allocated once, for good
    return peak_bytes(step) / (4 * math.prod(shape))


@SHAPES
def test_the_measure_sees_what_it_should(shape: tuple[int, int]) -> None:
    """Three tensors at once, though only one is left."""
    x = torch.randn(shape)
    assert 3.0 <= per_position(lambda: (x + 1) * (x + 2), shape) < 3.01


@SHAPES
@pytest.mark.parametrize("near", [False, True])
def test_forward_and_backward(near: bool, shape: tuple[int, int]) -> None:
    """Also where a tiny KL is summed a second time."""
    base = torch.randn(shape)
    clean, adv, teacher = ((base if near else 0) + (1e-3 if near else 1) * torch.randn(shape) for _ in range(3))
    clean.requires_grad_()
    adv.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(cktat_loss(clean, adv, teacher, 1.0), (clean, adv))

    assert 2 <= per_position(step, shape) <= 4


@SHAPES
def test_the_recipe(shape: tuple[int, int]) -> None:
    """One gradient, weights from labels and the terms of the same pass."""
    clean, adv, teacher = torch.randn(3, *shape)
    adv.requires_grad_()
    y = torch.arange(shape[0])

    def step() -> tuple[torch.Tensor, ...]:
        loss, terms = cktat_loss(clean, adv, teacher, 2.0, y=y, detach_clean=True, return_terms=True)
        return *torch.autograd.grad(loss, adv), *terms

    assert 1 <= per_position(step, shape) <= 3


@SHAPES
def test_no_gradient_no_memory(shape: tuple[int, int]) -> None:
    """Without gradients, a block at a time is all there is."""
    clean, adv, teacher = torch.randn(3, *shape)
    assert per_position(lambda: cktat_loss(clean, adv, teacher), shape) <= 1
