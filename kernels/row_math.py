"""The arithmetic of one row, shared by both kernels.

c, a and t are the clean, adversarial and teacher logits of a row, shifted: each minus its row's maximum. Probabilities
are p = exp(shifted) / sum, and for the teacher exp(shifted / tau) / sum. Then:

    guidance    = KL(p_t || p_a) = sum p_t (d_t + expm1(-d_t))        d_t = log p_t - log p_a
    consistency = KL(p_c || p_a) = sum p_c (d_c + expm1(-d_c))        d_c = log p_c - log p_a
    dL/da = w_g (p_a - p_t) + w_c (p_a - p_c)                         dL/dc = w_c p_c (d_c - consistency)

A tile of logits is (STRIPS, ROWS, WIDTH): column s WIDTH + w of a row lies in strip s. A thread sums over its strips in
its own registers, so that WIDTH decides how many threads share a row and how many shuffles a reduction takes.
Values per row are (ROWS,). The streaming kernel cuts a row into chunks and treats each chunk as a row.

Every fused multiply-add is written as ``tl.fma``, and launch.py switches off the compiler's own fusing. A probability
is a product, exponential times 1 / sum. With fusing, the difference of two equal probabilities would not be zero.
Constants are literals, because Triton checks every global that a kernel reads at every launch.
"""

import triton
import triton.language as tl


@triton.jit
def spread(v):
    """Broadcast values per row against tiles: (ROWS,) -> (1, ROWS, 1)."""
    return v[None, :, None]


@triton.jit
def row_sum(x):
    return tl.sum(tl.sum(x, 0), 1)


@triton.jit
def row_max(x):
    return tl.max(tl.max(x, 0), 1)


@triton.jit
def load_logits(pointers, mask):
    """Load logits as float32. Lanes outside the mask get -inf, which changes no maximum, sum or divergence."""
    return tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def per_row(value, STRIDE: tl.constexpr, rows, inside):
    """Return a float32 per row, from a number (STRIDE None) or from a pointer: STRIDE is 0 for a single value."""
    if STRIDE is None:
        return tl.zeros(rows.shape, tl.float32) + value
    else:  # noqa: RET505 - Triton compiles one branch
        return tl.load(value + rows * STRIDE, mask=inside).to(tl.float32)


@triton.jit
def load_labels(y_ptr, rows, inside, C: tl.constexpr):
    """Load labels as int64. Also return a mask of those in [0, C)."""
    y = tl.load(y_ptr + rows, mask=inside).to(tl.int64)
    return y, (y >= 0) & (y < C)


@triton.jit
def rates(tau):
    """Return 1 / tau and log2(e) / tau, clamped to finite positive numbers.

    If a tiny tau made them infinite, 0 * inf would be NaN. If a huge tau made them zero, -inf * 0 would be NaN.
    """
    rate = tl.minimum(tl.maximum(1.0 / tl.full((), tau, tl.float32), 1.2e-38), 3.4e38)
    return rate, tl.minimum(rate * 1.4426950408889634, 3.4e38)


@triton.jit
def softmax(shifted, rate_log2e):
    """Return the softmax of shifted / tau, as exp2(shifted * rate_log2e) / sum, and the log of that sum."""
    e = tl.exp2(shifted * rate_log2e)
    total = row_sum(e)
    total = tl.where(total == 0, 1.0, total)  # a chunk that is masked everywhere gets p = 0 instead of NaN
    return e * spread(1.0 / total), tl.log(total)


@triton.jit
def log_ratio(p, shifted_difference, log_sum_p, log_sum_q):
    """Return d = log p - log q, where log p = shifted - log_sum_p and likewise for q.

    If p = 0, d may be inf - inf. Any finite d outside the series' range, such as 1, gives the right summand q.
    """
    return tl.where(p > 0, shifted_difference + spread(log_sum_q - log_sum_p), 1.0)


@triton.jit
def kl_sum(p, d, q):
    """Return the row sums of p (d + expm1(-d)) for d = log p - log q. Summands are >= 0, so that none cancel."""
    # Minimax cubic for (d + expm1(-d)) / d^2 on |d| < 0.25, relative error 1.4e-6. It costs fewer instructions than the
    # polynomial of degree 4 in _plain.py, which holds to 0.5. From 0.25 on the direct form keeps 5 digits.
    series = tl.fma(tl.fma(tl.fma(d, -0.00833746, 0.04175350), d, -0.16666696), d, 0.49999932)
    # p expm1(-d) = q - p cannot overflow; expm1(-d) does where p is tiny and q is not.
    kl = row_sum(tl.where(tl.abs(d) < 0.25, p * (d * d) * series, tl.fma(p, d, q - p)))
    return tl.where(kl < 0, 0.0, kl)  # rounding gives -1e-45 on saturated rows; a maximum would drop NaN


@triton.jit
def divergences(c, a, t, rate, rate_log2e):
    """Compute the divergences of rows from their shifted logits.

    Returns the probabilities p_c, p_a, p_t and the log ratio d_c, which the gradients use; the logs of the three sums,
    from which streaming.py merges chunks; and the terms, guidance and consistency.
    """
    p_c, log_sum_c = softmax(c, 1.4426950408889634)
    p_a, log_sum_a = softmax(a, 1.4426950408889634)
    p_t, log_sum_t = softmax(t, rate_log2e)
    d_c = log_ratio(p_c, c - a, log_sum_c, log_sum_a)
    d_t = log_ratio(p_t, tl.fma(t, rate, -a), log_sum_t, log_sum_a)
    return p_c, p_a, p_t, d_c, log_sum_c, log_sum_a, log_sum_t, kl_sum(p_t, d_t, p_a), kl_sum(p_c, d_c, p_a)


@triton.jit
def mean_scale(n, REDUCTION: tl.constexpr):
    """Return 1 / N for "mean", else 1."""
    if REDUCTION == "mean":
        return 1.0 / tl.full((), n, tl.float32)
    else:  # noqa: RET505 - Triton compiles one branch
        return tl.full((), 1.0, tl.float32)


@triton.jit
def store_losses(
    loss_ptr, guidance_ptr, consistency_ptr, rows, inside, guidance, consistency, beta, scale, REDUCTION: tl.constexpr
):
    """Store the terms and the loss, each if its pointer is given.

    The loss is guidance + beta consistency: per row for "none", else ``scale`` times this program's sum.
    """
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
    """Store the gradients, each if its pointer is given. They are weighted first, then cast to the output's dtype."""
    if d_adv_ptr is not None:
        grad = tl.fma(spread(w_consistency), p_a - p_c, spread(w_guidance) * (p_a - p_t))
        tl.store(d_adv_ptr + offsets, grad.to(d_adv_ptr.dtype.element_ty), mask=mask)
    if d_clean_ptr is not None:
        grad = (spread(w_consistency) * p_c) * (d_c - spread(consistency))
        tl.store(d_clean_ptr + offsets, grad.to(d_clean_ptr.dtype.element_ty), mask=mask)
