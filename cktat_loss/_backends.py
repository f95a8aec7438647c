"""The interface of a backend, and the private functions of torch that the package calls.

A backend computes Eq. 17 and its gradients. There are three: ``kernels`` (Triton, on a GPU), ``_cpu`` (blocks that stay
in cache, on an eager CPU) and ``_plain`` (differentiable tensor operations, for everything else). ``_autograd.choose``
picks one of them. Arguments come in the order clean, adversarial, teacher everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

# All other types are subclasses of Tensor. A subclass, such as DTensor, may keep its elements elsewhere.
ORDINARY_TYPES = (Tensor, nn.Parameter)

# The gradients of the clean and of the adversarial logits, each (N, C). None if not needed. A backend returns each in
# its logits' dtype.
Gradients = tuple[Tensor | None, Tensor | None]


class CKTATTerms(NamedTuple):
    """The two KL terms of Eq. 17, each (N,): ``guidance + beta * consistency`` is the loss of each sample."""

    guidance: Tensor
    consistency: Tensor


class Problem(NamedTuple):
    """The inputs of both KL terms."""

    clean: Tensor  # (N, C), the student's logits on clean inputs
    adv: Tensor  # (N, C), the student's logits on adversarial inputs
    teacher: Tensor  # (N, C), the teacher's logits on clean inputs, detached
    tau: float  # the teacher's temperature


class Weighting(NamedTuple):
    """The rule by which the loss combines the two terms."""

    beta: float | Tensor  # weight of the consistency: a number, or a tensor, () or (N,)
    y: Tensor | None  # (N,), labels, which multiply beta by softmax(adv)[y]
    reduction: str  # "mean", "sum" or "none"


class Needs(NamedTuple):
    """The gradients that a backend's backward pass will be asked for."""

    clean: bool
    adv: bool


class Forward(NamedTuple):
    """The result of a forward pass."""

    loss: Tensor  # (), or (N,) for reduction "none"
    terms: CKTATTerms | None  # detached; None unless requested
    precomputed: Any  # passed back to loss_backward of the same backend, once


class Backend(Protocol):
    """The functions of a backend. Each backend is a module that has them."""

    def loss_forward(self, problem: Problem, weighting: Weighting, needs: Needs, return_terms: bool) -> Forward:
        """Compute the loss. The backend may also precompute gradients, in a form that it completes itself."""

    def loss_backward(
        self, problem: Problem, weighting: Weighting, grad_output: Tensor, precomputed: Any, needs: Needs
    ) -> Gradients:
        """Return the gradients for ``grad_output``, which has the loss's shape.

        ``precomputed`` is what ``loss_forward`` returned. It is None in a second backward pass over a retained graph.
        """

    def terms_forward(self, problem: Problem) -> CKTATTerms:
        """Compute both terms, each (N,)."""

    def terms_backward(
        self, problem: Problem, grad_guidance: Tensor, grad_consistency: Tensor, needs: Needs
    ) -> Gradients:
        """Return the logits' gradients, given the gradients of the two terms, each () or (N,)."""


# Private functions and classes of torch. Each comment says since when torch has had the name.


def in_functorch() -> bool:
    """True if a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()  # since torch 2.0


def is_traced() -> bool:
    """True if values of tensors cannot be read: under torch.compile, torch.export or a torch.func transform."""
    return torch.compiler.is_compiling() or in_functorch()


def is_transformed() -> bool:
    """True if a torch.func transform or forward-mode differentiation is active."""
    return in_functorch() or torch.autograd.forward_ad._current_level >= 0  # since torch 1.11


def is_mapped(gradients: Iterable[Tensor]) -> bool:
    """True inside ``autograd.grad(..., is_grads_batched=True)``, which maps a backward pass over many gradients."""
    return any(map(torch._C._functorch.is_legacy_batchedtensor, gradients))  # since torch 2.0


def is_compiled(module: nn.Module) -> bool:
    """True if the module is torch.compile's wrapper. Its class is compared by name: importing it takes seconds."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("torch._dynamo.eval_frame", "OptimizedModule")  # since torch 2.0


def has_own_forward(module: nn.Module) -> bool:
    """True if somebody replaced the ``forward`` of torch.compile's wrapper, which marks its own one."""
    return not hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # since torch 2.0


def hooks(module: nn.Module) -> list[Any]:
    """Return the forward and backward hooks of a module."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # since torch 2.0
    return [hook for name in names for hook in vars(module)[name].values()]


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call in a graph by name.

    The schema of an operator names the arguments that are passed by position, and so does the signature of a Python
    function. A built-in function such as torch.dropout has the names of the operator in torch.ops.aten.
    """
    target: Any = node.target
    names: list[str] = []
    if isinstance(target, FunctionType):
        names = [*inspect.signature(target).parameters]
    else:
        if isinstance(target, BuiltinFunctionType):
            target = getattr(getattr(torch.ops.aten, target.__name__, None), "default", None)
        if (schema := getattr(target, "_schema", None)) is not None:  # since torch 1.13
            names = [argument.name for argument in schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _is_exporting() -> bool:
    """True under torch.export. Call it only while a graph is being made."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().export
    except AttributeError:  # strict=False traces without Dynamo
        return True


if hasattr(torch.compiler, "is_exporting"):
    is_exporting = torch.compiler.is_exporting
else:
    # floor: torch 2.6, the oldest that is supported, has no is_exporting. While tracing, Dynamo evaluates a function
    # with this mark, and uses its result as a constant. ``current_tx().export`` and the mark are names of 2.6.
    is_exporting = _is_exporting
    is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
