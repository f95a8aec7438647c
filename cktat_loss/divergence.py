"""KL divergence between softmaxes, row by row, that stays accurate when it is tiny. Plain differentiable tensor ops."""

from __future__ import annotations

import torch
from torch import Tensor

# (d + expm1(-d)) / d^2 for |d| below this, as the Chebyshev fit of degree 4: right to 9e-7 relative. Beyond, the plain
# form is: where a KL is small, little of its probability has such a d.
SERIES_BELOW = 0.5
SERIES = (0.50000001, -0.16666277, 0.04166579, -0.00839556, 0.00139822)


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """The arithmetic's dtype: float32, or float64 where any of the logits is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def kl_elements(p: Tensor, d: Tensor, q: Tensor) -> Tensor:
    """The summands ``p (d + expm1(-d)) = p d + q - p`` of KL(p || q), with d = log p - log q.

    The sum of ``q - p`` over a row is zero, so the total is that of ``p d``; but no summand is negative, none cancel,
    and rounding is relative to d^2 instead of d. Where p = 0, pass d = 1: the summand is then q.
    """
    plain = p * d + (q - p)
    if p.dtype == torch.float64:  # rounds to 1e-16, below what anyone reads
        return plain
    return torch.where(d.abs() < SERIES_BELOW, small_kl_elements(p, d), plain)


def small_kl_elements(p: Tensor, d: Tensor) -> Tensor:
    """The summands of :func:`kl_elements` where |d| is below ``SERIES_BELOW``."""
    c0, c1, c2, c3, c4 = SERIES
    return p * (d * d) * (c0 + d * (c1 + d * (c2 + d * (c3 + d * c4))))


def log_softmax(logits: Tensor, tau: float | None = None) -> Tensor:
    """log softmax(logits / tau), the maximum taken off first: logits / tau can overflow, and a large offset rounds.

    By hand, since torch's takes off the maximum once more, also where a compiler writes it out.
    """
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    shifted = shifted if tau is None else shifted / tau
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, (..., C) -> (...), with 0 log 0 = 0 and never negative."""
    p = log_p.exp()
    d = torch.where(p > 0, log_p - log_q, 1.0)
    kl = kl_elements(p, d, log_q.exp()).sum(-1)
    return kl - kl.detach().clamp(max=0)  # clamps the value, keeps NaN, and keeps the derivatives at zero


def terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Both KL terms of Eq. 17, (N, C) -> two of (N,), in their ``compute_dtype``; autograd derives everything else."""
    dtype = compute_dtype(clean, adv, teacher)
    log_a = log_softmax(adv.to(dtype))
    guidance = kl_divergence(log_softmax(teacher.to(dtype), tau), log_a)
    return guidance, kl_divergence(log_softmax(clean.to(dtype)), log_a)


def gradients(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, w_guidance: Tensor, w_consistency: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``(w_guidance * guidance + w_consistency * consistency).sum()`` of :func:`terms`, cast last."""
    dtype = compute_dtype(clean, adv, teacher)
    log_c, log_a = log_softmax(clean.to(dtype)), log_softmax(adv.to(dtype))
    p_t, p_c, p_a = log_softmax(teacher.to(dtype), tau).exp(), log_c.exp(), log_a.exp()
    d = torch.where(p_c > 0, log_c - log_a, 0.0)
    w_t, w_c = w_guidance.unsqueeze(-1), w_consistency.unsqueeze(-1)
    d_clean = w_c * p_c * (d - (p_c * d).sum(-1, keepdim=True))
    # w_t (p_a - p_t) + w_c (p_a - p_c), with one use of p_a and p_t: a compiler stores an exp that is used twice.
    d_adv = (w_t + w_c) * (p_a - p_c) + w_t * (p_c - p_t)
    return d_clean.to(clean.dtype), d_adv.to(adv.dtype)
