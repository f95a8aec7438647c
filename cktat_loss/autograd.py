"""Autograd around the backends: what is computed when, and the dtype in which it comes back."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cktat_loss import closed_form, kernels, plain
from cktat_loss.plain import Gradients, Pass, Upstream

_T = TypeVar("_T")


class CKTATTerms(NamedTuple):
    """The two KL terms of Eq. 17, each (N,), a value for each sample: their sum, beta in it, is the loss."""

    guidance: Tensor
    consistency: Tensor


def cktat_loss(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float,
    beta: float | Tensor,
    y: Tensor | None,
    reduction: str,
    return_terms: bool,
    backend: str,
) -> tuple[Tensor, CKTATTerms | None]:
    """Eq. 17, reduced: a scalar, or (N,) for "none". With ``return_terms`` its terms too, which carry no gradient."""
    out = _run(clean, adv, teacher, tau, beta, y, reduction, return_terms, backend)
    assert out.loss is not None
    if not return_terms:
        return out.loss, None
    assert out.guidance is not None
    assert out.consistency is not None
    return out.loss, CKTATTerms(out.guidance.detach(), out.consistency.detach())


def cktat_terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, backend: str) -> CKTATTerms:
    """Both terms of Eq. 17, with gradients."""
    out = _run(clean, adv, teacher, tau, 1.0, None, "terms", True, backend)
    assert out.guidance is not None
    assert out.consistency is not None
    return CKTATTerms(out.guidance, out.consistency)


def _run(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float,
    beta: float | Tensor,
    y: Tensor | None,
    reduction: str,
    return_terms: bool,
    backend: str,
) -> Pass:
    if _transformed():  # derivatives and maps of any kind, by plain ops alone
        return plain.forward(clean, adv, teacher.detach(), tau, beta, y, reduction, return_terms, (True, True))
    chosen = _choose(backend, clean, adv, teacher)
    if torch.is_grad_enabled() and (clean.requires_grad or adv.requires_grad):
        clean, teacher, beta, y = _savable(clean), _savable(teacher), _savable(beta), _savable(y)
        return Pass(*_Loss.apply(clean, adv, teacher, beta, y, tau, reduction, return_terms, chosen))
    out: Pass = chosen.forward(clean, adv, teacher, tau, beta, y, reduction, return_terms, (False, False))
    return out


class _Loss(torch.autograd.Function):
    """The whole loss, or both terms, as one node: autograd adds no work of its own around it.

    A backend may compute the gradients with the loss, for an upstream gradient of one. They are held for one backward
    pass, which scales them; a second one, over a retained graph, computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        clean: Tensor,
        adv: Tensor,
        teacher: Tensor,
        beta: float | Tensor,
        y: Tensor | None,
        tau: float,
        reduction: str,
        return_terms: bool,
        backend: ModuleType,
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        out: Pass = backend.forward(clean, adv, teacher, tau, beta, y, reduction, return_terms, needed)
        # The logits also where the backward pass will not look at them: a change in place must still be an error.
        ctx.save_for_backward(clean, adv, teacher, beta if isinstance(beta, Tensor) else None, y)
        ctx.others, ctx.backend, ctx.held = (
            (tau, None if isinstance(beta, Tensor) else beta, reduction),
            backend,
            out.held,
        )
        ctx.set_materialize_grads(False)
        if reduction != "terms" and return_terms:
            ctx.mark_non_differentiable(out.guidance, out.consistency)
        return out.loss, out.guidance, out.consistency

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        clean, adv, teacher, weights, y = ctx.saved_tensors
        tau, beta, reduction = ctx.others
        call = (clean, adv, teacher, tau, beta if weights is None else weights, y, reduction)
        wanted, needed = upstream[1:] if reduction == "terms" else upstream[:1], ctx.needs_input_grad[:2]
        if _is_differentiated(wanted):
            gradients = _differentiable_backward(call, wanted, needed)
        else:
            # Handed over, not kept: autograd copies what somebody else still refers to.
            held, ctx.held = ctx.held, None
            gradients = ctx.backend.backward(*call, wanted, held, needed)
        return *gradients, None, None, None, None, None, None, None


def _choose(backend: str, *logits: Tensor) -> ModuleType:
    """Who computes it: a module with a ``forward`` and a ``backward`` like plain's."""
    if torch.compiler.is_compiling():
        return plain  # which the compiler fuses, at half the host's cost of an operator of ours
    on_cpu = logits[0].device.type == "cpu"
    # In Triton's interpreter the kernels take CPU tensors too, but only where asked for by name.
    if backend == "triton" or (backend == "auto" and not on_cpu and all(map(kernels.supports, logits))):
        return kernels  # what "triton" needs, checks.py has seen to
    # A subclass may have no data to look at: a fake tensor has none.
    branches = on_cpu and all(type(x) in kernels.PLAIN and x.dtype != torch.float64 for x in logits)
    return closed_form if branches else plain


def _transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work. Private names, the same since 2.0."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _savable(x: _T) -> _T:
    """A copy of an inference tensor, which autograd could not save."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _is_differentiated(upstream: Upstream) -> bool:
    """Whether a backward pass is to be differentiated itself, or is mapped over many upstream gradients."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or any(u is not None and torch._C._functorch.is_legacy_batchedtensor(u) for u in upstream)
    )


def _differentiable_backward(call: tuple[Any, ...], upstream: Upstream, needed: tuple[bool, ...]) -> Gradients:
    """The gradients by autograd over plain ops: a second derivative is that of the formula, not of a saved number."""
    clean, adv, *others = call
    with torch.enable_grad():
        # Views: if one of the two depends on the other, each gradient must still be the partial one.
        clean, adv = clean.view_as(clean), adv.view_as(adv)
        inputs = [x for x, need in zip((clean, adv), needed, strict=False) if need]
        out = plain.forward(clean, adv, *others, return_terms=True, needed=needed)
        values = out[:1] if out.loss is not None else out[1:3]
    used = [(v, u) for v, u in zip(values, upstream, strict=True) if v is not None and u is not None]
    found = torch.autograd.grad(
        [v for v, _ in used],
        inputs,
        [u for _, u in used],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,  # of the guidance alone, the clean logits are
    )
    gradients = iter(found)
    return next(gradients) if needed[0] else None, next(gradients) if needed[1] else None
