"""What the study runs: data sets with their settings, the methods of methods.csv, and the grid of both."""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

SPLIT_SEED = 2026  # the digits' usual split, seed 0, had been looked at when the recipes were made
NEEDED = ("clean", "pgd-at")  # by all other methods: their teacher, and whose adversarial images they are shown
SEARCH_SEEDS = 2
WIDTHS = ("digits-4", "digits", "digits-32")  # of the digits net, 16 in the middle


@dataclass(frozen=True)
class Setting:
    """How a data set is trained on, the same for every method.

    Args:
        arch: the network, unless a run names another.
        eps: radii of the Linf ball, the one of the main table first.
        epochs, teacher_epochs: adversarial and clean ones.
        validation: images held out to choose by; of the study's split.
        options: of the training command.
    """

    arch: str
    eps: tuple[float, ...]
    epochs: int
    teacher_epochs: int
    validation: int
    options: str


_SHORT = "--batch-size 64 --nesterov --schedule cosine --lr-warmup 0.2 --device cpu --threads 1"
SETTINGS = {
    "digits": Setting("digits", (0.2, 0.12), 15, 25, 300, _SHORT),
    "mnist5k": Setting("digits", (0.3, 0.2), 8, 10, 300, f"{_SHORT} --channels-last"),
    "cifar10": Setting("resnet18", (8 / 255, 4 / 255), 110, 100, 1000, "--amp bf16 --channels-last --workers 8"),
}


@dataclass(frozen=True)
class Method:
    """What is trained with: a row of methods.csv.

    Args:
        group: main and control are in the main tables, part, tau and beta in those of the paper, search in its own.
        about: what it is, in a phrase for the tables.
        options: of the training command.
        change: of variants.py, by name, where the training command has no option for it.
        longer: epochs, in those of the data set's setting.
    """

    group: str
    about: str
    options: str
    change: dict[str, Any]
    longer: int


def _methods() -> dict[str, Method]:
    table = pd.read_csv(Path(__file__).with_name("methods.csv"), index_col="method", keep_default_na=False)
    table["change"] = [
        {name: ast.literal_eval(value) for name, value in (word.split("=") for word in text.split())}
        for text in table["change"]
    ]
    return {str(name): Method(**row) for name, row in table.iterrows()}


def _group(*names: str) -> tuple[str, ...]:
    return tuple(name for name, method in METHODS.items() if method.group in names)


METHODS = _methods()
MAIN, CONTROLS, SEARCH = _group("main"), _group("control"), _group("search")
ABLATION = ("ramp", *_group("part"), "ramp-beta0")
TAU_SWEEP = {"ramp" if tau == 5 else f"ramp-tau{tau}": tau for tau in range(1, 7)}
BETA_SWEEP = {"ramp" if beta == 6 else f"ramp-beta{beta}": beta for beta in range(8)}
STEPS = ("adaptive-normalized", "pgd-at-weighted-mean-1")  # of the search, but with all seeds: a finding rests on them
CAPACITY = ("clean", "pgd-at", "teacher-only", "ramp", "adaptive")
LARGER = ("clean", "pgd-at", "adaptive", "adaptive-cold")  # at the largest width on mnist5k too, as a search


def base_of(method: str) -> str:
    """The method that one of the search changes: that with the longest name that it begins with."""
    return max((name for name in (*MAIN, *CONTROLS) if method.startswith(name)), key=len)


@dataclass(frozen=True)
class Run:
    """What is trained on what, with which seed."""

    dataset: str
    arch: str
    method: str
    eps: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder: data set, network, method and the rest."""
        return f"{self.dataset}/{self.arch}/{self.method}-eps{self.eps:.3g}-seed{self.seed}"


def grid(dataset: str, arch: str | None, seeds: Sequence[int], *, full: bool, methods: Iterable[str] = ()) -> list[Run]:
    """The runs of a data set, the most telling first, each once.

    Args:
        dataset, arch: the network is the data set's own if None.
        seeds: of every method; the search has the first two of them.
        full: every table, not only the main one.
        methods: these instead, at the first radius, and those that they need.
    """
    setting = SETTINGS[dataset]
    own, first, few = arch or setting.arch, setting.eps[:1], seeds[:SEARCH_SEEDS]
    plan = [(own, (*NEEDED, *methods) if methods else (*MAIN, *CONTROLS), first, seeds)]
    if full and not methods:
        plan += [(own, SEARCH, first, few), (own, MAIN, setting.eps[1:], seeds)]
        if dataset == "digits":
            plan += [(own, (*STEPS, *ABLATION, *TAU_SWEEP, *BETA_SWEEP), first, seeds)]
            plan += [(width, CAPACITY, first, seeds) for width in WIDTHS]
        if dataset == "mnist5k":
            plan += [(WIDTHS[-1], LARGER, first, few)]
    runs = (Run(dataset, net, method, eps, seed) for net, methods, radii, repeated in plan
            for seed, eps, method in product(repeated, radii, methods))  # fmt: skip
    return [*dict.fromkeys(runs)]
