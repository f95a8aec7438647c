"""What the study runs: data sets with their settings, methods in a phrase each, and the grid of both."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

SPLIT_SEED = 2026  # the digits' usual split, seed 0, had been looked at when the recipes were made
NEEDED = ("clean", "pgd-at")  # by all other methods: their teacher, and whose adversarial images they are shown


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
    """What is trained with.

    Args:
        about: what it is, in a phrase for the tables.
        options: of the training command.
        change: of variants.py, by name, where the training command has no option for it.
        longer: epochs, in those of the data set's setting.
    """

    about: str
    options: str
    change: dict[str, Any] = field(default_factory=dict)
    longer: int = 1


ADAPTIVE, COLD = "--recipe adaptive", "--recipe adaptive --no-warm-start"
AT, AT_WARM = "--method pgd-at --no-warm-start", "--method pgd-at"
TRADES = "--method trades --no-warm-start"
RAMP = "--recipe literal --detach-clean --beta-ramp 0.4"
TIMES_5 = "--no-adaptive-beta --beta 4"  # where nothing is mixed: (1 + 4) times the cross-entropy of every sample
WEIGHTS = {"one_hot": True, "mixing": False}  # the adaptive weights alone, on the cross-entropy with the labels
TAUS, BETAS = range(1, 7), range(8)

METHODS = {
    "clean": Method("the teacher: cross-entropy on clean images", ""),
    "pgd-at": Method("cross-entropy on adversarial images", AT),
    "trades": Method("TRADES, beta 6, its own attack on the KL", TRADES),
    "literal": Method("Eq. 17 to the letter: tau 5, beta 6", "--recipe literal"),
    "detach": Method("the same without the gradient through S(x)", "--recipe literal --detach-clean"),
    "ramp": Method("detach, and beta rises from 0 over 40 % of the epochs", RAMP),
    "adaptive": Method("detach, tau 2, and beta_i = 6 softmax(S(x'))[y]", ADAPTIVE),
    # Controls.
    "adaptive-cold": Method("adaptive from random weights", COLD),
    "adaptive-clean-guidance": Method("adaptive with guidance on clean images too", ADAPTIVE, {"clean_guidance": 1.0}),
    "adaptive-one-hot": Method("adaptive with labels in place of the teacher", ADAPTIVE, {"one_hot": True}),
    "pgd-at-lr0.3": Method("PGD-AT, three times the learning rate", f"{AT} --lr 0.3"),
    "pgd-at-times-5": Method(
        "PGD-AT from random weights, its loss times 5", f"--recipe adaptive {TIMES_5} --no-warm-start", WEIGHTS
    ),
    "pgd-at-warm": Method("PGD-AT from the teacher's weights", AT_WARM),
    "pgd-at-weighted": Method("pgd-at-warm, each sample times 1 + 6 softmax(S(x'))[y]", ADAPTIVE, WEIGHTS),
    "pgd-at-weighted-cold": Method("pgd-at-weighted from random weights", COLD, WEIGHTS),
    "pgd-at-weighted-batch": Method(
        "pgd-at-weighted-cold, every sample with the mean weight of its batch", COLD, {**WEIGHTS, "of_batch": True}
    ),
    "pgd-at-weighted-shared": Method(
        "pgd-at-weighted, and BatchNorm sees the clean images too, as in adaptive", ADAPTIVE, {**WEIGHTS, "shared": True}
    ),
    "trades-recipe": Method(
        "TRADES with ramp's recipe: warm start, detach, ramp, attack on the cross-entropy",
        "--method trades --beta-ramp 0.4",
        {"detach_clean": True, "objective": "ce"},
    ),
    # Picked from the replication; the second round of claims is about it.
    "adaptive-cold-clean-label": Method("adaptive-cold plus CE(S(x), y)", COLD, {"clean_label": 1.0}),
    # Ablations of ramp, the paper's Table 3a; without consistency is beta 0.
    "ramp-cold": Method("ramp from random weights", f"{RAMP} --no-warm-start"),
    "ramp-no-guidance": Method("ramp without the teacher's term", f"{RAMP} --no-guidance"),
    # The paper's Table 1: what a clean teacher's predictions do as the only labels.
    "teacher-only": Method(
        "the teacher's predictions as labels: tau 1, beta 0, random weights",
        "--recipe literal --tau 1 --no-consistency --no-warm-start",
    ),
    # The paper's Tables 3b and 3c. Both sweeps pass through ramp itself.
    **{f"ramp-tau{tau}": Method(f"ramp with tau {tau}", f"{RAMP} --tau {tau}") for tau in TAUS if tau != 5},
    **{f"ramp-beta{beta}": Method(f"ramp with beta {beta}", f"{RAMP} --beta {beta}") for beta in BETAS if beta != 6},
}
# What the search for a recipe tried, each a single change of the method that it is listed under.
SEARCHED = {
    "pgd-at": {
        "pgd-at-lr0.03": Method("PGD-AT, a third of the learning rate", f"{AT} --lr 0.03"),
        "pgd-at-longer": Method("PGD-AT for twice the epochs", AT, longer=2),
    },
    "pgd-at-warm": {
        "pgd-at-warm-lr0.3": Method(
            "PGD-AT from the teacher's weights, three times the learning rate", f"{AT_WARM} --lr 0.3"
        ),
        "pgd-at-warm-times-5": Method(
            "PGD-AT from the teacher's weights, its loss times 5", f"{ADAPTIVE} {TIMES_5}", WEIGHTS
        ),
    },
    "pgd-at-weighted": {
        "pgd-at-weighted-mean-1": Method(
            "pgd-at-weighted, the weights of a batch divided by their mean", ADAPTIVE, {**WEIGHTS, "mean_1": True}
        ),
    },
    "trades": {
        "trades-lr0.03": Method("TRADES, a third of the learning rate", f"{TRADES} --lr 0.03"),
        "trades-lr0.3": Method("TRADES, three times the learning rate", f"{TRADES} --lr 0.3"),
        "trades-longer": Method("TRADES for twice the epochs", TRADES, longer=2),
    },
    "adaptive-cold": {
        "adaptive-cold-lr0.03": Method("from random weights, a third of the learning rate", f"{COLD} --lr 0.03"),
        "adaptive-cold-lr0.3": Method("from random weights, three times the learning rate", f"{COLD} --lr 0.3"),
        "adaptive-cold-longer": Method("from random weights, twice the epochs", COLD, longer=2),
    },
    "adaptive": {
        "adaptive-longer": Method("twice the epochs", ADAPTIVE, longer=2),
        "adaptive-lr0.03": Method("a third of the learning rate", f"{ADAPTIVE} --lr 0.03"),
        "adaptive-lr0.3": Method("three times the learning rate", f"{ADAPTIVE} --lr 0.3"),
        "adaptive-normalized": Method("each sample's loss divided by 1 + beta_i", ADAPTIVE, {"normalized": True}),
        "adaptive-tau1": Method("the teacher as it is, tau 1", f"{ADAPTIVE} --tau 1"),
        "adaptive-tau5": Method("a softer teacher, tau 5", f"{ADAPTIVE} --tau 5"),
        "adaptive-beta2": Method("beta_i = 2 softmax(S(x'))[y]", f"{ADAPTIVE} --beta 2"),
        "adaptive-label": Method("plus the cross-entropy with the label", ADAPTIVE, {"label": 1.0}),
        "adaptive-logit-penalty": Method("plus 0.01 times the mean square logit", ADAPTIVE, {"logit_penalty": 0.01}),
        "adaptive-20-steps": Method("a training attack of 20 steps instead of 10", f"{ADAPTIVE} --steps 20"),
        "adaptive-kl-attack": Method("a training attack on the consistency term", ADAPTIVE, {"objective": "kl"}),
        "adaptive-two-forwards": Method(
            "BatchNorm sees clean and adversarial images apart", f"{ADAPTIVE} --two-forwards"
        ),
        "adaptive-ema": Method("a moving average of the weights, 0.99", f"{ADAPTIVE} --ema 0.99"),
    },
}
BASES = {method: base for base, methods in SEARCHED.items() for method in methods}
SEARCH = tuple(BASES)
for _methods in SEARCHED.values():
    METHODS |= _methods

MAIN = ("clean", "pgd-at", "trades", "literal", "detach", "ramp", "adaptive")
CONTROLS = tuple(METHODS)[len(MAIN) : list(METHODS).index("trades-recipe") + 1]
ABLATION = ("ramp", "ramp-cold", "ramp-no-guidance", "ramp-beta0")
TAU_SWEEP = {"ramp" if tau == 5 else f"ramp-tau{tau}": tau for tau in TAUS}
BETA_SWEEP = {"ramp" if beta == 6 else f"ramp-beta{beta}": beta for beta in BETAS}
SEARCH_SEEDS = 2
STEPS = ("adaptive-normalized", "pgd-at-weighted-mean-1")  # of the search, but with all seeds: a finding rests on them
CAPACITY = ("clean", "pgd-at", "teacher-only", "ramp", "adaptive")
WIDTHS = ("digits-4", "digits", "digits-32")  # of the digits net, 16 in the middle
LARGER = ("clean", "pgd-at", "adaptive", "adaptive-cold")  # at the largest width on mnist5k too, as a search


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
    eps = SETTINGS[dataset].eps
    arch, few = arch or SETTINGS[dataset].arch, seeds[:SEARCH_SEEDS]
    if methods:
        plan = [(arch, (*NEEDED, *methods), eps[:1], seeds)]
    else:
        plan = [(arch, (*MAIN, *CONTROLS), eps[:1], seeds)]
        if full:
            plan += [(arch, SEARCH, eps[:1], few), (arch, MAIN, eps[1:], seeds)]
        if full and dataset == "digits":
            plan += [(arch, (*STEPS, *ABLATION, *TAU_SWEEP, *BETA_SWEEP), eps[:1], seeds)]
            plan += [(width, CAPACITY, eps[:1], seeds) for width in WIDTHS]
        if full and dataset == "mnist5k":
            plan += [(WIDTHS[-1], LARGER, eps[:1], few)]
    return [*dict.fromkeys(_runs(dataset, plan))]


def _runs(dataset: str, plan: Iterable[tuple[str, Sequence[str], Sequence[float], Sequence[int]]]) -> Iterator[Run]:
    for arch, methods, radii, seeds in plan:
        for seed, eps, method in product(seeds, radii, methods):
            yield Run(dataset, arch, method, eps, seed)
