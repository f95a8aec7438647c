"""The Triton backend, imported as ``cktat_loss.kernels``. Its interface is ``cktat_loss._backends.Backend``.

Triton is imported when a kernel is first needed, not with the package. It is slow to import and not installed
everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cktat_loss._backends import ORDINARY_TYPES

if TYPE_CHECKING:
    from .launch import loss_backward, loss_forward, terms_backward, terms_forward

__all__ = ["is_available", "loss_backward", "loss_forward", "supports", "terms_backward", "terms_forward"]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Volta: Triton 3.8 compiles the kernels for it (benchmarks/results/by_hand.md). Nothing older than 9.0 has run them.
MINIMUM_CAPABILITY = 7


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # raised by an import hook
        return False


INSTALLED = _find_triton()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import launch

    globals()[name] = value = getattr(launch, name)
    return value


def is_available() -> bool:
    """True if Triton is installed and there is a GPU, or its interpreter is on."""
    return INSTALLED and (torch.cuda.is_available() or _interpreting())


def supports(tensor: Tensor) -> bool:
    """True if Triton can take this tensor: float16, bfloat16 or float32 on a CUDA or ROCm GPU.

    CPU tensors are supported only in Triton's interpreter. launch.py relies on this check.
    """
    answer = _supports.__wrapped__ if torch.compiler.is_compiling() else _supports  # Dynamo warns of lru_cache
    return answer(type(tensor), tensor.dtype, tensor.device)


@functools.cache
def _supports(kind: type, dtype: torch.dtype, device: torch.device) -> bool:
    if not INSTALLED or dtype not in SUPPORTED_DTYPES or kind not in ORDINARY_TYPES:
        return False
    if device.type == "cuda":  # also the name of a ROCm device
        is_rocm = torch.version.hip is not None
        return is_rocm or torch.cuda.get_device_properties(device).major >= MINIMUM_CAPABILITY
    return device.type == "cpu" and _interpreting()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y") and _defined_to_interpret()


def _defined_to_interpret() -> bool:
    """True if the variable was set when the kernels were defined. Triton reads it once per process."""
    from . import launch

    return launch.interprets()
