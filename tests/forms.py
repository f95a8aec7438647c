"""The ways in which the library computes the loss, each as rows and the gradients of their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cktat_loss import _autograd, _plain, adaptive_beta, functional
from tests import oracle

Result = tuple[Tensor, Tensor, Tensor]
Beta = float | Tensor

# float64 is not the kernels' job.
FLOAT64 = pytest.param(torch.float64, marks=pytest.mark.torch_only)
DTYPES = (FLOAT64, torch.float32, torch.float16, torch.bfloat16)


class Form(NamedTuple):
    """What is called as ``form(clean, adv, teacher, tau, beta, y)``. A labelled one brings its own labels."""

    run: Callable[..., Result]
    labelled: bool = False

    def __call__(
        self, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: Beta, y: Tensor | None = None
    ) -> Result:
        return self.run(clean, adv, teacher, tau, beta, labels(adv) if self.labelled else y)

    def truth(
        self, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: Beta, y: Tensor | None = None
    ) -> oracle.Truth:
        return oracle.truth(clean, adv, teacher, tau, beta, labels(adv) if self.labelled else y)


def labels(adv: Tensor) -> Tensor:
    return torch.arange(adv.shape[0]) % adv.shape[1]


def by_autograd(loss: Callable[..., Tensor], clean: Tensor, adv: Tensor, *others: Any) -> Result:
    clean, adv = clean.detach().requires_grad_(), adv.detach().requires_grad_()
    out = loss(clean, adv, *others)
    return out.detach(), *torch.autograd.grad(out.sum(), (clean, adv))


def loss_of_rows(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: Beta, y: Tensor | None) -> Tensor:
    return functional.cktat_loss(clean, adv, teacher, tau, beta, y=y, reduction="none")


def loss_of_terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: Beta, y: Tensor | None) -> Tensor:
    guidance, consistency = functional.cktat_terms(clean, adv, teacher, tau)
    # Of float32 logits alone the weights would be float32, beside float64 of the others.
    weights = beta if y is None else adaptive_beta(adv.to(guidance.dtype), y, beta)  # type: ignore[arg-type]
    return guidance + (weights.to(guidance.dtype) if isinstance(weights, Tensor) else weights) * consistency


def rows(*args: Any) -> Result:
    return by_autograd(loss_of_rows, *args)


def terms(*args: Any) -> Result:
    return by_autograd(loss_of_terms, *args)


def total(*args: Any) -> Result:
    """The gradients of a sum, as training has them; the rows apart."""
    *logits, tau, beta, y = args
    with torch.no_grad():
        each = loss_of_rows(*args)
    loss, *gradients = by_autograd(
        lambda c, a: functional.cktat_loss(c, a, logits[2], tau, beta, y=y, reduction="sum"), *logits[:2]
    )
    torch.testing.assert_close(loss, each.sum(), rtol=1e-5, atol=1e-9, equal_nan=True)
    return each, *gradients


def without_branches(*args: Any) -> Result:
    """By plain ops, as on devices where Python must not look at values."""
    with patch.object(_autograd, "choose", lambda *_: _plain):
        return rows(*args)


def transformed(clean: Tensor, adv: Tensor, *others: Any) -> Result:
    """Under a torch.func transform."""
    each, vjp = torch.func.vjp(lambda c, a: loss_of_rows(c, a, *others), clean.detach(), adv.detach())
    return each, *vjp(torch.ones_like(each))


def by_the_compiler(*args: Any) -> Result:
    torch.compiler.reset()  # every shape and dtype is a compilation, and there is a limit to them
    return by_autograd(torch.compile(loss_of_rows, backend="aot_eager", fullgraph=True), *args)


def in_chunks(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: Beta, y: Tensor | None) -> Result:
    """By the Triton kernels that go through a row in chunks, though it would fit into registers.

    Of the first three rows apart, of the next three their sum; the others whole, since the interpreter is slow.
    """
    from cktat_loss.kernels import launch

    block = 32 if clean.shape[1] <= 330 else launch.STREAMING_BLOCK
    parts = []
    for some, run in ((slice(0, 3), rows), (slice(3, 6), total), (slice(6, None), None)):
        logits = clean[some], adv[some], teacher[some]
        weights = beta[some] if isinstance(beta, Tensor) and beta.ndim else beta
        with (
            patch.object(launch, "STREAMING_BLOCK", block),
            patch.object(launch, "ROWS_UP_TO", 0 if run else 4096),
            # None that was made for other sizes.
            patch.object(launch, "find_plan", getattr(launch.find_plan, "__wrapped__", launch.find_plan)),
        ):
            parts.append((run or rows)(*logits, tau, weights, y if y is None else y[some]))
    each, d_clean, d_adv = (torch.cat(one) for one in zip(*parts, strict=True))
    return each, d_clean, d_adv


compiled = Form(by_the_compiler)
streaming = Form(in_chunks)
# What the tests of accuracy and of edge cases go through.
FORMS: dict[str, Form] = {
    "rows": Form(rows),
    "labels": Form(total, labelled=True),
    "terms": Form(terms),
    "plain": Form(without_branches),
    "transformed": Form(transformed),
}
# The same where the Triton kernels are to be tested: see conftest.py.
TRITON_FORMS: dict[str, Form] = {
    "rows": Form(rows),
    "total": Form(total),
    "labels": Form(total, labelled=True),
    "streaming": streaming,
}
