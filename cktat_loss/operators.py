"""The Triton launches as operators that torch.compile sees as one call each. Eager code launches them directly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cktat_loss import kernels

STATE_ROWS = 7  # as in kernels.launch, which is not imported before Triton is needed


@torch.library.custom_op("cktat_loss::terms", mutates_args=())
def terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Guidance and consistency, (N,) each, and the row statistics for :func:`gradients`."""
    guidance, consistency, state = kernels.terms(clean, adv, teacher, tau, save_state=True)
    assert state is not None
    return guidance, consistency, state


@torch.library.custom_op("cktat_loss::gradients", mutates_args=())
def gradients(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: Tensor,
    state: Tensor,
    w_guidance: Tensor,
    w_consistency: Tensor,
    need_clean: bool,
    need_adv: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``(w_guidance * guidance + w_consistency * consistency).sum()``; (0,) where not needed.

    Without an autograd formula of its own: a second derivative through it raises.
    """
    d_clean, d_adv = kernels.gradients(
        clean, adv, teacher, tau, state, w_guidance, w_consistency, need_clean=need_clean, need_adv=need_adv
    )
    return clean.new_empty(0) if d_clean is None else d_clean, adv.new_empty(0) if d_adv is None else d_adv


@terms.register_fake
def _(clean: Tensor, adv: Tensor, teacher: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = [clean.new_empty(clean.shape[0], dtype=torch.float32) for _ in range(2)]
    return rows[0], rows[1], clean.new_empty((STATE_ROWS, clean.shape[0]), dtype=torch.float32)


@gradients.register_fake
def _(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: Tensor,
    state: Tensor,
    w_guidance: Tensor,
    w_consistency: Tensor,
    need_clean: bool,
    need_adv: bool,
) -> tuple[Tensor, Tensor]:
    return clean.new_empty(clean.shape if need_clean else 0), adv.new_empty(adv.shape if need_adv else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, w_guidance: Tensor, w_consistency: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    found = gradients(*ctx.saved_tensors, w_guidance, w_consistency, *needed)
    return *(d if need else None for d, need in zip(found, needed, strict=True)), None, None


terms.register_autograd(_backward, setup_context=_save)
