"""Eq. 17 and its gradients in differentiable tensor operations, accurate also if a KL is tiny.

There is no branch on data: torch.compile fuses these operations, and torch.func transforms them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cktat_loss._backends import CKTATTerms, Forward, Gradients, Needs, Problem, Weighting

# Degree-4 Chebyshev fit of (d + expm1(-d)) / d^2 for |d| < SERIES_BELOW, relative error 9e-7. For larger |d| the direct
# form is accurate enough: if a KL is small, such classes carry little probability.
SERIES_BELOW = 0.5
SERIES = (0.50000001, -0.16666277, 0.04166579, -0.00839556, 0.00139822)


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 if any of the logits are float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def kl_elements(p: Tensor, d: Tensor, q: Tensor) -> Tensor:
    """Return the summands ``p (d + expm1(-d)) = p d + q - p`` of KL(p || q), with d = log p - log q.

    ``q - p`` sums to zero over a row, so the total is that of ``p d``. But no summand is negative, so none cancel, and
    rounding is relative to d^2 instead of d. If p = 0, pass d = 1: the summand is then q.
    """
    direct = p * d + (q - p)
    if p.dtype == torch.float64:  # its rounding error of 1e-16 does not matter
        return direct
    c0, c1, c2, c3, c4 = SERIES
    series = p * (d * d) * (c0 + d * (c1 + d * (c2 + d * (c3 + d * c4))))
    return torch.where(d.abs() < SERIES_BELOW, series, direct)


def log_softmax(logits: Tensor, tau: float | None = None) -> Tensor:
    """Return log softmax(logits / tau). Subtracts the maximum before the division, which could overflow.

    Written out because torch.log_softmax would subtract a maximum once more after the division. Without tau the same
    operations serve, so that equal predictions are equal to the bit.
    """
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    shifted = shifted if tau is None else shifted / tau
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row, (..., C) -> (...), with 0 log 0 = 0 and never negative."""
    p = log_p.exp()
    d = torch.where(p > 0, log_p - log_q, 1.0)
    kl = kl_elements(p, d, log_q.exp()).sum(-1)
    # Clamp the value only: NaN stays NaN, and the derivative is not cut off at KL = 0.
    return kl - kl.detach().clamp(max=0)


def gradients(problem: Problem, w_guidance: Tensor, w_consistency: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``(w_guidance * guidance + w_consistency * consistency).sum()``.

    The weights are () or (N,). Each gradient is cast to its logits' dtype at the end.
    """
    clean, adv, teacher, tau = problem
    dtype = compute_dtype(clean, adv, teacher)
    log_c, log_a = log_softmax(clean.to(dtype)), log_softmax(adv.to(dtype))
    p_c, p_a, p_t = log_c.exp(), log_a.exp(), log_softmax(teacher.to(dtype), tau).exp()
    d = torch.where(p_c > 0, log_c - log_a, 0.0)
    w_g, w_c = w_guidance.unsqueeze(-1), w_consistency.unsqueeze(-1)
    d_clean = w_c * p_c * (d - (p_c * d).sum(-1, keepdim=True))
    # Equal to w_g (p_a - p_t) + w_c (p_a - p_c). Here p_a and p_t occur once, so that a compiler computes their exp
    # within this line and stores neither.
    d_adv = (w_g + w_c) * (p_a - p_c) + w_g * (p_c - p_t)
    return d_clean.to(clean.dtype), d_adv.to(adv.dtype)


def label_weights(p_adv: Tensor, y: Tensor, beta: float | Tensor) -> Tensor:
    """Return ``beta * p_adv[y]``, (N,): NaN if y is out of range.

    The label is clamped before the gather: an index out of range would end the process's CUDA context.
    """
    classes = p_adv.shape[-1]
    y = y.long()
    p = p_adv.gather(-1, y.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
    return beta * torch.where((y >= 0) & (y < classes), p, torch.nan)


def sample_weights(problem: Problem, weighting: Weighting) -> float | Tensor:
    """Return the weight of each sample's consistency: beta, times softmax(adv)[y] with labels. It has no gradient."""
    dtype = compute_dtype(problem.clean, problem.adv, problem.teacher)
    if weighting.y is not None:
        return label_weights(log_softmax(problem.adv.detach().to(dtype)).exp(), weighting.y, weighting.beta)
    if isinstance(weighting.beta, Tensor):  # cast: a float16 beta, (N,), times a 0-d grad_output would stay float16
        return weighting.beta.to(dtype)
    return weighting.beta


def reduce(terms: CKTATTerms, weights: float | Tensor, reduction: str) -> Tensor:
    """Return ``guidance + weights * consistency`` per sample, reduced, in the dtype of the terms."""
    rows = terms.guidance + weights * terms.consistency
    if reduction == "mean":
        rows = rows.mean()
    elif reduction == "sum":
        rows = rows.sum()
    return rows.to(terms.guidance.dtype)


def row_gradient(grad_output: Tensor, reduction: str, n: int) -> Tensor:
    """Return the gradient of each row's loss, () or (N,): ``grad_output``, divided by N for "mean"."""
    return grad_output / max(1, n) if reduction == "mean" else grad_output


def combine(problem: Problem, weighting: Weighting, terms: CKTATTerms, return_terms: bool) -> Forward:
    """Compute the loss from its terms."""
    loss = reduce(terms, sample_weights(problem, weighting), weighting.reduction)
    detached = CKTATTerms(terms.guidance.detach(), terms.consistency.detach()) if return_terms else None
    return Forward(loss, detached, None)


def loss_forward(problem: Problem, weighting: Weighting, needs: Needs, return_terms: bool) -> Forward:
    return combine(problem, weighting, terms_forward(problem), return_terms)


def loss_backward(
    problem: Problem, weighting: Weighting, grad_output: Tensor, precomputed: Any, needs: Needs
) -> Gradients:
    w_guidance = row_gradient(grad_output, weighting.reduction, problem.adv.shape[0])
    return terms_backward(problem, w_guidance, sample_weights(problem, weighting) * w_guidance, needs)


def terms_forward(problem: Problem) -> CKTATTerms:
    clean, adv, teacher, tau = problem
    dtype = compute_dtype(clean, adv, teacher)
    log_a = log_softmax(adv.to(dtype))
    guidance = kl_divergence(log_softmax(teacher.to(dtype), tau), log_a)
    return CKTATTerms(guidance, kl_divergence(log_softmax(clean.to(dtype)), log_a))


def terms_backward(problem: Problem, grad_guidance: Tensor, grad_consistency: Tensor, needs: Needs) -> Gradients:
    d_clean, d_adv = gradients(problem, grad_guidance, grad_consistency)
    return d_clean if needs.clean else None, d_adv if needs.adv else None
