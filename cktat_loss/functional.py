"""The loss as functions of logits."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from cktat_loss import _autograd, _checks, _plain
from cktat_loss._backends import CKTATTerms, Problem, Weighting

__all__ = ["CKTATTerms", "adaptive_beta", "cktat_loss", "cktat_terms"]

Reduction = Literal["mean", "sum", "none"]
BackendName = Literal["auto", "triton", "torch"]


@overload
def cktat_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = ...,
    beta: float | Tensor = ...,
    *,
    y: Tensor | None = ...,
    reduction: Reduction = ...,
    detach_clean: bool = ...,
    return_terms: Literal[False] = ...,
    backend: BackendName = ...,
) -> Tensor: ...
@overload
def cktat_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = ...,
    beta: float | Tensor = ...,
    *,
    y: Tensor | None = ...,
    reduction: Reduction = ...,
    detach_clean: bool = ...,
    return_terms: Literal[True],
    backend: BackendName = ...,
) -> tuple[Tensor, CKTATTerms]: ...
def cktat_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 5.0,
    beta: float | Tensor = 6.0,
    *,
    y: Tensor | None = None,
    reduction: Reduction = "mean",
    detach_clean: bool = False,
    return_terms: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, CKTATTerms]:
    r"""The CKTAT loss, Eq. 17 of arXiv 2504.00038, from logits.

    $$
    L_i = \mathrm{KL}(\mathrm{softmax}(t_i / \tau) \,\|\, \mathrm{softmax}(a_i))
        + \beta_i \, \mathrm{KL}(\mathrm{softmax}(c_i) \,\|\, \mathrm{softmax}(a_i))
    $$

    with ``t`` the teacher's logits on the clean input, ``c`` and ``a`` the student's on the clean and the adversarial
    input. The first term is the guidance, the second the consistency (the TRADES term).

    Args:
        clean_logits: student on clean inputs, ``S(x)``. Gradients flow unless ``detach_clean``.
        adv_logits: student on adversarial inputs, ``S(x')``. Gradients flow.
        teacher_logits: clean teacher on clean inputs, ``T(x)``, undivided. Detached.
        tau: temperature, > 0; divides the teacher's logits only. The paper's best on CIFAR-10 is 5.
        beta: weight of the consistency term, >= 0; or a floating tensor, 0-d or (N,), of weights, one for each sample.
            A tensor's values are never looked at, and no gradient flows to it.
        y: labels (N,), integer. They make the weight of each sample ``beta * softmax(a_i)[y_i]``, through which no
            gradient flows: our recipe, see ``adaptive_beta``. ``beta`` is a number then. Where looking would wait for
            a device or stop a compiler, a label that is no class gives NaN for its sample.
        reduction: "mean" over the batch (torch's "batchmean"), "sum", or "none".
        detach_clean: stop the gradient through ``clean_logits``. Not the paper's form, but often needed: without an
            anchor on clean inputs, a large beta can pull the student to a constant prediction.
        return_terms: return both terms too, detached, from the same pass: for a log.
        backend: "auto" takes the Triton kernels where they can run and PyTorch elsewhere; "triton" and "torch" insist
            on one. Under torch.compile and torch.func all are plain ops.

    Shape:
        All logits (N, C) with C >= 1, in float16, bfloat16, float32 or float64, mixed as autocast makes them. An empty
        batch gives NaN for "mean" and 0 for "sum", as in torch. A logit of -inf masks its class; if it does in the
        adversarial logits alone, the loss is infinite, or NaN where the sample's weight is 0.

    Returns:
        A scalar, or (N,) for "none": float32, or float64 where any of the logits is. Gradients have the dtype of
        their logits, cast after all scaling. With ``return_terms`` the pair of that and
        ``CKTATTerms(guidance, consistency)``, each (N,).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value; on an eager CPU a label that is no class.
        RuntimeError: ``backend="triton"`` where it cannot run.

    Examples:
        >>> import torch
        >>> teacher, clean = torch.tensor([[5.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> adv = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> loss = cktat_loss(clean_logits=clean, adv_logits=adv, teacher_logits=teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in adv.grad[0].tolist()]
        (2.0778, [-2.5158, 2.5158])
    """
    _checks.logits(clean_logits, adv_logits, teacher_logits)
    tau, beta = _checks.tau(tau), _checks.sample_beta(beta, adv_logits, y)
    if y is not None:
        _checks.labels(y, adv_logits)
    _checks.reduction(reduction)
    _checks.backend(backend, clean_logits, adv_logits, teacher_logits)
    _checks.flag("detach_clean", detach_clean)
    _checks.flag("return_terms", return_terms)
    clean = clean_logits.detach() if detach_clean else clean_logits
    problem = Problem(clean, adv_logits, teacher_logits.detach(), tau)
    loss, terms = _autograd.loss(problem, Weighting(beta, y, reduction), return_terms, backend)
    return loss if terms is None else (loss, terms)


def cktat_terms(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 5.0,
    *,
    detach_clean: bool = False,
    backend: BackendName = "auto",
) -> CKTATTerms:
    """The two terms of ``cktat_loss``, a value for each sample, before beta and the reduction.

    Args, Shape and Raises: as for ``cktat_loss``.

    Returns:
        ``CKTATTerms(guidance, consistency)``, each (N,), with gradients.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0, -1.0]])
        >>> terms = cktat_terms(clean_logits=logits, adv_logits=logits, teacher_logits=logits, tau=1.0)
        >>> terms.guidance.item(), terms.consistency.item()
        (0.0, 0.0)
    """
    _checks.logits(clean_logits, adv_logits, teacher_logits)
    tau = _checks.tau(tau)
    _checks.backend(backend, clean_logits, adv_logits, teacher_logits)
    _checks.flag("detach_clean", detach_clean)
    clean = clean_logits.detach() if detach_clean else clean_logits
    return _autograd.terms(Problem(clean, adv_logits, teacher_logits.detach(), tau), backend)


def adaptive_beta(adv_logits: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    """Sample weights for the consistency term: ``beta * softmax(S(x'))[y]``.

    A sample whose attack succeeds has little probability left on its label, and so little weight: consistency is asked
    for only where the adversarial prediction deserves it. This is our recipe, not the paper's; use it with
    ``detach_clean=True``.

    Args:
        adv_logits: student on adversarial inputs, (N, C), floating.
        y: labels, (N,), integer, in [0, C). Where looking would wait for a device or stop a compiler, another value
            gives NaN for its sample.
        beta: the largest weight, finite and >= 0.

    Returns:
        (N,), detached: float32, or float64 for float64 logits.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value; on an eager CPU a label that is no class.

    Examples:
        >>> import torch
        >>> adaptive_beta(torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([0, 1]), beta=6.0)
        tensor([3.0000e+00, 9.1380e-08])
    """
    _checks.one_logits("adv_logits", adv_logits)
    _checks.labels(y, adv_logits)
    beta = _checks.beta(beta)
    p = adv_logits.detach().softmax(1, dtype=_plain.compute_dtype(adv_logits))
    return _plain.label_weights(p, y, beta)
