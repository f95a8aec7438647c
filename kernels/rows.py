"""Whole rows in registers: every logit is read once, and both gradients are written in the same pass."""

import triton
import triton.language as tl

from .row_math import (
    divergences,
    load_labels,
    load_logits,
    mean_scale,
    per_row,
    rates,
    row_max,
    row_sum,
    spread,
    store_gradients,
    store_losses,
)


@triton.jit(do_not_specialize=["n"])
def rows_kernel(
    clean_ptr, adv_ptr, teacher_ptr,  # logits (N, C)
    n, tau, beta, y_ptr,  # beta: a number, or a tensor; labels (N,) or None
    w_guidance, w_consistency,  # upstream gradients: a number, or tensors; None: as w_guidance
    loss_ptr, guidance_ptr, consistency_ptr, d_clean_ptr, d_adv_ptr,  # outputs, or None
    C: tl.constexpr, CLEAN_STRIDE: tl.constexpr, ADV_STRIDE: tl.constexpr, TEACHER_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr, GUIDANCE_STRIDE: tl.constexpr, CONSISTENCY_STRIDE: tl.constexpr,
    REDUCTION: tl.constexpr, DONE_AT_ONE: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """M rows a program. DONE_AT_ONE: the gradients are there already for an upstream gradient of one."""
    if DONE_AT_ONE:  # noqa: SIM102 - decided when compiling; the other one when running
        if tl.load(w_guidance) == 1.0:
            return
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # 64 bits: N C may pass 2^31
    cols = (tl.arange(0, G) * W)[:, None, None] + tl.arange(0, W)[None, None, :]
    inside = rows < n
    mask = spread(inside) & (cols < C)
    c = load_logits(clean_ptr + spread(rows * CLEAN_STRIDE) + cols, mask)
    a = load_logits(adv_ptr + spread(rows * ADV_STRIDE) + cols, mask)
    t = load_logits(teacher_ptr + spread(rows * TEACHER_STRIDE) + cols, mask)
    rate, rate_log2e = rates(tau)
    p_c, p_a, p_t, d_c, _, _, _, guidance, consistency = divergences(
        c - spread(row_max(c)), a - spread(row_max(a)), t - spread(row_max(t)), rate, rate_log2e
    )
    weight = per_row(beta, BETA_STRIDE, rows, inside)
    if y_ptr is not None:
        y, exists = load_labels(y_ptr, rows, inside, C)
        weight *= tl.where(exists, row_sum(tl.where(cols == spread(y), p_a, 0.0)), float("nan"))
    scale = mean_scale(n, REDUCTION)
    store_losses(loss_ptr, guidance_ptr, consistency_ptr, rows, inside, guidance, consistency, weight, scale, REDUCTION)
    if d_clean_ptr is not None or d_adv_ptr is not None:
        w_g = per_row(w_guidance, GUIDANCE_STRIDE, rows, inside) * scale
        w_c = w_g if w_consistency is None else per_row(w_consistency, CONSISTENCY_STRIDE, rows, inside) * scale
        store_gradients(
            d_clean_ptr, d_adv_ptr, spread(rows * C) + cols, mask, p_c, p_a, p_t, d_c, consistency, w_g, w_c * weight
        )
