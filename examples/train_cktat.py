"""Phase 2 of CKTAT: train the student on adversarial images, guided by a clean teacher (arXiv 2504.00038).

    python examples/train_cktat.py --teacher out/teacher --out out/student
    python examples/train_cktat.py --teacher out/teacher --recipe literal --out out/literal    (Eq. 17 to the letter)
    python examples/train_cktat.py --method trades --arch wrn-34-10 --out out/trades           (to compare with)
    torchrun --nproc-per-node=4 examples/train_cktat.py ...     (four GPUs, the images of a step split between them)

Every batch: attack the student with PGD, run the teacher T on the clean images x, and the student S on x and on the
adversarial images x'; then descend, with the recipe `ours` or `literal`, from the mean of

    KL(softmax(T(x) / tau) || softmax(S(x'))) + beta * KL(softmax(S(x)) || softmax(S(x')))
                     guidance                                consistency

The teacher comes from train_clean.py. evaluate.py attacks the result, plot_run.py draws the log. Ctrl-C and SIGTERM
leave a run that --resume continues.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import checkpoint
import torch
from data import Data
from distributed import Ranks
from engine import Settings, Trainer, launch, new_model, open_data
from methods import CKTAT, METHODS, PGDAT, TRADES, Method, Terms
from models import ARCHITECTURES, from_checkpoint
from options import Group, Number, UserError, fraction, manual
from pgd import EPS, pgd
from schedules import ramp
from torch import Tensor, nn
from torch.utils.data import default_collate
from training_options import add_data, add_hardware, add_optimisation, add_run, finish
from validation import APGD_STEPS, compare_with_apgd

from cktat_loss import CKTATLoss, warm_start


class Recipe(NamedTuple):
    """How the two terms of CKTAT are balanced."""

    tau: float
    beta: float
    detach_clean: bool
    adaptive_beta: bool

    def __str__(self) -> str:
        gradient = "no gradient through S(x)" if self.detach_clean else "gradient through S(x)"
        weights = "adaptive weights" if self.adaptive_beta else "the same weight for every sample"
        return f"tau {self.tau:g}, beta {self.beta:g}, {gradient}, {weights}"


RECIPES = {
    "ours": Recipe(2.0, 6.0, detach_clean=True, adaptive_beta=True),
    "literal": Recipe(5.0, 6.0, detach_clean=False, adaptive_beta=False),
}

_OF_CKTAT = ("recipe", "tau", "detach_clean", "adaptive_beta", "no_guidance", "no_consistency")
NOT_FOR = {"cktat": (), "trades": _OF_CKTAT, "pgd-at": (*_OF_CKTAT, "beta", "beta_ramp", "two_forwards")}


def run(
    args: argparse.Namespace,
    ranks: Ranks,
    new_method: Callable[[argparse.Namespace, nn.Module | None], Method] | None = None,
) -> None:
    """Train the student, with a method of the caller's in the place of --method where one is given."""
    data = open_data(args, ranks)
    torch.manual_seed(args.seed)
    teacher = None if args.teacher is None else open_teacher(args, data).to(ranks.device)
    trainer = Trainer(new_student(args, data, teacher), data, args, ranks)
    if trainer.finished:
        return
    method = (new_method or method_of)(args, teacher)
    frozen = method.criterion.teacher if isinstance(method, CKTAT) else None

    def settings(progress: float) -> Settings:
        """eps and beta, from the share of the training that is done."""
        eps = args.eps * max(0.01, ramp(progress, args.eps_ramp))  # so that the attack's steps are never 0
        return {"eps": eps, "beta": args.beta * ramp(progress, args.beta_ramp)}

    def step(x: Tensor, y: Tensor, eps: float, beta: float) -> Terms:
        """Attack, forwards, loss, backward."""
        with trainer.attacking():
            size, start = args.step_size * eps / args.eps, method.attack_start(x)
            ball = {"eps": eps, "norm": args.norm, "step": size, "steps": args.steps}
            x_adv = pgd(trainer.model, x, y, **ball, objective=method.objective, start=start)
        teacher_logits = None
        if frozen is not None:  # timed apart: it is what CKTAT costs above TRADES
            with trainer.clock("teacher"), trainer.autocast(), torch.no_grad():
                teacher_logits = frozen(x)
        with trainer.clock("student"):
            with trainer.autocast():
                if not method.clean_forward:
                    clean_logits, adv_logits = None, trainer.network(x_adv)
                elif args.two_forwards:
                    clean_logits, adv_logits = trainer.network(x), trainer.network(x_adv)
                else:  # the BatchNorms see clean and adversarial images together
                    clean_logits, adv_logits = trainer.network(torch.cat([x, x_adv])).chunk(2)
                terms = method(
                    clean_logits=clean_logits, adv_logits=adv_logits, teacher_logits=teacher_logits, y=y, beta=beta
                )
            trainer.update(terms.loss)  # zero_grad, backward, optimizer step
        return terms

    attack = partial(pgd, eps=args.eps, norm=args.norm, step=args.step_size, steps=args.steps)
    teacher_clean = None
    if teacher is not None and ranks.rank == 0:
        teacher_clean = trainer.validate(teacher, None).clean
        print(f"teacher: clean {teacher_clean:.1%} on the validation images")
    trainer.fit(step, settings=settings, attack=attack, teacher_clean=teacher_clean)

    if args.apgd_check and ranks.rank == 0:
        best = from_checkpoint(args.out / "best.pt").to(ranks.device)
        x, y = default_collate([data.validation[i] for i in range(min(args.apgd_check, len(data.validation)))])
        print(
            compare_with_apgd(best, x.to(ranks.device), y.to(ranks.device), eps=args.eps, norm=args.norm, attack=attack)
        )


def open_teacher(args: argparse.Namespace, data: Data) -> nn.Module:
    """The teacher, in eval mode. Its architecture is the student's too, where --arch is not given."""
    path = args.teacher / "best.pt" if args.teacher.is_dir() else args.teacher
    if not path.is_file():
        raise UserError(f"--teacher: there is no file {path}; train_clean.py makes one")
    try:
        saved = checkpoint.load(path) if path.suffix in (".pt", ".pth") else {}
        if "arch" in saved:
            teacher = from_checkpoint(path)
            facts = [(name, saved[name], getattr(data, name)) for name in ("classes", "size", "channels")]
            for name, of_teacher, of_data in facts:
                if of_teacher != of_data:
                    raise UserError(f"--teacher: {path} has {name} {of_teacher}, but {args.dataset} has {of_data}")
            if saved.get("dataset") == args.dataset and (split := saved.get("split_seed", 0)) != args.split_seed:
                raise UserError(
                    f"--split-seed: {path} has {split}, got {args.split_seed}: it has seen images held out here"
                )
            args.arch = args.arch or saved["arch"]
        elif args.arch is None:
            raise UserError(f"--teacher: {path} does not name its architecture, so --arch must")
        else:
            teacher = new_model(args.arch, data)
            warm_start(teacher, path)
    except (ValueError, ImportError) as error:
        raise UserError(f"--teacher {path}: {str(error).splitlines()[0].rstrip(':')}") from None
    return teacher.eval()


def new_student(args: argparse.Namespace, data: Data, teacher: nn.Module | None) -> nn.Module:
    """A fresh model, with the teacher's weights unless --no-warm-start."""
    args.arch = args.arch or "resnet18"
    student = new_model(args.arch, data)
    if teacher is not None and not args.no_warm_start:
        try:
            warm_start(student, teacher)
        except ValueError:
            raise UserError(
                f"--arch {args.arch} cannot take over the weights of another architecture: "
                "name the teacher's, or add --no-warm-start"
            ) from None
    return student


def method_of(args: argparse.Namespace, teacher: nn.Module | None) -> Method:
    """The loss to train with. CKTAT's criterion keeps its own frozen copy of the teacher."""
    if args.method == "trades":
        return TRADES()
    if args.method == "pgd-at":
        return PGDAT()
    criterion = CKTATLoss(teacher, tau=args.tau, detach_clean=args.detach_clean)
    if args.channels_last:
        criterion.to(memory_format=torch.channels_last)
    if args.compile:
        criterion.teacher.compile()
    return CKTAT(criterion, adaptive=args.adaptive_beta, guidance=not args.no_guidance)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All options, checked; those of the loss are the recipe's unless given."""
    parser = manual(__doc__)
    add_data(parser)
    add_method(parser)
    add_attack(parser)
    add_optimisation(parser, epochs=110, drops=(100, 105))
    add_hardware(parser)
    add_run(parser, out="out/student")
    args = finish(parser, argv)
    for name in NOT_FOR[args.method]:
        if getattr(args, name) not in (None, False):
            parser.error(f"argument --{name.replace('_', '-')}: is not for --method {args.method}")
    if args.method == "cktat" and args.teacher is None:
        parser.error("argument --teacher: is needed by --method cktat; train_clean.py trains one")
    if args.no_guidance and args.no_consistency:
        parser.error("argument --no-consistency: leaves no loss together with --no-guidance")
    if args.apgd_check and importlib.util.find_spec("pyautoattack") is None:
        parser.error("argument --apgd-check: its package is not installed: pip install pyautoattack, or give 0")
    for name, value in RECIPES[args.recipe or "ours"]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.beta = 0.0 if args.no_consistency or args.method == "pgd-at" else args.beta
    args.eps = args.eps or EPS[args.norm]
    args.step_size = args.step_size or args.eps / 4  # the field's usual
    return args


def add_method(parser: argparse.ArgumentParser) -> None:
    group = Group(
        parser, "method", "Each ablation of the paper is a switch. A term that is left out of the loss is logged still."
    )
    group.choice(
        "--method",
        METHODS,
        "cktat",
        "cktat; or trades (Zhang et al. 2019) or pgd-at (Madry et al. 2018), to compare with in the same loop",
    )
    group.option(
        "--teacher",
        Path,
        None,
        "a run of train_clean.py, whose best.pt is taken, or a file of weights. cktat needs one; trades and pgd-at "
        "start from its weights, if there is one",
        shown="none",
        metavar="RUN",
    )
    group.option(
        "--arch",
        str,
        None,
        f"of the student, one of {', '.join(ARCHITECTURES)}",
        shown="the teacher's, or resnet18",
        metavar="NAME",
    )
    group.choice(
        "--recipe",
        RECIPES,
        None,
        f"sets the four options below. {'; '.join(f'{name}: {recipe}' for name, recipe in RECIPES.items())}. literal "
        "is Eq. 17 of the paper, which can collapse to a constant prediction; ours is our remedy",
        shown="ours",
    )
    recipes = "the recipe's"
    group.option(
        "--tau", Number(float, 0.01, 100), None, "temperature, softens the teacher", shown=recipes, metavar="T"
    )
    group.option(
        "--beta",
        Number(float, 0, 1000),
        None,
        "weight of the consistency term, which TRADES has too, with 6 as its authors' choice",
        shown=recipes,
        metavar="B",
    )
    group.either(
        "--detach-clean",
        "no gradient through S(x) in the consistency term: S(x') moves towards S(x), never the reverse",
        shown=recipes,
    )
    group.either(
        "--adaptive-beta",
        "beta times the probability of the label under attack, sample by sample: consistency is asked for where the "
        "adversarial prediction deserves it",
        shown=recipes,
    )
    group.option(
        "--beta-ramp",
        Number(float, 0, 1),
        0.0,
        "share of the training in which beta rises from 0, so that guidance comes first",
        metavar="FRACTION",
    )
    group.switch("--no-warm-start", "start the student from random weights, not the teacher's")
    group.switch("--no-guidance", "leave the teacher's term out of the loss; a constant prediction is its optimum then")
    group.switch("--no-consistency", "leave the second term out of the loss: beta is 0")
    group.switch(
        "--two-forwards",
        "run x and x' through the student one after the other, as TRADES' code does, so that "
        "BatchNorm sees them apart; one pass of both was the more robust on small data",
    )


def add_attack(parser: argparse.ArgumentParser) -> None:
    group = Group(
        parser,
        "attack",
        "PGD, in training and in validation, with the field's usual budget. Pixels are in [0, 1]; 8/255 and the like "
        "can be given so.",
    )
    group.choice(
        "--norm", EPS, "linf", "what eps bounds: the change of each pixel (linf), or its length over the image (l2)"
    )
    group.option(
        "--eps",
        Number(fraction, 0, 100, above=True),
        None,
        "largest change, in pixel values where 1 is black to white",
        shown="8/255; with l2 128/255",
        metavar="E",
    )
    group.option(
        "--step-size",
        Number(fraction, 0, 100, above=True),
        None,
        "how far a step goes, in the same units",
        shown="a quarter of eps: 2/255 where that is 8/255",
        metavar="E",
    )
    group.option(
        "--steps", Number(int, 1, 1000), 10, "steps of the attack; each costs a forward and a backward", metavar="N"
    )
    group.option(
        "--eps-ramp",
        Number(float, 0, 1),
        0.0,
        "share of the training in which eps rises from a hundredth of it, and the steps with it, for a gentler start; "
        "validation attacks with all of it",
        metavar="FRACTION",
    )
    group.option(
        "--apgd-check",
        Number(int, 0, 1_000_000),
        256,
        f"validation images on which best.pt meets APGD-CE ({APGD_STEPS} steps) at the end; more than 10 points below "
        "PGD is a sign of gradient masking. 0: none",
        metavar="IMAGES",
    )


def main(argv: list[str] | None = None) -> int:
    return launch(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
