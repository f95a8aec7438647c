"""Weights of the consistency term."""

from __future__ import annotations

from torch import Tensor

from cktat_loss import checks, plain


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
    checks.one_logits("adv_logits", adv_logits)
    checks.labels(y, adv_logits)
    beta = checks.beta(beta)
    p = adv_logits.detach().softmax(1, dtype=plain.compute_dtype(adv_logits))
    return plain.label_weights(p, y, beta)
