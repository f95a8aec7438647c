"""Both terms of Eq. 17 and their gradients in closed form: one pass over blocks of rows that stay in cache.

Per row, with d = log p - log p_a for the target p of each term, and w1, w2 the weights of the two terms:

    guidance    = KL(p_t || p_a) = sum p_t d_t        dL/da = w1 (p_a - p_t) + w2 (p_a - p_c)
    consistency = KL(p_c || p_a) = sum p_c d_c        dL/dc = w2 p_c (d_c - sum p_c d_c)

In this form p_t = p_c = p_a leaves exactly zero, and a constant added to d drops out of dL/dc.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cktat_loss.divergence import SERIES, SERIES_BELOW, compute_dtype, kl_elements

# Large enough to amortise the calls of PyTorch, some thirty a block; small enough for a core's share of the cache.
# A block takes up to 8 elements a logit position for itself, 1.6 MB.
BLOCK_ELEMENTS_PER_THREAD = 51200
# Where there is no cache to stay in, a block only bounds the memory.
BLOCK_ELEMENTS_WITHOUT_CACHE = 1 << 24
# Rounding leaves up to some 1e-7 in a plain float32 sum of p d: a KL below this is summed again, termwise.
PLAIN_SUM_DOWN_TO = 0.02

# Up to here a call costs more than its arithmetic: the fewest calls win.
FEW_CALLS_UP_TO_ELEMENTS = 10000
LOG2_E = 1 / math.log(2)
# The weight that costs no multiplication.
ONE = 1.0


class Fused(NamedTuple):
    """The terms, (N,) each, and the gradients, (N, C) each, or None if not asked for."""

    guidance: Tensor
    consistency: Tensor
    d_clean: Tensor | None
    d_adv: Tensor | None


class _Divergences(NamedTuple):
    """Of a block: the softmaxes; d of the clean logits up to a constant, its mean under p_c; the terms."""

    p_teacher: Tensor
    p_clean: Tensor
    p_adv: Tensor
    d_clean: Tensor
    mean_d_clean: Tensor
    guidance: Tensor
    consistency: Tensor


def fused(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float,
    w_guidance: float | Tensor = ONE,
    w_consistency: float | Tensor = ONE,
    *,
    clean_grad: bool,
    adv_grad: bool,
    branch_on_data: bool,
) -> Fused:
    """Terms, and where asked for the gradients of ``sum(w_guidance * guidance + w_consistency * consistency)``.

    Weights are numbers or tensors that broadcast to (N,). Results come in float32 or float64, whatever the logits are,
    so that a caller can scale the gradients before they are cast down. ``branch_on_data`` lets Python look at values:
    free on an eager CPU, a wait on other devices, impossible in a traced graph.
    """
    n, classes = clean.shape
    dtype = compute_dtype(clean, adv, teacher)
    divergences, block = _without_branches, BLOCK_ELEMENTS_WITHOUT_CACHE
    if branch_on_data:
        divergences = _in_double if dtype == torch.float64 else _in_single
        if dtype == torch.float32 and n * classes <= FEW_CALLS_UP_TO_ELEMENTS:
            divergences = _in_few_calls
        # A share for each thread, but of a large problem no more than a fifth.
        block = min(BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads(), n * classes // 5)
        block = max(block, BLOCK_ELEMENTS_PER_THREAD)

    def compute(clean: Tensor, adv: Tensor, teacher: Tensor, *weights: float | Tensor) -> Fused:
        w1, w2 = (w.unsqueeze(1) if isinstance(w, Tensor) and w.ndim else w for w in weights)
        return _with_gradients(divergences(clean, adv, teacher, tau), w1, w2, clean_grad, adv_grad)

    step = max(1, block // classes)
    if n <= step:
        return compute(clean, adv, teacher, w_guidance, w_consistency)
    whole = Fused(
        clean.new_empty(n, dtype=dtype),
        clean.new_empty(n, dtype=dtype),
        clean.new_empty((n, classes), dtype=dtype) if clean_grad else None,
        clean.new_empty((n, classes), dtype=dtype) if adv_grad else None,
    )
    for start in range(0, n, step):
        rows = slice(start, start + step)
        weights = (w[rows] if isinstance(w, Tensor) and w.ndim else w for w in (w_guidance, w_consistency))
        _write(whole, rows, compute(clean[rows], adv[rows], teacher[rows], *weights))
    return whole


def _write(whole: Fused, rows: slice, parts: Fused) -> None:
    for into, part in zip(whole, parts, strict=True):
        if into is not None and part is not None:
            into[rows] = part


def _with_gradients(
    parts: _Divergences, w1: float | Tensor, w2: float | Tensor, clean_grad: bool, adv_grad: bool
) -> Fused:
    p_t, p_c, p_a, d_c, mean_d_c, guidance, consistency = parts
    d_clean = d_adv = None
    if clean_grad:
        d_clean = d_c.sub_(mean_d_c.unsqueeze(1)).mul_(p_c)
        d_clean = d_clean if w2 is ONE else d_clean.mul_(w2)
    if adv_grad:
        p_c -= p_a
        p_a -= p_t
        d_adv = p_a if w1 is ONE else p_a.mul_(w1)
        d_adv = d_adv.addcmul_(p_c, w2, value=-1) if isinstance(w2, Tensor) else d_adv.sub_(p_c, alpha=w2)
    return Fused(guidance, consistency, d_clean, d_adv)


def _without_branches(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> _Divergences:
    """All summands termwise, where Python cannot look at values."""
    x = torch.stack((teacher, clean, adv)).to(compute_dtype(clean, adv, teacher))
    x -= x.amax(2, keepdim=True)
    x[0].div_(tau)
    log_p = x - x.exp().sum(2, keepdim=True).log()
    p = log_p.exp()
    targets, p_a = p[:2], p[2]
    d = (log_p[:2] - log_p[2]).masked_fill_(targets == 0, 1.0)
    kl = kl_elements(targets, d, p_a).sum(2).clamp(min=0)
    return _Divergences(p[0], p[1], p_a, d[1], (p[1] * d[1]).sum(1), kl[0], kl[1])


def _in_double(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> _Divergences:
    """Plain sums of p d + q - p: in float64 they are right for any KL that anyone reads.

    Everything is done to all three at once, in few calls, also where the adversarial part comes out zero.
    """
    if teacher.dtype == torch.float64:  # only these can overflow when divided
        teacher = teacher - teacher.amax(1, keepdim=True)
    log_p = torch.stack((teacher.double() / tau, clean, adv)).log_softmax(2)  # (3, N, C), float64
    p = log_p.exp()
    d = log_p - log_p[2]
    rest = p[2] - p  # sums to zero, but for what log_softmax loses of a long row
    kl = (p * d).add_(rest).sum(2)
    if math.isnan(kl.sum().item()):
        kl = (p * d.masked_fill_(p == 0, 0.0)).add_(rest).sum(2)  # 0 log 0 = 0, where d may be inf - inf
    p_t, p_c, p_a = p.unbind()
    guidance, consistency, _ = kl.clamp(min=0).unbind()
    return _Divergences(p_t, p_c, p_a, d[1], kl[1], guidance, consistency)


def _in_few_calls(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> _Divergences:
    """All summands termwise, for small blocks of float32 or less: everything to all three at once.

    Where expm1 overflows, or meets inf - inf, the sum tells, and the block is done in float64.
    """
    x = torch.stack((teacher, clean, adv)).float()
    x -= x.amax(2, keepdim=True)
    x[0].div_(tau)
    p = x.exp()  # by hand: torch's softmax takes ten times as long for rows shorter than a vector register
    sums = p.sum(2, keepdim=True)
    p /= sums
    log_p = x.sub_(sums.log_())
    targets, d = p[:2], log_p[:2].sub_(log_p[2])
    kl = d.neg().expm1_().add_(d).mul_(targets).sum(2)  # p (d + expm1(-d))
    if not math.isfinite(kl.sum().item()):
        return _in_double(clean, adv, teacher, tau)
    guidance, consistency = kl.clamp_(min=0).unbind()
    return _Divergences(p[0], p[1], p[2], d[1], consistency, guidance, consistency)


def _in_single(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> _Divergences:
    """One after the other, since three at once would not stay in cache."""
    x_a, p_a, sum_a = _softmax(adv)

    def divergence(x: Tensor, p: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d up to a constant, its mean under p, and the KL."""
        d = x.sub_(x_a)
        mean_d = (p * d).sum(1)
        shift = (sum_a / sums).log_().squeeze(1)  # of the ratio, since two logarithms round more than their difference
        kl = mean_d + shift
        lowest = kl.amin().item()  # NaN if any is
        if math.isnan(lowest):
            d.masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, where d may be inf - inf
            mean_d = (p * d).sum(1)
            kl = mean_d + shift
        if not lowest > PLAIN_SUM_DOWN_TO:
            rows = (kl <= PLAIN_SUM_DOWN_TO).nonzero().squeeze(1)
            if rows.numel():
                some_p, some_d = p.index_select(0, rows), d.index_select(0, rows)
                kl[rows] = _termwise(some_p, some_d.add_(shift[rows].unsqueeze(1)), p_a, rows)
        return d, mean_d, kl

    x_t, p_t, sum_t = _softmax(teacher, tau)
    _, _, guidance = divergence(x_t, p_t, sum_t)
    x_c, p_c, sum_c = _softmax(clean)
    d, mean_d, consistency = divergence(x_c, p_c, sum_c)
    return _Divergences(p_t, p_c, p_a, d, mean_d, guidance, consistency)


def _softmax(logits: Tensor, tau: float = ONE) -> tuple[Tensor, Tensor, Tensor]:
    """The logits less their maximum, the softmax, and the sum that it was divided by.

    By hand, since torch's is slow for short rows and adds up long ones in one go, off by up to 1e-5. By ``exp2``, since
    ``exp`` is left to a library that is slow on some makers' processors.
    """
    x = logits.float()
    x = x - x.amax(1, keepdim=True)
    if tau is not ONE:
        x /= tau
    p = (x * LOG2_E).exp2_()
    sums = p.sum(1, keepdim=True)
    return x, p.div_(sums), sums


def _termwise(p: Tensor, d: Tensor, p_a: Tensor, rows: Tensor) -> Tensor:
    """KL of each row without cancellation, with no select over the elements where none is needed. Overwrites d."""
    if p.amin().item() == 0:
        d.masked_fill_(p == 0, 1.0)
    if d.abs().amax().item() < SERIES_BELOW:
        *lower, highest = SERIES  # as small_kl_elements, in place
        elements = d * highest
        for coefficient in reversed(lower):
            elements.add_(coefficient).mul_(d)
        elements.mul_(d).mul_(p)
    else:
        elements = kl_elements(p, d, p_a.index_select(0, rows))
    return elements.sum(1).clamp_(min=0)
