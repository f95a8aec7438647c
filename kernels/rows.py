"""Whole rows in registers: every logit is read once, and both gradients are written in the same pass."""

import triton
import triton.language as tl

from .row_math import (
    divergences,
    load_logits,
    load_state,
    probabilities,
    rates,
    row_max,
    row_operand,
    save_state,
    spread,
    store_gradients,
    store_losses,
)


@triton.jit
def tile(n, C: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """This program's rows (M,) and columns (G, 1, W), and which of them exist. 64-bit rows: N C may pass 2^31."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    cols = (tl.arange(0, G) * W)[:, None, None] + tl.arange(0, W)[None, None, :]
    inside = rows < n
    return rows, cols, inside, spread(inside) & (cols < C)


@triton.jit(do_not_specialize=["n"])
def rows_kernel(
    t, c, a, stride_t, stride_c, stride_a, n, tau, stride_tau,
    weight, stride_weight, beta, stride_beta, scale,
    guidance_out, consistency_out, loss_out, partial_out, state, d_clean, d_adv,
    C: tl.constexpr, CONTIGUOUS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Whatever has an output that is not None. The gradients are those of scale * weight * the loss."""
    if CONTIGUOUS:  # known when compiling: a run-time stride of 1000 would forbid 128-bit access
        stride_t, stride_c, stride_a = C, C, C
    rows, cols, inside, mask = tile(n, C, G, M, W)
    u = load_logits(t + spread(rows * stride_t) + cols, mask)
    x = load_logits(c + spread(rows * stride_c) + cols, mask)
    y = load_logits(a + spread(rows * stride_a) + cols, mask)
    max_t, max_c, max_a = row_max(u), row_max(x), row_max(y)
    rate, rate_log2e = rates(tau, stride_tau)
    p_t, p_c, p_a, d_c, log_t, log_c, log_a, guidance, consistency = divergences(
        u - spread(max_t), x - spread(max_c), y - spread(max_a), rate, rate_log2e
    )
    beta = row_operand(beta, stride_beta, rows, inside)
    store_losses(guidance_out, consistency_out, loss_out, partial_out, rows, inside, guidance, consistency, beta)
    save_state(state, n, rows, inside, max_t, max_c, max_a, log_t, log_c, log_a, consistency)
    if d_clean is not None or d_adv is not None:
        w_g = row_operand(weight, stride_weight, rows, inside) * scale
        w_k = w_g * beta
        store_gradients(d_clean, d_adv, spread(rows * C) + cols, mask, p_t, p_c, p_a, d_c, consistency, w_g, w_k)


@triton.jit(do_not_specialize=["n"])
def rows_backward_kernel(
    t, c, a, stride_t, stride_c, stride_a, n, tau, stride_tau,
    w_g, stride_g, w_k, stride_k, beta, stride_beta, scale, state, d_clean, d_adv,
    C: tl.constexpr, CONTIGUOUS: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The gradients from the logits and the forward's row statistics: no reduction."""
    if CONTIGUOUS:
        stride_t, stride_c, stride_a = C, C, C
    rows, cols, inside, mask = tile(n, C, G, M, W)
    max_t, max_c, max_a, log_t, log_c, log_a, consistency = load_state(state, n, rows, inside)
    u = tl.load(t + spread(rows * stride_t) + cols, mask=mask).to(tl.float32) - spread(max_t)
    x = tl.load(c + spread(rows * stride_c) + cols, mask=mask).to(tl.float32) - spread(max_c)
    y = tl.load(a + spread(rows * stride_a) + cols, mask=mask).to(tl.float32) - spread(max_a)
    _, rate_log2e = rates(tau, stride_tau)
    p_t, p_c, p_a, d_c = probabilities(u, x, y, log_t, log_c, log_a, rate_log2e)
    w_g = row_operand(w_g, stride_g, rows, inside) * scale
    w_k = row_operand(w_k, stride_k, rows, inside) * scale * row_operand(beta, stride_beta, rows, inside)
    store_gradients(d_clean, d_adv, spread(rows * C) + cols, mask, p_t, p_c, p_a, d_c, consistency, w_g, w_k)
