"""The arithmetic of one row, shared by every kernel.

With shifted logits u = t - max t, x = c - max c, y = a - max a, and log p = shifted - log sum exp(shifted):

    guidance    = KL(p_t || p_a) = sum p_t (d_t + expm1(-d_t))        d_t = log p_t - log p_a
    consistency = KL(p_c || p_a) = sum p_c (d_c + expm1(-d_c))        d_c = log p_c - log p_a
    dL/da = w_g (p_a - p_t) + w_k (p_a - p_c)                         dL/dc = w_k p_c (d_c - consistency)

Tiles of logits are (G, M, W): M rows, whose columns g W + w lie in G strips of W. A thread adds its strips up in its
registers, so that W alone decides how many threads share a row and how many shuffles a reduction takes. Row values
are (M,).

Teacher, clean, adversarial: in this order everywhere.

Every fused multiply-add is written as one, and the compiler's own fusing is switched off (launch.py): it would make
e_a r_a - p_t an fma, which is not zero where p_a = p_t.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
LARGEST = tl.constexpr(3.4e38)
SMALLEST = tl.constexpr(1.2e-38)
# Below it the series. Above it p d + (q - p) keeps 5 digits; at 0.1 it would keep only 4.
SERIES_BELOW = tl.constexpr(0.25)


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
    return tl.load(pointers, mask=mask, other=NEG_INF).to(tl.float32)


@triton.jit
def row_operand(value, stride, rows, inside):
    """A float32 a row: from a number (stride None), or from a tensor, 0-d with stride 0 or of one entry a row."""
    if stride is None:
        return tl.zeros(rows.shape, tl.float32) + value
    else:  # noqa: RET505 - not dead code to Triton
        return tl.load(value + rows * stride, mask=inside).to(tl.float32)


@triton.jit
def rates(tau, stride):
    """1 / tau, from a number (stride None) or a tensor, and log2(e) / tau: not infinite (0 * inf), nor 0 (-inf * 0)."""
    if stride is not None:
        tau = tl.load(tau)
    tau = tl.full((), tau, tl.float32)
    rate = tl.minimum(tl.maximum(1.0 / tau, SMALLEST), LARGEST)
    return rate, tl.minimum(rate * LOG2E, LARGEST)


@triton.jit
def kl_elements(p, d, q):
    """p (d + expm1(-d)) for d = log p - log q: never negative, so a tiny sum is no difference of large summands."""
    # Minimax cubic for (d + expm1(-d)) / d^2 on |d| < 0.25, 1.4e-6 relative.
    series = tl.fma(tl.fma(tl.fma(d, -0.00833746, 0.04175350), d, -0.16666696), d, 0.49999932)
    # p expm1(-d) = q - p cannot overflow; expm1(-d) does where p is tiny and q is not.
    return tl.where(tl.abs(d) < SERIES_BELOW, p * (d * d) * series, tl.fma(p, d, q - p))


@triton.jit
def kl_sum(p, d, q):
    kl = row_sum(kl_elements(p, d, q))
    return tl.where(kl < 0, 0.0, kl)  # rounding on saturated rows; a maximum would drop NaN


@triton.jit
def normalise(e):
    """Exponentials -> probabilities, log of their sum."""
    total = row_sum(e)
    total = tl.where(total == 0, 1.0, total)  # a chunk masked everywhere has p = 0, not NaN
    return e * spread(1.0 / total), tl.log(total)


@triton.jit
def log_ratio(p, shifted_difference, log_p, log_q):
    """d = log p - log q. Where p = 0 it may be inf - inf: any finite d makes the summand q, and 1 is off the series."""
    return tl.where(p > 0, shifted_difference + spread(log_q - log_p), 1.0)


@triton.jit
def divergences(u, x, y, rate, rate_log2e):
    """Shifted logits -> all that losses and gradients are made of. rate = 1/tau is still to be multiplied into u."""
    p_t, log_t = normalise(tl.exp2(u * rate_log2e))
    p_c, log_c = normalise(tl.exp2(x * LOG2E))
    p_a, log_a = normalise(tl.exp2(y * LOG2E))
    d_t = log_ratio(p_t, tl.fma(u, rate, -y), log_t, log_a)
    d_c = log_ratio(p_c, x - y, log_c, log_a)
    return p_t, p_c, p_a, d_c, log_t, log_c, log_a, kl_sum(p_t, d_t, p_a), kl_sum(p_c, d_c, p_a)


@triton.jit
def probabilities(u, x, y, log_t, log_c, log_a, rate_log2e):
    """Shifted logits and the logs of their sums -> p_t, p_c, p_a, d_c: no reduction, each element by itself."""
    p_t = tl.exp2(tl.fma(u, rate_log2e, spread(-log_t * LOG2E)))
    p_c = tl.exp2(tl.fma(x, LOG2E, spread(-log_c * LOG2E)))
    p_a = tl.exp2(tl.fma(y, LOG2E, spread(-log_a * LOG2E)))
    return p_t, p_c, p_a, log_ratio(p_c, x - y, log_c, log_a)


@triton.jit
def store_gradients(d_clean, d_adv, offsets, mask, p_t, p_c, p_a, d_c, consistency, w_g, w_k):
    """Each cast to its tensor's dtype once its weights are in it."""
    if d_adv is not None:
        grad = tl.fma(spread(w_k), p_a - p_c, spread(w_g) * (p_a - p_t))
        tl.store(d_adv + offsets, grad.to(d_adv.dtype.element_ty), mask=mask)
    if d_clean is not None:
        grad = (spread(w_k) * p_c) * (d_c - spread(consistency))
        tl.store(d_clean + offsets, grad.to(d_clean.dtype.element_ty), mask=mask)


@triton.jit
def store_losses(guidance_out, consistency_out, loss_out, partial_out, rows, inside, guidance, consistency, beta):
    """The terms, guidance + beta consistency, and its sum over the program's rows: each that has an output."""
    if guidance_out is not None:
        tl.store(guidance_out + rows, guidance, mask=inside)
    if consistency_out is not None:
        tl.store(consistency_out + rows, consistency, mask=inside)
    loss = tl.fma(beta, consistency, guidance)
    if loss_out is not None:
        tl.store(loss_out + rows, loss, mask=inside)
    if partial_out is not None:
        tl.store(partial_out + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), 0))


@triton.jit
def save_state(state, n, rows, inside, max_t, max_c, max_a, log_t, log_c, log_a, consistency):
    """(7, N). Maximum and log of the sum stay two numbers: added up, they round at large offsets."""
    if state is not None:
        tl.store(state + rows, max_t, mask=inside)
        state += n
        tl.store(state + rows, max_c, mask=inside)
        state += n
        tl.store(state + rows, max_a, mask=inside)
        state += n
        tl.store(state + rows, log_t, mask=inside)
        state += n
        tl.store(state + rows, log_c, mask=inside)
        state += n
        tl.store(state + rows, log_a, mask=inside)
        state += n
        tl.store(state + rows, consistency, mask=inside)


@triton.jit
def load_state(state, n, rows, inside):
    max_t = tl.load(state + rows, mask=inside)
    state += n
    max_c = tl.load(state + rows, mask=inside)
    state += n
    max_a = tl.load(state + rows, mask=inside)
    state += n
    log_t = tl.load(state + rows, mask=inside)
    state += n
    log_c = tl.load(state + rows, mask=inside)
    state += n
    log_a = tl.load(state + rows, mask=inside)
    state += n
    return max_t, max_c, max_a, log_t, log_c, log_a, tl.load(state + rows, mask=inside)


@triton.jit(do_not_specialize=["n"])
def sum_kernel(values, n, scale, out, BLOCK: tl.constexpr):
    """scale times the sum of n float32, by one program in a fixed order."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(values + start + lanes, mask=start + lanes < n, other=0.0)
    tl.store(out, tl.sum(total, 0) * scale)
