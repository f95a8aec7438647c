"""The loss as functions of logits."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from cktat_loss import checks, ops
from cktat_loss.ops import CKTATTerms

Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "torch"]


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
    backend: Backend = "auto",
) -> Any:
    r"""The CKTAT loss, Eq. 17 of arXiv 2504.00038, from logits.

    .. math:: L_i = KL(softmax(t_i / \tau) \| softmax(a_i)) + \beta \, KL(softmax(c_i) \| softmax(a_i))

    with ``t`` the teacher's logits on the clean input, ``c`` and ``a`` the student's on the clean and the adversarial
    input. The first term is the guidance, the second the consistency (the TRADES term).

    Args:
        clean_logits: student on clean inputs, ``S(x)``. Gradients flow unless ``detach_clean``.
        adv_logits: student on adversarial inputs, ``S(x')``. Gradients flow.
        teacher_logits: clean teacher on clean inputs, ``T(x)``, undivided. Detached.
        tau: temperature, > 0; divides the teacher's logits only. The paper's best on CIFAR-10 is 5.
        beta: weight of the consistency term, >= 0; or a floating tensor, 0-d or (N,), of weights, one a sample. A
            tensor's values are never looked at, and no gradient flows to it.
        reduction: "mean" over the batch (torch's "batchmean"), "sum", or "none".
        detach_clean: stop the gradient through ``clean_logits``. Not the paper's form, but often needed: without an
            anchor on clean inputs, a large beta can pull the student to a constant prediction.
        backend: "auto" takes the Triton kernels where they can run and the closed form elsewhere; "triton" and
            "torch" insist on one.

    Shape:
        All logits (N, C) with C >= 1, in float16, bfloat16, float32 or float64, mixed as autocast makes them. An empty
        batch gives NaN for "mean" and 0 for "sum", as in torch. A logit of -inf masks its class.

    Returns:
        A scalar, or (N,) for "none": float32, or float64 where any of the logits is. Gradients have the dtype of
        their logits, cast after all scaling.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: ``backend="triton"`` where it cannot run.

    Example:
        >>> import torch
        >>> teacher, clean = torch.tensor([[5.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> adv = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> loss = cktat_loss(clean_logits=clean, adv_logits=adv, teacher_logits=teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in adv.grad[0].tolist()]
        (2.0778, [-2.5158, 2.5158])
    """
    checks.logits(clean_logits, adv_logits, teacher_logits)
    tau, beta = checks.tau(tau), checks.sample_weights("beta", beta, adv_logits)
    checks.reduction(reduction)
    checks.backend(backend, clean_logits, adv_logits, teacher_logits)
    checks.flag("detach_clean", detach_clean)
    clean = clean_logits.detach() if detach_clean else clean_logits
    if y is not None:
        from cktat_loss.schedules import adaptive_beta

        beta = adaptive_beta(adv_logits, y, beta)
    loss = ops.cktat_loss(clean, adv_logits, teacher_logits.detach(), tau, beta, reduction, backend)
    if return_terms:
        terms = ops.cktat_terms(clean.detach(), adv_logits.detach(), teacher_logits.detach(), tau, backend)
        return loss, terms
    return loss


def cktat_terms(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 5.0,
    *,
    detach_clean: bool = False,
    backend: Backend = "auto",
) -> CKTATTerms:
    """The two terms of :func:`cktat_loss`, one value a sample, before beta and the reduction.

    Args, Shape and Raises: as for :func:`cktat_loss`.

    Returns:
        ``CKTATTerms(guidance, consistency)``, each (N,), with gradients.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0, -1.0]])
        >>> terms = cktat_terms(clean_logits=logits, adv_logits=logits, teacher_logits=logits, tau=1.0)
        >>> terms.guidance.item(), terms.consistency.item()
        (0.0, 0.0)
    """
    checks.logits(clean_logits, adv_logits, teacher_logits)
    tau = checks.tau(tau)
    checks.backend(backend, clean_logits, adv_logits, teacher_logits)
    checks.flag("detach_clean", detach_clean)
    clean = clean_logits.detach() if detach_clean else clean_logits
    return ops.cktat_terms(clean, adv_logits, teacher_logits.detach(), tau, backend)


def cktat_loss_and_grads(
    clean_logits: Tensor,
    adv_logits: Tensor,
    teacher_logits: Tensor,
    tau: float = 5.0,
    beta: float | Tensor = 6.0,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    detach_clean: bool = False,
    grad_scale: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The loss of :func:`cktat_loss` and its gradients in a single pass, without a graph.

    For loops that call ``torch.autograd.backward([clean_logits, adv_logits], [d_clean, d_adv])`` themselves.

    Args:
        grad_scale: a finite number, or a 0-d tensor such as a GradScaler's, that multiplies the gradients before they
            are cast to their logits' dtype. The loss is not scaled.

    The other Args, Shape and Raises: as for :func:`cktat_loss`.

    Returns:
        ``(loss, d_clean, d_adv)``: a scalar and two (N, C) tensors; ``d_clean`` is None with ``detach_clean``.

    Example:
        >>> import torch
        >>> clean, adv = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> loss, d_clean, d_adv = cktat_loss_and_grads(clean, adv, clean, tau=1.0, beta=1.0)
        >>> [round(g, 4) for g in d_adv[0].tolist()]
        [-0.7616, 0.7616]
    """
    checks.logits(clean_logits, adv_logits, teacher_logits)
    tau, beta = checks.tau(tau), checks.sample_weights("beta", beta, adv_logits)
    checks.choice("reduction", reduction, ("mean", "sum"))
    grad_scale = checks.grad_scale(grad_scale, adv_logits)
    checks.backend(backend, clean_logits, adv_logits, teacher_logits)
    checks.flag("detach_clean", detach_clean)
    logits = clean_logits.detach(), adv_logits.detach(), teacher_logits.detach()
    return ops.cktat_loss_and_grads(*logits, tau, beta, reduction, grad_scale, not detach_clean, backend)
