"""CKTAT from start to finish on scikit-learn's digits: nothing to download, about a minute on one core.

    python examples/quickstart.py          (--help explains every option)

1. Train a teacher on clean digits.   2. Start a student from its weights.   3. Train the student on adversarial
images with `CKTATLoss`.   4. Attack both with PGD-20, APGD-CE and APGD-T.   5. Print a table, save a picture.

The loss in `train_student` has the lines to copy into a project of your own, and pgd.py the attack.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from data import load
from evaluate import Budget, Evaluation, Findings, Row, writable
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from models import DigitNet
from pgd import check_length, eval_mode, fraction, pgd
from runtime import UserError, default, device_of, number, replacing
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from cktat_loss import CKTATLoss, warm_start

STEPS = 10  # of PGD in training, each of eps/4
TARGETS = 3  # classes that APGD-T aims at: the likeliest wrong ones
INK, MUTED, BLUE, ORANGE, RIGHT, WRONG = "#1f2933", "#616e7c", "#2463a8", "#d9730d", "#1a7f4b", "#c2272d"

Split = Sequence[Tensor]  # images (N, 1, 8, 8) in [0, 1], labels (N,)

TAU = {"adaptive": 2.0, "literal": 5.0}  # by recipe
WHY = {
    "adaptive": "S(x) is held fixed in the consistency term: S(x') has to move towards S(x), never the reverse. The\n"
    "term of each image is weighted by softmax(S(x'))[y]: it counts the more, the better the image withstands the\n"
    "attack. Unlike the literal form, this did not collapse in short runs, on validation data.",
    "literal": "Equation 17 to the letter. Nothing anchors S(x) on clean images, so the consistency term can pull the\n"
    "student towards a constant prediction. It is here to show that; adaptive avoids it.",
}


@dataclass(frozen=True)
class Options:
    """How to train, attack and draw."""

    recipe: Literal["adaptive", "literal"] = "adaptive"
    """balance of the loss terms: ours, or the paper's, which can collapse"""
    epochs: Annotated[int, number(int, 1, 1000)] = 15
    """adversarial epochs of the student"""
    teacher_epochs: Annotated[int, number(int, 1, 1000)] = 25
    """clean epochs of the teacher"""
    eps: Annotated[float, number(fraction, 0, 255, above=True)] = 0.2
    """largest change of a pixel, where 1 is black to white"""
    tau: Annotated[float | None, number(float, 0.01, 100), default("the recipe's: 2, or 5 for literal")] = None
    """temperature that softens the teacher"""
    beta: Annotated[float, number(float, 0, 100)] = 6.0
    """weight of the consistency term"""
    lr: Annotated[float, number(float, 0, 10, above=True)] = 0.1
    """peak learning rate of both phases"""
    batch_size: Annotated[int, number(int, 2, 1000)] = 64
    """images a training step"""
    apgd_steps: Annotated[int, number(int, 1, 1000)] = 50
    """steps of each APGD run, 50 or more for a number to report"""
    test_images: Annotated[int, number(int, 10, 500)] = 500
    """images that are attacked at the end"""
    seed: Annotated[int, number(int, 0, 2**32 - 1)] = 0
    """seeds splits, weights, batches and attacks"""
    threads: Annotated[int, number(int, 1, 1024)] = 1
    """CPU threads; more hardly help images this small"""
    device: str = "auto"
    """auto (an accelerator if there is one), cpu, cuda, mps, ..."""
    out: Path = Path("out/quickstart.png")
    """where the picture goes, a .png file"""


class Epoch(NamedTuple):
    """Of the student on validation images: both loss terms, clean accuracy, accuracy under the training attack."""

    guidance: float
    consistency: float
    clean: float
    robust: float


def fit(
    model: nn.Module, train: Split, options: Options, epochs: int, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[int, float]]:
    """Train on `loss_of(x, y)`: SGD with Nesterov momentum on a one-cycle learning rate, for teacher and student alike.

    After each epoch comes its number, from 1, and the loss of its last batch.
    """
    images, labels = train
    steps = max(epochs * math.ceil(len(images) / options.batch_size), 6)  # OneCycleLR divides by zero at 5
    sgd = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, options.lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(images)).split(options.batch_size):
            loss = loss_of(images[chosen], labels[chosen])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
        yield epoch, loss.item()


def train_teacher(train: Split, options: Options) -> nn.Module:
    """Phase 1: cross-entropy on clean images."""
    teacher, epochs = DigitNet().to(options.device), options.teacher_epochs
    for epoch, loss in fit(teacher, train, options, epochs, lambda x, y: F.cross_entropy(teacher(x), y)):
        if epoch % 5 == 0 or epoch == epochs:
            print(f"teacher: epoch {epoch}/{epochs}: loss {loss:.4f}", flush=True)
    return teacher


def train_student(
    teacher: nn.Module, train: Split, validation: Split, options: Options
) -> tuple[nn.Module, list[Epoch]]:
    """Phase 2: adversarial training with the CKTAT loss, from the teacher's weights."""
    student = DigitNet().to(options.device)
    warm_start(student, teacher)
    adaptive = options.recipe == "adaptive"
    criterion = CKTATLoss(teacher, tau=options.tau, beta=options.beta, adaptive=adaptive, detach_clean=adaptive)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        x_adv = pgd(student, x, y, eps=options.eps, step=options.eps / 4, steps=STEPS)
        # One pass for both: the BatchNorms see clean and adversarial images together.
        clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
        return criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, y=y if adaptive else None)

    curves = [validate(student, criterion, validation, options.eps)]
    for epoch, _ in fit(student, train, options, options.epochs, loss_of):
        curves.append(now := validate(student, criterion, validation, options.eps))
        print(
            f"student: epoch {epoch}/{options.epochs}: guidance {now.guidance:.3f}, consistency {now.consistency:.3f}, "
            f"clean {now.clean:.1%}, PGD {now.robust:.1%}",
            flush=True,
        )
    return student, curves


def validate(student: nn.Module, criterion: CKTATLoss, split: Split, eps: float) -> Epoch:
    """Both loss terms, the clean accuracy and that under the training attack."""
    x, y = split
    x_adv = pgd(student, x, y, eps=eps, step=eps / 4, steps=STEPS)
    with eval_mode(student), torch.no_grad():
        clean_logits, adv_logits = student(x), student(x_adv)
        terms = criterion.terms(clean_logits=clean_logits, adv_logits=adv_logits, x=x)
    hits = [(logits.argmax(1) == y).float().mean().item() for logits in (clean_logits, adv_logits)]
    return Epoch(terms.guidance.mean().item(), terms.consistency.mean().item(), *hits)


def attack(models: dict[str, nn.Module], test: Split, options: Options) -> dict[str, tuple[list[Row], Findings]]:
    """The rows of each model: clean, PGD-20, and APGD-T on what APGD-CE leaves right; and what is suspicious."""
    results = {}
    for name, model in models.items():
        print(f"\nattacks on the {name}:", file=sys.stderr)
        evaluation = Evaluation(model, TensorDataset(*test), eps=options.eps, seed=options.seed, device=options.device)
        findings = evaluation.run(("pgd20", "apgd"), Budget(options.apgd_steps, TARGETS))
        results[name] = [row for row in evaluation.rows if row.attack != "APGD-CE"], findings
    return results


def report(results: dict[str, tuple[list[Row], Findings]], options: Options) -> None:
    """The table, and what to be wary of in it."""
    print(f"\n{'accuracy in %':<14}{'clean':>13}{'PGD-20':>13}{'APGD':>13}")
    for name, (rows, _) in results.items():
        print(f"{name:<14}" + "".join(f"{f'{row.accuracy:.1f} ± {row.standard_error:.1f}':>13}" for row in rows))
    print(
        f"\n{options.test_images} test images, ± standard error; attacks change a pixel by {options.eps:g} at most.\n"
        f"PGD-20: 20 steps of eps/4 on the cross-entropy, one random start.\n"
        f"APGD (pyautoattack): the worst case of APGD-CE, {options.apgd_steps} steps, and of APGD-T (targeted DLR),\n"
        f"{TARGETS} targets x {options.apgd_steps} steps, on the images that APGD-CE leaves right."
    )
    if options.apgd_steps < 50:
        print(f"warning: {options.apgd_steps} APGD steps are too few to report; 50 is the least.")
    for name, (_, findings) in results.items():
        for text in findings.values():
            print(f"warning: {name}: {text}")
    lost = results["teacher"][0][0].accuracy - results["student"][0][0].accuracy
    if lost > 20:
        print(f"warning: the student is {lost:.1f} points below the teacher on clean images: a collapse.")


def draw(title: str, curves: list[Epoch], teacher: nn.Module, student: nn.Module, test: Split, eps: float) -> Figure:
    """Curves by epoch; below them the first test image of each class, clean and attacked, with what the models see.

    The models are in eval mode, as the attacks left them.
    """
    figure = Figure(figsize=(11, 7.2), facecolor="white")
    figure.text(0.065, 0.952, title, size=14, weight="bold", color=INK)
    panels = figure.add_gridspec(1, 2, left=0.065, right=0.985, top=0.885, bottom=0.575, wspace=0.16)
    draw_curves(*panels.subplots(), curves)

    labels = test[1].tolist()
    chosen = [labels.index(digit) for digit in sorted(set(labels))]
    x, y = (part[chosen] for part in test)
    for_teacher, for_student = (pgd(model, x, y, eps=eps, step=eps / 4, steps=20) for model in (teacher, student))
    rows = [  # images, and whose prediction stands where below each of them
        ("clean", x, {0.24: ("T", teacher), 0.76: ("S", student)}),
        ("PGD-20 on the\nteacher (T)", for_teacher, {0.5: ("T", teacher)}),
        ("PGD-20 on the\nstudent (S)", for_student, {0.5: ("S", student)}),
    ]
    grid = figure.add_gridspec(3, 10, left=0.155, right=0.985, top=0.475, bottom=0.045, wspace=0.1, hspace=0.38)
    for places, (name, images, captions) in zip(grid.subplots(), rows, strict=True):
        places[0].text(-0.2, 0.5, name, transform=places[0].transAxes, ha="right", va="center", color=INK)
        for axes in places:
            axes.set_axis_off()
        for axes, image in zip(places, images.cpu().numpy(), strict=False):
            axes.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
        for place, (model, network) in captions.items():
            for axes, seen, label in zip(places, network(images).argmax(1).tolist(), y.tolist(), strict=False):
                mark, color = ("✓", RIGHT) if seen == label else ("✗", WRONG)
                caption = f"{model} {seen} {mark}"
                axes.text(place, -0.07, caption, transform=axes.transAxes, ha="center", va="top", color=color, size=9)
    return figure


def draw_curves(left: Axes, right: Axes, curves: list[Epoch]) -> None:
    """Both loss terms on the left, clean and robust accuracy on the right, by epoch; 0 is the warm start."""
    guidance, consistency, clean, robust = zip(*curves, strict=True)
    left.plot(guidance, color=BLUE, label=r"guidance  $\mathrm{KL}(p_t \| p_a)$")
    left.plot(consistency, color=ORANGE, label=r"consistency  $\mathrm{KL}(p_c \| p_a)$")
    left.set_title("Loss terms, validation data", loc="left", size=11, color=INK)
    left.set_yscale("log", subs=[])  # no minor ticks
    left.set_ylim(bottom=max(left.get_ylim()[0], 0.02))  # after a collapse, the consistency term is 0
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    right.plot(clean, color=BLUE, label="clean")
    right.plot(robust, color=ORANGE, label="under PGD")
    right.set_title("Student's accuracy, validation data", loc="left", size=11, color=INK)
    right.set_ylim(0, 1.03)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        for line in axes.lines:
            line.set(linewidth=2, marker="o", markersize=3.5)
        axes.set_xlabel("adversarial epoch (0: the warm start)", color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e7eb", lw=0.8)
        axes.tick_params(colors=MUTED, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#cbd2d9")
        axes.legend(frameon=False, labelcolor=INK)


def run(options: Options) -> None:
    """Train, attack, report. The picture is the only file, and written last."""
    started = time.perf_counter()
    check_length("--eps", options.eps, "linf")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out must name a .png file, got {options.out}")
    writable(options.out.parent)
    options = replace(options, tau=options.tau or TAU[options.recipe], device=str(device_of(options.device)))
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    print(
        f"recipe {options.recipe}: tau = {options.tau:g}, beta = {options.beta:g}\n{WHY[options.recipe]}\n"
        f"seed {options.seed}, device {options.device}, {options.threads} CPU thread(s), batch size "
        f"{options.batch_size}; training attack: PGD, {STEPS} steps of eps/4, eps = {options.eps:g}\n",
        flush=True,
    )
    data = load("digits", Path(), download=False, seed=options.seed, validation=200)
    train, validation, test = (
        [part.to(options.device) for part in default_collate([*images])]
        for images in (data.train, data.validation, data.test)
    )
    test = [part[: options.test_images] for part in test]
    teacher = train_teacher(train, options)
    student, curves = train_student(teacher, train, validation, options)
    results = attack({"teacher": teacher, "student": student}, test, options)
    report(results, options)
    before, after = (f"{rows[-1].accuracy:.1f}%" for rows, _ in results.values())
    title = f"CKTAT on digits: accuracy under APGD, eps = {options.eps:g}: teacher {before}, student {after}"
    figure = draw(title, curves, teacher, student, test, options.eps)
    with replacing(options.out) as file:
        figure.savefig(file, format="png", dpi=120)
    print(f"\nsaved {options.out} after {time.perf_counter() - started:.0f} s")


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, description=__doc__, args=argv)
    try:
        run(options)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: no picture written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
