"""Eq. 17 and its gradients in float64 NumPy, apart from the library, and the error of a result against them."""

import os
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# Allowed errors of loss and gradients, by the dtype of the logits. Half precision is computed in float32.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}


class Truth(NamedTuple):
    """Values in the order that results have."""

    guidance: Array  # (N,)
    consistency: Array  # (N,)
    rows: Array  # (N,), the loss of each row
    d_clean: Array  # (N, C), gradients of the rows' sum
    d_adv: Array
    unit_clean: Array  # (N,), natural sizes of each row's gradients
    unit_adv: Array


def array(x: Tensor) -> Array:
    return x.detach().double().resolve_neg().numpy()


def log_softmax(x: Array) -> Array:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def kl(log_p: Array, log_q: Array) -> Array:
    p = np.exp(log_p)
    return np.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)


@np.errstate(invalid="ignore", over="ignore")
def truth(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float | Tensor, y: Tensor | None = None
) -> Truth:
    c, a, t = array(clean), array(adv), array(teacher)
    weight = np.broadcast_to(array(beta) if isinstance(beta, Tensor) else beta, (len(a),))
    l_c, l_a, l_t = log_softmax(c), log_softmax(a), log_softmax((t - t.max(1, keepdims=True)) / tau)
    p_c, p_a, p_t = np.exp(l_c), np.exp(l_a), np.exp(l_t)
    guidance, consistency = kl(l_t, l_a), kl(l_c, l_a)
    unit = weight
    if y is not None:  # the label's probability may be too small for float32
        weight = weight * p_a[np.arange(len(a)), y.numpy()]
        unit = np.maximum(weight, 1e-3 * unit)
    d_clean = np.where(p_c == 0, 0.0, p_c * (l_c - l_a - consistency[:, None]))
    d_adv = (p_a - p_t) + weight[:, None] * (p_a - p_c)
    largest = np.abs(l_c - l_a).max(1, where=np.isfinite(l_c) & np.isfinite(l_a), initial=1.0)
    rows = guidance + weight * consistency
    return Truth(guidance, consistency, rows, weight[:, None] * d_clean, d_adv, unit * largest, 1 + unit)


def loss_error(actual: Tensor, true: Array | float) -> float:
    """Return the largest |error| / max(|true|, 1e-3)."""
    return float(np.max(np.abs(array(actual) - true) / np.maximum(np.abs(true), 1e-3)))


def gradient_error(actual: Tensor, true: Array, unit: Array) -> float:
    """Return the largest error beyond rounding, relative to its row's largest entry or natural size.

    If softmaxes saturate, a gradient is a difference of nearly equal numbers: an error relative to it means nothing.
    """
    truncated = actual.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"  # instead of rounded
    info = torch.finfo(actual.dtype)
    rounding = (1.0 if truncated else 0.5) * info.eps * (np.abs(true) + info.smallest_normal)
    excess = np.maximum(np.abs(array(actual) - true) - rounding, 0.0)
    return float(np.max(excess / np.maximum(np.abs(true).max(1), np.maximum(unit, 1e-300))[:, None]))


def assert_right(rows: Tensor, d_clean: Tensor, d_adv: Tensor, true: Truth, tolerance: float, note: str = "") -> None:
    error_clean = gradient_error(d_clean, true.d_clean, true.unit_clean)
    errors = loss_error(rows, true.rows), error_clean, gradient_error(d_adv, true.d_adv, true.unit_adv)
    assert all(error <= tolerance for error in errors), f"{note}: loss, d_clean, d_adv {errors}, allowed {tolerance}"
