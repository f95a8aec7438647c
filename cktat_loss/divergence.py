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
    """log softmax(logits / tau), the maximum taken off first: logits / tau can overflow, and a large offset rounds."""
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    return torch.log_softmax(shifted if tau is None else shifted / tau, -1)


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
