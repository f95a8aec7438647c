"""CKTAT from start to finish on scikit-learn's digits: nothing to download, about a minute on two cores.

    python examples/quickstart.py          (--help explains every option)

1. Train a teacher on clean digits.   2. Start a student from its weights.   3. Train the student on adversarial
images with `CKTATLoss`.   4. Attack both with PGD-20, APGD-CE and APGD-T.   5. Print a table, save a picture.

`pgd` and `train_student` are the lines to copy into a project of your own, with `eval_mode` of pgd.py.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from options import Number, device_name
from pgd import eval_mode
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from quickstart_extras import Attacked, Curves, DigitNet, Split, load_data, png_path, save_figure
from torch import Tensor, nn
from tqdm import tqdm

from cktat_loss import CKTATLoss, adaptive_beta, warm_start

TRAINING_STEPS = 10  # of PGD in training, each of eps/4
APGD_TARGETS = 3  # classes that APGD-T aims at: the likeliest wrong ones


@dataclass(frozen=True)
class Recipe:
    """How the two terms are balanced, and why one would want that."""

    tau: float
    beta: float
    detach_clean: bool
    weights: str
    why: str


RECIPES = {
    "adaptive": Recipe(
        2.0,
        6.0,
        detach_clean=True,
        weights="beta_i = {beta:g} * softmax(S(x'_i))[y_i], sample by sample",
        why="S(x) is held fixed in the consistency term: S(x') has to move towards S(x), never the reverse. A sample\n"
        "counts the more, the better it withstands the attack. Unlike the literal form, this did not collapse in\n"
        "short runs, on validation data.",
    ),
    "ramp": Recipe(
        5.0,
        6.0,
        detach_clean=True,
        weights="beta rises from 0 to {beta:g} over the first 40 % of the epochs",
        why="S(x) is held fixed in the consistency term: S(x') has to move towards S(x), never the reverse. Guidance\n"
        "comes first. Unlike the literal form, this did not collapse in short runs, on validation data.",
    ),
    "literal": Recipe(
        5.0,
        6.0,
        detach_clean=False,
        weights="beta = {beta:g} throughout",
        why="Equation 17 to the letter. Nothing anchors S(x) on clean images, so the consistency term can pull the\n"
        "student towards a constant prediction. It is here to show that: adaptive and ramp avoid it.",
    ),
}


def batches(split: Split, size: int) -> Iterator[Split]:
    """One shuffled pass over the data."""
    for chosen in torch.randperm(len(split[0])).split(size):
        yield split[0][chosen], split[1][chosen]


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int, step_size: float) -> Tensor:
    """Maximise the cross-entropy within eps of every pixel and within [0, 1] (Madry et al. 2018).

    Random start, BatchNorm in eval mode; the model's modes and its parameters' `.grad` are left as they were.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv = x + eps * (2 * torch.rand_like(x) - 1)
    with eval_mode(model), torch.enable_grad():
        for _ in range(steps):
            x_adv = x_adv.clamp(low, high).detach().requires_grad_()
            loss = F.cross_entropy(model(x_adv), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv + step_size * gradient.sign()
    return x_adv.clamp(low, high).detach()


class Trainer:
    """SGD with Nesterov momentum on a one-cycle learning rate, for teacher and student alike."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        self.sgd = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = max(steps, 6)  # OneCycleLR divides by zero at 5
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.sgd, lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
        )

    def step(self, loss: Tensor) -> None:
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        self.schedule.step()


def train_teacher(train: Split, args: argparse.Namespace) -> nn.Module:
    """Phase 1: cross-entropy on clean images."""
    teacher = DigitNet().to(args.device)
    trainer = Trainer(teacher, args.lr, args.teacher_epochs * math.ceil(len(train[0]) / args.batch_size))
    for _ in (bar := tqdm(range(args.teacher_epochs), desc="teacher", unit="epoch")):
        for x, y in batches(train, args.batch_size):
            loss = F.cross_entropy(teacher(x), y)
            trainer.step(loss)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return teacher


def train_student(
    teacher: nn.Module, train: Split, validation: Split, args: argparse.Namespace
) -> tuple[nn.Module, Curves]:
    """Phase 2: adversarial training with the CKTAT loss, from the teacher's weights."""
    recipe = RECIPES[args.recipe]
    student = DigitNet().to(args.device)
    warm_start(student, teacher)
    criterion = CKTATLoss(teacher, tau=args.tau, beta=args.beta, detach_clean=recipe.detach_clean)
    trainer = Trainer(student, args.lr, args.epochs * math.ceil(len(train[0]) / args.batch_size))
    curves = Curves()
    validate(student, criterion, validation, args.eps, curves)

    for epoch in (bar := tqdm(range(args.epochs), desc="student", unit="epoch")):
        if args.recipe == "ramp":
            criterion.beta = args.beta * min(1.0, epoch / (0.4 * args.epochs))
        for x, y in batches(train, args.batch_size):
            x_adv = pgd(student, x, y, eps=args.eps, steps=TRAINING_STEPS, step_size=args.eps / 4)
            # One pass for both: the BatchNorms see clean and adversarial images together.
            clean_logits, adv_logits = student(torch.cat([x, x_adv])).chunk(2)
            beta = adaptive_beta(adv_logits, y, beta=args.beta) if args.recipe == "adaptive" else None
            loss = criterion(clean_logits=clean_logits, adv_logits=adv_logits, x=x, beta=beta)
            trainer.step(loss)
        validate(student, criterion, validation, args.eps, curves)
        bar.set_postfix_str(curves.last())
    return student, curves


def validate(student: nn.Module, criterion: CKTATLoss, split: Split, eps: float, curves: Curves) -> None:
    """Append both loss terms, the clean accuracy and that under the training attack."""
    x, y = split
    x_adv = pgd(student, x, y, eps=eps, steps=TRAINING_STEPS, step_size=eps / 4)
    with eval_mode(student), torch.no_grad():
        clean_logits, adv_logits = student(x), student(x_adv)
        terms = criterion.terms(clean_logits=clean_logits, adv_logits=adv_logits, x=x)
    curves.guidance.append(terms.guidance.mean().item())
    curves.consistency.append(terms.consistency.mean().item())
    curves.clean.append((clean_logits.argmax(1) == y).float().mean().item())
    curves.robust.append((adv_logits.argmax(1) == y).float().mean().item())


def attack(name: str, model: nn.Module, test: Split, args: argparse.Namespace) -> Attacked:
    """Clean images, PGD-20 and APGD: APGD-CE first, then APGD-T on the images that are still right."""
    torch.manual_seed(args.seed)
    # n_iter goes in here: APGD derives the checkpoints of its step size from it, so setting it later is too late.
    notes: list[str] = []  # APGD-T complains here of zero gradients
    log = SimpleNamespace(warning=notes.append)
    settings = {"n_iter": args.apgd_steps, "eps": args.eps, "seed": args.seed, "logger": log}
    apgd_ce = APGDAttack(model, loss="ce", **settings)
    apgd_t = APGDAttack_targeted(model, n_target_classes=APGD_TARGETS, **settings)
    chunks = list(zip(*(part[: args.test_images].split(100) for part in test), strict=True))
    columns = []
    with eval_mode(model), torch.no_grad():
        for x, y in tqdm(chunks, desc=f"attack the {name}", unit="chunk"):
            x_pgd = pgd(model, x, y, eps=args.eps, steps=20, step_size=args.eps / 4)
            x_apgd = apgd_ce.perturb(x, y)
            left = model(x_apgd).argmax(1) == y
            if left.any():
                x_apgd[left] = apgd_t.perturb(x[left], y[left])
            predicted = model(x).argmax(1)
            pgd_hit, apgd_hit = model(x_pgd).argmax(1) == y, model(x_apgd).argmax(1) == y
            x_adv = torch.where(apgd_hit.view(-1, 1, 1, 1), x_pgd, x_apgd)
            columns.append((y, predicted, predicted == y, pgd_hit, apgd_hit, x, x_adv, model(x_adv).argmax(1)))
    return Attacked(name, bool(notes), *(torch.cat(column).cpu() for column in zip(*columns, strict=True)))


def percent(hits: Tensor) -> str:
    """Mean and standard error of hits and misses, in percent."""
    mean = hits.double().mean().item()
    return f"{100 * mean:.1f} ± {100 * math.sqrt(mean * (1 - mean) / len(hits)):.1f}"


def report(teacher: Attacked, student: Attacked, args: argparse.Namespace) -> None:
    """The table, and what to be wary of in it."""
    print(f"\n{'accuracy in %':<14}{'clean':>13}{'PGD-20':>13}{'APGD':>13}")
    for model in (teacher, student):
        print(f"{model.name:<14}" + "".join(f"{percent(hits):>13}" for hits in (model.clean, model.pgd, model.apgd)))
    print(
        f"\n{len(teacher.labels)} test images, ± standard error. Attacks change each pixel by {args.eps:g} at most.\n"
        f"PGD-20: 20 steps of eps/4 on the cross-entropy, one random start.\n"
        f"APGD (pyautoattack): the worst case of APGD-CE, {args.apgd_steps} steps, and of APGD-T (targeted DLR),\n"
        f"{APGD_TARGETS} targets x {args.apgd_steps} steps, on the images that APGD-CE leaves right."
    )
    if args.apgd_steps < 50:
        print(f"warning: {args.apgd_steps} APGD steps are too few to report; 50 is the least.")
    for model in (teacher, student):
        gap = 100 * (model.pgd.float().mean() - model.apgd.float().mean()).item()
        if gap > 10:
            print(f"warning: {model.name}: PGD-20 is {gap:.1f} points above APGD: gradient masking is likely.")
        if model.zero_gradients:
            print(f"warning: {model.name}: APGD-T met gradients of exactly zero: masking, or a constant prediction.")
    lost = 100 * (teacher.clean.float().mean() - student.clean.float().mean()).item()
    if lost > 20:
        print(f"warning: the student is {lost:.1f} points below the teacher on clean images: a collapse.")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All options, checked; tau and beta are the recipe's unless given."""
    parser = argparse.ArgumentParser(description="CKTAT on scikit-learn's digits: train, attack, report, draw.")
    own = "; ".join(f"{name}: tau {recipe.tau:g}, beta {recipe.beta:g}" for name, recipe in RECIPES.items())

    def option(flag: str, check: Callable[[str], object], default: object, meaning: str) -> None:
        wanted = f", {check.wanted}" if isinstance(check, Number) else ""
        note = "the recipe's" if default is None else default
        parser.add_argument(flag, type=check, default=default, help=f"{meaning}{wanted} (default: {note})")

    parser.add_argument(
        "--recipe", choices=RECIPES, default="adaptive", help=f"balance of the loss terms ({own}; default: adaptive)"
    )
    option("--epochs", Number(int, 1, 1000), 15, "adversarial epochs of the student")
    option("--teacher-epochs", Number(int, 1, 1000), 25, "clean epochs of the teacher")
    option("--eps", Number(float, 0, 1, above=True), 0.2, "largest change of a pixel, where 1 is black to white")
    option("--tau", Number(float, 0.01, 100), None, "temperature that softens the teacher")
    option("--beta", Number(float, 0, 100), None, "weight of the consistency term")
    option("--lr", Number(float, 0, 10, above=True), 0.1, "peak learning rate of both phases")
    option("--batch-size", Number(int, 2, 1000), 64, "images a training step")
    option("--apgd-steps", Number(int, 1, 1000), 50, "steps of each APGD run, 50 or more for a number to report")
    option("--test-images", Number(int, 10, 500), 500, "images that are attacked at the end")
    option("--seed", Number(int, 0, 2**32 - 1), 0, "seeds splits, weights, batches and attacks")
    option("--threads", Number(int, 1, 1024), 1, "CPU threads; more hardly help images this small")
    option("--device", device_name, "auto", "auto (an accelerator if there is one), cpu, cuda, mps, ...")
    option("--out", png_path, "out/quickstart.png", "where the picture goes, a .png file")
    args = parser.parse_args(argv)
    args.tau = RECIPES[args.recipe].tau if args.tau is None else args.tau
    args.beta = RECIPES[args.recipe].beta if args.beta is None else args.beta
    return args


def run(args: argparse.Namespace) -> None:
    """Train, attack, report. The picture is the only file, and written last."""
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.recipe]
    print(
        f"recipe {args.recipe}: tau = {args.tau:g}, {recipe.weights.format(beta=args.beta)}, "
        f"detach_clean={recipe.detach_clean}\n{recipe.why}\n"
        f"seed {args.seed}, device {args.device}, {args.threads} CPU thread(s), batch size {args.batch_size}; "
        f"training attack: PGD, {TRAINING_STEPS} steps of eps/4, eps = {args.eps:g}\n",
        flush=True,
    )
    train, validation, test = load_data(args.seed, args.device)
    teacher = train_teacher(train, args)
    student, curves = train_student(teacher, train, validation, args)
    results = attack("teacher", teacher, test, args), attack("student", student, test, args)
    report(*results, args)
    save_figure(args.out, curves, *results, eps=args.eps)
    print(f"\nsaved {args.out} after {time.perf_counter() - started:.0f} s")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\ninterrupted: no picture written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
