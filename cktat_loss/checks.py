"""Checks of arguments: each names the argument, what came and what was wanted, and changes nothing.

They compare and never convert to a Python number what a traced graph holds as a symbol, so that a tau or beta that
changes during training recompiles at most once. Tensors' values are never looked at: that would wait for the device.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from cktat_loss import kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_NEEDS = "it needs Triton and a CUDA or ROCm GPU; use 'auto' or 'torch'"
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-149, (2 - 2.0**-23) * 2.0**127


def tau(value: float) -> float:
    """A temperature, as a float."""
    value = number("tau", value)
    if not SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise ValueError(f"tau must be finite, > 0 and not 0 in float32, got {value}")
    return value


def beta(value: float) -> float:
    """A weight of the consistency term, as a float."""
    value = number("beta", value)
    if not 0 <= value <= LARGEST_FLOAT32:
        raise ValueError(f"beta must be finite and >= 0, got {value}")
    return value


def reduction(value: str) -> None:
    choice("reduction", value, ("mean", "sum", "none"))


def backend(value: str, *logits: Tensor) -> None:
    """A known backend that, where it insists on Triton, can serve all of ``logits``."""
    choice("backend", value, ("auto", "triton", "torch"))
    if value != "triton":
        return
    if not logits and not kernels.is_available():
        raise RuntimeError(f"backend='triton' is not available here: {TRITON_NEEDS}")
    for name, x in zip(("clean_logits", "adv_logits", "teacher_logits"), logits, strict=False):
        if x.dtype == torch.float64:
            raise TypeError(f"backend='triton' takes half and single precision, got {name}: {describe(x)}")
        if not kernels.supports(x):
            raise RuntimeError(f"backend='triton' is not available for {name}, {describe(x)}: {TRITON_NEEDS}")


def choice(name: str, got: object, choices: tuple[str, ...]) -> None:
    if got not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {got!r}")


def number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:  # an int past the largest float
        return math.inf


def logits(clean: Tensor, adv: Tensor, teacher: Tensor) -> None:
    named = (("clean_logits", clean), ("adv_logits", adv), ("teacher_logits", teacher))
    for name, x in named:
        one_logits(name, x)
    for name, x in named[1:]:
        if x.shape != clean.shape:
            raise ValueError(f"{name} must have the shape of clean_logits, {tuple(clean.shape)}, got {describe(x)}")
        if x.device != clean.device:
            raise ValueError(f"{name} must be on the device of clean_logits, {clean.device}, got {describe(x)}")


def one_logits(name: str, x: Tensor) -> None:
    """Dense floating (N, C) with C >= 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of logits (N, C), got {describe(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {describe(x)} with layout {x.layout}")
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (N, C), got {describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, got {describe(x)}")


def labels(y: Tensor, of: Tensor) -> None:
    """Integer (N,), for the logits ``of``."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of labels (N,), got {describe(y)}")
    if y.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"y must be an integer tensor, got {describe(y)}")
    if y.shape != of.shape[:1]:
        raise ValueError(f"y must have shape ({of.shape[0]},), one label a sample, got {describe(y)}")
    if y.device != of.device:
        raise ValueError(f"y must be on the device of adv_logits, {of.device}, got {describe(y)}")


def sample_weights(name: str, value: float | Tensor, of: Tensor) -> float | Tensor:
    """A number >= 0, or a floating tensor, 0-d or (N,), that takes no gradient, for the logits ``of``."""
    if not isinstance(value, Tensor):
        return beta(value)
    _floating(name, value, of)
    n = of.shape[0]
    if value.ndim > 0 and value.shape != (n,):
        raise ValueError(
            f"{name} must be a number or have shape () or ({n},), one weight a sample, got {describe(value)}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad, since no gradient flows to it: pass {name}.detach()")
    return value


def grad_scale(value: float | Tensor, of: Tensor) -> float | Tensor:
    """A finite number, or a 0-d floating tensor beside the logits ``of``."""
    if isinstance(value, Tensor):
        _floating("grad_scale", value, of)
        if value.ndim:
            raise ValueError(f"grad_scale must be a number or a 0-d tensor, got {describe(value)}")
        return value.detach()
    value = number("grad_scale", value)
    if not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise ValueError(f"grad_scale must be finite, got {value}")
    return value


def _floating(name: str, value: Tensor, of: Tensor) -> None:
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be a number or a floating tensor, got {describe(value)}")
    if value.device != of.device:
        raise ValueError(f"{name} must be on the device of the logits, {of.device}, got {describe(value)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def describe(value: object) -> str:
    """What came, for an error message: a tensor by shape, dtype and device, anything else by value and type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r} ({type(value).__name__})"
