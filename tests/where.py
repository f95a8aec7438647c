"""Sends the whole library through the Triton kernels, so that tests written for the CPU test those."""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cktat_loss import CKTATTerms, _autograd, functional, kernels
from tests import forms, oracle


def to_triton(mode: str) -> None:
    forms.FORMS = forms.TRITON_FORMS
    if mode == "interpreter":
        # "auto" keeps CPU tensors away from the interpreter. Here they are to go there, half and single precision.
        from cktat_loss.kernels import launch

        patch_the_language_once()
        launch.rows_tile = many_rows_a_program(launch.rows_tile)
        oracle.LOST_TO_ROUNDING[torch.bfloat16] = 1.0
        _autograd.choose = to_the_interpreter(_autograd.choose)
        return
    for name in ("cktat_loss", "cktat_terms"):
        setattr(functional, name, on_the_gpu(getattr(functional, name)))


def to_the_interpreter(choose: Any) -> Any:
    @functools.wraps(choose)
    def whatever_it_supports(backend: str, *logits: Tensor) -> ModuleType:
        can = backend == "auto" and not torch.compiler.is_compiling() and all(map(kernels.supports, logits))
        return choose("triton" if can else backend, *logits)

    return whatever_it_supports


def patch_the_language_once() -> None:
    """The interpreter patches triton.language before every call of every function: most of its time, for ours."""
    import triton.language as tl
    from triton.runtime import interpreter

    from cktat_loss.kernels.rows import rows_kernel

    for function in (rows_kernel, tl.sum):
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def many_rows_a_program(rows_tile: Any) -> Any:
    """64 at least, whatever the tile: the interpreter's time goes by the program. test_tiles.py has the true ones."""

    @functools.wraps(rows_tile)
    def taller(*args: Any) -> Any:
        tile = rows_tile(*args)
        return tile._replace(rows=max(64, tile.rows))

    return taller


def on_the_gpu(function: Any) -> Any:
    """The function, computed on the GPU also for CPU tensors; gradients find their way back by themselves."""

    @functools.wraps(function)
    def moved(*args: Any, **options: Any) -> Any:
        if args[0].is_cuda:
            return function(*args, **options)
        return to_cpu(function(*map(to_gpu, args), **{name: to_gpu(value) for name, value in options.items()}))

    return moved


def to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    parts = map(to_cpu, value)
    return CKTATTerms(*parts) if isinstance(value, CKTATTerms) else tuple(parts)


def to_gpu(value: Any) -> Any:
    """On the GPU, with the same strides where that can be."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return value
    if 0 in value.stride() or torch._C._are_functorch_transforms_active():
        return value.cuda()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)
