"""The kernel that goes through a row in chunks, for any number of classes.

KL over a row is exactly the KL between its chunks plus the KL within them (the chain rule). With P_k and Q_k the masses
of chunk k under p and q:

    KL(p || q) = KL(P || Q) + sum_k P_k KL(p given k || q given k)

Each part is accurate by itself, so that one reading of the row gives even a small KL accurately. A chunk is treated as
a row. The chunks then form one more row, whose logits are the chunks' log-sum-exps. The gradients take a second
reading.

If 8 does not divide C, the rows of a contiguous tensor start at any address. A row's interior is the part between
multiples of 8 elements, which allows 128-bit access in any dtype. Its edges, at most 7 elements on either side, are one
small chunk of their own.
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
    """Return the first column of the row's interior, and the interior's length."""
    if C % 8 == 0:
        return 0, C
    else:  # noqa: RET505 - Triton compiles one branch
        head = ((row * C + 7) // 8 * 8 - row * C).to(tl.int32)
        return head, tl.maximum(C - head, 0) // 8 * 8


@triton.jit
def interior_start(row, head, STRIDE: tl.constexpr, C: tl.constexpr):
    """Return the offset of the row's interior. For contiguous rows the compiler sees that it is a multiple of 8.

    Rows with another stride have the same interior, so that their columns match those of the contiguous gradients.
    """
    if STRIDE == C:
        return (row * C + 7) // 8 * 8
    else:  # noqa: RET505 - Triton compiles one branch
        return row * STRIDE + head


@triton.jit
def edges(head, length, C: tl.constexpr):
    """Return the columns of the edges, counted from the interior's start, and a mask of existing ones, (1, 1, 16)."""
    lane = tl.arange(0, 16)[None, None, :]
    before = lane < 8
    cols = tl.where(before, lane - head, length + lane - 8)
    return cols, (cols + head < C) & ((lane < head) | (lane >= 8))


@triton.jit
def add_chunk(
    slot,  # True for the slot of this chunk, (1, 1, SLOTS)
    c,  # logits of the chunk, (1, 1, BLOCK)
    a,
    t,
    rate,
    rate_log2e,
    max_c,  # statistics of the chunks so far, (1, 1, SLOTS): the maxima,
    max_a,
    max_t,
    log_sum_c,  # the logs of the sums of exponentials,
    log_sum_a,
    log_sum_t,
    guidance,  # and the KL within each chunk
    consistency,
):
    """Return the statistics of the chunks, with those of this chunk in its slot."""
    top_c, top_a, top_t = row_max(c), row_max(a), row_max(t)
    # The maximum of a chunk that is masked everywhere stays -inf, but -inf - (-inf) would be NaN.
    c -= spread(tl.where(top_c == float("-inf"), 0.0, top_c))
    a -= spread(tl.where(top_a == float("-inf"), 0.0, top_a))
    t -= spread(tl.where(top_t == float("-inf"), 0.0, top_t))
    _, _, _, _, own_c, own_a, own_t, own_guidance, own_consistency = divergences(c, a, t, rate, rate_log2e)
    return (
        tl.where(slot, spread(top_c), max_c),
        tl.where(slot, spread(top_a), max_a),
        tl.where(slot, spread(top_t), max_t),
        tl.where(slot, spread(own_c), log_sum_c),
        tl.where(slot, spread(own_a), log_sum_a),
        tl.where(slot, spread(own_t), log_sum_t),
        tl.where(slot, spread(own_guidance), guidance),
        tl.where(slot, spread(own_consistency), consistency),
    )


@triton.jit
def merge_chunks(max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, guidance, consistency, rate):
    """Reduce the statistics of the chunks, (1, 1, SLOTS) each, to those of the row, (1,) each.

    The chunks' log-sum-exps are taken relative to the row's largest logit. They are at most log(BLOCK), so that exp
    cannot overflow, and the row's log sums come out relative to the largest logit too.
    """
    top_c, top_a, top_t = row_max(max_c), row_max(max_a), row_max(max_t)
    p_c, _, p_t, _, row_c, row_a, row_t, guidance_between, consistency_between = divergences(
        max_c - spread(top_c) + log_sum_c,
        max_a - spread(top_a) + log_sum_a,
        tl.fma(max_t - spread(top_t), rate, log_sum_t),
        1.0,
        1.4426950408889634,
    )
    # A chunk without mass may have an infinite KL: select, do not multiply. A select may drop a NaN, but then the KL
    # between chunks is NaN.
    guidance = guidance_between + row_sum(tl.where(p_t > 0, p_t * guidance, 0.0))
    consistency = consistency_between + row_sum(tl.where(p_c > 0, p_c * consistency, 0.0))
    return top_c, top_a, top_t, row_c, row_a, row_t, guidance, consistency


@triton.jit
def store_chunk_gradients(
    clean_ptr,  # logits, from the interior's start on
    adv_ptr,
    teacher_ptr,
    d_clean_ptr,  # outputs, or None
    d_adv_ptr,
    offsets,  # where the chunk's gradients are stored, (1, 1, BLOCK)
    cols,  # columns of the chunk, counted from the interior's start, (1, 1, BLOCK)
    mask,  # (1, 1, BLOCK)
    rate_log2e,
    max_c,  # statistics of the row, (1,)
    max_a,
    max_t,
    log_sum_c,
    log_sum_a,
    log_sum_t,
    consistency,
    w_guidance,  # weights of the terms, (1,)
    w_consistency,
):
    """Read a chunk again and store its gradients."""
    c = tl.load(clean_ptr + cols, mask=mask).to(tl.float32) - spread(max_c)
    a = tl.load(adv_ptr + cols, mask=mask).to(tl.float32) - spread(max_a)
    t = tl.load(teacher_ptr + cols, mask=mask).to(tl.float32) - spread(max_t)
    p_c = tl.exp2(tl.fma(c, 1.4426950408889634, spread(-log_sum_c * 1.4426950408889634)))
    p_a = tl.exp2(tl.fma(a, 1.4426950408889634, spread(-log_sum_a * 1.4426950408889634)))
    p_t = tl.exp2(tl.fma(t, rate_log2e, spread(-log_sum_t * 1.4426950408889634)))
    d_c = log_ratio(p_c, c - a, log_sum_c, log_sum_a)
    store_gradients(d_clean_ptr, d_adv_ptr, offsets, mask, p_c, p_a, p_t, d_c, consistency, w_guidance, w_consistency)


@triton.jit(do_not_specialize=["n"])
def streaming_kernel(
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
    BLOCK: tl.constexpr,  # columns per chunk
    CHUNKS: tl.constexpr,  # chunks of the interior
    SLOTS: tl.constexpr,  # a power of two, at least CHUNKS and one more for the edges
):
    """Compute the loss, the terms and the gradients of one row, each if its output is given."""
    if PRECOMPUTED:  # noqa: SIM102 - the outer condition is decided at compile time
        if tl.load(w_guidance) == 1.0:
            return
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    inside = rows < n
    head, length = interior(row, C)
    clean_ptr += interior_start(row, head, CLEAN_STRIDE, C)
    adv_ptr += interior_start(row, head, ADV_STRIDE, C)
    teacher_ptr += interior_start(row, head, TEACHER_STRIDE, C)

    rate, rate_log2e = rates(tau)  # 1 / tau, log2(e) / tau
    # Statistics of the chunks, one slot per chunk.
    slot = tl.arange(0, SLOTS)[None, None, :]
    minus_inf = tl.full((1, 1, SLOTS), float("-inf"), tl.float32)
    zero = tl.zeros((1, 1, SLOTS), tl.float32)
    max_c, max_a, max_t = minus_inf, minus_inf, minus_inf
    log_sum_c, log_sum_a, log_sum_t = zero, zero, zero
    guidance, consistency = zero, zero
    if C % 8 != 0:
        edge_cols, on_edge = edges(head, length, C)
        max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, guidance, consistency = add_chunk(
            slot == CHUNKS,
            load_logits(clean_ptr + edge_cols, on_edge),
            load_logits(adv_ptr + edge_cols, on_edge),
            load_logits(teacher_ptr + edge_cols, on_edge),
            rate, rate_log2e, max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, guidance, consistency,
        )  # fmt: skip
    for k in range(CHUNKS):
        cols = k * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        mask = cols < length
        max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, guidance, consistency = add_chunk(
            slot == k,
            load_logits(clean_ptr + cols, mask),
            load_logits(adv_ptr + cols, mask),
            load_logits(teacher_ptr + cols, mask),
            rate, rate_log2e, max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, guidance, consistency,
        )  # fmt: skip
    max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, guidance, consistency = merge_chunks(
        max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, guidance, consistency, rate
    )

    weight = per_row(beta, BETA_STRIDE, rows, inside)
    if y_ptr is not None:
        y, in_range = load_labels(y_ptr, rows, inside, C)
        logit = tl.load(adv_ptr - head + y, mask=in_range).to(tl.float32)  # one more reading costs less than a search
        weight *= tl.where(in_range, tl.exp(logit - max_a - log_sum_a), float("nan"))
    scale = mean_scale(n, REDUCTION)
    store_losses(loss_ptr, guidance_ptr, consistency_ptr, rows, inside, guidance, consistency, weight, scale, REDUCTION)
    if d_clean_ptr is not None or d_adv_ptr is not None:
        w_g = per_row(w_guidance, GUIDANCE_STRIDE, rows, inside) * scale
        w_c = w_g if w_consistency is None else per_row(w_consistency, CONSISTENCY_STRIDE, rows, inside) * scale
        w_c *= weight
        start = interior_start(row, head, C, C)
        if C % 8 != 0:
            edge_cols, on_edge = edges(head, length, C)
            store_chunk_gradients(
                clean_ptr, adv_ptr, teacher_ptr, d_clean_ptr, d_adv_ptr, start + edge_cols, edge_cols, on_edge,
                rate_log2e, max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, consistency, w_g, w_c,
            )  # fmt: skip
        for k in range(CHUNKS):
            cols = k * BLOCK + tl.arange(0, BLOCK)[None, None, :]
            store_chunk_gradients(
                clean_ptr, adv_ptr, teacher_ptr, d_clean_ptr, d_adv_ptr, start + cols, cols, cols < length, rate_log2e,
                max_c, max_a, max_t, log_sum_c, log_sum_a, log_sum_t, consistency, w_g, w_c,
            )  # fmt: skip
