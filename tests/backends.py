"""Send the loss of CPU tensors to the Triton kernels, so that tests written for the CPU test the kernels."""

import functools
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cktat_loss import _autograd, kernels

NAMES = ("torch", "interpreter", "gpu")


def use(name: str) -> None:
    """Let ``_autograd.choose`` return the named backend for all CPU tensors that the Triton kernels can take."""
    if name == "torch":
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by deterministic algorithms on a GPU
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, which shows what is never written
    backend: Any = kernels
    if name == "gpu":
        functions = ("loss_forward", "loss_backward", "terms_forward", "terms_backward")
        backend = SimpleNamespace(**{function: _on_gpu(getattr(kernels, function)) for function in functions})
    else:
        _patch_language_once()
    choose = _autograd.choose

    @functools.wraps(choose)
    def choose_kernels(asked: str, *logits: Tensor) -> Any:
        takes = all(type(x) in kernels.SUPPORTED_TYPES and x.dtype in kernels.SUPPORTED_DTYPES for x in logits)
        return backend if asked == "auto" and logits[0].is_cpu and takes else choose(asked, *logits)

    _autograd.choose = choose_kernels


def _patch_language_once() -> None:
    """Save most of the interpreter's time: it patches triton.language before every call of every function."""
    from triton import language
    from triton.runtime import interpreter

    from cktat_loss.kernels.rows import rows_kernel

    for function in (rows_kernel, language.sum):
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def _on_gpu(function: Any) -> Any:
    """Wrap a function of a backend: its arguments go to the GPU, and its results return to the CPU."""
    return lambda *args: tree_map_only(Tensor, Tensor.cpu, function(*tree_map_only(Tensor, _to_gpu, args)))


def _to_gpu(x: Tensor) -> Tensor:
    if 0 in x.stride():  # elements share memory
        return x.cuda()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
