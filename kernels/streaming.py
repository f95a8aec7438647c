"""Columns in chunks, any number of classes.

KL over a row is exactly KL between its chunks plus KL within them (the chain rule): with P_k, Q_k the chunks' masses,

    KL(p || q) = KL(P || Q) + sum_k P_k KL(p given k || q given k)

Each part is accurate by itself, so one reading of the row gives the small KL too. A chunk is treated as a row; the
chunks are then one more row, whose logits are the chunks' log-sum-exps. Gradients take a second reading.

A row of odd length starts anywhere. Its interior is the part between multiples of 8 elements, for 128-bit access in
any dtype; what sticks out on both sides, at most 7 elements each, is one small chunk of its own.
"""

import triton
import triton.language as tl

from .row_math import (
    divergences,
    load_labels,
    load_logits,
    log_ratio,
    mean_scale,
    per_row,
    rates,
    row_max,
    row_sum,
    spread,
    store_gradients,
    store_losses,
)


@triton.jit
def interior(row, C: tl.constexpr):
    """The first column of the row's aligned interior, and its length."""
    if C % 8 == 0:
        return 0, C
    else:  # noqa: RET505 - not dead code to Triton
        head = ((row * C + 7) // 8 * 8 - row * C).to(tl.int32)
        return head, tl.maximum(C - head, 0) // 8 * 8


@triton.jit
def interior_start(row, head, STRIDE: tl.constexpr, C: tl.constexpr):
    """Where the interior starts in a tensor: where rows are contiguous, a multiple of 8 that the compiler sees."""
    if STRIDE == C:
        return (row * C + 7) // 8 * 8
    else:  # noqa: RET505 - not dead code to Triton
        return row * STRIDE + head


@triton.jit
def edges(head, length, C: tl.constexpr):
    """Columns before and after the interior, counted from its start, (1, 1, 16), and which of them exist."""
    lane = tl.arange(0, 16)[None, None, :]
    before = lane < 8
    cols = tl.where(before, lane - head, length + lane - 8)
    return cols, (cols + head < C) & ((lane < head) | (lane >= 8))


@triton.jit
def add_chunk(here, c, a, t, rate, rate_log2e, max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency):
    """The statistics of the chunks, (1, 1, SLOTS) each, with those of this chunk in the slot that is here."""
    top_c, top_a, top_t = row_max(c), row_max(a), row_max(t)
    # A chunk that is masked everywhere keeps its maximum of -inf, but must not give inf - inf.
    c -= spread(tl.where(top_c == float("-inf"), 0.0, top_c))
    a -= spread(tl.where(top_a == float("-inf"), 0.0, top_a))
    t -= spread(tl.where(top_t == float("-inf"), 0.0, top_t))
    _, _, _, _, own_log_c, own_log_a, own_log_t, own_guidance, own_consistency = divergences(c, a, t, rate, rate_log2e)
    return (
        tl.where(here, spread(top_c), max_c),
        tl.where(here, spread(top_a), max_a),
        tl.where(here, spread(top_t), max_t),
        tl.where(here, spread(own_log_c), log_c),
        tl.where(here, spread(own_log_a), log_a),
        tl.where(here, spread(own_log_t), log_t),
        tl.where(here, spread(own_guidance), guidance),
        tl.where(here, spread(own_consistency), consistency),
    )


@triton.jit
def merge(max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency, rate):
    """Statistics of the chunks, (1, 1, SLOTS), to those of the row, (1,)."""
    top_c, top_a, top_t = row_max(max_c), row_max(max_a), row_max(max_t)
    p_c, _, p_t, _, row_log_c, row_log_a, row_log_t, guidance_between, consistency_between = divergences(
        max_c - spread(top_c) + log_c,
        max_a - spread(top_a) + log_a,
        tl.fma(max_t - spread(top_t), rate, log_t),
        1.0,
        1.4426950408889634,
    )
    # A chunk without mass may be infinitely far: select, don't multiply. NaN rows are NaN in the part between chunks.
    guidance = guidance_between + row_sum(tl.where(p_t > 0, p_t * guidance, 0.0))
    consistency = consistency_between + row_sum(tl.where(p_c > 0, p_c * consistency, 0.0))
    return top_c, top_a, top_t, row_log_c, row_log_a, row_log_t, guidance, consistency


@triton.jit
def store_chunk_gradients(
    clean_ptr, adv_ptr, teacher_ptr, d_clean_ptr, d_adv_ptr, offsets, cols, mask, rate_log2e,
    max_c, max_a, max_t, log_c, log_a, log_t, consistency, w_guidance, w_consistency,
):  # fmt: skip
    c = tl.load(clean_ptr + cols, mask=mask).to(tl.float32) - spread(max_c)
    a = tl.load(adv_ptr + cols, mask=mask).to(tl.float32) - spread(max_a)
    t = tl.load(teacher_ptr + cols, mask=mask).to(tl.float32) - spread(max_t)
    p_c = tl.exp2(tl.fma(c, 1.4426950408889634, spread(-log_c * 1.4426950408889634)))
    p_a = tl.exp2(tl.fma(a, 1.4426950408889634, spread(-log_a * 1.4426950408889634)))
    p_t = tl.exp2(tl.fma(t, rate_log2e, spread(-log_t * 1.4426950408889634)))
    d_c = log_ratio(p_c, c - a, log_c, log_a)
    store_gradients(d_clean_ptr, d_adv_ptr, offsets, mask, p_c, p_a, p_t, d_c, consistency, w_guidance, w_consistency)


@triton.jit(do_not_specialize=["n"])
def streaming_kernel(
    clean_ptr, adv_ptr, teacher_ptr, n, tau, beta, y_ptr, w_guidance, w_consistency,
    loss_ptr, guidance_ptr, consistency_ptr, d_clean_ptr, d_adv_ptr,
    C: tl.constexpr, CLEAN_STRIDE: tl.constexpr, ADV_STRIDE: tl.constexpr, TEACHER_STRIDE: tl.constexpr,
    BETA_STRIDE: tl.constexpr, GUIDANCE_STRIDE: tl.constexpr, CONSISTENCY_STRIDE: tl.constexpr,
    REDUCTION: tl.constexpr, DONE_AT_ONE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One row a program; arguments as for rows_kernel."""
    if DONE_AT_ONE:  # noqa: SIM102 - decided when compiling; the other one when running
        if tl.load(w_guidance) == 1.0:
            return
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    inside = rows < n
    head, length = interior(row, C)
    clean_ptr += interior_start(row, head, CLEAN_STRIDE, C)
    adv_ptr += interior_start(row, head, ADV_STRIDE, C)
    teacher_ptr += interior_start(row, head, TEACHER_STRIDE, C)

    rate, rate_log2e = rates(tau)
    slot = tl.arange(0, SLOTS)[None, None, :]
    none = tl.full((1, 1, SLOTS), float("-inf"), tl.float32)
    zero = tl.zeros((1, 1, SLOTS), tl.float32)
    max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency = none, none, none, zero, zero, zero, zero, zero
    if C % 8 != 0:
        beside, on_edge = edges(head, length, C)
        max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency = add_chunk(
            slot == CHUNKS,
            load_logits(clean_ptr + beside, on_edge),
            load_logits(adv_ptr + beside, on_edge),
            load_logits(teacher_ptr + beside, on_edge),
            rate, rate_log2e, max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency,
        )  # fmt: skip
    for k in range(CHUNKS):
        cols = k * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        mask = cols < length
        max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency = add_chunk(
            slot == k,
            load_logits(clean_ptr + cols, mask),
            load_logits(adv_ptr + cols, mask),
            load_logits(teacher_ptr + cols, mask),
            rate, rate_log2e, max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency,
        )  # fmt: skip
    max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency = merge(
        max_c, max_a, max_t, log_c, log_a, log_t, guidance, consistency, rate
    )

    weight = per_row(beta, BETA_STRIDE, rows, inside)
    if y_ptr is not None:
        y, exists = load_labels(y_ptr, rows, inside, C)
        logit = tl.load(adv_ptr - head + y, mask=exists).to(tl.float32)  # one more reading costs less than a search
        weight *= tl.where(exists, tl.exp(logit - max_a - log_a), float("nan"))
    scale = mean_scale(n, REDUCTION)
    store_losses(loss_ptr, guidance_ptr, consistency_ptr, rows, inside, guidance, consistency, weight, scale, REDUCTION)
    if d_clean_ptr is not None or d_adv_ptr is not None:
        w_g = per_row(w_guidance, GUIDANCE_STRIDE, rows, inside) * scale
        w_c = w_g if w_consistency is None else per_row(w_consistency, CONSISTENCY_STRIDE, rows, inside) * scale
        w_c *= weight
        start = interior_start(row, head, C, C)
        if C % 8 != 0:
            beside, on_edge = edges(head, length, C)
            store_chunk_gradients(
                clean_ptr, adv_ptr, teacher_ptr, d_clean_ptr, d_adv_ptr, start + beside, beside, on_edge, rate_log2e,
                max_c, max_a, max_t, log_c, log_a, log_t, consistency, w_g, w_c,
            )  # fmt: skip
        for k in range(CHUNKS):
            cols = k * BLOCK + tl.arange(0, BLOCK)[None, None, :]
            store_chunk_gradients(
                clean_ptr, adv_ptr, teacher_ptr, d_clean_ptr, d_adv_ptr, start + cols, cols, cols < length, rate_log2e,
                max_c, max_a, max_t, log_c, log_a, log_t, consistency, w_g, w_c,
            )  # fmt: skip
