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

from cktat_loss.divergence import SERIES_BELOW, compute_dtype, kl_elements, small_kl_elements

# Large enough to amortise the calls of PyTorch, some thirty a block; small enough for a core's share of the cache.
# A block takes up to 8 elements a logit position for itself, 1.6 MB.
BLOCK_ELEMENTS_PER_THREAD = 51200
# Where there is no cache to stay in, a block only bounds the memory.
BLOCK_ELEMENTS_WITHOUT_CACHE = 1 << 24
# Up to here a call costs more than its arithmetic: the fewest calls win.
FEW_CALLS_UP_TO_ELEMENTS = 20000
# torch's CPU softmax adds up a row in one go, so that a long one is off by up to 1e-5; torch's sum adds pairwise.
LONG_ROW = 1024
# Rounding leaves up to some 1e-7 in a plain float32 sum of p d: a KL below this is summed again, termwise.
PLAIN_SUM_DOWN_TO = 0.02

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
    divergences = _in_double if dtype == torch.float64 else _in_single
    if dtype == torch.float32 and branch_on_data and n * classes <= FEW_CALLS_UP_TO_ELEMENTS:
        divergences = _in_few_calls
    block = BLOCK_ELEMENTS_WITHOUT_CACHE
    if branch_on_data:  # a share for each thread, but of a large problem no more than a fifth
        block = min(BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads(), n * classes // 5)
        block = max(block, BLOCK_ELEMENTS_PER_THREAD)

    def compute(rows: slice) -> Fused:
        logits = (clean[rows], adv[rows], teacher[rows])
        w1, w2 = (w[rows, None] if isinstance(w, Tensor) and w.ndim else w for w in (w_guidance, w_consistency))
        return _with_gradients(divergences(*logits, tau, branch_on_data), w1, w2, clean_grad, adv_grad)

    step = max(1, block // classes)
    if n <= step:
        return compute(slice(None))
    whole = Fused(
        clean.new_empty(n, dtype=dtype),
        clean.new_empty(n, dtype=dtype),
        clean.new_empty((n, classes), dtype=dtype) if clean_grad else None,
        clean.new_empty((n, classes), dtype=dtype) if adv_grad else None,
    )
    for start in range(0, n, step):
        rows = slice(start, start + step)
        _write(whole, rows, compute(rows))
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
        d_adv, to_clean = p_a - p_t, p_a - p_c
        d_adv = d_adv if w1 is ONE else d_adv.mul_(w1)
        d_adv = d_adv.addcmul_(to_clean, w2) if isinstance(w2, Tensor) else d_adv.add_(to_clean, alpha=w2)
    return Fused(guidance, consistency, d_clean, d_adv)


def _in_double(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, branch_on_data: bool) -> _Divergences:
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
    if not branch_on_data or math.isnan(kl.sum().item()):
        kl = (p * d.masked_fill_(p == 0, 0.0)).add_(rest).sum(2)  # 0 log 0 = 0, where d may be inf - inf
    p_t, p_c, p_a = p.unbind()
    guidance, consistency, _ = kl.clamp(min=0).unbind()
    return _Divergences(p_t, p_c, p_a, d[1], kl[1], guidance, consistency)


def _in_few_calls(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, branch_on_data: bool) -> _Divergences:
    """All summands termwise, for small blocks of float32 or less: everything to all three at once.

    Where expm1 overflows, or meets inf - inf, the sum tells, and the block is done in float64.
    """
    t = teacher.float()
    t = (t - t.amax(1, keepdim=True)) / tau
    log_p = torch.stack((t, clean, adv)).log_softmax(2)  # (3, N, C), float32
    p = log_p.exp()
    d = log_p - log_p[2]
    kl = d.neg().expm1_().add_(d).mul_(p).sum(2)  # p (d + expm1(-d)), the adversarial part zero
    if not math.isfinite(kl.sum().item()):
        return _in_double(clean, adv, teacher, tau, branch_on_data)
    p_t, p_c, p_a = p.unbind()
    guidance, consistency, _ = kl.clamp_(min=0).unbind()
    return _Divergences(p_t, p_c, p_a, d[1], consistency, guidance, consistency)


def _in_single(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, branch_on_data: bool) -> _Divergences:
    """Plain sums of p d, and termwise ones where rounding would show."""
    x = torch.stack((teacher, clean, adv)).float()
    x -= x.amax(2, keepdim=True)
    x[0] /= tau
    p = x.softmax(2)
    if x.shape[2] > LONG_ROW:
        p /= p.sum(2, keepdim=True)
    targets, p_a = p[:2], p[2]
    top = p.amax(2)  # 1 / sum exp(x): the normaliser, without another pass over the row
    shift = (top[:2] / top[2]).log_()  # of the ratio, since two logarithms round more than their difference
    d = x[:2].sub_(x[2])
    mean_d = (targets * d).sum(2)
    kl = mean_d + shift
    lowest = kl.amin().item() if branch_on_data else math.nan  # NaN if any is
    if math.isnan(lowest):
        d.masked_fill_(targets == 0, 0.0)  # 0 log 0 = 0, where d may be inf - inf
        mean_d = (targets * d).sum(2)
        kl = mean_d + shift
    if not branch_on_data:
        exact_d = (d + shift.unsqueeze(2)).masked_fill_(targets == 0, 1.0)
        kl = kl_elements(targets, exact_d, p_a).sum(2).clamp(min=0)
    elif not lowest > PLAIN_SUM_DOWN_TO:
        for term in range(2):
            rows = (kl[term] <= PLAIN_SUM_DOWN_TO).nonzero().squeeze(1)
            if rows.numel():
                some_p, some_d, some_q = (v.index_select(0, rows) for v in (p[term], d[term], p_a))
                kl[term, rows] = _termwise(some_p, some_d.add_(shift[term, rows].unsqueeze(1)), some_q)
    return _Divergences(p[0], p[1], p_a, d[1], mean_d[1], kl[0], kl[1])


def _termwise(p: Tensor, d: Tensor, q: Tensor) -> Tensor:
    """KL of each row without cancellation, with no select over the elements where none is needed."""
    if p.amin().item() == 0:
        d.masked_fill_(p == 0, 1.0)
    elements = small_kl_elements(p, d) if d.abs().amax().item() < SERIES_BELOW else kl_elements(p, d, q)
    return elements.sum(1).clamp_(min=0)
