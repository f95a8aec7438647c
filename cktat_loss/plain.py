"""Eq. 17 and its gradients in plain tensor ops, accurate also where a KL is tiny.

Differentiable as often as asked, without branches on data: what torch.compile fuses and torch.func transforms. Here
too are the few words that all backends share, each of which has a ``forward`` and a ``backward`` like these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# (d + expm1(-d)) / d^2 for |d| below this, as the Chebyshev fit of degree 4: right to 9e-7 relative. Beyond, the plain
# form is: where a KL is small, little of its probability has such a d.
SERIES_BELOW = 0.5
SERIES = (0.50000001, -0.16666277, 0.04166579, -0.00839556, 0.00139822)

Upstream = tuple[Tensor | None, ...]
Gradients = tuple[Tensor | None, Tensor | None]


class Pass(NamedTuple):
    """What a forward pass gives; None where it was not asked for."""

    loss: Tensor | None
    guidance: Tensor | None
    consistency: Tensor | None
    held: Any = None  # what the backend wants back in the backward pass


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
    c0, c1, c2, c3, c4 = SERIES
    series = p * (d * d) * (c0 + d * (c1 + d * (c2 + d * (c3 + d * c4))))
    return torch.where(d.abs() < SERIES_BELOW, series, plain)


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
    """Both KL terms of Eq. 17, (N, C) -> two of (N,), in their ``compute_dtype``."""
    dtype = compute_dtype(clean, adv, teacher)
    log_a = log_softmax(adv.to(dtype))
    guidance = kl_divergence(log_softmax(teacher.to(dtype), tau), log_a)
    return guidance, kl_divergence(log_softmax(clean.to(dtype)), log_a)


def gradients(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, w_guidance: Tensor, w_consistency: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``(w_guidance * guidance + w_consistency * consistency).sum()`` of :func:`terms`, not cast.

    Weights are 0-d or (N,).
    """
    dtype = compute_dtype(clean, adv, teacher)
    log_c, log_a = log_softmax(clean.to(dtype)), log_softmax(adv.to(dtype))
    p_c, p_a, p_t = log_c.exp(), log_a.exp(), log_softmax(teacher.to(dtype), tau).exp()
    d = torch.where(p_c > 0, log_c - log_a, 0.0)
    w_g, w_c = w_guidance.unsqueeze(-1), w_consistency.unsqueeze(-1)
    d_clean = w_c * p_c * (d - (p_c * d).sum(-1, keepdim=True))
    # w_g (p_a - p_t) + w_c (p_a - p_c), with one use of p_a and p_t: a compiler stores an exp that is used twice.
    return d_clean, (w_g + w_c) * (p_a - p_c) + w_g * (p_c - p_t)


def label_weights(p_adv: Tensor, y: Tensor, beta: float | Tensor) -> Tensor:
    """``beta * p_adv[y]``, (N,); NaN where y is no class. Never a failed assertion on a device."""
    classes = p_adv.shape[-1]
    y = y.long()
    p = p_adv.gather(-1, y.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
    return beta * torch.where((y >= 0) & (y < classes), p, torch.nan)


def sample_weights(adv: Tensor, y: Tensor | None, beta: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The weights of the consistency: beta, or with labels beta * softmax(adv)[y]. No gradient flows through them."""
    return beta if y is None else label_weights(log_softmax(adv.detach().to(dtype)).exp(), y, beta)


def reduced(guidance: Tensor, consistency: Tensor, beta: float | Tensor, reduction: str) -> Tensor:
    """``guidance + beta * consistency`` of each sample, reduced, in the dtype of the terms."""
    rows = guidance + beta * consistency
    rows = rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows
    return rows.to(guidance.dtype)


def upstream_weights(upstream: Upstream, reduction: str, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What the terms' gradients are multiplied by, before beta: 0-d or (N,), the 1/N of a mean in it."""
    w_guidance, w_consistency = upstream if reduction == "terms" else upstream * 2
    zero = like.new_zeros(()) if w_guidance is None or w_consistency is None else None
    w_guidance, w_consistency = (zero if w is None else w for w in (w_guidance, w_consistency))
    assert w_guidance is not None
    assert w_consistency is not None
    if reduction == "mean":
        w_guidance = w_consistency = w_guidance / max(1, n)
    return w_guidance, w_consistency


def forward(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float,
    beta: float | Tensor,
    y: Tensor | None,
    reduction: str,
    return_terms: bool,
    needed: tuple[bool, ...],
) -> Pass:
    """The loss and, if asked for, its terms; of the reduction "terms" those alone.

    Gradients are left to :func:`backward`, which starts from the logits: a compiler that derived it would keep five
    tensors of their size from one pass to the other.
    """
    guidance, consistency = terms(clean, adv, teacher, tau)
    if reduction == "terms":
        return Pass(None, guidance, consistency)
    beta = sample_weights(adv, y, beta, guidance.dtype)
    loss = reduced(guidance, consistency, beta, reduction)
    return Pass(loss, guidance, consistency) if return_terms else Pass(loss, None, None)


def backward(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float,
    beta: float | Tensor,
    y: Tensor | None,
    reduction: str,
    upstream: Upstream,
    held: Any,
    needed: tuple[bool, ...],
) -> Gradients:
    """The gradients of the loss, or of both terms, cast last. ``held`` is the forward pass's, or None when repeated."""
    dtype = compute_dtype(clean, adv, teacher)
    w_guidance, w_consistency = upstream_weights(upstream, reduction, clean.shape[0], adv)
    w_consistency = sample_weights(adv, y, beta, dtype) * w_consistency
    d_clean, d_adv = gradients(clean, adv, teacher, tau, w_guidance, w_consistency)
    return d_clean.to(clean.dtype) if needed[0] else None, d_adv.to(adv.dtype) if needed[1] else None
