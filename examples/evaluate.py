"""How robust is a model? Clean accuracy, PGD, CW and AutoAttack, with a warning where the numbers look suspicious.

    python examples/evaluate.py out/student/best.pt                   all attacks on the data set it was trained on
    python examples/evaluate.py out/student/best.pt --samples 1000    on 1000 test images, drawn by --seed
    python examples/evaluate.py my.package:load --dataset cifar10     a model of yours: load() returns it

Report the last line of the table, AutoAttack. PGD-20 flatters losses of the distillation kind.
"""

import importlib
import json
import math
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from attacks import Attack, Budget, autoattack, margin, pgd_attack
from data import DATASETS, Data, MissingData, Sample, load, loader
from diagnostics import ADVICE, Findings, inspect_budget, inspect_model, inspect_results
from models import from_checkpoint
from pgd import EPS, Norm, check_length, fraction
from runtime import UserError, default, device_of, number, replacing
from runtime import load as load_checkpoint
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff, Positional, arg

import cktat_loss

STANDARD = "clean,pgd20,pgd100,cw,autoattack"
ATTACKS = (*STANDARD.split(","), "apgd")  # the last: AutoAttack's first two alone, at a tenth of the price


@dataclass(frozen=True)
class Options:
    """What to attack, with what, and where the report goes."""

    model: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """a .pt file of a run, or module:function"""
    dataset: Annotated[Literal[DATASETS] | None, default("the one that the checkpoint names")] = None
    """whose test images to attack"""
    data: Path = Path("data")
    """folder of the data set's files"""
    download: bool = False
    """fetch what is missing into --data"""
    samples: Annotated[int | None, number(int, 1, 10**9), default("all")] = None
    """how many of the images, drawn by --seed"""
    attacks: Annotated[str, arg(metavar="NAME,NAME,...")] = STANDARD
    """clean is always there; apgd is AutoAttack without FAB-T and Square"""
    norm: Norm = "linf"
    """what eps bounds: the change of each pixel, or its Euclidean length"""
    eps: Annotated[float | None, number(fraction, 0, 255, above=True), default("8/255; with l2 128/255")] = None
    """largest change, where 1 is black to white"""
    apgd_steps: Annotated[int, number(int, 1, 10**6)] = 100
    """steps of APGD-CE, and of APGD-T for each target"""
    apgd_targets: Annotated[int, number(int, 1, 10**6)] = 9
    """wrong classes that APGD-T and FAB-T aim at"""
    fab_steps: Annotated[int, number(int, 1, 10**6)] = 100
    """steps of FAB-T for each target"""
    square_queries: Annotated[int, number(int, 1, 10**9)] = 5000
    """queries of Square"""
    no_ema: bool = False
    """evaluate the last weights, also where the checkpoint has averaged ones"""
    batch: Annotated[int, number(int, 1, 10**6)] = 250
    """images at once"""
    device: str = "auto"
    """auto (an accelerator if there is one), cpu, cuda, mps, ..."""
    threads: Annotated[int | None, number(int, 1, 1024), default("torch's own")] = None
    """CPU threads"""
    workers: Annotated[int, number(int, 0, 1024)] = 0
    """processes that load images; 0: none but this"""
    seed: Annotated[int, number(int, 0, 2**32 - 1)] = 0
    """draws the images and the attacks' starts"""
    out: Annotated[Path | None, default("the checkpoint's, or out")] = None
    """folder for the report, .json and .md"""


@dataclass(frozen=True)
class Row:
    """A line of the table. AutoAttack's four are one after the other: each starts from what the last one left right."""

    attack: str
    accuracy: float  # in % of all images
    standard_error: float  # likewise
    attacked: int  # images
    seconds: float
    budget: dict[str, int | float]


@dataclass
class Evaluation:
    """A model, images, and the eps-ball around each of them. `run` fills `rows`, `hits` and `outside`."""

    model: nn.Module  # images in [0, 1] to logits (N, C); moved to the device, put into eval mode and frozen
    dataset: Dataset[Sample]
    _: KW_ONLY
    norm: Norm = "linf"
    eps: float = 8 / 255  # in pixel values where 1 is black to white
    batch: int = 250  # images at once
    seed: int = 0  # every attack starts from it, so that none depends on which others are run
    device: torch.device | str = "cpu"
    workers: int = 0  # processes that load images
    rows: list[Row] = field(default_factory=list, init=False)  # the table
    hits: dict[str, Tensor] = field(default_factory=dict, init=False)  # by attack: which images (N,) are still right
    outside: dict[str, int] = field(default_factory=dict, init=False)  # images moved out of the ball: not broken

    def __post_init__(self) -> None:
        # Frozen, since FAB goes backward into parameters too.
        self.model = self.model.to(self.device).eval().requires_grad_(False)

    def run(self, attacks: Sequence[str] = ATTACKS[:-1], budget: Budget | None = None) -> Findings:
        """Attack, "clean" always first; return what is suspicious, by name, and what to do about it.

        Args:
            attacks: of ATTACKS.
            budget: of AutoAttack, its standard one if None.

        Raises:
            ValueError: images outside [0, 1], or logits that are NaN or have no gradient.
        """
        budget, ball = budget or Budget(), {"norm": self.norm, "eps": self.eps}
        everything = torch.ones(len(self.dataset), dtype=torch.bool)
        x, y = next(iter(self._batches(everything)))
        findings = inspect_model(self.model, x, y)
        with torch.no_grad():
            classes = self.model(x[:1]).shape[1]

        right = self._attack(Attack("clean", {}, lambda x, y: x), everything)
        if "pgd20" in attacks:
            self._attack(pgd_attack(self.model, steps=20, **ball), everything)
        if "pgd100" in attacks:
            self._attack(pgd_attack(self.model, steps=100, **ball), everything)
        if "cw" in attacks:
            self._attack(pgd_attack(self.model, steps=30, **ball, name="CW", objective=margin), everything)
        if "autoattack" in attacks or "apgd" in attacks:
            before, attacked = len(self.rows), int(right.sum())
            four = autoattack(self.model, **ball, classes=classes, budget=budget, seed=self.seed)
            for attack in four if "autoattack" in attacks else four[:-2]:  # without FAB-T and Square
                right = self._attack(attack, right)
        if "autoattack" in attacks:
            self._add("AutoAttack", right, attacked, sum(row.seconds for row in self.rows[before:]), {})
            findings |= inspect_budget(budget, classes)
        findings |= inspect_results(self.hits, self.outside)
        return {name: f"{seen} {ADVICE[name]}" for name, seen in findings.items()}

    def _attack(self, attack: Attack, which: Tensor) -> Tensor:
        """Attack the images (N,) bool that are named, and return those of them that are still right."""
        torch.manual_seed(self.seed)
        started, attacked, right = time.perf_counter(), int(which.sum()), which.clone()
        parts, outside = [right[:0]], 0
        bar = tqdm(total=attacked, desc=attack.name, unit="image", leave=False, disable=None)
        with bar, torch.no_grad():
            for x, y in self._batches(which):
                x_adv = attack.perturb(x, y)
                inside = self._inside(x_adv, x)
                outside += int((~inside).sum())
                parts.append(((self.model(x_adv).argmax(1) == y) | ~inside).cpu())
                bar.update(len(x))
                bar.set_postfix_str(f"{torch.cat(parts).float().mean():.1%} right")
        right[which] = torch.cat(parts)
        if outside:
            self.outside[attack.name] = outside
        self._add(attack.name, right, attacked, time.perf_counter() - started, attack.budget)
        return right

    def _add(self, name: str, right: Tensor, attacked: int, seconds: float, budget: dict[str, int | float]) -> None:
        share = right.double().mean().item()
        error = math.sqrt(share * (1 - share) / len(right))
        self.hits[name] = right
        self.rows.append(Row(name, 100 * share, 100 * error, attacked, seconds, budget))
        print(f"{name}: {100 * share:.1f} ± {100 * error:.1f} % right, {seconds:.0f} s", file=sys.stderr)

    def _batches(self, which: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The images (N,) bool that are named, and their classes, on the device."""
        if which.any():
            chosen = Subset(self.dataset, which.nonzero().squeeze(1).tolist())
            for x, y in loader(chosen, batch=self.batch, seed=0, epoch=0, workers=self.workers, train=False):
                yield x.to(self.device), y.to(self.device)

    def _inside(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which images (N, ...) lie in the ball and in [0, 1], but for rounding; those with NaN do not."""
        order = math.inf if self.norm == "linf" else 2
        length = torch.linalg.vector_norm((x_adv - x).flatten(1), order, dim=1)
        in_range = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        return (length <= self.eps * (1 + 1e-5) + 1e-6) & in_range


def markdown(rows: Sequence[Row], findings: Findings, facts: dict[str, Any]) -> str:
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
        *(f"- **warning: {name}.** {text}" for name, text in findings.items()),
        *([""] if findings else []),
        ", ".join(f"{name} {value}" for name, value in facts["versions"].items()),
    ]
    return "\n".join(lines) + "\n"


def save(folder: Path, rows: Sequence[Row], findings: Findings, facts: dict[str, Any]) -> list[Path]:
    """Write evaluation-NORM-EPS.json and .md, each in one move."""
    report = {**facts, "rows": [asdict(row) for row in rows], "findings": findings}
    name = f"evaluation-{facts['norm']}-{facts['eps']:.4g}"
    texts = {f"{name}.json": json.dumps(report, indent=2) + "\n", f"{name}.md": markdown(rows, findings, facts)}
    for file_name, text in texts.items():
        with replacing(folder / file_name) as file:
            file.write(text.encode())
    return [folder / file_name for file_name in texts]


def writable(folder: Path) -> Path:
    """The folder, made if it is missing; a bad one is refused before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: the folder {folder} cannot be written to: {error.strerror}") from None
    return folder


def load_model(name: str, *, ema: bool) -> tuple[nn.Module, str | None, int]:
    """A checkpoint's model, its data set and the seed of that one's split; or what `module:function` returns."""
    if Path(name).is_file():
        saved = load_checkpoint(Path(name))
        return from_checkpoint(name, ema=ema), saved.get("dataset"), saved.get("split_seed", 0)
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise UserError(f"CHECKPOINT must be a file, or module:function, got {name!r}, which is neither")
    return call(*name.split(":")), None, 0


def call(module: str, function: str) -> nn.Module:
    """The model that somebody's function returns.

    Their modules may have the names of ours, as models, data and attacks have in many repositories: ours are out of the
    way meanwhile, and afterwards theirs keep the names that both use.
    """
    here = Path(__file__).parent
    ours = {path.stem: sys.modules.pop(path.stem) for path in here.glob("*.py") if path.stem in sys.modules}
    # Their code is found from where the command was given, as for `python -m`.
    sys.path[:] = ["", *(path for path in sys.path if Path(path).resolve() != here.resolve())]
    try:
        model = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:
        place, text = traceback.extract_tb(error.__traceback__)[-1], str(error).partition("\n")[0]
        reason = f"{type(error).__name__} in {place.filename}, line {place.lineno}: {text}"
        raise UserError(f"CHECKPOINT: {function}() of {module} does not return a model ({reason})") from error
    finally:
        for name, its_module in ours.items():
            sys.modules.setdefault(name, its_module)
        sys.path.append(str(here))
    if not isinstance(model, nn.Module):
        raise UserError(
            f"CHECKPOINT: {function}() of {module} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def check_fit(model: nn.Module, data: Data, name: str) -> None:
    """Refuse images that the model does not take, and classes that it does not know, in a sentence."""
    shape = data.channels, data.size, data.size
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *shape))
    except Exception as error:  # of somebody else's model
        size, reason = " x ".join(map(str, shape)), str(error).partition("\n")[0]
        raise UserError(f"--dataset {name} has images of {size}, which the model does not take ({reason})") from error
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(got, tuple) or len(got) != 2:
        raise UserError(f"CHECKPOINT: the model must return logits (N, classes), got {got}")
    if got[1] < data.classes:
        raise UserError(f"--dataset {name} has {data.classes} classes, but the model's logits only {got[1]}")


def run(options: Options) -> None:
    """Load, attack, print, write."""
    eps = options.eps or EPS[options.norm]
    check_length("--eps", eps, options.norm)
    attacks = options.attacks.split(",")
    if unknown := [name for name in attacks if name not in ATTACKS]:
        raise UserError(f"--attacks must be some of {','.join(ATTACKS)}, got {unknown[0]!r}")
    device = device_of(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, own, split_seed = load_model(options.model, ema=not options.no_ema)
    if (name := options.dataset or own) is None:
        raise UserError(f"--dataset must be given for a model of yours, one of {', '.join(DATASETS)}")
    folder = writable(options.out or (Path("out") if own is None else Path(options.model).parent))
    data = load(name, options.data, download=options.download, seed=split_seed, validation=0)
    check_fit(model, data, name)
    # Drawn, not the first ones: imagefolder is sorted by class.
    drawn = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(options.seed))[: options.samples]
    images = Subset(data.test, drawn.sort().values.tolist())
    settings = {"norm": options.norm, "eps": eps, "batch": options.batch, "seed": options.seed, "device": str(device)}
    evaluation = Evaluation(model, images, **settings, workers=options.workers)
    budget = Budget(options.apgd_steps, options.apgd_targets, options.fab_steps, options.square_queries)
    findings = evaluation.run(attacks, budget)
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "pyautoattack": version("pyautoattack"),
        "cktat-loss": cktat_loss.__version__,
    }
    facts = {"model": options.model, "dataset": name, "images": len(images), **settings, "versions": versions}
    print(markdown(evaluation.rows, findings, facts))
    print("saved", *save(folder, evaluation.rows, findings, facts))


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, description=__doc__, args=argv, config=(FlagCreatePairsOff,))
    try:
        run(options)
    except (UserError, MissingData, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: no report written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
