"""Eq. 17 and its gradients for an eager CPU, in single precision or less.

Rows are processed in blocks that stay in cache, in place, with branches on data, which cost nothing on a CPU.

Per row, with d = log p - log p_a for the target p of each term, and w_g, w_c the weights of the two terms:

    guidance    = KL(p_t || p_a) = sum p_t d_t        dL/da = w_g (p_a - p_t) + w_c (p_a - p_c)
    consistency = KL(p_c || p_a) = sum p_c d_c        dL/dc = w_c p_c (d_c - sum p_c d_c)

In this form p_t = p_c = p_a gives exactly zero, and a constant added to d has no effect on dL/dc. Functions whose names
end in ``_`` overwrite their arguments.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cktat_loss import _plain
from cktat_loss._backends import CKTATTerms, Forward, Gradients, Needs, Problem, Weighting

# Logit positions (rows times columns) per block and thread: enough to amortise some thirty calls of PyTorch per block,
# and few enough for a core's share of the cache: a block allocates up to 8 float32 per position, 1.6 MB per thread.
BLOCK_ELEMENTS_PER_THREAD = 51200
# A float32 sum of p d has an absolute error of some 1e-7. A KL below this limit is summed again, in a form that cancels
# nothing.
DIRECT_SUM_DOWN_TO = 0.02
LOG2_E = 1 / math.log(2)


class _Block(NamedTuple):
    """Results for a block of rows, in float32."""

    guidance: Tensor  # (N,)
    consistency: Tensor  # (N,)
    weights: float | Tensor  # weight of the consistency, a number, () or (N,)
    d_clean: Tensor | None  # (N, C), None if not needed
    d_adv: Tensor | None  # (N, C), None if not needed


def loss_forward(problem: Problem, weighting: Weighting, needs: Needs, return_terms: bool) -> Forward:
    """Compute the loss, and the gradients of the rows' sum in float32, not yet scaled."""
    rows = _all_rows(problem, weighting.beta, weighting.y, None, needs)
    terms = CKTATTerms(rows.guidance, rows.consistency)
    loss = _plain.reduce(terms, rows.weights, weighting.reduction)
    return Forward(loss, terms if return_terms else None, (rows.d_clean, rows.d_adv))


def loss_backward(
    problem: Problem, weighting: Weighting, grad_output: Tensor, precomputed: Gradients | None, needs: Needs
) -> Gradients:
    """Scale the precomputed gradients, then cast them."""
    if precomputed is None:
        rows = _all_rows(problem, weighting.beta, weighting.y, None, needs)
        precomputed = (rows.d_clean, rows.d_adv)
    weight = _plain.row_gradient(grad_output, weighting.reduction, problem.adv.shape[0])
    d_clean, d_adv = precomputed
    if d_clean is not None:
        d_clean = _scale_rows_(d_clean, weight).to(problem.clean.dtype)
    if d_adv is not None:
        d_adv = _scale_rows_(d_adv, weight).to(problem.adv.dtype)
    return d_clean, d_adv


def terms_forward(problem: Problem) -> CKTATTerms:
    rows = _all_rows(problem, 1.0, None, None, Needs(clean=False, adv=False))
    return CKTATTerms(rows.guidance, rows.consistency)


def terms_backward(problem: Problem, grad_guidance: Tensor, grad_consistency: Tensor, needs: Needs) -> Gradients:
    rows = _all_rows(problem, grad_consistency, None, grad_guidance, needs)
    return (
        None if rows.d_clean is None else rows.d_clean.to(problem.clean.dtype),
        None if rows.d_adv is None else rows.d_adv.to(problem.adv.dtype),
    )


def _all_rows(
    problem: Problem, beta: float | Tensor, y: Tensor | None, w_guidance: Tensor | None, needs: Needs
) -> _Block:
    """Compute all rows, block by block.

    Args:
        problem: the logits, (N, C), and the temperature.
        beta: weight of the consistency, a number, () or (N,).
        y: labels, (N,), or None.
        w_guidance: weight of the guidance in the gradients, () or (N,). None means 1.
        needs: the gradients to compute.
    """
    clean, adv, teacher, tau = problem
    n, classes = adv.shape
    # A block has BLOCK_ELEMENTS_PER_THREAD for each thread, but at most a fifth of the input, so that its temporary
    # tensors stay small beside the input. A block for one thread is always allowed.
    elements = min(BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads(), n * classes // 5)
    step = max(1, max(elements, BLOCK_ELEMENTS_PER_THREAD) // classes)
    if n <= step:
        return _block(problem, beta, y, w_guidance, needs)

    guidance, consistency = _empty(adv, n), _empty(adv, n)
    weights = beta if y is None else _empty(adv, n)
    d_clean = _empty(adv, n, classes) if needs.clean else None
    d_adv = _empty(adv, n, classes) if needs.adv else None
    for start in range(0, n, step):
        rows = slice(start, start + step)
        block = _block(
            Problem(clean[rows], adv[rows], teacher[rows], tau),
            _rows_of(beta, rows),
            None if y is None else y[rows],
            None if w_guidance is None else _rows_of(w_guidance, rows),
            needs,
        )
        guidance[rows], consistency[rows] = block.guidance, block.consistency
        if y is not None:
            weights[rows] = block.weights  # type: ignore[index]
        if d_clean is not None and block.d_clean is not None:
            d_clean[rows] = block.d_clean
        if d_adv is not None and block.d_adv is not None:
            d_adv[rows] = block.d_adv
    return _Block(guidance, consistency, weights, d_clean, d_adv)


def _block(problem: Problem, beta: float | Tensor, y: Tensor | None, w_guidance: Tensor | None, needs: Needs) -> _Block:
    """Compute a block of rows. Arguments are those of ``_all_rows``."""
    x_a, p_a, sum_a = _softmax(problem.adv)
    x_t, p_t, sum_t = _softmax(problem.teacher, problem.tau)
    _, guidance = _divergence_(x_t, p_t, sum_t, x_a, p_a, sum_a)
    x_c, p_c, sum_c = _softmax(problem.clean)
    mean_d, consistency = _divergence_(x_c, p_c, sum_c, x_a, p_a, sum_a)
    d = x_c  # log p_c - log p_a up to a constant per row
    weights = beta if y is None else _plain.label_weights(p_a, y, beta)
    w_c = _as_column(weights)
    d_clean = d_adv = None
    if needs.clean:
        d_clean = d.sub_(mean_d.unsqueeze(1)).mul_(p_c).mul_(w_c)
    if needs.adv:
        p_c -= p_a
        p_a -= p_t
        if w_guidance is not None:
            _scale_rows_(p_a, w_guidance)
        d_adv = p_a.addcmul_(p_c, w_c, value=-1) if isinstance(w_c, Tensor) else p_a.sub_(p_c, alpha=w_c)
    return _Block(guidance, consistency, weights, d_clean, d_adv)


def _softmax(logits: Tensor, tau: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits - maximum) / tau, (N, C), its softmax, (N, C), and the softmax's divisor, (N, 1).

    Written out because torch.softmax is slow for short rows and inaccurate for long ones. Uses ``exp2`` because ``exp``
    calls Intel's MKL, which is slow on other processors. docs/architecture.md has the numbers.
    """
    x = logits.float()
    x = x - x.amax(1, keepdim=True)
    if tau is not None:
        x /= tau
    p = (x * LOG2_E).exp2_()
    sums = p.sum(1, keepdim=True)
    return x, p.div_(sums), sums


def _divergence_(x: Tensor, p: Tensor, sums: Tensor, x_a: Tensor, p_a: Tensor, sum_a: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite x with d = log p - log p_a up to a constant per row. Return the mean of d under p, and KL(p || p_a).

    ``x``, ``p`` and ``sums`` are what ``_softmax`` returned for the target, ``x_a``, ``p_a`` and ``sum_a`` for the
    adversarial logits.
    """
    d = x.sub_(x_a)
    mean_d = (p * d).sum(1)
    shift = (sum_a / sums).log_().squeeze(1)  # one logarithm of the ratio rounds less than the difference of two
    kl = mean_d + shift
    lowest = kl.amin().item() if kl.numel() else math.inf  # NaN if the KL of any row is NaN
    if math.isnan(lowest):
        d.masked_fill_(p == 0, 0.0)  # 0 log 0 = 0, but d may be inf - inf
        mean_d = (p * d).sum(1)
        kl = mean_d + shift
    if not lowest > DIRECT_SUM_DOWN_TO:  # true for NaN too: the new kl may be small
        rows = (kl <= DIRECT_SUM_DOWN_TO).nonzero().squeeze(1)
        if rows.numel():
            row_d = d.index_select(0, rows).add_(shift[rows].unsqueeze(1))
            kl[rows] = _small_kl_(row_d, p.index_select(0, rows), p_a, rows)
    return mean_d, kl


def _small_kl_(d: Tensor, p: Tensor, p_a: Tensor, rows: Tensor) -> Tensor:
    """Return the KL of the given rows as sum p (d + expm1(-d)), which cancels nothing. Overwrites d.

    ``d`` and ``p`` are those rows, (R, C). ``p_a`` has all rows, (N, C). If all d are small, the polynomial
    ``_plain.SERIES``, which is (d + expm1(-d)) / d^2, serves every element. Otherwise ``_plain.kl_elements`` selects.
    """
    if p.amin().item() == 0:
        d.masked_fill_(p == 0, 1.0)  # beyond the polynomial's range, where the summand is p_a
    if d.abs().amax().item() < _plain.SERIES_BELOW:
        *lower, highest = _plain.SERIES
        elements = d * highest
        for coefficient in reversed(lower):
            elements.add_(coefficient).mul_(d)
        elements.mul_(d).mul_(p)
    else:
        elements = _plain.kl_elements(p, d, p_a.index_select(0, rows))
    return elements.sum(1).clamp_(min=0)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _rows_of(value: Any, rows: slice) -> Any:
    """Return the rows of an (N,) tensor. A number or a 0-d tensor is the same for all rows."""
    return value[rows] if isinstance(value, Tensor) and value.ndim else value


def _as_column(weight: float | Tensor) -> float | Tensor:
    """Return an (N,) tensor as (N, 1). A number or a 0-d tensor stays as it is."""
    return weight.unsqueeze(1) if isinstance(weight, Tensor) and weight.ndim else weight


def _scale_rows_(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.mul_(_as_column(weight))
