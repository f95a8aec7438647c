"""What evaluate.py attacks with: PGD on the cross-entropy and on the CW margin, and the four attacks of AutoAttack.

The first two are ours, from pgd.py. AutoAttack's are those of pyautoattack, its authors' code as a package.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from pgd import Norm, Objective, pgd
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn


@dataclass(frozen=True)
class Attack:
    """A name, what it spends on each image, and how it makes adversarial examples (N, ...) of images and labels."""

    name: str
    budget: dict[str, int | float]
    perturb: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """What AutoAttack may spend; the defaults are its standard version's."""

    apgd_steps: int = 100
    targets: int = 9  # wrong classes that APGD-T and FAB-T aim at, the likeliest first
    fab_steps: int = 100
    square_queries: int = 5000


def pgd_attack(
    model: nn.Module, *, steps: int, norm: Norm, eps: float, name: str = "PGD", objective: Objective = "ce"
) -> Attack:
    """PGD with steps of eps/4 and one random start; the last iterate counts."""
    perturb = partial(pgd, model, eps=eps, step=eps / 4, steps=steps, norm=norm, objective=objective)
    return Attack(f"{name}-{steps}", {"steps": steps, "step": eps / 4, "restarts": 1}, perturb)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max over j != y of z_j - z_y, above 0 where the model is wrong: (N, C), (N,) to (N,).

    PGD on it is what the field reports as "CW" within an eps, after Carlini and Wagner, whose own attack looks for the
    smallest change. Unlike the cross-entropy's, its gradient does not vanish where the model is very sure.
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def autoattack(
    model: nn.Module, *, norm: Norm, eps: float, classes: int, budget: Budget, seed: int
) -> tuple[Attack, ...]:
    """AutoAttack's standard version (Croce and Hein 2020), in its order; each is for the images that are still right.

    With fewer classes than targets, all wrong classes are aimed at. APGD-T's loss takes 4 classes: with fewer, it is
    left out.
    """
    ball = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed}
    targets = min(budget.targets, classes - 1)
    # Steps go in here: APGD derives the checkpoints of its step size from them, so setting n_iter later is too late.
    # Its warnings of zero gradients would come with every batch: diagnostics.py counts them once, for all attacks.
    apgd = {**ball, "n_iter": budget.apgd_steps, "logger": logging.Logger("APGD", logging.ERROR)}
    apgd_ce = APGDAttack(model, loss="ce", **apgd)
    apgd_t = APGDAttack_targeted(model, n_target_classes=targets, **apgd)
    fab_t = FABAttack_PT(model, targeted=True, n_target_classes=targets, n_iter=budget.fab_steps, **ball)
    # AutoAttack's own schedule of square sizes; the class has another by default.
    square = SquareAttack(model, n_queries=budget.square_queries, resc_schedule=False, **ball)
    steps = {"steps": budget.apgd_steps, "restarts": 1}
    return (
        Attack("APGD-CE", steps, apgd_ce.perturb),
        *((Attack("APGD-T", {**steps, "targets": targets}, apgd_t.perturb),) if classes >= 4 else ()),
        Attack("FAB-T", {"steps": budget.fab_steps, "restarts": 1, "targets": targets}, fab_t.perturb),
        Attack("Square", {"queries": budget.square_queries, "restarts": 1}, square.perturb),
    )
