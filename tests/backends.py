"""Send the loss of CPU tensors to the Triton kernels, so that tests written for the CPU test the kernels."""

import functools
import os
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cktat_loss import _autograd, kernels
from cktat_loss._backends import ORDINARY_TYPES


def use(name: str) -> None:
    """Let ``_autograd.choose`` return the named backend for all CPU tensors that the Triton kernels can take."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by deterministic algorithms on a GPU
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, which shows what is never written
    wrap, choose = {"interpreter": _in_interpreter, "gpu": _on_gpu}[name], _autograd.choose
    functions = ("loss_forward", "loss_backward", "terms_forward", "terms_backward")
    backend = SimpleNamespace(**{function: wrap(getattr(kernels, function)) for function in functions})

    @functools.wraps(choose)
    def choose_kernels(asked: str, *logits: Tensor) -> Any:
        takes = all(type(x) in ORDINARY_TYPES and x.dtype in kernels.SUPPORTED_DTYPES for x in logits)
        return backend if asked == "auto" and logits[0].is_cpu and takes else choose(asked, *logits)

    _autograd.choose = choose_kernels


def _in_interpreter(function: Any) -> Any:
    """Wrap a function of the kernels to save most of the interpreter's time.

    A program gets at least 64 rows. The language is patched once, not before every call of every function in a kernel.
    """
    from triton.runtime import interpreter

    from cktat_loss.kernels import launch, rows

    def tall(*args: Any, tile: Any = launch.rows_tile) -> Any:
        return tile(*args)._replace(rows=max(64, tile(*args).rows))

    interpreter._patch_lang(rows.rows_kernel.fn)
    interpreter._patch_lang(rows.tl.sum.fn)
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    # The plans of other tiles are cached.
    return patch.multiple(launch, rows_tile=tall, find_plan=launch.find_plan.__wrapped__)(function)


def _on_gpu(function: Any) -> Any:
    """Wrap a function of the kernels: its arguments go to the GPU, and its results return to the CPU."""
    return lambda *args: tree_map_only(Tensor, Tensor.cpu, function(*tree_map_only(Tensor, _to_gpu, args)))


def _to_gpu(x: Tensor) -> Tensor:
    if 0 in x.stride():  # elements share memory
        return x.cuda()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
