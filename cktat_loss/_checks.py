"""Checks of arguments. An error names the argument, what came and what was wanted.

The checks keep tau and beta symbolic under torch.compile, so that changing them recompiles at most once. Values of
tensors are not read, because that would wait for the device. The one exception is labels on an eager CPU.
"""

from __future__ import annotations

import builtins
import math
from numbers import Real

import torch
from torch import Tensor

from cktat_loss import kernels
from cktat_loss._backends import ORDINARY_TYPES, is_traced

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_NEEDS = "it needs Triton and a CUDA or ROCm GPU; use 'auto' or 'torch'"
HALF_OF_THE_SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-150, (2 - 2.0**-23) * 2.0**127


def tau(value: float) -> float:
    """Return the temperature as a float. Raise unless it is a finite number > 0 in float32."""
    value = number("tau", value)
    if not HALF_OF_THE_SMALLEST_FLOAT32 < value <= LARGEST_FLOAT32:
        raise ValueError(f"tau must be finite, > 0 and not 0 in float32, got {value}")
    return value


def beta(value: float) -> float:
    """Return the weight of the consistency term as a float. Raise unless it is a finite number >= 0 in float32."""
    value = number("beta", value)
    if not 0 <= value <= LARGEST_FLOAT32:
        raise ValueError(f"beta must be finite and >= 0, got {value}")
    return value


def reduction(value: str) -> str:
    if isinstance(value, str) and value == "batchmean":
        raise ValueError("reduction must be 'mean', which is torch's 'batchmean': the mean over the batch alone")
    return choice("reduction", value, ("mean", "sum", "none"))


def backend(value: str, *logits: Tensor) -> str:
    """Return the backend's name. Raise if it is unknown, or is "triton" and the kernels cannot take the logits."""
    choice("backend", value, ("auto", "triton", "torch"))
    if value != "triton":
        return value
    if not logits and not kernels.is_available():
        raise RuntimeError(f"backend='triton' is not available here: {TRITON_NEEDS}")
    for name, x in zip(("clean_logits", "adv_logits", "teacher_logits"), logits, strict=False):
        if x.dtype == torch.float64:
            raise TypeError(f"backend='triton' takes half and single precision, got {name}: {describe(x)}")
        if not kernels.supports(x):
            raise RuntimeError(f"backend='triton' is not available for {name}, {describe(x)}: {TRITON_NEEDS}")
    return value


def choice(name: str, got: str, choices: tuple[str, ...]) -> str:
    if not isinstance(got, str) or got not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {describe(got)}")
    return got


def number(name: str, value: object) -> float:
    # float and int come first, because a check against the abstract class Real alone takes a microsecond more.
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:  # an int past the largest float
        return math.inf


def logits(clean: Tensor, adv: Tensor, teacher: Tensor) -> None:
    one_logits("clean_logits", clean)
    shape, device = clean.shape, clean.device
    for name, x in (("adv_logits", adv), ("teacher_logits", teacher)):
        one_logits(name, x)
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape of clean_logits, {tuple(shape)}, got {describe(x)}")
        if x.device != device:
            raise ValueError(f"{name} must be on the device of clean_logits, {device}, got {describe(x)}")
        combinable(name, x, "clean_logits", clean)
    combinable("teacher_logits", teacher, "adv_logits", adv)


def combinable(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that torch can combine two tensors: of two subclasses of Tensor, one must be a subclass of the other.

    While a graph is traced nothing is checked, because tracing puts types of its own in the place of the tensors.
    """
    kind, other_kind = type(x), type(other)
    if kind is other_kind or kind in ORDINARY_TYPES or other_kind in ORDINARY_TYPES or is_traced():
        return
    if not issubclass(kind, other_kind) and not issubclass(other_kind, kind):
        kinds = f"{kind.__name__} and {other_kind.__name__}"
        raise TypeError(f"{name} and {other_name} must have related types, got the unrelated tensor subclasses {kinds}")


def tensor(name: str, x: Tensor) -> None:
    """Check that ``x`` is a tensor. The error for a model's output object points at its ``.logits``."""
    if not isinstance(x, Tensor):
        has_logits = isinstance(getattr(x, "logits", None), Tensor)
        got = f"a {type(x).__name__}: pass its .logits" if has_logits else describe(x)
        raise TypeError(f"{name} must be a tensor of logits (N, C), got {got}")


def one_logits(name: str, x: Tensor) -> None:
    """Check one tensor of logits: dense, floating, (N, C) with C >= 1."""
    tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(x)}")
    dense(name, x, "(N, C)")
    if x.ndim != 2:
        hint = ": pass logits.movedim(1, -1).flatten(0, -2)" if x.ndim > 2 else ""
        raise ValueError(f"{name} must have shape (N, C), got {describe(x)}{hint}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, got {describe(x)}")


def dense(name: str, x: Tensor, shape: str) -> None:
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor {shape}, got {describe(x)}")


def labels(y: Tensor, logits: Tensor) -> None:
    """Check labels: integer, (N,), on the device of ``logits``. Their range is checked on an eager CPU only."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of labels (N,), got {describe(y)}")
    if y.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"y must be an integer tensor, got {describe(y)}")
    dense("y", y, "(N,)")
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y must have shape ({logits.shape[0]},), a label for each sample, got {describe(y)}")
    if y.device != logits.device:
        raise ValueError(f"y must be on the device of adv_logits, {logits.device}, got {describe(y)}")
    combinable("y", y, "adv_logits", logits)
    if any(getattr(placement, "dim", None) == 1 for placement in getattr(logits, "placements", ())):
        raise TypeError(
            "y cannot be used with adv_logits that are sharded over classes: redistribute them over samples"
        )
    # Reading labels is free on an eager CPU. Elsewhere a label out of range gives NaN for its sample.
    if y.device.type == "cpu" and type(y) in ORDINARY_TYPES and y.numel() and not is_traced():
        lowest, highest = y.min().item(), y.max().item()
        if lowest < 0 or highest >= logits.shape[1]:
            found = lowest if lowest < 0 else highest
            raise ValueError(f"y must hold labels from 0 to {logits.shape[1] - 1}, got {found}")


def sample_beta(value: float | Tensor, logits: Tensor, y: Tensor | None = None) -> float | Tensor:
    """Return beta: a number >= 0, or a floating tensor, () or (N,), that does not require grad.

    With labels only a number is accepted.
    """
    if not isinstance(value, Tensor):
        return beta(value)
    if y is not None:
        raise TypeError(f"beta must be a number where y gives the weights of the samples, got {describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"beta must be a number or a floating tensor, got {describe(value)}")
    dense("beta", value, "() or (N,)")
    if value.device != logits.device:
        raise ValueError(f"beta must be on the device of the logits, {logits.device}, got {describe(value)}")
    combinable("beta", value, "the logits", logits)
    n = logits.shape[0]
    if value.ndim > 0 and value.shape != (n,):
        raise ValueError(
            f"beta must be a number or have shape () or ({n},), a weight for each sample, got {describe(value)}"
        )
    if value.requires_grad:
        raise ValueError("beta must not require grad, since no gradient flows to it: pass beta.detach()")
    return value


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def describe(value: object) -> str:
    """Describe a value for an error message.

    A tensor is described by shape, dtype and device; a number, string, bool or None by its repr and type; anything else
    by its type.
    """
    if isinstance(value, Tensor):
        kind = "nested tensor" if value.is_nested else "tensor"
        shape = "" if value.is_nested else f" of shape {tuple(value.shape)}"
        layout = "" if value.layout == torch.strided else f", {value.layout}"
        return f"a {kind}{shape}, {value.dtype}, on {value.device}{layout}"
    if isinstance(value, (str, bool, int, float, Real, type(None))):
        return f"{value!r} ({type(value).__name__})"
    name = type(value).__name__
    if hasattr(builtins, name):  # name numpy.bool in full, because bool is another type
        name = f"{type(value).__module__}.{name}".removeprefix("builtins.")
    return f"a {name}"
