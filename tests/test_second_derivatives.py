"""Differentiated twice, the loss is still right: Hessians and gradient penalties are never silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cktat_loss import reference
from cktat_loss.functional import cktat_loss, cktat_terms
from tests.variants import FLOAT64

TAU, BETA = 0.7, 5.3
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
LABELS = torch.tensor([0, 3, 1])
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loss": lambda c, a, t: cktat_loss(c, a, t, TAU, BETA),
    "terms": lambda c, a, t: sum(w * k.mean() for w, k in zip((1, BETA), cktat_terms(c, a, t, TAU), strict=True)),
}
EACH_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def logits(n: int = 3, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = 2 * torch.randn(3, n, classes, dtype=torch.float64)
    return clean.requires_grad_(), adv.requires_grad_(), teacher


@REDUCTIONS
@pytest.mark.parametrize("beta", [BETA, torch.tensor([0.0, 0.7, 5.3], dtype=torch.float64)], ids=["float", "tensor"])
def test_gradgradcheck_of_the_loss(beta: Any, reduction: Any) -> None:
    clean, adv, teacher = logits()

    def loss(clean: Tensor, adv: Tensor) -> Tensor:
        return cktat_loss(clean, adv, teacher, TAU, beta, reduction=reduction)

    assert gradcheck(loss, (clean, adv))
    assert gradgradcheck(loss, (clean, adv))


def test_gradgradcheck_of_the_terms() -> None:
    clean, adv, teacher = logits()
    assert gradcheck(lambda c, a: cktat_terms(c, a, teacher, TAU), (clean, adv))
    assert gradgradcheck(lambda c, a: cktat_terms(c, a, teacher, TAU), (clean, adv))


def test_one_side_only() -> None:
    clean, adv, teacher = logits()
    for fixed in (clean, adv):
        fixed.requires_grad_(False)
        assert gradgradcheck(lambda c, a: cktat_loss(c, a, teacher, TAU, BETA), (clean, adv))
        fixed.requires_grad_(True)
    assert gradgradcheck(lambda c, a: cktat_loss(c, a, teacher, TAU, BETA, detach_clean=True), (clean.detach(), adv))


def test_the_guidance_alone_with_a_graph() -> None:
    clean, adv, teacher = logits()
    guidance = cktat_terms(clean, adv, teacher, TAU).guidance.sum()
    for create_graph in (False, True):
        d_clean, _ = torch.autograd.grad(guidance, (clean, adv), retain_graph=True, create_graph=create_graph)
        assert (d_clean == 0).all()


@EACH_LOSS
def test_a_gradient_penalty_has_no_gradient_for_the_teacher(loss: Callable[..., Tensor]) -> None:
    clean, adv, teacher = logits()
    teacher.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(clean, adv, teacher), adv, create_graph=True)
    gradient.square().sum().backward()
    assert teacher.grad is None
    assert adv.grad is not None


@pytest.mark.parametrize("where", ["all", "teacher", "clean"])
def test_under_masks(where: str) -> None:
    clean, adv, teacher = logits()
    mask = torch.tensor([[False, True, False, False], [False, False, True, True], [False] * 4])
    if where in ("all", "teacher"):
        teacher = teacher.masked_fill(mask, -torch.inf)

    def loss(clean: Tensor, adv: Tensor) -> Tensor:
        clean = clean.masked_fill(mask, -torch.inf) if where in ("all", "clean") else clean
        adv = adv.masked_fill(mask, -torch.inf) if where == "all" else adv
        return cktat_loss(clean, adv, teacher, TAU, BETA)

    assert gradcheck(loss, (clean, adv))
    assert gradgradcheck(loss, (clean, adv))


def test_at_equal_predictions() -> None:
    """The minimum: a zero gradient, but not a zero Hessian."""
    clean, adv, _ = logits()
    adv.data.copy_(clean)
    teacher = TAU * clean.detach()
    assert gradgradcheck(lambda c, a: cktat_loss(c, a, teacher, TAU, BETA), (clean, adv))
    (gradient,) = torch.autograd.grad(cktat_loss(clean, adv, teacher, TAU, BETA), adv, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 0], adv)
    p = adv[0].softmax(0)
    torch.testing.assert_close(second[0, 0], (1 + BETA) / 3 * p[0] * (1 - p[0]), rtol=1e-9, atol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
@EACH_LOSS
def test_hessian(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    clean, adv, teacher = (x.detach().to(dtype) for x in logits())
    actual = torch.autograd.functional.hessian(lambda c, a: loss(c, a, teacher), (clean, adv))
    expected = torch.autograd.functional.hessian(
        lambda c, a: reference.cktat_loss(c, a, teacher.double(), TAU, BETA), (clean.double(), adv.double())
    )
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for row, expected_row in zip(actual, expected, strict=True):
        for block, expected_block in zip(row, expected_row, strict=True):
            torch.testing.assert_close(block.double(), expected_block, rtol=tolerance, atol=tolerance * (1 + BETA))


@pytest.mark.parametrize("shape", [(3, 4), (40, 17), (8, 1000)], ids=str)
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
@EACH_LOSS
def test_gradient_penalty(loss: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, int]) -> None:
    clean, adv, teacher = (x.detach().to(dtype) for x in logits(*shape))

    def penalty(loss: Callable[..., Tensor], *logits: Tensor) -> tuple[Tensor, ...]:
        clean, adv = (x.clone().requires_grad_() for x in logits[:2])
        d_clean, d_adv = torch.autograd.grad(loss(clean, adv, logits[2]), (clean, adv), create_graph=True)
        value = (d_clean.square().sum() + d_adv.square().sum()) * shape[0]
        return value.detach(), *torch.autograd.grad(value, (clean, adv))

    actual = penalty(loss, clean, adv, teacher)
    expected = penalty(
        lambda c, a, t: reference.cktat_loss(c, a, t, TAU, BETA), clean.double(), adv.double(), teacher.double()
    )
    assert expected[0] > 1
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for x, true in zip(actual, expected, strict=True):
        error = (x.double() - true).abs().max() / true.abs().max()
        assert error <= tolerance


def test_first_backward_with_a_graph_changes_no_gradient() -> None:
    clean, adv, teacher = logits()
    loss = cktat_loss(clean, adv, teacher, TAU, BETA)
    with_graph = torch.autograd.grad(loss, (clean, adv), create_graph=True)
    without = torch.autograd.grad(loss, (clean, adv))
    for x, y in zip(with_graph, without, strict=True):
        assert x.requires_grad
        torch.testing.assert_close(x.detach(), y, rtol=1e-11, atol=1e-13)


# What is easily wrong in silence: a gradient in the loss itself.

PENALTIES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l + g^2": lambda loss, gradient, adv: loss + gradient.square().sum(),
    "g a": lambda loss, gradient, adv: (gradient * adv).sum(),
    "g": lambda loss, gradient, adv: gradient[:, 0].sum(),
}
EACH_PENALTY = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
SHAPES = pytest.mark.parametrize("shape", [(3, 4), (3, 50)], ids=str)
WITH_LABELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **LOSSES,
    "labels": lambda c, a, t: cktat_loss(c, a, t, TAU, BETA, y=LABELS),
    "sum of rows": lambda c, a, t: cktat_loss(c, a, t, TAU, BETA, reduction="none").sum() / 3,
}


def of_reference(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    return reference.cktat_loss(clean, adv, teacher, TAU, BETA)


def labelled_reference(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    weights = BETA * adv.detach().softmax(1)[torch.arange(3), LABELS]
    return reference.cktat_loss(clean, adv, teacher, TAU, weights)


def penalised(loss: Callable[..., Tensor], penalty: Callable[..., Tensor], *logits: Tensor) -> tuple[Tensor, ...]:
    clean, adv = (x.detach().clone().requires_grad_() for x in logits[:2])
    value = loss(clean, adv, logits[2])
    (gradient,) = torch.autograd.grad(value, adv, create_graph=True)
    return torch.autograd.grad(penalty(value, gradient, adv), (clean, adv))


def expected_of(name: str, penalty: Callable[..., Tensor], *logits: Tensor) -> tuple[Tensor, ...]:
    return penalised(labelled_reference if name == "labels" else of_reference, penalty, *(x.double() for x in logits))


@EACH_PENALTY
@SHAPES
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WITH_LABELS)
def test_a_gradient_in_the_loss(
    name: str, dtype: torch.dtype, shape: tuple[int, int], penalty: Callable[..., Tensor]
) -> None:
    args = [x.to(dtype) for x in logits(*shape)]
    actual = penalised(WITH_LABELS[name], penalty, *args)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for x, true in zip(actual, expected_of(name, penalty, *args), strict=True):
        torch.testing.assert_close(x.double(), true, rtol=tolerance, atol=tolerance * (1 + BETA))


@pytest.mark.parametrize("name", WITH_LABELS)
def test_a_gradient_in_a_compiled_loss_is_right_or_raises(name: str) -> None:
    torch.compiler.reset()
    args = logits()
    compiled = torch.compile(WITH_LABELS[name], backend="aot_eager", fullgraph=True)
    for penalty in PENALTIES.values():
        try:
            actual = penalised(compiled, penalty, *args)
        except RuntimeError as error:
            assert "double backward" in str(error)  # noqa: PT017 - either will do
            continue
        for x, true in zip(actual, expected_of(name, penalty, *args), strict=True):
            torch.testing.assert_close(x, true, rtol=1e-4, atol=1e-4)


def test_the_compiler_named_eager_gives_a_first_gradient_without_a_graph() -> None:
    """docs/kernels.md warns of it."""
    torch.compiler.reset()
    clean, adv, teacher = logits()
    loss = torch.compile(cktat_loss, backend="eager", fullgraph=True)(clean, adv, teacher)
    (gradient,) = torch.autograd.grad(loss, adv, create_graph=True)
    assert not gradient.requires_grad
