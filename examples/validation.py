"""What the validation images say of a model, and when to distrust it."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from checkpoint import own_randomness
from pgd import eval_mode
from torch import Tensor, nn
from torch.utils.data import DataLoader

APGD_STEPS = 50

QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95)

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, x, y -> x'


@dataclass(frozen=True)
class Scores:
    """Shares of the validation images, in [0, 1]."""

    clean: float  # right on clean images
    pgd: float | None  # right under attack, if there was one
    most_predicted: float  # given the class that is given most often
    label_probability: tuple[float, ...] = ()  # of the label under attack: its QUANTILES over the images

    @property
    def deciding(self) -> float:
        """What best.pt is chosen by."""
        return self.clean if self.pgd is None else self.pgd


def validate(
    model: nn.Module,
    batches: DataLoader[tuple[Tensor, Tensor]],
    attack: Attack | None,
    device: torch.device,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Clean accuracy, and that under attack, in float32; None if `stop` became true meanwhile.

    The attack's random starts are the same in every call, and training's randomness is left as it was.
    """
    clean, adversarial, predicted, labels, probability = [], [], [], [], []
    with own_randomness(device, seed=0), eval_mode(model), torch.no_grad():
        for x, y in batches:
            if stop():
                return None
            x, y = x.to(device), y.to(device)
            classes = model(x).argmax(1)
            clean.append(classes == y)
            predicted.append(classes)
            labels.append(y)
            if attack is not None:
                logits = model(attack(model, x, y))
                adversarial.append(logits.argmax(1) == y)
                probability.append(logits.softmax(1).gather(1, y[:, None]).squeeze(1).cpu())
    most_predicted = torch.cat(predicted).bincount().max().item() / len(torch.cat(labels))
    if attack is None:
        return Scores(_share(clean), None, most_predicted)
    quantiles = torch.cat(probability).quantile(torch.tensor(QUANTILES))
    return Scores(_share(clean), _share(adversarial), most_predicted, tuple(quantiles.tolist()))


def _share(hits: list[Tensor]) -> float:
    return torch.cat(hits).double().mean().item()


def collapse(scores: Scores, chance: float, teacher_clean: float | None) -> str | None:
    """What looks like a collapse towards a constant prediction, in a clause; None where nothing does.

    Args:
        chance: share of the commonest label, the accuracy of the best constant prediction.
        teacher_clean: the teacher's clean accuracy, where there is a teacher.
    """
    if scores.most_predicted > (1 + chance) / 2:
        return f"{scores.most_predicted:.0%} of the validation images are given the same class"
    lead = 0.0 if teacher_clean is None else teacher_clean - chance
    if lead > chance and scores.clean - chance < lead / 10:
        return f"clean accuracy is {scores.clean:.1%}, near chance, and the teacher's is {teacher_clean:.1%}"
    return None


def compare_with_apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, norm: str, attack: Attack) -> str:
    """Accuracy under PGD and under APGD-CE (Croce and Hein 2020) on the same images, and whether they part."""
    from pyautoattack.autopgd_base import APGDAttack

    # n_iter goes in here: APGD derives the checkpoints of its step size from it, so setting it later is too late.
    apgd = APGDAttack(
        model,
        n_iter=APGD_STEPS,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=eps,
        loss="ce",
        logger=SimpleNamespace(warning=lambda _: None),
    )
    with own_randomness(x.device, seed=0), eval_mode(model), torch.no_grad():
        by_pgd = _share([model(attack(model, x, y)).argmax(1) == y])
        by_apgd = _share([model(apgd.perturb(x, y)).argmax(1) == y])
    return describe_gap(by_pgd, by_apgd, len(x))


def describe_gap(by_pgd: float, by_apgd: float, images: int) -> str:
    """One line, with a warning where PGD flatters."""
    text = f"best.pt on {images} validation images: PGD {by_pgd:.1%}, APGD-CE ({APGD_STEPS} steps) {by_apgd:.1%}"
    if by_pgd - by_apgd > 0.10:
        text += (
            f"\nwarning: PGD is {100 * (by_pgd - by_apgd):.1f} points above APGD: gradient masking is likely. "
            "Trust AutoAttack only (evaluate.py)"
        )
    return text
