"""The kernel that holds whole rows in registers: each logit is read once, and both gradients come from that reading."""

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
    clean_ptr,  # (N, C), the student's logits on clean inputs
    adv_ptr,  # (N, C), the student's logits on adversarial inputs
    teacher_ptr,  # (N, C), the teacher's logits on clean inputs
    n,  # N, int
    tau,  # temperature of the teacher, float
    beta,  # weight of the consistency: a float, or a pointer to () or (N,)
    y_ptr,  # (N,), labels, or None
    w_guidance,  # grad_output of the loss, or of the guidance: a float, or a pointer to () or (N,)
    w_consistency,  # grad_output of the consistency: likewise; None means w_guidance
    loss_ptr,  # output: (N,) for "none", else one partial sum per program; or None
    guidance_ptr,  # output: (N,), or None
    consistency_ptr,  # output: (N,), or None
    d_clean_ptr,  # output: (N, C), contiguous, the gradient of the clean logits; or None
    d_adv_ptr,  # output: (N, C), contiguous, the gradient of the adversarial logits; or None
    C: tl.constexpr,  # number of classes
    CLEAN_STRIDE: tl.constexpr,  # elements from one row to the next
    ADV_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr,  # elements from one row to the next, 0 for a single value, None for a number
    GUIDANCE_STRIDE: tl.constexpr,  # likewise, of w_guidance
    CONSISTENCY_STRIDE: tl.constexpr,  # likewise, of w_consistency
    REDUCTION: tl.constexpr,  # "mean", "sum" or "none"
    PRECOMPUTED: tl.constexpr,  # True if the gradient outputs are already right for w_guidance = 1
    STRIPS: tl.constexpr,  # the tile is (STRIPS, ROWS, WIDTH), see row_math.py
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute the losses, the terms and the gradients of ROWS rows, each if its output is given."""
    if PRECOMPUTED:  # noqa: SIM102 - the outer condition is decided at compile time
        if tl.load(w_guidance) == 1.0:
            return
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits, because N * C may exceed 2^31
    cols = (tl.arange(0, STRIPS) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
    inside = rows < n
    mask = spread(inside) & (cols < C)
    c = load_logits(clean_ptr + spread(rows * CLEAN_STRIDE) + cols, mask)
    a = load_logits(adv_ptr + spread(rows * ADV_STRIDE) + cols, mask)
    t = load_logits(teacher_ptr + spread(rows * TEACHER_STRIDE) + cols, mask)
    rate, rate_log2e = rates(tau)  # 1 / tau, log2(e) / tau
    # Subtract the row maximum, so that exp cannot overflow.
    p_c, p_a, p_t, d_c, _, _, _, guidance, consistency = divergences(
        c - spread(row_max(c)), a - spread(row_max(a)), t - spread(row_max(t)), rate, rate_log2e
    )
    # With labels, multiply beta by the adversarial probability of the label.
    weight = per_row(beta, BETA_STRIDE, rows, inside)
    if y_ptr is not None:
        y, in_range = load_labels(y_ptr, rows, inside, C)
        weight *= tl.where(in_range, row_sum(tl.where(cols == spread(y), p_a, 0.0)), float("nan"))
    scale = mean_scale(n, REDUCTION)
    store_losses(loss_ptr, guidance_ptr, consistency_ptr, rows, inside, guidance, consistency, weight, scale, REDUCTION)
    if d_clean_ptr is not None or d_adv_ptr is not None:
        w_g = per_row(w_guidance, GUIDANCE_STRIDE, rows, inside) * scale
        w_c = w_g if w_consistency is None else per_row(w_consistency, CONSISTENCY_STRIDE, rows, inside) * scale
        store_gradients(
            d_clean_ptr, d_adv_ptr, spread(rows * C) + cols, mask, p_c, p_a, p_t, d_c, consistency, w_g, w_c * weight
        )
