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
SEARCH_SEEDS = 2  # the first ones
WIDTHS = ("digits-4", "digits", "digits-32")  # of the digits net, 16 in the middle


@dataclass(frozen=True)
class Setting:
    """How a data set is trained on, the same for every method."""

    arch: str  # the network, unless a run names another
    eps: tuple[float, ...]  # radii of the Linf ball, the one of the main table first
    epochs: int
    teacher_epochs: int
    validation: int  # images held out to choose by
    options: str  # of the training command


_SHORT = "--batch-size 64 --nesterov --schedule cosine --lr-warmup 0.2 --device cpu --threads 1"
SETTINGS = {
    "digits": Setting("digits", (0.2, 0.12), 15, 25, 300, _SHORT),
    "mnist5k": Setting("digits", (0.3, 0.2), 8, 10, 300, f"{_SHORT} --channels-last"),
    "cifar10": Setting("resnet18", (8 / 255, 4 / 255), 110, 100, 1000, "--amp bf16 --channels-last --workers 8"),
}


@dataclass(frozen=True)
class Method:
    """What is trained with: a row of methods.csv."""

    group: str  # main and control: of the main tables; part, tau and beta: of the paper's; search: of its own
    about: str  # what it is, in a phrase for the tables
    options: str  # of the training command
    change: dict[str, Any]  # of variants.py, by name, where the training command has no option for it
    longer: int  # times the epochs of the data set's setting


def _change(text: str) -> dict[str, Any]:
    return {name: ast.literal_eval(value) for name, value in (word.split("=") for word in text.split())}


def _group(group: str) -> tuple[str, ...]:
    return tuple(name for name, method in METHODS.items() if method.group == group)


_table = pd.read_csv(
    Path(__file__).with_name("methods.csv"), index_col="method", keep_default_na=False, converters={"change": _change}
)
METHODS = {str(name): Method(**row) for name, row in _table.iterrows()}
MAIN, CONTROLS, SEARCH, PARTS = map(_group, ("main", "control", "search", "part"))
ABLATION = ("ramp", *PARTS, "ramp-beta0")
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
        """Of its folder."""
        return f"{self.dataset}/{self.arch}/{self.method}-eps{self.eps:.3g}-seed{self.seed}"


def grid(dataset: str, arch: str | None, seeds: Sequence[int], *, full: bool, methods: Iterable[str] = ()) -> list[Run]:
    """The runs of a data set, the most telling first, each once.

    Args:
        arch: the network; the data set's own if None.
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
