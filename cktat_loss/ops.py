"""Autograd around the backends: what is computed when, and the dtype in which it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cktat_loss import closed_form, divergence
from cktat_loss.closed_form import Fused
from cktat_loss.divergence import compute_dtype


class CKTATTerms(NamedTuple):
    """The two KL terms of Eq. 17, a value a sample, each (N,): ``guidance + beta * consistency`` is the loss."""

    guidance: Tensor
    consistency: Tensor


def cktat_loss(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float | Tensor, reduction: str) -> Tensor:
    """Eq. 17, reduced: a scalar, or (N,) for "none". Differentiable in ``clean`` and ``adv`` as often as asked."""
    if _traced():
        return _reduce(CKTATTerms(*divergence.terms(clean, adv, teacher, tau)), beta, reduction, clean, adv, teacher)
    if torch.is_grad_enabled() and (clean.requires_grad or adv.requires_grad):
        return _Loss.apply(clean, adv, teacher, tau, beta, reduction)  # type: ignore[no-any-return]
    return _reduce(_forward(clean, adv, teacher, tau), beta, reduction, clean, adv, teacher)


def cktat_terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> CKTATTerms:
    """Both terms of Eq. 17. Differentiable in ``clean`` and ``adv`` as often as asked."""
    if _traced():
        return CKTATTerms(*divergence.terms(clean, adv, teacher, tau))
    if torch.is_grad_enabled() and (clean.requires_grad or adv.requires_grad):
        return CKTATTerms(*_Terms.apply(clean, adv, teacher, tau))
    return _forward(clean, adv, teacher, tau)


def cktat_loss_and_grads(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float,
    beta: float | Tensor,
    reduction: str,
    grad_scale: float | Tensor,
    clean_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The reduced loss, and ``grad_scale`` times its gradients, in one pass and without a graph."""
    with torch.no_grad():
        out = _fused(clean, adv, teacher, tau, closed_form.ONE, beta, clean_grad=clean_grad, adv_grad=True)
        scale = grad_scale / max(1, clean.shape[0]) if reduction == "mean" else grad_scale
        d_clean, d_adv = _scaled(out.d_clean, scale, clean), _scaled(out.d_adv, scale, adv)
        assert d_adv is not None
        return _reduce(out, beta, reduction, clean, adv, teacher), d_clean, d_adv


class _Loss(torch.autograd.Function):
    """The whole loss as one node, so that autograd adds no work of its own around it.

    One pass gives the loss and the gradients for an upstream gradient of one, in float32 or float64; the backward
    pass scales them and casts. They are held for one backward pass only: a second one, over a retained graph,
    computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        clean: Tensor,
        adv: Tensor,
        teacher: Tensor,
        tau: float,
        beta: float | Tensor,
        reduction: str,
    ) -> Tensor:
        ctx.save_for_backward(clean, adv, teacher, beta if isinstance(beta, Tensor) else None)
        ctx.tau, ctx.beta, ctx.reduction = tau, beta, reduction
        clean_grad, adv_grad = ctx.needs_input_grad[:2]
        out = _fused(clean, adv, teacher, tau, closed_form.ONE, beta, clean_grad=clean_grad, adv_grad=adv_grad)
        ctx.gradients = out.d_clean, out.d_adv
        return _reduce(out, beta, reduction, clean, adv, teacher)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        clean, adv, teacher, beta = ctx.saved_tensors
        beta = ctx.beta if beta is None else beta
        clean_grad, adv_grad = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or _traced(upstream):

            def loss(clean: Tensor, adv: Tensor) -> tuple[Tensor]:
                terms = CKTATTerms(*divergence.terms(clean, adv, teacher, ctx.tau))
                return (_reduce(terms, beta, ctx.reduction, clean, adv, teacher),)

            return *_differentiable_backward(loss, clean, adv, (upstream,), ctx.needs_input_grad), *[None] * 4
        if ctx.gradients is None:
            out = _fused(clean, adv, teacher, ctx.tau, closed_form.ONE, beta, clean_grad=clean_grad, adv_grad=adv_grad)
            ctx.gradients = out.d_clean, out.d_adv
        (d_clean, d_adv), ctx.gradients = ctx.gradients, None
        if ctx.reduction == "mean":
            upstream = upstream / max(1, clean.shape[0])
        elif ctx.reduction == "none":
            upstream = upstream.unsqueeze(1)
        return _scaled(d_clean, upstream, clean), _scaled(d_adv, upstream, adv), *[None] * 4


class _Terms(torch.autograd.Function):
    """Both terms as one node; with two upstream gradients a row, the backward pass computes the gradients anew."""

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(clean, adv, teacher)
        ctx.tau = tau
        guidance, consistency = _forward(clean, adv, teacher, tau)
        # Copies, not two views of one tensor, which autograd would guard against changes.
        return guidance.clone(), consistency.clone()

    @staticmethod
    def backward(ctx: Any, w_guidance: Tensor, w_consistency: Tensor) -> tuple[Tensor | None, ...]:
        clean, adv, teacher = ctx.saved_tensors
        clean_grad, adv_grad = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or _traced(w_guidance, w_consistency):

            def terms(clean: Tensor, adv: Tensor) -> tuple[Tensor, ...]:
                return divergence.terms(clean, adv, teacher, ctx.tau)

            weights = (w_guidance, w_consistency)
            return *_differentiable_backward(terms, clean, adv, weights, ctx.needs_input_grad), None, None
        out = _fused(clean, adv, teacher, ctx.tau, w_guidance, w_consistency, clean_grad=clean_grad, adv_grad=adv_grad)
        return _scaled(out.d_clean, 1.0, clean), _scaled(out.d_adv, 1.0, adv), None, None


def _traced(*upstream: Tensor) -> bool:
    """Whether torch.compile or a functorch transform is looking: both want plain tensor ops and no Python branches.

    A backward pass mapped over many upstream gradients (``is_grads_batched``) shows in those alone.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(torch._C._functorch.is_legacy_batchedtensor(u) for u in upstream)
    )


def _fused(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, *weights: float | Tensor, **wanted: bool) -> Fused:
    branch_on_data = clean.device.type == "cpu" and not _traced()
    return closed_form.fused(clean, adv, teacher, tau, *weights, **wanted, branch_on_data=branch_on_data)


def _forward(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> CKTATTerms:
    with torch.no_grad():
        out = _fused(clean, adv, teacher, tau, clean_grad=False, adv_grad=False)
    dtype = compute_dtype(clean, adv, teacher)
    return CKTATTerms(out.guidance.to(dtype), out.consistency.to(dtype))


def _reduce(terms: CKTATTerms | Fused, beta: float | Tensor, reduction: str, *logits: Tensor) -> Tensor:
    rows = terms.guidance + beta * terms.consistency
    return (rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows).to(
        compute_dtype(*logits)
    )


def _scaled(gradient: Tensor | None, scale: float | Tensor, logits: Tensor) -> Tensor | None:
    """``gradient * scale`` in the dtype of ``logits``, cast last; the gradient's own memory where that fits."""
    if gradient is None:
        return None
    return gradient.mul_(scale).to(logits.dtype)


def _differentiable_backward(
    outputs: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    clean: Tensor,
    adv: Tensor,
    upstream: tuple[Tensor, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients by autograd, so that they can be differentiated again (``create_graph``) or mapped over."""
    with torch.enable_grad():
        # Views: if one of the two depends on the other, each gradient must still be the partial one.
        clean, adv = clean.view_as(clean), adv.view_as(adv)
        inputs = [x for x, need in zip((clean, adv), needed, strict=False) if need]
        values = outputs(clean, adv)
    gradients = iter(torch.autograd.grad(values, inputs, upstream, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if need else None for need in needed[:2]]
