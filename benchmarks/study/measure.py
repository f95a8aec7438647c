"""The attacks of the study, and the accuracies that a record holds."""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from examples.pgd import pgd

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N, C) and classes (N,) to one value per image
_LOSS = "loss" if "loss" in inspect.signature(pgd).parameters else "objective"  # its name in 0.3 and before


def attacked(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    steps: int,
    loss: Loss | str = "ce",
    start: Tensor | None = None,
) -> Tensor:
    """Return PGD's images within eps (Linf) of x, after steps of eps/4.

    Args:
        x: images (N, 1, H, W) in [0, 1].
        loss: maximised by the attack: "ce", TRADES' "kl", or a function.
        start: images to start from. None: random points of the ball.
    """
    return pgd(net, x, y, eps=eps, step=eps / 4, steps=steps, start=start, **{_LOSS: loss})


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the largest wrong logit minus the label's, per image: CW's loss."""
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


@torch.no_grad()
def on_validation(
    net: nn.Module, x: Tensor, y: Tensor, eps: float, source: nn.Module | None
) -> dict[str, float | None]:
    """Return accuracies and signs of gradient masking, by the names of the columns of runs.csv.

    Args:
        net: in eval mode, its parameters frozen.
        source: network whose adversarial images are tried on `net` ("transfer"). None: not measured.
    """
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(inputs), y, reduction="sum"), inputs)
    by_apgd = apgd(net, x, y, eps)
    return {
        "natural": share(net(x).argmax(1) == y),
        "pgd20": _under_pgd(net, x, y, eps, 20),
        "cw30": _under_pgd(net, x, y, eps, 30, margin),
        "apgd": share(by_apgd["apgd"]),
        "apgd_ce": share(by_apgd["apgd_ce"]),
        "transfer": _under_pgd(net, x, y, eps, 20, source=source) if source else None,
        "zero_gradients": share((gradient.flatten(1) == 0).all(1)),
    }


@torch.no_grad()
def on_test(net: nn.Module, x: Tensor, y: Tensor, eps: float, autoattack_images: int) -> dict[str, float | None]:
    """Return the accuracies on all test images, and under standard AutoAttack on the first `autoattack_images`."""
    some, labels = x[:autoattack_images], y[:autoattack_images]
    auto = AutoAttack(net, norm="Linf", eps=eps, seed=0, device="cpu")
    _, predicted = auto.run_standard_evaluation(some, labels)
    return {
        "test_natural": share(net(x).argmax(1) == y),
        "test_pgd20": _under_pgd(net, x, y, eps, 20),
        "test_apgd": share(apgd(net, x, y, eps)["apgd"]),
        "test_autoattack": share(predicted == labels),
        "test_autoattack_images": len(some),
    }


def apgd(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    """Return which images are right after APGD-CE (50 steps), and after APGD-T (3 targets x 50 steps) on those left."""
    how = {"norm": "Linf", "eps": eps, "n_iter": 50, "seed": 0, "device": "cpu"}
    attacks = {
        "apgd_ce": APGDAttack(net, loss="ce", **how),
        "apgd": APGDAttack_targeted(net, n_target_classes=3, **how),
    }
    right, found = net(x).argmax(1) == y, {}
    for name, attack in attacks.items():
        if right.any():
            right[right.clone()] = net(attack.perturb(x[right], y[right])).argmax(1) == y[right]
        found[name] = right.clone()
    return found


def share(hits: Tensor) -> float:
    """Return the share of True."""
    return hits.double().mean().item()


def _under_pgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    steps: int,
    loss: Loss | str = "ce",
    source: nn.Module | None = None,
) -> float:
    torch.manual_seed(0)  # the same random start for every network
    return share(net(attacked(source or net, x, y, eps, steps, loss)).argmax(1) == y)
