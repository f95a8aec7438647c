"""The Triton backend, imported as ``cktat_loss.kernels``: a ``forward`` and a ``backward`` as in ``_plain.py``.

Triton is imported with the first launch, not with the package: it is slow to import, and not there on every machine.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .launch import backward, forward

__all__ = ["backward", "forward", "is_available", "supports"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VOLTA = 7  # the compute capability of NVIDIA GPUs from which on Triton compiles for them
PLAIN = (Tensor, torch.nn.Parameter)  # a subclass, such as DTensor, may hold its elements elsewhere


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # from an import hook
        return False


INSTALLED = _installed()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import launch

    globals()[name] = value = getattr(launch, name)
    return value


def is_available() -> bool:
    """Whether Triton is installed and has something to run on: a GPU, or its interpreter."""
    return INSTALLED and (torch.cuda.is_available() or _interpreting())


def supports(tensor: Tensor) -> bool:
    """Whether this tensor may go to Triton: half or single precision, on a CUDA or ROCm GPU, with memory of its own.

    CPU tensors only where Triton's interpreter runs the kernels. The one place that looks at the device.
    """
    answer = _supports.__wrapped__ if torch.compiler.is_compiling() else _supports  # Dynamo warns of a cache
    return answer(type(tensor), tensor.dtype, tensor.device)


@functools.cache
def _supports(kind: type, dtype: torch.dtype, device: torch.device) -> bool:
    if not INSTALLED or dtype not in DTYPES or kind not in PLAIN:
        return False
    if device.type == "cuda":  # ROCm's name too
        return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= VOLTA
    return device.type == "cpu" and _interpreting()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y") and _defined_to_interpret()


def _defined_to_interpret() -> bool:
    """The variable counts when the kernels are defined, once in a process."""
    from . import launch

    return launch.interprets()
