"""CKTAT from start to finish on scikit-learn's digits: nothing to download, about a minute on one core.

    python examples/quickstart.py

1. Train a teacher on clean digits.   2. Start a student from its weights.   3. Train the student on adversarial
images with `CKTATLoss`.   4. Attack both with PGD and APGD.   5. Print a table, save a picture.

Copy `student_loss` below into a project of your own, and the attack from pgd.py.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images
import torch
import torch.nn.functional as F
from networks import digit_net
from pgd import eval_mode, fraction, pgd
from torch import Tensor, nn
from torch.utils.data import default_collate

from cktat_loss import CKTATLoss, warm_start

TEACHER_EPOCHS, BATCH, LR = 25, 64, 0.1
RECIPES = {  # arguments of CKTATLoss, whose defaults are those of the paper's Eq. 17
    "adaptive": {"tau": 2.0, "beta": 6.0, "adaptive": True, "detach_clean": True},  # ours
    "literal": {"tau": 5.0, "beta": 6.0},  # the paper's
}
Split = list[Tensor]  # images (N, 1, 8, 8) in [0, 1], classes (N,)
INK, BLUE, ORANGE, RIGHT, WRONG = "#1f2933", "#2463a8", "#d9730d", "#1a7f4b", "#c2272d"


def fit(model: nn.Module, train: Split, epochs: int, loss_of: Callable[..., Tensor]) -> Iterator[tuple[int, float]]:
    """Minimise loss_of(x, y) by SGD. The learning rate rises for a fifth of the steps. Yield (epoch, last loss)."""
    x, y = train
    sgd = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, LR, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(x)).split(BATCH):
            loss = loss_of(x[chosen], y[chosen])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
        yield epoch, loss.item()


def train_student(
    student: nn.Module, criterion: CKTATLoss, train: Split, validation: Split, args: argparse.Namespace
) -> list[tuple[float, ...]]:
    """Train on adversarial images with CKTAT. Return what `validate` finds before it and after each epoch."""

    def student_loss(x: Tensor, y: Tensor) -> Tensor:
        x_adv = pgd(student, x, y, eps=args.eps, step=args.eps / 4, steps=10)
        # One forward for both: BatchNorm sees clean and adversarial images together.
        clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
        return criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y if criterion.adaptive else None)

    curves = [validate(student, criterion, *validation, args.eps)]
    for epoch, _ in fit(student, train, args.epochs, student_loss):
        curves.append(validate(student, criterion, *validation, args.eps))
        guidance, consistency, clean, robust = curves[-1]
        terms = f"guidance {guidance:.3f}, consistency {consistency:.3f}"
        print(f"student: epoch {epoch}/{args.epochs}: {terms}, clean {clean:.1%}, PGD {robust:.1%}", flush=True)
    return curves


def validate(student: nn.Module, criterion: CKTATLoss, x: Tensor, y: Tensor, eps: float) -> tuple[float, ...]:
    """Return guidance, consistency, clean accuracy, and accuracy under the training attack."""
    x_adv = pgd(student, x, y, eps=eps, step=eps / 4, steps=10)
    with eval_mode(student), torch.no_grad():
        clean_logits, adv_logits = student(x), student(x_adv)
        terms = criterion.terms(clean_logits=clean_logits, adv_logits=adv_logits, x=x)
    clean, robust = ((logits.argmax(1) == y).float().mean().item() for logits in (clean_logits, adv_logits))
    return terms.guidance.mean().item(), terms.consistency.mean().item(), clean, robust


def attacked(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace) -> list[float]:
    """Return the accuracy in % on clean images, under PGD-20, and under APGD-CE and APGD-T one after the other."""
    autopgd = images.need("pyautoattack.autopgd_base", "pyautoattack")
    model.eval().requires_grad_(False)
    apgd = {"norm": "Linf", "eps": args.eps, "n_iter": 50, "seed": args.seed, "device": "cpu"}
    clean = model(x).argmax(1) == y
    by_pgd = model(pgd(model, x, y, eps=args.eps, step=args.eps / 4, steps=20)).argmax(1) == y
    right = clean.clone()
    targeted = autopgd.APGDAttack_targeted(model, n_target_classes=3, **apgd)
    for attack in (autopgd.APGDAttack(model, loss="ce", **apgd), targeted):
        if right.any():
            right[right.clone()] = model(attack.perturb(x[right], y[right])).argmax(1) == y[right]
    return [100 * mask.double().mean().item() for mask in (clean, by_pgd, right)]


def draw(title: str, curves: list[tuple[float, ...]], models: list[nn.Module], x: Tensor, y: Tensor, eps: float) -> Any:
    """Draw the curves. Below them draw the first test image of each class, clean and attacked, with predictions."""
    ticker = images.need("matplotlib.ticker", "matplotlib")
    figure = images.need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 7.2), facecolor="white")
    figure.text(0.065, 0.952, title, size=14, weight="bold", color=INK)
    left, right = figure.add_gridspec(1, 2, left=0.065, right=0.985, top=0.885, bottom=0.575, wspace=0.16).subplots()
    lines = [*zip(*curves, strict=True)]
    terms = r"guidance  $\mathrm{KL}(p_t \| p_a)$", r"consistency  $\mathrm{KL}(p_c \| p_a)$"
    for axes, title, labels in (left, "Loss terms", terms), (right, "Student's accuracy", ("clean", "under PGD")):
        for label, color in zip(labels, (BLUE, ORANGE), strict=True):
            axes.plot(lines.pop(0), color=color, label=label, linewidth=2, marker="o", markersize=3.5)
        axes.set_title(f"{title}, validation data", loc="left", size=11, color=INK)
        axes.set_xlabel("adversarial epoch (0: the warm start)")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e7eb", lw=0.8)
        axes.legend(frameon=False, labelcolor=INK)
    left.set_yscale("log", subs=[])
    left.set_ylim(bottom=max(left.get_ylim()[0], 0.02))  # after a collapse the consistency is 0
    left.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    right.set_ylim(0, 1.03)
    right.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))

    first = [y.tolist().index(digit) for digit in range(10)]
    x, y = x[first], y[first]
    teacher, student = models
    on_teacher, on_student = (pgd(model, x, y, eps=eps, step=eps / 4, steps=20) for model in models)
    rows = [  # name, images, and {place below an image: (letter, model) of a prediction}
        ("clean", x, {0.24: ("T", teacher), 0.76: ("S", student)}),
        ("PGD-20 on the\nteacher (T)", on_teacher, {0.5: ("T", teacher)}),
        ("PGD-20 on the\nstudent (S)", on_student, {0.5: ("S", student)}),
    ]
    grid = figure.add_gridspec(3, 10, left=0.155, right=0.985, top=0.475, bottom=0.045, wspace=0.1, hspace=0.38)
    for places, (name, shown, captions) in zip(grid.subplots(), rows, strict=True):
        places[0].text(-0.2, 0.5, name, transform=places[0].transAxes, ha="right", va="center", color=INK)
        for digit, axes in enumerate(places):
            axes.set_axis_off()
            axes.imshow(shown[digit, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            for place, (letter, model) in captions.items():
                seen = model(shown).argmax(1)[digit].item()
                text, color = (f"{letter} {seen} ✓", RIGHT) if seen == y[digit] else (f"{letter} {seen} ✗", WRONG)
                axes.text(place, -0.07, text, transform=axes.transAxes, ha="center", va="top", color=color, size=9)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="adaptive", choices=RECIPES, help="ours, or the paper's, which collapses")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of the student (default: %(default)s)")
    parser.add_argument("--eps", type=fraction, default=0.2, help="where 1 is black to white (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart.png"), help="picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.eps <= 1 or args.epochs < 1 or args.out.suffix != ".png":
        parser.error("--eps must be above 0 and at most 1, --epochs at least 1, and --out a .png file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # more threads hardly help with images this small
    print(f"recipe {args.recipe}: {RECIPES[args.recipe]}")

    train, validation, test = (default_collate([*part]) for part in images.load("digits")[:3])
    teacher = digit_net()
    for epoch, loss in fit(teacher, train, TEACHER_EPOCHS, lambda x, y: F.cross_entropy(teacher(x), y)):
        if epoch % 5 == 0:
            print(f"teacher: epoch {epoch}/{TEACHER_EPOCHS}: loss {loss:.4f}", flush=True)
    student = digit_net()
    warm_start(student, teacher)
    curves = train_student(student, CKTATLoss(teacher, **RECIPES[args.recipe]), train, validation, args)

    print(f"\n{'accuracy in %':<14}{'clean':>13}{'PGD-20':>13}{'APGD':>13}")
    found = {name: attacked(model, *test, args) for name, model in (("teacher", teacher), ("student", student))}
    for name, shares in found.items():
        cells = (f"{share:.1f} ± {math.sqrt(share * (100 - share) / len(test[1])):.1f}" for share in shares)
        print(f"{name:<14}" + "".join(f"{cell:>13}" for cell in cells))
    print(f"\n{len(test[1])} test images, ± standard error; attacks change a pixel by {args.eps:g} at most.")
    print("APGD (pyautoattack): the worst case of APGD-CE, 50 steps, and of APGD-T, 3 targets x 50 steps.")
    if found["teacher"][0] - found["student"][0] > 20:  # points of clean accuracy
        print("warning: the student collapsed towards a constant prediction. The recipe adaptive avoids it.")
    title = "CKTAT on digits: accuracy under APGD, eps = {:g}: teacher {:.1f}%, student {:.1f}%"
    title = title.format(args.eps, *(shares[-1] for shares in found.values()))
    draw(title, curves, [teacher, student], *test, args.eps).savefig(args.out, dpi=120)
    print(f"\nsaved {args.out} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (images.UserError, OSError) as error:  # an OSError names the file
        sys.exit(f"error: {error}")
