"""Eq. 17 in a few lines of PyTorch, clear rather than fast.

The package's values and first derivatives are tested against an independent implementation in float64 NumPy,
``tests/oracle.py``. Its second derivatives and transforms are tested against this module.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return KL(softmax(p_logits) || softmax(q_logits)) of each row, (N, C) -> (N,), with 0 log 0 = 0."""
    log_p, log_q = p_logits.log_softmax(1), q_logits.log_softmax(1)
    seen = log_p > -torch.inf
    # Select on both sides of the product: otherwise a class with p = 0 would make the gradient NaN.
    ratio = torch.where(seen, log_p, 0.0) - torch.where(seen, log_q, 0.0)
    # If a row has a NaN, or all of its classes are masked, all of log_p is NaN, and so is this zero.
    zero = 0.0 * log_p.exp().sum(1, keepdim=True)
    p = torch.where(seen, log_p.exp(), zero)
    return (p * ratio).sum(1)


def cktat_terms(
    clean_logits: Tensor, adv_logits: Tensor, teacher_logits: Tensor, tau: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Return guidance and consistency, the two KL terms of Eq. 17, each (N,)."""
    return kl_divergence(teacher_logits.detach() / tau, adv_logits), kl_divergence(clean_logits, adv_logits)


def cktat_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 5.0,
    beta: float | Tensor = 6.0,
) -> Tensor:
    """Return Eq. 17, the mean over the batch of ``guidance + beta * consistency``."""
    guidance, consistency = cktat_terms(clean_logits, adv_logits, teacher_logits, tau)
    return (guidance + beta * consistency).mean()
