"""How robust is a model? Clean accuracy, PGD, CW and AutoAttack, with a warning where the numbers look suspicious.

    python examples/evaluate.py out/student/best.pt                   all attacks on the data set it was trained on
    python examples/evaluate.py out/student/best.pt --samples 1000    on 1000 test images, drawn by --seed
    python examples/evaluate.py my.package:load --dataset cifar10     a model of yours: load() returns it

Report the last line of the table, AutoAttack. PGD-20 flatters losses of the distillation kind.
"""

import argparse
import importlib
import json
import math
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkpoint
import models
import torch
from attacks import Attack, Budget, Norm, autoattack, cw_attack, pgd_attack
from data import DATASETS, Data, MissingData, Sample, load, loader
from diagnostics import Finding, inspect_budget, inspect_model, inspect_results
from options import Group, Names, Number, UserError, device_name, fraction, manual
from pgd import EPS
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

STANDARD = ("clean", "pgd20", "pgd100", "cw", "autoattack")
ATTACKS = (*STANDARD, "apgd")  # the last: AutoAttack's first two alone, at a tenth of the price
CW_STEPS = 30


@dataclass(frozen=True)
class Row:
    """A line of the table. AutoAttack's four are one after the other: each starts from what the last one left right."""

    attack: str
    accuracy: float  # in % of all images
    standard_error: float  # likewise
    attacked: int  # images
    seconds: float
    budget: dict[str, int | float]


class Evaluation:
    """A model, images, and the eps-ball around each of them.

    Args:
        model: images in [0, 1] to logits (N, C); put into eval mode, and its parameters frozen.
        dataset: of (image, class).
        norm, eps: of the ball, in pixel values where 1 is black to white.
        batch: images at once.
        seed: every attack starts from it, so that none depends on which others are run.
        device: to run on; the model is moved there.
        workers: processes that load images.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset[Sample],
        *,
        norm: Norm = "linf",
        eps: float = 8 / 255,
        batch: int = 250,
        seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        # Frozen, since FAB goes backward into parameters too.
        self.model = model.to(device).eval().requires_grad_(False)
        self.dataset, self.norm, self.eps, self.batch = dataset, norm, eps, batch
        self.seed, self.device, self.workers = seed, device, workers
        self.rows: list[Row] = []
        self.hits: dict[str, Tensor] = {}  # (images,) bool, on the CPU: still right after the attack of that name
        self.outside: dict[str, int] = {}  # images that an attack moved out of the ball; they do not count as broken

    def run(self, attacks: Sequence[str] = STANDARD, budget: Budget | None = None) -> list[Finding]:
        """Fill `rows` and `hits`, "clean" always first; return what is suspicious about them.

        Args:
            attacks: of ATTACKS.
            budget: of AutoAttack, its standard one if None.

        Raises:
            ValueError: images outside [0, 1], or logits that are NaN or have no gradient.
        """
        budget = budget or Budget()
        x, y = (part.to(self.device) for part in next(iter(self._batches(torch.arange(len(self.dataset))))))
        findings = inspect_model(self.model, x, y)
        with torch.no_grad():
            classes = self.model(x[:1]).shape[1]

        everything = torch.ones(len(self.dataset), dtype=torch.bool)
        self._attack(Attack("clean", {}, lambda x, y: x), everything)
        ball = {"norm": self.norm, "eps": self.eps}
        if "pgd20" in attacks:
            self._attack(pgd_attack(self.model, steps=20, **ball), everything)
        if "pgd100" in attacks:
            self._attack(pgd_attack(self.model, steps=100, **ball), everything)
        if "cw" in attacks:
            self._attack(cw_attack(self.model, steps=CW_STEPS, **ball), everything)
        if "autoattack" in attacks or "apgd" in attacks:
            right, before = self.hits["clean"], len(self.rows)
            own = autoattack(self.model, **ball, classes=classes, budget=budget, seed=self.seed)
            for attack in own if "autoattack" in attacks else own[:-2]:  # without FAB-T and Square
                right = self._attack(attack, right)
        if "autoattack" in attacks:
            seconds = sum(row.seconds for row in self.rows[before:])
            self._add(Attack("AutoAttack", {}, lambda x, y: x), right, int(self.hits["clean"].sum()), seconds)
            findings += inspect_budget(budget, classes)
        return findings + inspect_results(self.hits, self.outside)

    def _attack(self, attack: Attack, which: Tensor) -> Tensor:
        """Attack the images (N,) bool that are named, and return those of them that are still right."""
        torch.manual_seed(self.seed)
        started, right, outside = time.perf_counter(), [], 0
        indices = which.nonzero().squeeze(1)
        with tqdm(total=len(indices), desc=attack.name, unit="image") as bar, torch.no_grad():
            for x, y in self._batches(indices):
                x, y = x.to(self.device), y.to(self.device)
                x_adv = attack.perturb(x, y)
                inside = self._inside(x_adv, x)
                outside += int((~inside).sum())
                right.append(((self.model(x_adv).argmax(1) == y) | ~inside).cpu())
                bar.update(len(x))
                bar.set_postfix_str(f"{torch.cat(right).float().mean():.1%} right")
        still_right = torch.zeros_like(which)
        still_right[indices] = torch.cat(right) if right else torch.tensor([], dtype=torch.bool)
        if outside:
            self.outside[attack.name] = outside
        self._add(attack, still_right, len(indices), time.perf_counter() - started)
        return still_right

    def _add(self, attack: Attack, right: Tensor, attacked: int, seconds: float) -> None:
        self.hits[attack.name] = right
        share = right.double().mean().item()
        error = math.sqrt(share * (1 - share) / len(right))
        self.rows.append(Row(attack.name, 100 * share, 100 * error, attacked, seconds, attack.budget))

    def _batches(self, indices: Tensor) -> Any:
        if not len(indices):
            return ()
        chosen = Subset(self.dataset, indices.tolist())
        return loader(chosen, batch=self.batch, seed=0, epoch=0, workers=self.workers, train=False)

    def _inside(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which images (N, ...) lie in the ball and in [0, 1], but for rounding; those with NaN do not."""
        order = math.inf if self.norm == "linf" else 2
        length = torch.linalg.vector_norm((x_adv - x).flatten(1), order, dim=1)
        return (
            (length <= self.eps * (1 + 1e-5) + 1e-6) & (x_adv >= 0).flatten(1).all(1) & (x_adv <= 1).flatten(1).all(1)
        )


def markdown(rows: Sequence[Row], findings: Sequence[Finding], facts: dict[str, Any]) -> str:
    """The report for reading."""
    lines = ["# Robustness of " + facts["model"], ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("model", "versions")), ""]
    lines += ["| attack | accuracy in % | images attacked | seconds | budget an image |", "|---|---|---|---|---|"]
    for row in rows:
        budget = ", ".join(f"{name} {value:.4g}" for name, value in row.budget.items()) or "-"
        name = f"**{row.attack}**" if row.attack == "AutoAttack" else row.attack
        accuracy = f"{row.accuracy:.1f} ± {row.standard_error:.1f}"
        lines.append(f"| {name} | {accuracy} | {row.attacked} | {row.seconds:.1f} | {budget} |")
    lines += [
        "",
        "± the standard error. PGD maximises the cross-entropy, CW the margin between the best wrong logit and the "
        "label's, by PGD. AutoAttack is what is right after APGD-CE, APGD-T, FAB-T and Square, each on the images that "
        "the ones before it left right.",
        "",
    ]
    for finding in findings:
        lines.append(f"- **warning: {finding.name}.** {finding.why} {finding.advice}")
    lines += [*([""] if findings else []), ", ".join(f"{name} {value}" for name, value in facts["versions"].items())]
    return "\n".join(lines) + "\n"


def save(folder: Path, rows: Sequence[Row], findings: Sequence[Finding], facts: dict[str, Any]) -> list[Path]:
    """Write evaluation-NORM-EPS.json and .md, each in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {**facts, "rows": [asdict(row) for row in rows], "findings": [asdict(finding) for finding in findings]}
    texts = {"json": json.dumps(report, indent=2) + "\n", "md": markdown(rows, findings, facts)}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"evaluation-{facts['norm']}-{facts['eps']:.4g}.{suffix}")
        with checkpoint.replacing(paths[-1]) as file:
            file.write(text.encode())
    return paths


def load_model(name: str, *, ema: bool) -> tuple[nn.Module, str | None, int]:
    """A checkpoint's model, its data set and the seed of that one's split; or what `module:function` returns."""
    if not re.fullmatch(r"[\w.]+:\w+", name):
        if not Path(name).is_file():
            raise UserError(f"CHECKPOINT must be a file, or module:function, got {name!r}, which is neither")
        saved = checkpoint.load(Path(name))
        return models.from_checkpoint(name, ema=ema), saved["dataset"], saved.get("split_seed", 0)
    module, function = name.split(":")
    sys.path.insert(0, "")  # the folder where the command was given, as for `python -m`
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"model {name!r} must be a checkpoint's path or module:function ({error})") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model, None, 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All options, checked."""
    parser = manual(__doc__, operands="CHECKPOINT")
    parser.add_argument("model", metavar="CHECKPOINT", help="a .pt file of a run, or module:function")
    group = Group(parser, "data")
    own = "the one that the checkpoint names"
    group.choice("--dataset", DATASETS, None, "whose test images to attack", shown=own)
    group.option("--data", Path, Path("data"), "folder of the data set's files", metavar="FOLDER")
    group.switch("--download", "fetch what is missing into --data")
    group.option(
        "--samples", Number(int, 1, 10**9), None, "how many of them, drawn by --seed", shown="all", metavar="N"
    )
    group = Group(parser, "attacks")
    group.option(
        "--attacks",
        Names(ATTACKS),
        STANDARD,
        "separated by commas; clean is always there; apgd is AutoAttack without FAB-T and Square",
        shown=",".join(STANDARD),
        metavar="NAMES",
    )
    group.choice("--norm", tuple(EPS), "linf", "of a change: of its largest pixel, or its Euclidean length")
    group.option(
        "--eps",
        Number(fraction, 0, 1000, above=True),
        None,
        "largest change, where 1 is black to white",
        shown="8/255 for linf, 128/255 for l2",
        metavar="EPS",
    )
    group.option(
        "--apgd-steps", Number(int, 1, 10**6), 100, "steps of APGD-CE, and of APGD-T for each target", metavar="N"
    )
    group.option("--apgd-targets", Number(int, 1, 10**6), 9, "wrong classes that APGD-T and FAB-T aim at", metavar="N")
    group.option("--fab-steps", Number(int, 1, 10**6), 100, "steps of FAB-T for each target", metavar="N")
    group.option("--square-queries", Number(int, 1, 10**9), 5000, "queries of Square", metavar="N")
    group = Group(parser, "run")
    group.switch("--no-ema", "evaluate the last weights, also where the checkpoint has averaged ones")
    group.option("--batch", Number(int, 1, 10**6), 250, "images at once", metavar="N")
    group.option(
        "--device", device_name, "auto", "auto (an accelerator if there is one), cpu, cuda, mps, ...", metavar="NAME"
    )
    group.option("--threads", Number(int, 1, 1024), None, "CPU threads", shown="torch's own", metavar="N")
    group.option("--workers", Number(int, 0, 1024), 0, "processes that load images; 0: none but this", metavar="N")
    group.option("--seed", Number(int, 0, 2**32 - 1), 0, "draws the images and the attacks' starts", metavar="N")
    group.option(
        "--out", Path, None, "folder for the report, .json and .md", shown="the checkpoint's, or out", metavar="FOLDER"
    )
    args = parser.parse_args(argv)
    args.eps = EPS[args.norm] if args.eps is None else args.eps
    if args.norm == "linf" and args.eps > 1:
        parser.error(f"argument --eps: got {args.eps:g}, wanted at most 1 for linf (pixels are in [0, 1])")
    return args


def run(args: argparse.Namespace) -> None:
    """Load, attack, print, write."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, own, split_seed = load_model(args.model, ema=not args.no_ema)
    if (name := args.dataset or own) is None:
        raise UserError(f"--dataset must be given for a model of yours, one of {', '.join(DATASETS)}")
    data = load(name, args.data, download=args.download, seed=split_seed, validation=0)
    check_fit(model, data, name)
    # Drawn, not the first ones: imagefolder is sorted by class.
    drawn = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(args.seed))[: args.samples]
    images = Subset(data.test, drawn.sort().values.tolist())
    evaluation = Evaluation(
        model,
        images,
        norm=args.norm,
        eps=args.eps,
        batch=args.batch,
        seed=args.seed,
        device=args.device,
        workers=args.workers,
    )
    budget = Budget(args.apgd_steps, args.apgd_targets, args.fab_steps, args.square_queries)
    findings = evaluation.run(args.attacks, budget)
    facts = {
        "model": args.model,
        "dataset": name,
        "images": len(images),
        "norm": args.norm,
        "eps": args.eps,
        "seed": args.seed,
        "batch": args.batch,
        "device": str(args.device),
        "versions": {
            "Python": platform.python_version(),
            **{package: version(package) for package in ("torch", "pyautoattack", "cktat-loss")},
        },
    }
    print(markdown(evaluation.rows, findings, facts))
    folder = args.out or (Path("out") if own is None else Path(args.model).parent)
    print("saved", *save(folder, evaluation.rows, findings, facts))


def check_fit(model: nn.Module, data: Data, name: str) -> None:
    """Refuse images that the model does not take, and classes that it does not know, in a sentence."""
    shape = data.channels, data.size, data.size
    try:
        with torch.no_grad():
            classes = model.eval()(torch.zeros(1, *shape)).shape[1]
    except RuntimeError as error:
        size, reason = " x ".join(map(str, shape)), str(error).splitlines()[0]
        raise UserError(f"--dataset {name} has images of {size}, which the model does not take ({reason})") from None
    if classes < data.classes:
        raise UserError(f"--dataset {name} has {data.classes} classes, but the model's logits only {classes}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (UserError, MissingData, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: no report written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
