"""The ways in which the library computes the loss, each as rows and the gradients of their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cktat_loss import closed_form
from cktat_loss.functional import cktat_loss, cktat_loss_and_grads, cktat_terms

Result = tuple[Tensor, Tensor, Tensor]
Form = Callable[..., Result]


def by_autograd(rows: Callable[..., Tensor], clean: Tensor, adv: Tensor, *others: Any) -> Result:
    clean, adv = clean.detach().requires_grad_(), adv.detach().requires_grad_()
    loss = rows(clean, adv, *others)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (clean, adv))


def rows_of_loss(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float | Tensor) -> Tensor:
    return cktat_loss(clean, adv, teacher, tau, beta, reduction="none")


def rows_of_terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float | Tensor) -> Tensor:
    guidance, consistency = cktat_terms(clean, adv, teacher, tau)
    return guidance + beta * consistency


def eager(*args: Any) -> Result:
    return by_autograd(rows_of_loss, *args)


def terms(*args: Any) -> Result:
    return by_autograd(rows_of_terms, *args)


def at_once(*args: Any) -> Result:
    """Loss and gradients in one pass, of the sum; the rows apart."""
    with torch.no_grad():
        rows = rows_of_loss(*args)
    total, d_clean, d_adv = cktat_loss_and_grads(*args, reduction="sum")
    torch.testing.assert_close(total, rows.sum(), rtol=1e-5, atol=1e-9, equal_nan=True)
    assert d_clean is not None
    return rows, d_clean, d_adv


def streaming(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float | Tensor) -> Result:
    """By the Triton kernels that go through a row in chunks, though it would fit into registers.

    With a graph the first three rows, in one pass the next three; the others whole, since the interpreter is slow.
    """
    from cktat_loss.kernels import launch

    block = 32 if clean.shape[1] <= 330 else launch.STREAMING_BLOCK
    parts = []
    for rows, form in ((slice(0, 3), eager), (slice(3, 6), at_once), (slice(6, None), None)):
        part = (
            clean[rows],
            adv[rows],
            teacher[rows],
            tau,
            beta[rows] if isinstance(beta, Tensor) and beta.ndim else beta,
        )
        with patch.object(launch, "STREAMING_BLOCK", block), patch.object(launch, "ROWS_UP_TO", 0 if form else 4096):
            parts.append((form or eager)(*part))
    rows, d_clean, d_adv = (torch.cat(one) for one in zip(*parts, strict=True))
    return rows, d_clean, d_adv


def branchless(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float | Tensor) -> Result:
    """The closed form as on devices where Python must not look at values."""
    out = closed_form.fused(
        clean, adv, teacher, tau, closed_form.ONE, beta, clean_grad=True, adv_grad=True, branch_on_data=False
    )
    assert out.d_clean is not None
    assert out.d_adv is not None
    return out.guidance + beta * out.consistency, out.d_clean.to(clean.dtype), out.d_adv.to(adv.dtype)


def transformed(clean: Tensor, adv: Tensor, *others: Any) -> Result:
    """Under a torch.func transform."""
    rows, vjp = torch.func.vjp(lambda c, a: rows_of_loss(c, a, *others), clean.detach(), adv.detach())
    return rows, *vjp(torch.ones_like(rows))


def compiled(*args: Any) -> Result:
    torch.compiler.reset()  # every shape and dtype is a compilation, and there is a limit to them
    return by_autograd(torch.compile(rows_of_loss, backend="aot_eager", fullgraph=True), *args)


# What the tests of accuracy and of edge cases go through.
FORMS: dict[str, Form] = {
    "eager": eager,
    "terms": terms,
    "at once": at_once,
    "branchless": branchless,
    "transformed": transformed,
}
# The same where the Triton kernels are to be tested: see conftest.py.
TRITON_FORMS: dict[str, Form] = {"eager": eager, "at once": at_once, "streaming": streaming}
