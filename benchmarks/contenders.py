"""Eq. 17 as people write it, and as this library computes it: what the benchmarks compare, by name.

Each is called as ``loss(clean, adv, teacher, tau, beta, reduction)``; "none" gives a loss a sample.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cktat_loss import functional

TAU, BETA = 5.3, 5.7  # not dyadic: 5 and 6 hide a scalar that lost precision
Loss = Callable[..., Tensor]


class Contender(NamedTuple):
    loss: Loss
    compiled: bool = False
    note: str = ""


def kl_div(log_q: Tensor, p: Tensor, reduction: str, log_target: bool = False) -> Tensor:
    if reduction == "mean":
        return F.kl_div(log_q, p, reduction="batchmean", log_target=log_target)
    return F.kl_div(log_q, p, reduction="none", log_target=log_target).sum(1)


def usual(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "mean"
) -> Tensor:
    guidance = kl_div(F.log_softmax(adv, 1), F.softmax(teacher / tau, 1), reduction)
    return guidance + beta * kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction)


def one_log_softmax(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "mean"
) -> Tensor:
    log_a = F.log_softmax(adv, 1)
    guidance = kl_div(log_a, F.softmax(teacher / tau, 1), reduction)
    return guidance + beta * kl_div(log_a, F.softmax(clean, 1), reduction)


def log_targets(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "mean"
) -> Tensor:
    log_a, log_t, log_c = F.log_softmax(adv, 1), F.log_softmax(teacher / tau, 1), F.log_softmax(clean, 1)
    guidance = kl_div(log_a, log_t, reduction, log_target=True)
    return guidance + beta * kl_div(log_a, log_c, reduction, log_target=True)


def ours(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "mean"
) -> Tensor:
    return functional.cktat_loss(clean, adv, teacher, tau, beta, reduction=reduction)  # type: ignore[arg-type]


def closed_form(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "mean"
) -> Tensor:
    return functional.cktat_loss(clean, adv, teacher, tau, beta, reduction=reduction, backend="torch")  # type: ignore[arg-type]


def triton(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "mean"
) -> Tensor:
    return functional.cktat_loss(clean, adv, teacher, tau, beta, reduction=reduction, backend="triton")  # type: ignore[arg-type]


def liger(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "mean"
) -> Tensor:
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    log_a = F.log_softmax(adv, 1)

    def kl(p: Tensor) -> Tensor:
        result = LigerKLDivLossFunction.apply(log_a, p, "batchmean" if reduction == "mean" else "none", False, 1e-10)
        return result if reduction == "mean" else result.sum(1)  # type: ignore[no-any-return]

    return kl(F.softmax(teacher / tau, 1)) + beta * kl(F.softmax(clean, 1))


def choose(device: str, compiling: bool = True) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders of a device, the usual expression first; and why others are left out."""
    chosen = {
        "usual": Contender(usual),
        "usual, one log_softmax": Contender(one_log_softmax),
        "usual, log_target": Contender(log_targets),
        "usual, compiled": Contender(usual, compiled=True),
        "ours": Contender(closed_form),
        "ours, compiled": Contender(ours, compiled=True),
    }
    left_out = {}
    if why := "not asked for" if not compiling else no_compiler(device):
        for name in [name for name, contender in chosen.items() if contender.compiled]:
            del chosen[name]
            left_out[name] = why
    if device == "cpu":
        left_out["ours, Triton"] = "needs a GPU; Triton's interpreter is for tests, its times mean nothing"
        left_out["Liger-Kernel"] = "needs a GPU"
        return chosen, left_out
    chosen["ours, Triton"] = Contender(triton)
    if importlib.util.find_spec("liger_kernel") is None:
        left_out["Liger-Kernel"] = "not installed"
    else:
        note = "computes the KLs alone, from softmaxes by PyTorch; no gradient to the clean logits"
        chosen["Liger-Kernel"] = Contender(liger, note=note)
    return chosen, left_out


def no_compiler(device: str) -> str:
    """Why torch.compile cannot work here, as far as one sees without trying; or nothing."""
    from torch._inductor import config

    names = [name for name in config.cpp.cxx if name] if device == "cpu" else ["cc", "gcc", "clang"]
    if any(shutil.which(name) for name in names):
        return ""
    return f"torch.compile finds no compiler ({', '.join(names)})"


def compiled(loss: Loss) -> Loss:
    """Compiled for one number of classes and any number of rows: see :func:`any_rows`."""
    return torch.compile(loss)


def any_rows(*logits: Tensor) -> None:
    """Marks the batch as dynamic, so that one compilation serves all batch sizes."""
    for x in logits:
        torch._dynamo.mark_dynamic(x, 0)
