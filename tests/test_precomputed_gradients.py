"""Gradients made with the loss and held for the backward pass are right at any scale, in any number of passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cktat_loss.functional import cktat_loss, cktat_terms
from tests import oracle
from tests.variants import FLOAT64

pytestmark = pytest.mark.kernels

TAU, BETA = 0.7, 5.3
N = 7
DTYPES = pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.bfloat16, torch.float16], ids=str)
LABELLED = pytest.mark.parametrize("labelled", [False, True], ids=["a number", "labels"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
PASSES = [(1.0, 2.5), (2.5, 1.0), (1.0, 1.0), (0.25, 0.25), (1.0, -3.7, 1.0)]


class Problem:
    """Logits, their loss, and what its gradients should be."""

    def __init__(self, dtype: torch.dtype, labelled: bool, reduction: str = "mean", classes: int = 17) -> None:
        self.clean, self.adv, self.teacher = (3 * torch.randn(3, N, classes)).to(dtype).unbind()
        self.clean, self.adv = self.clean.detach().requires_grad_(), self.adv.detach().requires_grad_()
        self.y = torch.arange(N) if labelled else None
        self.true = oracle.truth(self.clean, self.adv, self.teacher, TAU, BETA, self.y)
        self.share = 1 / N if reduction == "mean" else 1.0
        options: Any = {"reduction": reduction, "y": self.y}
        self.loss = cktat_loss(self.clean, self.adv, self.teacher, TAU, BETA, **options).sum()

    def check(self, d_clean: Tensor | None, d_adv: Tensor | None, *upstream: float) -> None:
        """Gradients of passes of these upstream gradients, added up in their own dtype."""
        scale, sizes = self.share * sum(upstream), self.share * sum(map(abs, upstream))
        assert d_clean is not None
        assert d_adv is not None
        rounding = 2 * (len(upstream) - 1) * torch.finfo(d_adv.dtype).eps * sizes
        tolerance = oracle.TOLERANCES[d_adv.dtype] + rounding / self.share
        for actual, true, unit in (
            (d_clean, self.true.d_clean, self.true.unit_clean),
            (d_adv, self.true.d_adv, self.true.unit_adv),
        ):
            assert oracle.gradient_error(actual, scale * true, sizes * unit) <= tolerance


@DTYPES
@LABELLED
@REDUCTIONS
@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.7, 0.0])
def test_any_upstream_gradient(upstream: float, reduction: str, labelled: bool, dtype: torch.dtype) -> None:
    problem = Problem(dtype, labelled, reduction)
    (upstream * problem.loss).backward()
    problem.check(problem.clean.grad, problem.adv.grad, upstream)


@DTYPES
@LABELLED
@REDUCTIONS
@pytest.mark.parametrize("passes", PASSES, ids=str)
def test_passes_over_a_retained_graph_add_up(
    passes: tuple[float, ...], reduction: str, labelled: bool, dtype: torch.dtype
) -> None:
    """In ``.grad``, where the first pass may have left the very memory that was held."""
    problem = Problem(dtype, labelled, reduction)
    for i, upstream in enumerate(passes):
        (upstream * problem.loss).backward(retain_graph=True)
        problem.check(problem.clean.grad, problem.adv.grad, *passes[: i + 1])


@DTYPES
@LABELLED
@pytest.mark.parametrize("passes", PASSES, ids=str)
def test_no_pass_writes_into_another_ones_result(passes: tuple[float, ...], labelled: bool, dtype: torch.dtype) -> None:
    problem = Problem(dtype, labelled)
    inputs = problem.clean, problem.adv
    results = [
        torch.autograd.grad(problem.loss, inputs, torch.tensor(u, dtype=problem.loss.dtype), retain_graph=True)
        for u in passes
    ]
    memory = {x.data_ptr() for both in results for x in both}
    assert len(memory) == 2 * len(passes)
    for result, upstream in zip(results, passes, strict=True):
        problem.check(*result, upstream)


@LABELLED
def test_one_input_at_a_time(labelled: bool) -> None:
    """The graph wants both gradients, a call only one of them; and then the other."""
    for upstream in (1.0, 2.5):
        problem = Problem(torch.float32, labelled)
        loss = upstream * problem.loss
        (d_clean,) = torch.autograd.grad(loss, problem.clean, retain_graph=True)
        (d_adv,) = torch.autograd.grad(loss, problem.adv)
        problem.check(d_clean, d_adv, upstream)


@LABELLED
def test_with_a_graph_between_two_without(labelled: bool) -> None:
    problem = Problem(torch.float32, labelled)
    inputs = problem.clean, problem.adv
    for create_graph in (True, False, True, False):
        problem.check(*torch.autograd.grad(problem.loss, inputs, retain_graph=True, create_graph=create_graph), 1.0)


def test_of_two_losses_of_the_same_logits() -> None:
    """Each holds its own."""
    problem = Problem(torch.float32, labelled=False)
    other = cktat_loss(problem.clean, problem.adv, problem.teacher, TAU, BETA)
    other.backward()
    (2.5 * problem.loss).backward()
    problem.check(problem.clean.grad, problem.adv.grad, 1.0, 2.5)


@pytest.mark.parametrize("form", ["loss", "labels", "rows", "terms"])
def test_float16_gradients_survive_loss_scaling(form: str) -> None:
    """Late in training, cast after the scaling: cast before it, most of them would be zero."""
    n, scale = 128, 65536.0
    base = 2 * torch.randn(n, 1000)
    clean, adv, teacher = ((base + 0.003 * torch.randn(n, 1000)) for _ in range(3))
    clean, adv, teacher = clean.half().requires_grad_(), adv.half().requires_grad_(), (5 * teacher).half()
    y = adv.detach().argmax(1) if form == "labels" else None
    true = oracle.truth(clean, adv, teacher, 5.0, 6.0, y)
    if form == "terms":
        terms = cktat_terms(clean, adv, teacher)
        (scale * (terms.guidance + 6.0 * terms.consistency).mean()).backward()
    elif form == "rows":
        (scale * cktat_loss(clean, adv, teacher, reduction="none").mean()).backward()
    else:
        (scale * cktat_loss(clean, adv, teacher, y=y)).backward()
    for actual, expected, unit in zip((clean.grad, adv.grad), true[3:5], true[5:], strict=True):
        assert actual is not None
        cast_first = torch.from_numpy(expected / n).half()
        assert (cast_first == 0).double().mean() > 0.5, "the case is too easy to tell"
        assert (actual == 0).double().mean() < 0.02
        assert oracle.gradient_error(actual, scale / n * expected, scale / n * unit) <= 2e-5
