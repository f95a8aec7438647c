"""What a trained network is worth, and whether the attacks that say so can be trusted."""

import torch
import torch.nn.functional as F
from attacks import Budget, pgd_attack
from data import Images
from evaluate import Evaluation
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

BATCH = 300  # images at once
APGD, STANDARD = Budget(apgd_steps=50, targets=3), Budget()


def on_validation(model: nn.Module, images: Images, eps: float, source: nn.Module | None) -> dict[str, float | None]:
    """Accuracies and signs of gradient masking, by the names of records.RUN.

    Args:
        model: on the device to run on, in eval mode afterwards.
        images: to attack within eps (Linf, of pixels in [0, 1]).
        source: a network whose adversarial images to try too.
    """
    names = {"clean": "natural", "PGD-20": "pgd20", "CW-30": "cw30", "APGD-CE": "apgd_ce", "APGD-T": "apgd"}
    right = _right(model, images, ("pgd20", "cw", "apgd"), eps, APGD)
    if source is not None:
        source.to(_device(model)).eval().requires_grad_(False)
    parts = [_on_batch(model, x, y, eps, source) for x, y in DataLoader(images, BATCH)]
    confidence, zero, nonlinearity, transfer = (torch.cat(part).double() for part in zip(*parts, strict=True))
    return {
        **{name: right[attack] for attack, name in names.items()},
        "transfer": transfer.mean().item() if source is not None else None,
        "zero_gradients": zero.mean().item(),
        "nonlinearity": nonlinearity.median().item(),
        "confidence": confidence.mean().item(),
    }


def on_test(model: nn.Module, images: Images, eps: float, autoattack_images: int) -> dict[str, float]:
    """The final read: of all test images, and AutoAttack's standard version on the first so many."""
    whole = _right(model, images, ("pgd20", "apgd"), eps, APGD)
    some = Subset(images, range(min(autoattack_images, len(images))))
    return {
        "test_natural": whole["clean"],
        "test_pgd20": whole["PGD-20"],
        "test_apgd": whole["APGD-T"],
        "test_autoattack": _right(model, some, ("autoattack",), eps, STANDARD)["AutoAttack"],
        "test_autoattack_images": len(some),
    }


def _right(
    model: nn.Module, images: Images | Subset, attacks: tuple[str, ...], eps: float, budget: Budget
) -> dict[str, float]:
    """The share of images that are still right after each attack."""
    evaluation = Evaluation(model, images, eps=eps, device=_device(model))
    evaluation.run(attacks, budget)
    return {name: hits.double().mean().item() for name, hits in evaluation.hits.items()}


def _on_batch(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, source: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image by image: the largest probability; whether the cross-entropy l has no gradient g; how far it is from linear
    on the way d of an attack, |l(x + d) - l(x) - d g| / l(x + d), after Qin et al. 2019 (arXiv 1907.02610); whether
    it withstands the source's adversarial image."""
    x, y = x.to(_device(model)), y.to(_device(model))
    inputs = x.clone().requires_grad_()
    logits = model(inputs)
    loss = F.cross_entropy(logits, y, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), inputs)
    x_adv = _attacked(model, x, y, eps)
    with torch.no_grad():
        there = F.cross_entropy(model(x_adv), y, reduction="none")
        linear = loss + ((x_adv - x) * gradient).flatten(1).sum(1)
        right = torch.zeros_like(y) if source is None else model(_attacked(source, x, y, eps)).argmax(1) == y
    zero = gradient.flatten(1).abs().amax(1) == 0
    return logits.detach().softmax(1).amax(1), zero, (there - linear).abs() / there.clamp_min(1e-6), right


def _attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    torch.manual_seed(0)
    return pgd_attack(model, steps=20, norm="linf", eps=eps).perturb(x, y)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
