"""The runs of the study: data sets with their settings, the methods of methods.csv, and the grid of both."""

import ast
import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "study"  # the published CSVs
SPLIT_SEED = 2026  # not seed 0: the recipes were made with that split of the digits
VALIDATION = 300  # images held out to choose recipes by
# All methods need these two runs: "clean" is their teacher, and "pgd-at" makes the images of the transfer attack.
NEEDED = ("clean", "pgd-at")
WIDTHS = ("digits-4", "digits", "digits-32")  # networks; "digits" has width 16


@dataclass(frozen=True)
class Setting:
    """The training of every method on a data set."""

    eps: tuple[float, ...]  # radii of the Linf ball; the main table has the first
    epochs: int
    teacher_epochs: int
    test: int  # number of test images


SETTINGS = {"digits": Setting((0.2, 0.12), 15, 25, 500), "mnist5k": Setting((0.3, 0.2), 8, 10, 1000)}


@dataclass(frozen=True)
class Method:
    """A row of methods.csv. The default of each setting is that of the recipe `adaptive`."""

    group: str  # "main" and "control": main tables; "part", "tau", "beta": the paper's tables; "search": its own table
    about: str  # a phrase for the tables
    settings: str  # the fields below that differ from their defaults, as "tau=5 warm=False"
    loss: str = "cktat"  # or "clean", "pgd-at", "trades"
    warm: bool = True  # start from the teacher's weights
    tau: float = 2.0
    beta: float = 6.0
    ramp: float = 0.0  # share of the training in which beta rises from 0
    adaptive: bool = True  # beta_i = beta softmax(S(x'))[y]
    detach: bool = True  # stop the gradient through S(x) in the consistency
    attack: str = "ce"  # the loss that the training attack maximises, "ce" or "kl"
    steps: int = 10  # of the training attack
    lr: float = 0.1
    longer: int = 1  # factor on the epochs of the data set
    ema: float = 0.0  # decay of a moving average of the weights; 0: none
    together: bool = True  # one forward for clean and adversarial images, so that BatchNorm sees them together
    # The rest changes CKTAT's loss.
    guidance: float = 1.0  # weight of the first term
    one_hot: bool = False  # replace the teacher's predictions by the labels
    mixing: bool = True  # False: replace the consistency by the guidance and keep its weight
    shared: bool = False  # compute S(x) without mixing too, so that BatchNorm sees clean images
    of_batch: bool = False  # give every sample the mean beta_i of its batch
    normalized: bool = False  # divide the loss of each sample by 1 + beta_i
    mean_1: bool = False  # divide the loss of a batch by the mean of 1 + beta_i
    clean_guidance: float = 0.0  # weight of KL(softmax(T(x)/tau) || softmax(S(x)))
    clean_label: float = 0.0  # weight of CE(S(x), y)
    label: float = 0.0  # weight of CE(S(x'), y)
    logit_penalty: float = 0.0  # weight of the mean square of S(x')

    @property
    def clean_forward(self) -> bool:
        """True if training computes S(x), so that BatchNorm sees clean images."""
        return self.loss == "trades" or self.mixing or self.shared or self.clean_guidance + self.clean_label > 0


def _read() -> dict[str, Method]:
    with open(Path(__file__).with_name("methods.csv"), newline="") as file:
        rows = {row.pop("method"): row for row in csv.DictReader(file)}
    given = {name: dict(word.split("=") for word in row["settings"].split()) for name, row in rows.items()}
    return {name: Method(**rows[name], **{k: ast.literal_eval(v) for k, v in given[name].items()}) for name in rows}


METHODS = _read()
MAIN, CONTROLS, SEARCH, PARTS = (
    tuple(name for name, method in METHODS.items() if method.group == group)
    for group in ("main", "control", "search", "part")
)
SHOWN = (*MAIN, *CONTROLS)  # in the main tables
ABLATION = ("ramp", *PARTS, "ramp-beta0")
TAU_SWEEP = {"ramp" if tau == 5 else f"ramp-tau{tau}": tau for tau in range(1, 7)}
BETA_SWEEP = {"ramp" if beta == 6 else f"ramp-beta{beta}": beta for beta in range(8)}
STEPS = ("adaptive-normalized", "pgd-at-weighted-mean-1")  # in the search, but with all seeds: a finding rests on them
CAPACITY = ("clean", "pgd-at", "teacher-only", "ramp", "adaptive")
LARGER = ("clean", "pgd-at", "adaptive", "adaptive-cold")  # at the largest width on mnist5k, with two seeds


@dataclass(frozen=True)
class Run:
    """One training: data set, network, method, radius and seed."""

    dataset: str
    arch: str
    method: str
    eps: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's files."""
        return f"{self.dataset}-{self.arch}-{self.method}-eps{self.eps:.3g}-seed{self.seed}"


def grid(dataset: str, seeds: Sequence[int], *, full: bool = False, methods: Iterable[str] = ()) -> list[Run]:
    """Return the runs of a data set, each once: the main table, all tables if `full`, or `methods` and NEEDED.

    Each kind has a run per seed. The search takes the first two seeds.
    """
    first, rest = SETTINGS[dataset].eps[:1], SETTINGS[dataset].eps[1:]
    plan: list[tuple[str, Iterable[str], tuple[float, ...], Sequence[int]]]
    plan = [("digits", (*NEEDED, *methods) if methods else SHOWN, first, seeds)]
    if full and not methods:
        plan += [("digits", SEARCH, first, seeds[:2]), ("digits", MAIN, rest, seeds)]
        if dataset == "digits":
            plan += [("digits", (*STEPS, *ABLATION, *TAU_SWEEP, *BETA_SWEEP), first, seeds)]
            plan += [(width, CAPACITY, first, seeds) for width in WIDTHS]
        else:
            plan += [(WIDTHS[-1], LARGER, first, seeds[:2])]
    return [*dict.fromkeys(
        Run(dataset, arch, method, eps, seed)
        for arch, names, radii, repeated in plan for seed, eps, method in product(repeated, radii, names)
    )]  # fmt: skip
