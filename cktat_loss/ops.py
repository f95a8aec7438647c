"""Autograd around the backends: what is computed when, and the dtype in which it comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cktat_loss import closed_form, divergence, kernels, operators
from cktat_loss.closed_form import Fused
from cktat_loss.divergence import compute_dtype


class CKTATTerms(NamedTuple):
    """The two KL terms of Eq. 17, a value a sample, each (N,): ``guidance + beta * consistency`` is the loss."""

    guidance: Tensor
    consistency: Tensor


def cktat_loss(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float | Tensor, reduction: str, backend: str
) -> Tensor:
    """Eq. 17, reduced: a scalar, or (N,) for "none". Differentiable in ``clean`` and ``adv`` as often as asked."""
    if _traced():
        return _reduce(_traced_terms(clean, adv, teacher, tau, backend), beta, reduction, clean, adv, teacher)
    triton = _to_triton(backend, clean, adv, teacher)
    if torch.is_grad_enabled() and (clean.requires_grad or adv.requires_grad):
        return _Loss.apply(clean, adv, teacher, tau, beta, reduction, triton)  # type: ignore[no-any-return]
    if triton:
        return kernels.loss(clean, adv, teacher, tau, beta, reduction).value
    return _reduce(_forward(clean, adv, teacher, tau), beta, reduction, clean, adv, teacher)


def cktat_terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, backend: str) -> CKTATTerms:
    """Both terms of Eq. 17. Differentiable in ``clean`` and ``adv`` as often as asked."""
    if _traced():
        return _traced_terms(clean, adv, teacher, tau, backend)
    triton = _to_triton(backend, clean, adv, teacher)
    if torch.is_grad_enabled() and (clean.requires_grad or adv.requires_grad):
        return CKTATTerms(*_Terms.apply(clean, adv, teacher, tau, triton))
    if triton:
        return CKTATTerms(*kernels.terms(clean, adv, teacher, tau)[:2])
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
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The reduced loss, and ``grad_scale`` times its gradients, in one pass and without a graph."""
    with torch.no_grad():
        if not _traced() and _to_triton(backend, clean, adv, teacher):
            return kernels.loss_and_grads(clean, adv, teacher, tau, beta, reduction, grad_scale, need_clean=clean_grad)
        out = _fused(clean, adv, teacher, tau, closed_form.ONE, beta, clean_grad=clean_grad, adv_grad=True)
        scale = grad_scale / max(1, clean.shape[0]) if reduction == "mean" else grad_scale
        d_clean, d_adv = _scaled(out.d_clean, scale, clean), _scaled(out.d_adv, scale, adv)
        assert d_adv is not None
        return _reduce(out, beta, reduction, clean, adv, teacher), d_clean, d_adv


class _Loss(torch.autograd.Function):
    """The whole loss as one node, so that autograd adds no work of its own around it.

    In closed form, one pass gives the loss and the gradients for an upstream gradient of one, in float32 or float64;
    the backward pass scales them and casts. They are held for one backward pass only: a second one, over a retained
    graph, computes them again. The Triton kernels save row statistics instead, and make the gradients of them later.
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
        triton: bool,
    ) -> Tensor:
        ctx.tau, ctx.beta, ctx.reduction = tau, beta, reduction
        saved = clean, adv, teacher, beta if isinstance(beta, Tensor) else None
        if triton:
            loss, state = kernels.loss(clean, adv, teacher, tau, beta, reduction, save_state=True)
            ctx.save_for_backward(*saved, state)
            return loss
        ctx.save_for_backward(*saved, None)
        clean_grad, adv_grad = ctx.needs_input_grad[:2]
        out = _fused(clean, adv, teacher, tau, closed_form.ONE, beta, clean_grad=clean_grad, adv_grad=adv_grad)
        ctx.gradients = out.d_clean, out.d_adv
        return _reduce(out, beta, reduction, clean, adv, teacher)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        clean, adv, teacher, beta, state = ctx.saved_tensors
        beta = ctx.beta if beta is None else beta
        clean_grad, adv_grad = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or _traced(upstream):

            def loss(clean: Tensor, adv: Tensor) -> tuple[Tensor]:
                terms = CKTATTerms(*divergence.terms(clean, adv, teacher, ctx.tau))
                return (_reduce(terms, beta, ctx.reduction, clean, adv, teacher),)

            return *_differentiable_backward(loss, clean, adv, (upstream,), ctx.needs_input_grad), *[None] * 5
        if state is not None:
            scale = 1 / max(1, clean.shape[0]) if ctx.reduction == "mean" else 1.0
            return *kernels.gradients(
                clean, adv, teacher, ctx.tau, state, upstream, upstream,
                beta=beta, scale=scale, need_clean=clean_grad, need_adv=adv_grad,
            ), *[None] * 5  # fmt: skip
        if ctx.gradients is None:
            out = _fused(clean, adv, teacher, ctx.tau, closed_form.ONE, beta, clean_grad=clean_grad, adv_grad=adv_grad)
            ctx.gradients = out.d_clean, out.d_adv
        (d_clean, d_adv), ctx.gradients = ctx.gradients, None
        if ctx.reduction == "mean":
            upstream = upstream / max(1, clean.shape[0])
        elif ctx.reduction == "none":
            upstream = upstream.unsqueeze(1)
        return _scaled(d_clean, upstream, clean), _scaled(d_adv, upstream, adv), *[None] * 5


class _Terms(torch.autograd.Function):
    """Both terms as one node; with two upstream gradients a row, the backward pass computes the gradients anew."""

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, triton: bool) -> tuple[Tensor, ...]:
        ctx.tau = tau
        if triton:
            *both, state = kernels.terms(clean, adv, teacher, tau, save_state=True)
            ctx.save_for_backward(clean, adv, teacher, state)
            return tuple(both)
        ctx.save_for_backward(clean, adv, teacher, None)
        guidance, consistency = _forward(clean, adv, teacher, tau)
        # Copies, not two views of one tensor, which autograd would guard against changes.
        return guidance.clone(), consistency.clone()

    @staticmethod
    def backward(ctx: Any, w_guidance: Tensor, w_consistency: Tensor) -> tuple[Tensor | None, ...]:
        clean, adv, teacher, state = ctx.saved_tensors
        clean_grad, adv_grad = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or _traced(w_guidance, w_consistency):

            def terms(clean: Tensor, adv: Tensor) -> tuple[Tensor, ...]:
                return divergence.terms(clean, adv, teacher, ctx.tau)

            weights = (w_guidance, w_consistency)
            return *_differentiable_backward(terms, clean, adv, weights, ctx.needs_input_grad), *[None] * 3
        if state is not None:
            return *kernels.gradients(
                clean, adv, teacher, ctx.tau, state, w_guidance, w_consistency, need_clean=clean_grad, need_adv=adv_grad
            ), *[None] * 3
        out = _fused(clean, adv, teacher, ctx.tau, w_guidance, w_consistency, clean_grad=clean_grad, adv_grad=adv_grad)
        return _scaled(out.d_clean, 1.0, clean), _scaled(out.d_adv, 1.0, adv), *[None] * 3


class _InGraph(torch.autograd.Function):
    """Both terms as plain ops for torch.compile, whose backward pass starts from the logits.

    Left to derive it, the compiler keeps five tensors of their size from one pass to the other.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        ctx.tau = tau
        ctx.save_for_backward(clean, adv, teacher)
        return divergence.terms(clean, adv, teacher, tau)

    @staticmethod
    def backward(ctx: Any, w_guidance: Tensor, w_consistency: Tensor) -> tuple[Tensor | None, ...]:
        clean, adv, teacher = ctx.saved_tensors
        return *divergence.gradients(clean, adv, teacher, ctx.tau, w_guidance, w_consistency), None, None


def _to_triton(backend: str, *logits: Tensor) -> bool:
    """Whether the kernels take these: on CPU tensors (Triton's interpreter) only where asked for by name."""
    if torch.autograd.forward_ad._current_level >= 0:
        return False  # a launch would lose the tangents
    if backend == "triton":
        return True  # or checks.py would have said no
    return backend == "auto" and all(x.device.type != "cpu" and kernels.supports(x) for x in logits)


def _traced_terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, backend: str) -> CKTATTerms:
    """For torch.compile the kernels are operators. Transforms map and differentiate plain ops as often as they like."""
    if not torch._C._are_functorch_transforms_active() and _to_triton(backend, clean, adv, teacher):
        # A tensor, since an operator's float is a constant of the graph: a schedule would compile it every time. By a
        # product, since that is what the compiler takes for a variable one.
        tau_now = tau * adv.new_ones((), dtype=torch.float32)
        return CKTATTerms(*operators.terms(clean, adv, teacher, tau_now)[:2])
    if torch._C._are_functorch_transforms_active():
        return CKTATTerms(*divergence.terms(clean, adv, teacher, tau))
    return CKTATTerms(*_InGraph.apply(clean, adv, teacher, tau))


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
    # A subclass may have no data to look at: a fake tensor has none.
    branch_on_data = clean.device.type == "cpu" and type(clean) in kernels.PLAIN and not _traced()
    return closed_form.fused(clean, adv, teacher, tau, *weights, **wanted, branch_on_data=branch_on_data)


def _forward(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> CKTATTerms:
    """The terms, where no gradient is recorded anyway; not in float64 if that was only a way to compute them."""
    guidance, consistency, *_ = _fused(clean, adv, teacher, tau, clean_grad=False, adv_grad=False)
    dtype = compute_dtype(clean, adv, teacher)
    return CKTATTerms(guidance.to(dtype), consistency.to(dtype))


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
