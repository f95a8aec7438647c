"""Eq. 17 in plain PyTorch: the definition that everything else is tested against. Clear, not fast."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p_logits) || softmax(q_logits)) of each row, (N, C) -> (N,), with 0 log 0 = 0."""
    log_p, log_q = p_logits.log_softmax(1), q_logits.log_softmax(1)
    seen = log_p > -torch.inf
    # `where` on both sides of the product: a class that p leaves out must give no NaN to the gradient either.
    ratio = torch.where(seen, log_p, 0.0) - torch.where(seen, log_q, 0.0)
    # A row without any class, or with a NaN, has no probabilities at all: its sum must say so.
    return (torch.where(seen, log_p.exp(), 0.0 * log_p.exp().sum(1, keepdim=True)) * ratio).sum(1)


def cktat_terms(
    clean_logits: Tensor, adv_logits: Tensor, teacher_logits: Tensor, tau: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Guidance and consistency of each sample, (N,) each: the two KL terms of Eq. 17."""
    return kl_divergence(teacher_logits.detach() / tau, adv_logits), kl_divergence(clean_logits, adv_logits)


def cktat_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 5.0,
    beta: float | Tensor = 6.0,
) -> Tensor:
    """Eq. 17: the mean over the batch of ``guidance + beta * consistency``."""
    guidance, consistency = cktat_terms(clean_logits, adv_logits, teacher_logits, tau)
    return (guidance + beta * consistency).mean()
