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
    r"""Compute the CKTAT loss, Eq. 17 of arXiv 2504.00038, from logits.

    $$
    L_i = \mathrm{KL}(\mathrm{softmax}(t_i / \tau) \,\|\, \mathrm{softmax}(a_i))
        + \beta_i \, \mathrm{KL}(\mathrm{softmax}(c_i) \,\|\, \mathrm{softmax}(a_i))
    $$

    ``t`` are the teacher's logits on the clean input, ``c`` and ``a`` the student's logits on the clean and on the
    adversarial input. The first term is the guidance, the second the consistency (the TRADES term).

    Args:
        clean_logits: the student's logits on clean inputs, ``S(x)``, (N, C). They get a gradient unless
            ``detach_clean``.
        adv_logits: the student's logits on adversarial inputs, ``S(x')``, (N, C). They get a gradient.
        teacher_logits: the teacher's logits on clean inputs, ``T(x)``, (N, C), not divided by tau. They are detached.
        tau: the temperature, > 0. It divides the teacher's logits only. The paper's best on CIFAR-10 is 5.
        beta: the weight of the consistency term, a number >= 0, or a floating tensor, () or (N,). A tensor must not
            require grad, and its values are not checked.
        y: labels, (N,), integer. The weight of each sample is then ``beta * softmax(a_i)[y_i]``, without a gradient,
            and ``beta`` must be a number. This is our recipe, see ``adaptive_beta``. On an eager CPU a label out of
            range is an error. On a GPU or under torch.compile it gives NaN for its sample.
        reduction: "mean" over the batch (torch's "batchmean"), "sum", or "none".
        detach_clean: stop the gradient through ``clean_logits``. This is not the paper's form, but it is often needed:
            nothing anchors the clean predictions, so a large beta can pull the student to a constant prediction.
        return_terms: also return both terms, detached, for logging. They come from the same pass.
        backend: "auto" uses the Triton kernels if they support the logits, else PyTorch. "triton" and "torch" insist on
            one. Under torch.compile, torch.export and torch.func every choice runs as PyTorch operations.

    Shape:
        All logits are (N, C) with C >= 1, in float16, bfloat16, float32 or float64. The three dtypes may differ. An
        empty batch gives NaN for "mean" and 0 for "sum", as in torch. A logit of -inf masks its class. If a class is
        masked in the adversarial logits but not in the teacher's, the guidance is infinite. If it is masked in the
        adversarial logits but not in the clean ones, the consistency is infinite. The loss is then infinite too, or NaN
        if the infinite consistency has weight 0, and the sample's gradients are unspecified.

    Returns:
        The loss, () or (N,) for "none", in float32, or in float64 if any of the logits are. Each gradient has its
        logits' dtype and is cast after all scaling. With ``return_terms``, the pair of the loss and
        ``CKTATTerms(guidance, consistency)``, each (N,).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value. On an eager CPU, a label out of range.
        RuntimeError: ``backend="triton"`` if the kernels cannot run.

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
    """Compute the two KL terms of Eq. 17 per sample, with gradients, for a loss of your own.

    Args, Shape and Raises are those of ``cktat_loss``.

    Returns:
        ``CKTATTerms(guidance, consistency)``, each (N,), before beta and the reduction.

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
    """Return sample weights for the consistency term, ``beta * softmax(S(x'))[y]``.

    If an attack succeeds, little probability is left on the label, and the sample gets little weight. This is our
    recipe, not the paper's. Use it with ``detach_clean=True`` and ``tau=2``.

    Args:
        adv_logits: the student's logits on adversarial inputs, (N, C), floating.
        y: labels, (N,), integer, in [0, C). On an eager CPU a label out of range is an error. On a GPU or under
            torch.compile it gives NaN for its sample.
        beta: the largest weight, finite and >= 0.

    Returns:
        The weights, (N,), detached, in float32, or in float64 for float64 logits.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value. On an eager CPU, a label out of range.

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
