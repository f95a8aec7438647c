"""Columns in chunks, any number of classes.

KL over a row is exactly KL between its chunks plus KL within them (the chain rule): with P_k, Q_k the chunks' masses,

    KL(p || q) = KL(P || Q) + sum_k P_k KL(p given k || q given k)

Each part is accurate by itself, so one reading of the row gives the small KL too. A chunk is treated as a row; the
chunks are then one more row, whose logits are the chunks' log-sum-exps.

A row of odd length starts anywhere. Its interior is the part between multiples of 8 elements, for 128-bit access in
any dtype; what sticks out on both sides, at most 7 elements each, is one small chunk of its own.
"""

import triton
import triton.language as tl

from .row_math import (
    LOG2E,
    NEG_INF,
    divergences,
    load_logits,
    load_state,
    probabilities,
    rates,
    row_max,
    row_operand,
    row_sum,
    save_state,
    spread,
    store_gradients,
    store_losses,
)


@triton.jit
def interior(row, C: tl.constexpr):
    """The offset of the row's aligned interior in a contiguous tensor, its first column, and its length."""
    start = row * C
    if C % 8 == 0:
        return start, 0, C
    else:  # noqa: RET505 - not dead code to Triton
        aligned = (start + 7) // 8 * 8
        head = (aligned - start).to(tl.int32)
        return aligned, head, tl.maximum(C - head, 0) // 8 * 8


@triton.jit
def edges(head, length, C: tl.constexpr):
    """Columns before and after the interior, (1, 1, 16), and which of them exist."""
    lane = tl.arange(0, 16)[None, None, :]
    before = lane < 8
    cols = tl.where(before, lane, head + length + lane - 8)
    return cols, (cols < C) & ((lane < head) | (lane >= 8))


@triton.jit
def add_chunk(here, u, x, y, rate, rate_log2e, m_t, m_c, m_a, log_t, log_c, log_a, kl_t, kl_c):
    """The statistics of the chunks, (1, 1, SLOTS) each, with those of this chunk in the slot that is here."""
    max_t, max_c, max_a = row_max(u), row_max(x), row_max(y)
    # A chunk that is masked everywhere keeps its maximum of -inf, but must not give inf - inf.
    u -= spread(tl.where(max_t == NEG_INF, 0.0, max_t))
    x -= spread(tl.where(max_c == NEG_INF, 0.0, max_c))
    y -= spread(tl.where(max_a == NEG_INF, 0.0, max_a))
    _, _, _, _, sum_t, sum_c, sum_a, guidance, consistency = divergences(u, x, y, rate, rate_log2e)
    return (
        tl.where(here, spread(max_t), m_t),
        tl.where(here, spread(max_c), m_c),
        tl.where(here, spread(max_a), m_a),
        tl.where(here, spread(sum_t), log_t),
        tl.where(here, spread(sum_c), log_c),
        tl.where(here, spread(sum_a), log_a),
        tl.where(here, spread(guidance), kl_t),
        tl.where(here, spread(consistency), kl_c),
    )


@triton.jit
def merge(max_t, max_c, max_a, log_t, log_c, log_a, guidance, consistency, rate):
    """Statistics of the chunks, (1, 1, K), to those of the row, (1,)."""
    top_t, top_c, top_a = row_max(max_t), row_max(max_c), row_max(max_a)
    p_t, p_c, _, _, sum_t, sum_c, sum_a, guidance_between, consistency_between = divergences(
        tl.fma(max_t - spread(top_t), rate, log_t),
        max_c - spread(top_c) + log_c,
        max_a - spread(top_a) + log_a,
        1.0,
        LOG2E,
    )
    # A chunk without mass may be infinitely far: select, don't multiply. NaN rows are NaN in the part between chunks.
    guidance = guidance_between + row_sum(tl.where(p_t > 0, p_t * guidance, 0.0))
    consistency = consistency_between + row_sum(tl.where(p_c > 0, p_c * consistency, 0.0))
    return top_t, top_c, top_a, sum_t, sum_c, sum_a, guidance, consistency


@triton.jit
def store_chunk_gradients(
    t, c, a, offset, cols, mask, rate_log2e, d_clean, d_adv,
    max_t, max_c, max_a, log_t, log_c, log_a, consistency, w_g, w_k,
):  # fmt: skip
    u = tl.load(t + cols, mask=mask).to(tl.float32) - spread(max_t)
    x = tl.load(c + cols, mask=mask).to(tl.float32) - spread(max_c)
    y = tl.load(a + cols, mask=mask).to(tl.float32) - spread(max_a)
    p_t, p_c, p_a, d_c = probabilities(u, x, y, log_t, log_c, log_a, rate_log2e)
    store_gradients(d_clean, d_adv, offset + cols, mask, p_t, p_c, p_a, d_c, consistency, w_g, w_k)


@triton.jit(do_not_specialize=["n"])
def streaming_kernel(
    t, c, a, stride_t, stride_c, stride_a, n, tau, stride_tau,
    weight, stride_weight, beta, stride_beta, scale,
    guidance_out, consistency_out, loss_out, partial_out, state, d_clean, d_adv,
    C: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One row a program; the outputs and weights of rows_kernel. Gradients take a second reading of the row."""
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    inside = rows < n
    aligned, head, length = interior(row, C)
    # Where the interior starts in each tensor.
    in_t, in_c, in_a = aligned, aligned, aligned
    if not CONTIGUOUS:
        in_t, in_c, in_a = row * stride_t + head, row * stride_c + head, row * stride_a + head

    rate, rate_log2e = rates(tau, stride_tau)
    slot = tl.arange(0, SLOTS)[None, None, :]
    none = tl.full((1, 1, SLOTS), NEG_INF, tl.float32)
    zero = tl.zeros((1, 1, SLOTS), tl.float32)
    m_t, m_c, m_a, l_t, l_c, l_a, kl_t, kl_c = none, none, none, zero, zero, zero, zero, zero
    if C % 8 != 0:
        around, exists = edges(head, length, C)
        m_t, m_c, m_a, l_t, l_c, l_a, kl_t, kl_c = add_chunk(
            slot == CHUNKS,
            load_logits(t + (in_t - head) + around, exists),
            load_logits(c + (in_c - head) + around, exists),
            load_logits(a + (in_a - head) + around, exists),
            rate, rate_log2e, m_t, m_c, m_a, l_t, l_c, l_a, kl_t, kl_c,
        )  # fmt: skip
    for k in range(CHUNKS):
        cols = k * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        mask = cols < length
        m_t, m_c, m_a, l_t, l_c, l_a, kl_t, kl_c = add_chunk(
            slot == k,
            load_logits(t + in_t + cols, mask),
            load_logits(c + in_c + cols, mask),
            load_logits(a + in_a + cols, mask),
            rate, rate_log2e, m_t, m_c, m_a, l_t, l_c, l_a, kl_t, kl_c,
        )  # fmt: skip
    max_t, max_c, max_a, log_t, log_c, log_a, guidance, consistency = merge(
        m_t, m_c, m_a, l_t, l_c, l_a, kl_t, kl_c, rate
    )

    beta = row_operand(beta, stride_beta, rows, inside)
    store_losses(guidance_out, consistency_out, loss_out, partial_out, rows, inside, guidance, consistency, beta)
    save_state(state, n, rows, inside, max_t, max_c, max_a, log_t, log_c, log_a, consistency)
    if d_clean is not None or d_adv is not None:
        w_g = row_operand(weight, stride_weight, rows, inside) * scale
        w_k = w_g * beta
        if C % 8 != 0:
            around, exists = edges(head, length, C)
            store_chunk_gradients(
                t + (in_t - head), c + (in_c - head), a + (in_a - head), aligned - head,
                around, exists, rate_log2e, d_clean, d_adv, max_t, max_c, max_a, log_t, log_c,
                log_a, consistency, w_g, w_k,
            )  # fmt: skip
        for k in range(CHUNKS):
            cols = k * BLOCK + tl.arange(0, BLOCK)[None, None, :]
            store_chunk_gradients(
                t + in_t, c + in_c, a + in_a, aligned, cols, cols < length, rate_log2e,
                d_clean, d_adv, max_t, max_c, max_a, log_t, log_c, log_a, consistency, w_g, w_k,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def streaming_backward_kernel(
    t, c, a, stride_t, stride_c, stride_a, n, tau, stride_tau,
    w_g, stride_g, w_k, stride_k, beta, stride_beta, scale, state, d_clean, d_adv,
    C: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One chunk a program, so that few rows still fill the GPU; the first chunk's program does the edges too."""
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    k = tl.program_id(0) % CHUNKS
    rows = row + tl.arange(0, 1)
    inside = rows < n
    aligned, head, length = interior(row, C)
    in_t, in_c, in_a = aligned, aligned, aligned
    if not CONTIGUOUS:
        in_t, in_c, in_a = row * stride_t + head, row * stride_c + head, row * stride_a + head
    _, rate_log2e = rates(tau, stride_tau)
    max_t, max_c, max_a, log_t, log_c, log_a, consistency = load_state(state, n, rows, inside)
    w_g = row_operand(w_g, stride_g, rows, inside) * scale
    w_k = row_operand(w_k, stride_k, rows, inside) * scale * row_operand(beta, stride_beta, rows, inside)
    cols = k * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    store_chunk_gradients(
        t + in_t, c + in_c, a + in_a, aligned, cols, cols < length, rate_log2e,
        d_clean, d_adv, max_t, max_c, max_a, log_t, log_c, log_a, consistency, w_g, w_k,
    )  # fmt: skip
    if C % 8 != 0:  # noqa: SIM102 - decided when compiling; the other one when running
        if k == 0:
            around, exists = edges(head, length, C)
            store_chunk_gradients(
                t + (in_t - head), c + (in_c - head), a + (in_a - head), aligned - head,
                around, exists, rate_log2e, d_clean, d_adv, max_t, max_c, max_a, log_t, log_c,
                log_a, consistency, w_g, w_k,
            )  # fmt: skip
