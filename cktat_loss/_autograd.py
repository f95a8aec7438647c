"""Autograd around the backends: what is computed when, and the dtype in which it comes back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cktat_loss import _cpu, _plain, kernels
from cktat_loss._plain import Gradients, Pass, Problem, Upstream


def compute(problem: Problem, return_terms: bool, backend: str) -> Pass:
    """The loss or both terms, differentiable in ``clean`` and ``adv`` as often as asked. The teacher is detached."""
    clean, adv, teacher, tau, beta, y, reduction = problem
    transformed, compiling = _transformed(), torch.compiler.is_compiling()
    if transformed or compiling or teacher.requires_grad:
        teacher = teacher.detach()
        problem = Problem(clean, adv, teacher, tau, beta, y, reduction)
    # Plain ops: transforms map and differentiate them. torch.export(strict=True) would drop the backward pass of an
    # autograd.Function.
    if transformed or (compiling and _is_exporting()):
        return _plain.forward(problem, return_terms, (True, True))
    if compiling:  # plain ops too: the compiler fuses them, and an operator of ours costs its host
        # A view, because Dynamo does not take one tensor as two inputs of an autograd.Function.
        guidance, consistency = _InGraph.apply(clean, adv.view_as(adv), teacher, tau)
        return _plain.from_terms(problem, guidance, consistency, return_terms)
    chosen = _choose(backend, clean, adv, teacher)
    if torch.is_grad_enabled() and (clean.requires_grad or adv.requires_grad):
        clean, adv, teacher = _savable(clean), _savable(adv), _savable(teacher)
        beta, y = beta if isinstance(beta, float) else _savable(beta), y if y is None else _savable(y)
        return Pass(*_Loss.apply(clean, adv, teacher, tau, beta, y, reduction, return_terms, chosen))
    out: Pass = chosen.forward(problem, return_terms, (False, False))
    return out


def _is_exporting() -> bool:
    """True under torch.export, which is the only caller that needs plain differentiable ops in a graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().export
    except AttributeError:  # strict=False does without Dynamo
        return True


if hasattr(torch.compiler, "is_exporting"):
    _is_exporting = torch.compiler.is_exporting
else:  # floor: torch 2.6. Dynamo calls a function that is marked so, and takes its result for a constant.
    _is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Loss(torch.autograd.Function):
    """The whole loss, or both terms, as one node: autograd adds no work of its own around it.

    A backend may compute the gradients with the loss, for an upstream gradient of one. They are held for one backward
    pass, which scales them; a second one, over a retained graph, computes them again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *fields, return_terms, backend = arguments
        problem = Problem(*fields)
        out: Pass = backend.forward(problem, return_terms, ctx.needs_input_grad)
        # The logits also where the backward pass will not look at them: a change in place must still be an error.
        clean, adv, teacher, tau, beta, y, reduction = problem
        saved_beta, number = (beta, None) if isinstance(beta, Tensor) else (None, beta)
        ctx.save_for_backward(clean, adv, teacher, saved_beta, y)
        ctx.others, ctx.backend, ctx.held = (tau, number, reduction), backend, out.held
        ctx.set_materialize_grads(False)
        if return_terms and reduction != "terms":
            ctx.mark_non_differentiable(out.guidance, out.consistency)
        return out.loss, out.guidance, out.consistency

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        clean, adv, teacher, beta, y = ctx.saved_tensors
        tau, number, reduction = ctx.others
        problem = Problem(clean, adv, teacher, tau, number if beta is None else beta, y, reduction)
        upstream = upstream[1:] if reduction == "terms" else upstream[:1]
        if upstream[0] is None and upstream[-1] is None:  # what was made of the loss has no gradient for it
            return (None,) * 9
        if _is_differentiated(upstream):
            gradients = _differentiable_backward(problem, upstream, ctx.needs_input_grad)
        else:
            # Handed over, not kept: autograd copies what somebody else still refers to.
            held, ctx.held = ctx.held, None
            gradients = ctx.backend.backward(problem, upstream, held, ctx.needs_input_grad)
        return *gradients, None, None, None, None, None, None, None


class _InGraph(torch.autograd.Function):
    """Both terms for torch.compile, with a backward pass that starts from the logits.

    Left to derive it, the compiler would keep five tensors of their size from one pass to the other.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        ctx.tau = tau
        ctx.save_for_backward(clean, adv, teacher)
        return _plain.terms(clean, adv, teacher, tau)

    @staticmethod
    def backward(ctx: Any, w_guidance: Tensor, w_consistency: Tensor) -> tuple[Tensor | None, ...]:
        clean, adv, teacher = ctx.saved_tensors
        d_clean, d_adv = _plain.gradients(clean, adv, teacher, ctx.tau, w_guidance, w_consistency)
        weight = (w_guidance + w_consistency).unsqueeze(1)
        return _bound_to(clean, d_clean, w_consistency.unsqueeze(1)), _bound_to(adv, d_adv, weight), None, None


def _bound_to(logits: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient, which is NaN where the weight is, in a form that takes the logits themselves.

    A compiled graph that kept only what it has made of them would have a silently wrong second derivative (torch 2.6 to
    2.11 at least). Where it keeps an input that requires grad, PyTorch refuses a second derivative.
    """
    return torch.where(weight.isnan(), (logits + weight).to(gradient.dtype), gradient)


def _choose(backend: str, *logits: Tensor) -> ModuleType:
    """Who computes it: a module with a ``forward`` and a ``backward`` like plain's."""
    on_cpu = logits[0].device.type == "cpu"
    # In Triton's interpreter the kernels take CPU tensors too, but only where asked for by name.
    if backend == "triton" or (backend == "auto" and not on_cpu and all(map(kernels.supports, logits))):
        return kernels  # what "triton" needs, _checks.py has seen to
    # A subclass may have no data to look at: a fake tensor has none.
    branches = on_cpu and all(type(x) in kernels.PLAIN and x.dtype != torch.float64 for x in logits)
    return _cpu if branches else _plain


def _transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work. A private name, the same since 2.0."""
    return _plain.transformed() or torch.autograd.forward_ad._current_level >= 0


def _savable(x: Tensor) -> Tensor:
    """A copy of an inference tensor, which autograd could not save."""
    return x.clone() if x.is_inference() else x


def _is_differentiated(upstream: Upstream) -> bool:
    """Whether a backward pass is to be differentiated itself, or is mapped over many upstream gradients.

    The mapping is that of ``autograd.grad(..., is_grads_batched=True)``. A private name, the same since torch 2.0.
    """
    return (
        torch.is_grad_enabled()
        or _transformed()
        or any(u is not None and torch._C._functorch.is_legacy_batchedtensor(u) for u in upstream)
    )


def _differentiable_backward(problem: Problem, upstream: Upstream, needed: tuple[bool, ...]) -> Gradients:
    """The gradients by autograd over plain ops: a second derivative is that of the formula, not of a saved number."""
    with torch.enable_grad():
        # Views: if one of the two depends on the other, each gradient must still be the partial one.
        clean, adv = problem.clean.view_as(problem.clean), problem.adv.view_as(problem.adv)
        out = _plain.forward(problem._replace(clean=clean, adv=adv), True, needed)
    values = (out.guidance, out.consistency) if out.loss is None else (out.loss,)
    used = [(value, u) for value, u in zip(values, upstream, strict=True) if value is not None and u is not None]
    found = torch.autograd.grad(
        [value for value, _ in used],
        [x for x, need in zip((clean, adv), needed, strict=False) if need],
        [u for _, u in used],
        create_graph=torch.is_grad_enabled(),
        materialize_grads=True,  # of the guidance alone, the clean logits get zeros
    )
    gradients = iter(found)
    return next(gradients) if needed[0] else None, next(gradients) if needed[1] else None
