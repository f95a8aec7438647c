"""Signs that an evaluation says more about the attacks than about the model, and what to do about each.

The checks follow Carlini et al. 2019 (arXiv 1902.06705), Athalye et al. 2018 (arXiv 1802.00420) and the flags of
AutoAttack. A finding proves nothing, and none proves nothing either.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from attacks import Budget
from pgd import eval_mode
from torch import Tensor, nn

ZERO_GRADIENTS = 0.01  # share of images
SQUARE_ALONE = 0.01  # share of images; Square needs no gradients, and is weaker than attacks whose gradients are right
PGD_GAP = 0.10  # accuracy under PGD-20 less that under AutoAttack
ONE_CLASS = 0.90  # share of images that are all predicted to be one class


@dataclass(frozen=True)
class Finding:
    """Something suspicious: its name, a sentence on what was seen, a sentence on what to do."""

    name: str
    why: str
    advice: str


def inspect_model(model: nn.Module, x: Tensor, y: Tensor) -> list[Finding]:
    """What one batch tells about the model, in eval mode.

    Args:
        model: images to logits (N, C).
        x: clean images (N, ...) in [0, 1].
        y: classes (N,).

    Raises:
        ValueError: the images are not in [0, 1]; or the logits are NaN or infinite, or have no gradient with respect
            to the images, so that no attack can run.
    """
    if x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"images must be in [0, 1], got values in [{x.min():.3g}, {x.max():.3g}]: normalise inside the model"
        )
    with eval_mode(model), torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        logits = model(inputs)
        if not logits.requires_grad:
            raise ValueError(
                "model must be differentiable, got logits without a gradient with respect to the images "
                "(is there a detach(), .data, no_grad or a detour through NumPy in it?)"
            )
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), inputs)
        with torch.no_grad():
            again = model(inputs)
    logits = logits.detach()
    if logits.isnan().any() or logits.isposinf().any():
        raise ValueError(
            "model must give finite logits, got NaN or infinity: look for the step at which training diverged"
        )
    findings = []
    change = (again - logits).abs().max() / logits.abs().max().clamp_min(1e-12)
    if change > 1e-4:
        findings.append(
            Finding(
                "random",
                f"Two forwards of the same images differ by {change:.1g} of the largest logit.",
                "Turn the randomness off, or attack its average (expectation over transformations, AutoAttack's rand "
                "version), since these attacks follow the gradient of one draw.",
            )
        )
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        findings.append(
            Finding(
                "probabilities",
                "The outputs look like probabilities: none is negative, and every row sums to 1.",
                "Take the softmax off: the attacks apply their own, and gradients through two of them vanish.",
            )
        )
    zero = gradient.flatten(1).abs().amax(1) == 0
    if zero.float().mean() > ZERO_GRADIENTS:
        findings.append(
            Finding(
                "zero-gradients",
                f"{_share(zero)} of the images have a cross-entropy gradient of exactly zero.",
                "Look for rounding, thresholds or saturation in the model: attack through a differentiable stand-in "
                "for it (BPDA), or divide huge logits by their scale.",
            )
        )
    if _largest_class(logits.argmax(1)) > ONE_CLASS > 2 * _largest_class(y):
        findings.append(
            Finding(
                "one-class",
                f"{_largest_class(logits.argmax(1)):.0%} of the images are predicted to be of one class.",
                "Accuracy that no attack lowers is that of a constant here: the training collapsed.",
            )
        )
    return findings


def inspect_results(hits: dict[str, Tensor], outside: dict[str, int]) -> list[Finding]:
    """What the attacks tell together.

    Args:
        hits: by the name of the attack, which images (N,) are still right; "clean", "PGD-20", "APGD-CE", "APGD-T",
            "FAB-T" and "Square" are looked at, each if it is there. AutoAttack's are one after the other: what an
            attack broke is broken for the later ones.
        outside: by the name of the attack, how many images it moved out of the eps-ball or to NaN.
    """
    accuracy = {name: hit.double().mean().item() for name, hit in hits.items()}
    findings = []
    if "Square" in hits:
        gain = accuracy["FAB-T"] - accuracy["Square"]
        if gain > SQUARE_ALONE:
            findings.append(
                Finding(
                    "square-beats-gradients",
                    f"Square, which sees no gradients, broke {gain:.1%} of the images after all white-box attacks "
                    "had failed on them.",
                    "The gradients mislead: look for masking, give Square more queries and restarts, and try an "
                    "attack that is made for this model.",
                )
            )
    if "Square" in hits and "PGD-20" in hits:
        gap = accuracy["PGD-20"] - accuracy["Square"]
        if gap > PGD_GAP:
            findings.append(
                Finding(
                    "pgd-gap",
                    f"Accuracy under PGD-20 is {100 * gap:.1f} points above that under AutoAttack.",
                    "PGD overstates the robustness of this model, often a sign of gradient masking: report AutoAttack.",
                )
            )
    healed = [name for name in hits if accuracy[name] > accuracy["clean"]]
    if healed:
        findings.append(
            Finding(
                "attack-helps",
                f"Accuracy is higher under attack ({', '.join(healed)}) than on clean images.",
                "The gradients point the wrong way, or labels and preprocessing do not fit the model: check both.",
            )
        )
    for name, images in outside.items():
        findings.append(
            Finding(
                "outside",
                f"{name} returned {images} images that are not within eps of the clean ones, or not in [0, 1].",
                "They are counted as not broken, which flatters the model: look for NaN gradients.",
            )
        )
    return findings


def inspect_budget(budget: Budget, classes: int) -> list[Finding]:
    """Whether AutoAttack is the standard one, which published numbers are from."""
    wanted = asdict(Budget(targets=min(Budget.targets, classes - 1)))
    less = [
        f"{spent} {name.replace('_', ' ')} instead of {wanted[name]}"
        for name, spent in asdict(budget).items()
        if spent < wanted[name]
    ]
    if classes < 4:
        less.append("no APGD-T, whose loss needs 4 classes")
    if not less:
        return []
    return [
        Finding(
            "not-standard",
            f"This is less than the standard AutoAttack: {', '.join(less)}.",
            "Do not put it beside published AutoAttack numbers: the true robustness may be lower.",
        )
    ]


def _largest_class(classes: Tensor) -> float:
    return classes.bincount().max().item() / len(classes)


def _share(which: Tensor) -> str:
    return f"{which.float().mean():.1%}"
