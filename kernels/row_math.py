"""The arithmetic of one row, shared by both kernels.

With shifted logits c, a, t (each less its row's maximum), probabilities p = exp(shifted) / sum, and log p:

    guidance    = KL(p_t || p_a) = sum p_t (d_t + expm1(-d_t))        d_t = log p_t - log p_a
    consistency = KL(p_c || p_a) = sum p_c (d_c + expm1(-d_c))        d_c = log p_c - log p_a
    dL/da = w_g (p_a - p_t) + w_c (p_a - p_c)                         dL/dc = w_c p_c (d_c - consistency)

Tiles of logits are (G, M, W): M rows, whose columns g W + w lie in G strips of W. A thread adds its strips up in its
registers, so W alone decides how many threads share a row and how many shuffles a reduction takes. Row values are (M,).

Every fused multiply-add is written as one, and the compiler's own fusing is switched off (launch.py): it would make
e_a r_a - p_t an fma, which is not zero where p_a = p_t. Constants are literals, since Triton checks every global that a
kernel reads at every launch.
"""

import triton
import triton.language as tl


@triton.jit
def spread(v):
    """(M,) -> (1, M, 1), against tiles."""
    return v[None, :, None]


@triton.jit
def row_sum(x):
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def row_max(x):
    return tl.max(tl.max(x, 0), 1)


@triton.jit
def load_logits(pointers, mask):
    """As float32, -inf in lanes that do not exist: they leave maxima, sums and divergences as they are."""
    return tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def per_row(value, STRIDE: tl.constexpr, rows, inside):
    """A float32 for each row: of a number (STRIDE None), or of a tensor, (N,) or with STRIDE 0 a single value."""
    if STRIDE is None:
        return tl.zeros(rows.shape, tl.float32) + value
    else:  # noqa: RET505 - not dead code to Triton
        return tl.load(value + rows * STRIDE, mask=inside).to(tl.float32)


@triton.jit
def load_labels(y_ptr, rows, inside, C: tl.constexpr):
    """Labels, and which of them are classes."""
    y = tl.load(y_ptr + rows, mask=inside).to(tl.int64)
    return y, (y >= 0) & (y < C)


@triton.jit
def rates(tau):
    """1 / tau and log2(e) / tau, neither infinite (0 * inf is NaN) nor zero (-inf * 0 is)."""
    rate = tl.minimum(tl.maximum(1.0 / tl.full((), tau, tl.float32), 1.2e-38), 3.4e38)
    return rate, tl.minimum(rate * 1.4426950408889634, 3.4e38)


@triton.jit
def softmax(shifted, rate_log2e):
    """exp2(shifted * rate_log2e), normalised, and the log of the sum that it was divided by."""
    e = tl.exp2(shifted * rate_log2e)
    total = row_sum(e)
    total = tl.where(total == 0, 1.0, total)  # a chunk masked everywhere has p = 0, not NaN
    return e * spread(1.0 / total), tl.log(total)


@triton.jit
def log_ratio(p, shifted_difference, log_p, log_q):
    """d = log p - log q. Where p = 0 it may be inf - inf: any finite d makes the summand q, and 1 is off the series."""
    return tl.where(p > 0, shifted_difference + spread(log_q - log_p), 1.0)


@triton.jit
def kl_sum(p, d, q):
    """Sum of p (d + expm1(-d)) for d = log p - log q. No summand is negative, so a tiny sum cancels nothing."""
    # Minimax cubic for (d + expm1(-d)) / d^2 on |d| < 0.25, 1.4e-6 relative. At 0.25 the other form keeps 5 digits.
    series = tl.fma(tl.fma(tl.fma(d, -0.00833746, 0.04175350), d, -0.16666696), d, 0.49999932)
    # p expm1(-d) = q - p cannot overflow; expm1(-d) does where p is tiny and q is not.
    kl = row_sum(tl.where(tl.abs(d) < 0.25, p * (d * d) * series, tl.fma(p, d, q - p)))
    return tl.where(kl < 0, 0.0, kl)  # rounding on saturated rows; a maximum would drop NaN


@triton.jit
def divergences(c, a, t, rate, rate_log2e):
    """From shifted logits: what the gradients, then the statistics of a chunk, then the loss are made of."""
    p_c, log_c = softmax(c, 1.4426950408889634)
    p_a, log_a = softmax(a, 1.4426950408889634)
    p_t, log_t = softmax(t, rate_log2e)
    d_c = log_ratio(p_c, c - a, log_c, log_a)
    d_t = log_ratio(p_t, tl.fma(t, rate, -a), log_t, log_a)
    return p_c, p_a, p_t, d_c, log_c, log_a, log_t, kl_sum(p_t, d_t, p_a), kl_sum(p_c, d_c, p_a)


@triton.jit
def mean_scale(n, REDUCTION: tl.constexpr):
    if REDUCTION == "mean":
        return 1.0 / tl.full((), n, tl.float32)
    else:  # noqa: RET505 - not dead code to Triton
        return tl.full((), 1.0, tl.float32)


@triton.jit
def store_losses(
    loss_ptr, guidance_ptr, consistency_ptr, rows, inside, guidance, consistency, beta, scale, REDUCTION: tl.constexpr
):
    """Where they have an output: the terms; guidance + beta consistency, or scale times this program's sum of it."""
    if guidance_ptr is not None:
        tl.store(guidance_ptr + rows, guidance, mask=inside)
        tl.store(consistency_ptr + rows, consistency, mask=inside)
    if loss_ptr is not None:
        loss = tl.fma(beta, consistency, guidance)
        if REDUCTION == "none":
            tl.store(loss_ptr + rows, loss, mask=inside)
        else:
            tl.store(loss_ptr + tl.program_id(0), scale * tl.sum(tl.where(inside, loss, 0.0), 0))


@triton.jit
def store_gradients(d_clean_ptr, d_adv_ptr, offsets, mask, p_c, p_a, p_t, d_c, consistency, w_guidance, w_consistency):
    """Each cast to its tensor's dtype once its weights are in it."""
    if d_adv_ptr is not None:
        grad = tl.fma(spread(w_consistency), p_a - p_c, spread(w_guidance) * (p_a - p_t))
        tl.store(d_adv_ptr + offsets, grad.to(d_adv_ptr.dtype.element_ty), mask=mask)
    if d_clean_ptr is not None:
        grad = (spread(w_consistency) * p_c) * (d_c - spread(consistency))
        tl.store(d_clean_ptr + offsets, grad.to(d_clean_ptr.dtype.element_ty), mask=mask)
