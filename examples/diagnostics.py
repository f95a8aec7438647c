"""Signs that an evaluation says more about the attacks than about the model, and what to do about each.

The checks follow Carlini et al. 2019 (arXiv 1902.06705), Athalye et al. 2018 (arXiv 1802.00420) and the flags of
AutoAttack. A finding proves nothing, and none proves nothing either.
"""

from dataclasses import asdict

import torch
import torch.nn.functional as F
from attacks import Budget
from pgd import eval_mode
from torch import Tensor, nn

ZERO_GRADIENTS = 0.01  # share of images
SQUARE_ALONE = 0.01  # share of images; Square needs no gradients, and is weaker than attacks whose gradients are right
PGD_GAP = 0.10  # accuracy under PGD-20 less that under AutoAttack, or under its first two attacks
ONE_CLASS = 0.90  # share of images that are all predicted to be one class

Findings = dict[str, str]  # by the name of a sign: what was seen, in a sentence

ADVICE = {  # by the name of a sign: a sentence on what to do
    "random": "Turn the randomness off, or attack its average (expectation over transformations, AutoAttack's rand "
    "version), since these attacks follow the gradient of one draw.",
    "probabilities": "Take the softmax off: the attacks apply their own, and gradients through two of them vanish.",
    "zero-gradients": "Look for rounding, thresholds or saturation in the model: attack through a differentiable "
    "stand-in for it (BPDA), or divide huge logits by their scale.",
    "one-class": "Accuracy that no attack lowers is that of a constant here: the training collapsed.",
    "square-beats-gradients": "The gradients mislead: look for masking, give Square more queries and restarts, and "
    "try an attack that is made for this model.",
    "pgd-gap": "PGD overstates the robustness of this model, often a sign of gradient masking: report AutoAttack.",
    "attack-helps": "The gradients point the wrong way, or labels and preprocessing do not fit the model: check both.",
    "outside": "They are counted as not broken, which flatters the model: look for NaN gradients.",
    "not-standard": "Do not put it beside published AutoAttack numbers: the true robustness may be lower.",
}


def inspect_model(model: nn.Module, x: Tensor, y: Tensor) -> Findings:
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
    found = {}
    change = (again - logits).abs().max() / logits.abs().max().clamp_min(1e-12)
    if change > 1e-4:
        found["random"] = f"Two forwards of the same images differ by {change:.1g} of the largest logit."
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        found["probabilities"] = "The outputs look like probabilities: none is negative, and every row sums to 1."
    zero = (gradient.flatten(1) == 0).all(1).float().mean()
    if zero > ZERO_GRADIENTS:
        found["zero-gradients"] = f"{zero:.1%} of the images have a cross-entropy gradient of exactly zero."
    predicted, label = (classes.bincount().max().item() / len(y) for classes in (logits.argmax(1), y))
    if predicted > ONE_CLASS > 2 * label:
        found["one-class"] = f"{predicted:.0%} of the images are predicted to be of one class."
    return found


def inspect_results(hits: dict[str, Tensor], outside: dict[str, int]) -> Findings:
    """What the attacks tell together.

    Args:
        hits: by the name of the attack, which images (N,) are still right; "clean", "PGD-20", "APGD-CE", "APGD-T",
            "FAB-T" and "Square" are looked at, each if it is there. AutoAttack's are one after the other: what an
            attack broke is broken for the later ones.
        outside: by the name of the attack, how many images it moved out of the eps-ball or to NaN.
    """
    found = {}
    accuracy = {name: hit.double().mean().item() for name, hit in hits.items()}
    if "Square" in hits and (gain := accuracy["FAB-T"] - accuracy["Square"]) > SQUARE_ALONE:
        found["square-beats-gradients"] = (
            f"Square, which sees no gradients, broke {gain:.1%} of the images after the white-box attacks had failed."
        )
    strongest = next((name for name in ("Square", "APGD-T", "APGD-CE") if name in hits), "PGD-20")
    if "PGD-20" in hits and (gap := accuracy["PGD-20"] - accuracy[strongest]) > PGD_GAP:
        name = "AutoAttack" if strongest == "Square" else "APGD"
        found["pgd-gap"] = f"Accuracy under PGD-20 is {100 * gap:.1f} points above that under {name}."
    if healed := [name for name in hits if accuracy[name] > accuracy["clean"]]:
        found["attack-helps"] = f"Accuracy is higher under attack ({', '.join(healed)}) than on clean images."
    if outside:
        counts = ", ".join(f"{name} ({images})" for name, images in outside.items())
        found["outside"] = f"Attacks returned images that are not within eps of the clean ones and [0, 1]: {counts}."
    return found


def inspect_budget(budget: Budget, classes: int) -> Findings:
    """Whether AutoAttack is the standard one, which published numbers are from."""
    standard, spent = asdict(Budget(targets=min(Budget.targets, classes - 1))), asdict(budget)
    less = [
        f"{spent[name]} {name.replace('_', ' ')} instead of {wanted}"
        for name, wanted in standard.items()
        if spent[name] < wanted
    ]
    if classes < 4:
        less.append("no APGD-T, whose loss needs 4 classes")
    return {"not-standard": f"This is less than the standard AutoAttack: {', '.join(less)}."} if less else {}
