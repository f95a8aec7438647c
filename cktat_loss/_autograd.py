"""Autograd around the backends: which backend computes the loss, and when gradients are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cktat_loss import _cpu, _plain, kernels
from cktat_loss._backends import (
    ORDINARY_TYPES,
    Backend,
    CKTATTerms,
    Gradients,
    Needs,
    Problem,
    Weighting,
    is_exporting,
    is_mapped,
    is_transformed,
)

# No gradient is needed from the backend: nobody wants one, or autograd derives it from differentiable operations.
NO_GRADIENTS = Needs(clean=False, adv=False)


def loss(problem: Problem, weighting: Weighting, return_terms: bool, backend: str) -> tuple[Tensor, CKTATTerms | None]:
    """Compute the loss. Under torch.compile it is differentiable once, otherwise any number of times.

    The terms are detached, and None unless ``return_terms``.
    """
    if _derives_everything():
        out = _plain.loss_forward(problem, weighting, NO_GRADIENTS, return_terms)
        return out.loss, out.terms
    if torch.compiler.is_compiling():
        out = _plain.combine(problem, weighting, _terms_in_graph(problem), return_terms)
        return out.loss, out.terms
    chosen = choose(backend, problem.clean, problem.adv, problem.teacher)
    if _needs_gradients(problem):
        problem = _savable_problem(problem)
        weighting = _savable_weighting(weighting)
        value, guidance, consistency = _Loss.apply(problem.clean, problem.adv, problem, weighting, return_terms, chosen)
        return value, CKTATTerms(guidance, consistency) if return_terms else None
    out = chosen.loss_forward(problem, weighting, NO_GRADIENTS, return_terms)
    return out.loss, out.terms


def terms(problem: Problem, backend: str) -> CKTATTerms:
    """Compute both terms, each (N,), differentiable as the loss is."""
    if _derives_everything():
        return _plain.terms_forward(problem)
    if torch.compiler.is_compiling():
        return _terms_in_graph(problem)
    chosen = choose(backend, problem.clean, problem.adv, problem.teacher)
    if _needs_gradients(problem):
        problem = _savable_problem(problem)
        return CKTATTerms(*_Terms.apply(problem.clean, problem.adv, problem, chosen))
    return chosen.terms_forward(problem)


def _derives_everything() -> bool:
    """True if autograd has to derive the gradients from plain operations.

    torch.func and forward-mode differentiation refuse the Functions below. torch.export drops their backward pass.
    """
    return is_transformed() or (torch.compiler.is_compiling() and is_exporting())


def choose(backend: str, *logits: Tensor) -> Backend:
    """Return the backend that computes a problem with these logits.

    ``_checks.backend`` has verified that the kernels support them if ``backend`` is "triton".
    """
    on_cpu = logits[0].device.type == "cpu"
    # Triton's interpreter takes CPU tensors too, but only if it is asked for by name.
    if backend == "triton" or (backend == "auto" and not on_cpu and all(map(kernels.supports, logits))):
        return kernels
    # A tensor subclass may have no data to branch on. A fake tensor has none.
    if on_cpu and all(type(x) in ORDINARY_TYPES and x.dtype != torch.float64 for x in logits):
        return _cpu
    return _plain


class _Loss(torch.autograd.Function):
    """The loss as one node of the autograd graph.

    A backend may precompute gradients together with the loss. They serve one backward pass, which completes them for
    the real grad_output. A second backward pass over a retained graph computes the gradients again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        clean: Tensor,
        adv: Tensor,
        problem: Problem,
        weighting: Weighting,
        return_terms: bool,
        backend: Backend,
    ) -> tuple[Tensor | None, ...]:
        needs = Needs(*ctx.needs_input_grad[:2])
        out = backend.loss_forward(problem, weighting, needs, return_terms)
        # Save the logits even if the backward pass will not read them: a change in place must still be an error.
        has_tensor = isinstance(weighting.beta, Tensor)
        ctx.save_for_backward(clean, adv, problem.teacher, weighting.beta if has_tensor else None, weighting.y)
        ctx.tau, ctx.beta, ctx.reduction = problem.tau, None if has_tensor else weighting.beta, weighting.reduction
        ctx.backend, ctx.precomputed = backend, out.precomputed
        ctx.set_materialize_grads(False)
        if out.terms is None:
            return out.loss, None, None
        ctx.mark_non_differentiable(out.terms.guidance, out.terms.consistency)
        return out.loss, out.terms.guidance, out.terms.consistency

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        clean, adv, teacher, beta, y = ctx.saved_tensors
        problem = Problem(clean, adv, teacher, ctx.tau)
        weighting = Weighting(ctx.beta if beta is None else beta, y, ctx.reduction)
        needs = Needs(*ctx.needs_input_grad[:2])
        if grad_output is None:  # no gradient reaches the loss
            d_clean, d_adv = None, None
        elif _is_differentiated(grad_output):
            with torch.enable_grad():
                problem = _as_views(problem)
                value = _plain.loss_forward(problem, weighting, NO_GRADIENTS, False).loss
            d_clean, d_adv = _differentiable_gradients(problem, [value], [grad_output], needs)
        else:
            # Drop our reference. Autograd copies a returned gradient if anything else still refers to it.
            precomputed, ctx.precomputed = ctx.precomputed, None
            d_clean, d_adv = ctx.backend.loss_backward(problem, weighting, grad_output, precomputed, needs)
        return d_clean, d_adv, None, None, None, None


class _Terms(torch.autograd.Function):
    """Both terms as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor, problem: Problem, backend: Backend) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(clean, adv, problem.teacher)
        ctx.tau, ctx.backend = problem.tau, backend
        ctx.set_materialize_grads(False)
        out = backend.terms_forward(problem)
        return out.guidance, out.consistency

    @staticmethod
    def backward(ctx: Any, grad_guidance: Tensor | None, grad_consistency: Tensor | None) -> tuple[Tensor | None, ...]:
        clean, adv, teacher = ctx.saved_tensors
        problem, needs = Problem(clean, adv, teacher, ctx.tau), Needs(*ctx.needs_input_grad[:2])
        given = [grad for grad in (grad_guidance, grad_consistency) if grad is not None]
        if not given:  # no gradient reaches the terms
            return None, None, None, None
        if _is_differentiated(*given):
            with torch.enable_grad():
                problem = _as_views(problem)
                guidance, consistency = _plain.terms_forward(problem)
            pairs = [(guidance, grad_guidance), (consistency, grad_consistency)]
            outputs = [term for term, grad in pairs if grad is not None]
            return *_differentiable_gradients(problem, outputs, given, needs), None, None
        if grad_guidance is None:
            grad_guidance = given[0].new_zeros(())
        if grad_consistency is None:
            grad_consistency = given[0].new_zeros(())
        return *ctx.backend.terms_backward(problem, grad_guidance, grad_consistency, needs), None, None


class _TermsInGraph(torch.autograd.Function):
    """Both terms for torch.compile, with a backward pass that starts from the logits.

    If the compiler derived the backward pass itself, it would also save intermediate tensors of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        ctx.tau = tau
        ctx.save_for_backward(clean, adv, teacher)
        out = _plain.terms_forward(Problem(clean, adv, teacher, tau))
        return out.guidance, out.consistency

    @staticmethod
    def backward(ctx: Any, grad_guidance: Tensor, grad_consistency: Tensor) -> tuple[Tensor | None, ...]:
        clean, adv, teacher = ctx.saved_tensors
        problem = Problem(clean, adv, teacher, ctx.tau)
        d_clean, d_adv = _plain.gradients(problem, grad_guidance, grad_consistency)
        weight = (grad_guidance + grad_consistency).unsqueeze(1)
        return _bind(d_clean, clean, grad_consistency.unsqueeze(1)), _bind(d_adv, adv, weight), None, None


def _terms_in_graph(problem: Problem) -> CKTATTerms:
    # A view, because Dynamo does not take one tensor as two inputs of an autograd.Function.
    adv = problem.adv.view_as(problem.adv)
    return CKTATTerms(*_TermsInGraph.apply(problem.clean, adv, problem.teacher, problem.tau))


def _bind(gradient: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient unchanged, but make the compiled backward pass read the logits, so that they must be saved.

    Without that the compiler may save intermediates in place of the logits. A compiled graph has no second derivative.
    PyTorch raises an error when one is asked for, but only if the graph has saved an input that requires grad.
    Otherwise torch 2.6 to 2.11 return a wrong one. The logits are selected only if the weight is NaN, and then the
    gradient is NaN anyway.
    """
    return torch.where(weight.isnan(), (logits + weight).to(gradient.dtype), gradient)


def _needs_gradients(problem: Problem) -> bool:
    return torch.is_grad_enabled() and (problem.clean.requires_grad or problem.adv.requires_grad)


def _savable(x: Tensor) -> Tensor:
    """Copy an inference tensor, which autograd cannot save."""
    return x.clone() if x.is_inference() else x


def _savable_problem(problem: Problem) -> Problem:
    return Problem(_savable(problem.clean), _savable(problem.adv), _savable(problem.teacher), problem.tau)


def _savable_weighting(weighting: Weighting) -> Weighting:
    beta, y, reduction = weighting
    if isinstance(beta, Tensor):
        beta = _savable(beta)
    return Weighting(beta, y if y is None else _savable(y), reduction)


def _is_differentiated(*grad_outputs: Tensor) -> bool:
    """True if a backward pass is to be differentiated itself, or is mapped over many gradients."""
    return torch.is_grad_enabled() or is_transformed() or is_mapped(grad_outputs)


def _as_views(problem: Problem) -> Problem:
    """Return a problem with views of the student's logits.

    Differentiating with respect to a fresh view of each gives partial derivatives, even if the adversarial logits were
    computed from the clean ones.
    """
    clean, adv = problem.clean.view_as(problem.clean), problem.adv.view_as(problem.adv)
    return Problem(clean, adv, problem.teacher, problem.tau)


def _differentiable_gradients(
    problem: Problem, outputs: list[Tensor], grad_outputs: list[Tensor], needs: Needs
) -> Gradients:
    """Return gradients that autograd derives from plain operations: their derivatives are those of the formula."""
    inputs = [x for x, needed in ((problem.clean, needs.clean), (problem.adv, needs.adv)) if needed]
    found = torch.autograd.grad(
        outputs,
        inputs,
        grad_outputs,
        create_graph=torch.is_grad_enabled(),
        materialize_grads=True,  # the guidance alone has no gradient for the clean logits: zeros
    )
    gradients = iter(found)
    d_clean = next(gradients) if needs.clean else None
    d_adv = next(gradients) if needs.adv else None
    return d_clean, d_adv
