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


class Problem(NamedTuple):
    """What is to be computed, as every backend gets it."""

    clean: Tensor
    adv: Tensor
    teacher: Tensor
    tau: float
    beta: float | Tensor  # weight of the consistency: a number, or a tensor, 0-d or (N,)
    y: Tensor | None  # labels, which multiply beta by softmax(adv)[y]
    reduction: str  # "mean", "sum" or "none" of the loss; "terms": no loss, but both terms


class Pass(NamedTuple):
    """What a forward pass gives; None where it was not asked for."""

    loss: Tensor | None
    guidance: Tensor | None
    consistency: Tensor | None
    held: Any = None  # what the backend wants back in the backward pass


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """The arithmetic's dtype: float32, or float64 where any of the logits is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def transformed() -> bool:
    """Whether a torch.func transform is at work. A private name, the same since torch 2.0."""
    return torch._C._are_functorch_transforms_active()


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
    """The gradients of ``(w_guidance * guidance + w_consistency * consistency).sum()``, cast last.

    Weights are 0-d or (N,).
    """
    dtype = compute_dtype(clean, adv, teacher)
    log_c, log_a = log_softmax(clean.to(dtype)), log_softmax(adv.to(dtype))
    p_c, p_a, p_t = log_c.exp(), log_a.exp(), log_softmax(teacher.to(dtype), tau).exp()
    d = torch.where(p_c > 0, log_c - log_a, 0.0)
    w_g, w_c = w_guidance.unsqueeze(-1), w_consistency.unsqueeze(-1)
    d_clean = w_c * p_c * (d - (p_c * d).sum(-1, keepdim=True))
    # w_g (p_a - p_t) + w_c (p_a - p_c), with one use of p_a and p_t: a compiler stores an exp that is used twice.
    d_adv = (w_g + w_c) * (p_a - p_c) + w_g * (p_c - p_t)
    return d_clean.to(clean.dtype), d_adv.to(adv.dtype)


def label_weights(p_adv: Tensor, y: Tensor, beta: float | Tensor) -> Tensor:
    """``beta * p_adv[y]``, (N,); NaN where y is no class. Never a failed assertion on a device."""
    classes = p_adv.shape[-1]
    y = y.long()
    p = p_adv.gather(-1, y.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
    return beta * torch.where((y >= 0) & (y < classes), p, torch.nan)


def sample_weights(problem: Problem) -> float | Tensor:
    """The weights of the consistency: beta, or with labels beta * softmax(adv)[y]. No gradient flows through them."""
    dtype = compute_dtype(problem.clean, problem.adv, problem.teacher)
    if problem.y is None:  # in float32 it would take a 0-d float64 upstream gradient down with it
        return problem.beta.to(dtype) if isinstance(problem.beta, Tensor) else problem.beta
    return label_weights(log_softmax(problem.adv.detach().to(dtype)).exp(), problem.y, problem.beta)


def reduced(guidance: Tensor, consistency: Tensor, beta: float | Tensor, reduction: str) -> Tensor:
    """``guidance + beta * consistency`` of each sample, reduced, in the dtype of the terms."""
    rows = guidance + beta * consistency
    rows = rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows
    return rows.to(guidance.dtype)


def upstream_weights(problem: Problem, upstream: Upstream) -> tuple[Tensor, Tensor]:
    """What the terms' gradients are multiplied by, before beta: 0-d or (N,), the 1/N of a mean in it."""
    given = upstream if problem.reduction == "terms" else upstream * 2
    w_guidance, w_consistency = (problem.adv.new_zeros((), dtype=torch.float32) if w is None else w for w in given)
    if problem.reduction == "mean":
        w_guidance = w_consistency = w_guidance / max(1, problem.adv.shape[0])
    return w_guidance, w_consistency


def forward(problem: Problem, return_terms: bool, needed: tuple[bool, ...]) -> Pass:
    """The loss and, if asked for, its terms, detached; of the reduction "terms" those alone.

    ``needed`` says of clean and adversarial logits whether their gradients will be asked for; here they are left to
    ``backward``.
    """
    return from_terms(problem, *terms(*problem[:4]), return_terms)


def from_terms(problem: Problem, guidance: Tensor, consistency: Tensor, return_terms: bool) -> Pass:
    if problem.reduction == "terms":
        return Pass(None, guidance, consistency)
    loss = reduced(guidance, consistency, sample_weights(problem), problem.reduction)
    return Pass(loss, guidance.detach(), consistency.detach()) if return_terms else Pass(loss, None, None)


def backward(problem: Problem, upstream: Upstream, held: Any, needed: tuple[bool, ...]) -> Gradients:
    """The gradients of the loss, or of both terms. ``held`` is the forward pass's, or None if this is a repetition."""
    w_guidance, w_consistency = upstream_weights(problem, upstream)
    d_clean, d_adv = gradients(*problem[:4], w_guidance, sample_weights(problem) * w_consistency)
    return d_clean if needed[0] else None, d_adv if needed[1] else None
