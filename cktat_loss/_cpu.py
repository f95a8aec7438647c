"""Both terms of Eq. 17 and their gradients in closed form, for single precision and less on an eager CPU.

One pass over blocks of rows that stay in cache, with branches on data, which cost nothing there.

Per row, with d = log p - log p_a for the target p of each term, and w_g, w_c the weights of the two terms:

    guidance    = KL(p_t || p_a) = sum p_t d_t        dL/da = w_g (p_a - p_t) + w_c (p_a - p_c)
    consistency = KL(p_c || p_a) = sum p_c d_c        dL/dc = w_c p_c (d_c - sum p_c d_c)

In this form p_t = p_c = p_a leaves exactly zero, and a constant added to d drops out of dL/dc. Functions whose names
end in ``_`` overwrite their arguments.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cktat_loss import _plain
from cktat_loss._plain import Gradients, Pass, Problem, Upstream

# Large enough to amortise the calls of PyTorch, some thirty a block; small enough for a core's share of the cache.
# A block takes up to 8 elements a logit position for itself, 1.6 MB.
BLOCK_ELEMENTS_PER_THREAD = 51200
# Rounding leaves up to some 1e-7 in a plain float32 sum of p d: a KL below this is summed again, termwise.
PLAIN_SUM_DOWN_TO = 0.02
# Up to here a call costs more than its arithmetic: the fewest calls win.
FEW_CALLS_UP_TO_ELEMENTS = 10000
LOG2_E = 1 / math.log(2)


class _Rows(NamedTuple):
    """Of some rows: the terms; the weights of the consistency; the gradients, not cast."""

    guidance: Tensor
    consistency: Tensor
    beta: float | Tensor
    d_clean: Tensor | None
    d_adv: Tensor | None


class _Divergences(NamedTuple):
    """Of some rows: the softmaxes; d of the clean logits up to a constant, and its mean under p_clean; the terms."""

    p_clean: Tensor
    p_adv: Tensor
    p_teacher: Tensor
    d_clean: Tensor
    mean_d_clean: Tensor
    guidance: Tensor
    consistency: Tensor


def forward(problem: Problem, return_terms: bool, needed: tuple[bool, ...]) -> Pass:
    """As ``_plain.forward``, with the gradients of the rows' sum, not cast. Those of "terms" are left for later."""
    only_terms = problem.reduction == "terms"
    rows = _rows(problem, None, (False, False) if only_terms else needed)
    loss = None if only_terms else _plain.reduced(rows.guidance, rows.consistency, rows.beta, problem.reduction)
    held = None if only_terms else (rows.d_clean, rows.d_adv)
    if not return_terms:
        return Pass(loss, None, None, held)
    # Copies, not two views of one tensor, which autograd would guard against changes.
    return Pass(loss, rows.guidance.clone(), rows.consistency.clone(), held)


def backward(problem: Problem, upstream: Upstream, held: Gradients | None, needed: tuple[bool, ...]) -> Gradients:
    """As ``_plain.backward``: the gradients of the forward pass, scaled; or computed now."""
    w_guidance, w_consistency = _plain.upstream_weights(problem, upstream)
    if problem.reduction == "terms":
        d_clean, d_adv = _rows(problem._replace(beta=w_consistency), w_guidance, needed)[3:]
    else:
        d_clean, d_adv = held or _rows(problem, None, needed)[3:]
        _weighted_(d_clean, w_guidance)
        _weighted_(d_adv, w_guidance)
    return (
        None if d_clean is None else d_clean.to(problem.clean.dtype),
        None if d_adv is None else d_adv.to(problem.adv.dtype),
    )


def _rows(problem: Problem, w_guidance: Tensor | None, needed: tuple[bool, ...]) -> _Rows:
    """All rows, block by block, and the gradients with ``w_guidance`` (None: 1) for the guidance's weights."""
    n, classes = problem.adv.shape
    # A share for each thread, but of a large problem no more than a fifth.
    block = min(BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads(), n * classes // 5)
    step = max(1, max(block, BLOCK_ELEMENTS_PER_THREAD) // classes)
    if n <= step:
        return _block(problem, w_guidance, needed)

    def new(*shape: int) -> Tensor:
        return problem.adv.new_empty(shape, dtype=torch.float32)

    beta = problem.beta if problem.y is None else new(n)
    d_clean, d_adv = new(n, classes) if needed[0] else None, new(n, classes) if needed[1] else None
    whole = _Rows(new(n), new(n), beta, d_clean, d_adv)
    for start in range(0, n, step):
        rows = slice(start, start + step)

        def cut(x: Any, rows: slice = rows) -> Any:
            return x[rows] if isinstance(x, Tensor) and x.ndim else x

        part = _block(Problem(*map(cut, problem)), cut(w_guidance), needed)
        for into, values in zip(whole, part, strict=True):
            if isinstance(into, Tensor) and isinstance(values, Tensor) and into is not problem.beta:
                into[rows] = values
    return whole


def _block(problem: Problem, w_guidance: Tensor | None, needed: tuple[bool, ...]) -> _Rows:
    few = problem.adv.numel() <= FEW_CALLS_UP_TO_ELEMENTS
    found = (_all_at_once if few else _one_by_one)(*problem[:4])
    beta = problem.beta if problem.y is None else _plain.label_weights(found.p_adv, problem.y, problem.beta)
    return _Rows(found.guidance, found.consistency, beta, *_gradients_(found, w_guidance, beta, needed))


def _weighted_(d: Tensor | None, weight: Tensor | None) -> None:
    if d is not None and weight is not None:
        d.mul_(weight.unsqueeze(1) if weight.ndim else weight)


def _gradients_(
    found: _Divergences, w_guidance: Tensor | None, w_consistency: float | Tensor, needed: tuple[bool, ...]
) -> Gradients:
    p_c, p_a, p_t, d, mean_d, _, _ = found
    d_clean = d_adv = None
    w_c = w_consistency.unsqueeze(1) if isinstance(w_consistency, Tensor) and w_consistency.ndim else w_consistency
    if needed[0]:
        d_clean = d.sub_(mean_d.unsqueeze(1)).mul_(p_c).mul_(w_c)
    if needed[1]:
        p_c -= p_a
        p_a -= p_t
        _weighted_(p_a, w_guidance)
        d_adv = p_a.addcmul_(p_c, w_c, value=-1) if isinstance(w_c, Tensor) else p_a.sub_(p_c, alpha=w_c)
    return d_clean, d_adv


def _all_at_once(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> _Divergences:
    """All summands termwise, for small blocks: everything to all three at once, in the fewest calls.

    Where expm1 overflows, or meets inf - inf, the sum tells, and the other way finds out.
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
        return _one_by_one(clean, adv, teacher, tau)
    guidance, consistency = kl.clamp_(min=0).unbind()
    return _Divergences(p[1], p[2], p[0], d[1], consistency, guidance, consistency)


def _one_by_one(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> _Divergences:
    """One after the other, since three at once would not stay in cache."""
    x_a, p_a, sum_a = _softmax(adv)
    x, p_t, sums = _softmax(teacher, tau)
    _, guidance = _divergence_(x, p_t, sums, x_a, p_a, sum_a)
    d, p_c, sums = _softmax(clean)
    mean_d, consistency = _divergence_(d, p_c, sums, x_a, p_a, sum_a)
    return _Divergences(p_c, p_a, p_t, d, mean_d, guidance, consistency)


def _softmax(logits: Tensor, tau: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The logits less their maximum, over tau; the softmax; and the sum that it was divided by.

    By hand, since torch's is slow for short rows and adds up long ones in one go, off by up to 1e-5. By ``exp2``, since
    ``exp`` is left to a library that is slow on some makers' processors.
    """
    x = logits.float()
    x = x - x.amax(1, keepdim=True)
    if tau is not None:
        x /= tau
    p = (x * LOG2_E).exp2_()
    sums = p.sum(1, keepdim=True)
    return x, p.div_(sums), sums


def _divergence_(x: Tensor, p: Tensor, sums: Tensor, x_a: Tensor, p_a: Tensor, sum_a: Tensor) -> tuple[Tensor, Tensor]:
    """Makes of x, the shifted logits of p, d up to a constant. Returns its mean under p, and KL(p || p_a)."""
    d = x.sub_(x_a)
    mean_d = (p * d).sum(1)
    shift = (sum_a / sums).log_().squeeze(1)  # of the ratio, since two logarithms round more than their difference
    kl = mean_d + shift
    lowest = kl.amin().item() if kl.numel() else math.inf  # NaN if any is
    if math.isnan(lowest):
        d.masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, where d may be inf - inf
        mean_d = (p * d).sum(1)
        kl = mean_d + shift
    if not lowest > PLAIN_SUM_DOWN_TO:
        rows = (kl <= PLAIN_SUM_DOWN_TO).nonzero().squeeze(1)
        if rows.numel():
            some_d = d.index_select(0, rows).add_(shift[rows].unsqueeze(1))
            kl[rows] = _termwise_(some_d, p.index_select(0, rows), p_a, rows)
    return mean_d, kl


def _termwise_(d: Tensor, p: Tensor, p_a: Tensor, rows: Tensor) -> Tensor:
    """KL of each row without cancellation, with no select over the elements where none is needed. Overwrites d."""
    if p.amin().item() == 0:
        d.masked_fill_(p == 0, 1.0)
    if d.abs().amax().item() < _plain.SERIES_BELOW:
        *lower, highest = _plain.SERIES  # as in _plain.kl_elements, in place
        elements = d * highest
        for coefficient in reversed(lower):
            elements.add_(coefficient).mul_(d)
        elements.mul_(d).mul_(p)
    else:
        elements = _plain.kl_elements(p, d, p_a.index_select(0, rows))
    return elements.sum(1).clamp_(min=0)
