"""What the study runs: data sets with their settings, methods in a sentence each, and the grid of both."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

SPLIT_SEED = 2026  # the digits' usual split, seed 0, had been looked at when the recipes were made


@dataclass(frozen=True)
class Setting:
    """How a data set is trained on, the same for every method.

    Args:
        arch: the network, unless a run names another.
        eps: radii of the Linf ball, the one of the main table first.
        epochs, teacher_epochs: adversarial and clean ones.
        validation: images held out to choose by; of the study's split.
        options: of train_clean.py and train_cktat.py.
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
        options: of train_cktat.py.
        change: of lab.variants, by name, where train_cktat.py has no option for it.
        longer: epochs, in those of the data set's setting.
    """

    about: str
    options: str
    change: dict[str, Any] = field(default_factory=dict)
    longer: int = 1


RAMP = "--recipe literal --detach-clean --beta-ramp 0.4"
EVERY = "--no-adaptive-beta --beta 4"  # where nothing is mixed: (1 + 4) times the cross-entropy of every sample
METHODS = {
    "clean": Method("the teacher: cross-entropy on clean images", ""),
    "pgd-at": Method("cross-entropy on adversarial images", "--method pgd-at --no-warm-start"),
    "trades": Method("TRADES, beta 6, its own attack on the KL", "--method trades --no-warm-start"),
    "literal": Method("Eq. 17 to the letter: tau 5, beta 6", "--recipe literal"),
    "detach": Method("the same without the gradient through S(x)", "--recipe literal --detach-clean"),
    "ramp": Method("detach, and beta rises from 0 over 40 % of the epochs", RAMP),
    "adaptive": Method("detach, tau 2, and beta_i = 6 softmax(S(x'))[y]", "--recipe ours"),
    # Controls.
    "adaptive-cold": Method("adaptive from random weights", "--recipe ours --no-warm-start"),
    "adaptive-clean-guidance": Method(
        "adaptive with guidance on clean images too", "--recipe ours", {"clean_guidance": 1.0}
    ),
    "adaptive-one-hot": Method("adaptive with labels in place of the teacher", "--recipe ours", {"one_hot": True}),
    "pgd-at-lr0.3": Method("PGD-AT, three times the learning rate", "--method pgd-at --no-warm-start --lr 0.3"),
    "pgd-at-times-5": Method(
        "PGD-AT from random weights, its loss times 5",
        f"--recipe ours {EVERY} --no-warm-start",
        {"one_hot": True, "mixing": False},
    ),
    "pgd-at-warm": Method("PGD-AT from the teacher's weights", "--method pgd-at"),
    "pgd-at-weighted": Method(
        "pgd-at-warm, each sample times 1 + 6 softmax(S(x'))[y]", "--recipe ours", {"one_hot": True, "mixing": False}
    ),
    "pgd-at-weighted-cold": Method(
        "pgd-at-weighted from random weights",
        "--recipe ours --no-warm-start",
        {"one_hot": True, "mixing": False},
    ),
    "pgd-at-weighted-batch": Method(
        "pgd-at-weighted-cold, every sample with the mean weight of its batch",
        "--recipe ours --no-warm-start",
        {"one_hot": True, "mixing": False, "of_batch": True},
    ),
    "pgd-at-weighted-shared": Method(
        "pgd-at-weighted, and BatchNorm sees the clean images too, as in adaptive",
        "--recipe ours",
        {"one_hot": True, "mixing": False, "shared": True},
    ),
    "trades-recipe": Method(
        "TRADES with ramp's recipe: warm start, detach, ramp, attack on the cross-entropy",
        "--method trades --beta-ramp 0.4",
        {"detach_clean": True, "objective": "ce"},
    ),
    # Ablations of ramp, the paper's Table 3a; without consistency is beta 0.
    "ramp-cold": Method("ramp from random weights", f"{RAMP} --no-warm-start"),
    "ramp-no-guidance": Method("ramp without the teacher's term", f"{RAMP} --no-guidance"),
    # The paper's Table 1: what a clean teacher's predictions do as the only labels.
    "teacher-only": Method(
        "the teacher's predictions as labels: tau 1, beta 0, random weights",
        "--recipe literal --tau 1 --no-consistency --no-warm-start",
    ),
}
TAUS, BETAS = range(1, 7), range(8)
for _tau in TAUS:
    METHODS[f"ramp-tau{_tau}"] = Method(f"ramp with tau {_tau}", f"{RAMP} --tau {_tau}")
for _beta in BETAS:
    METHODS[f"ramp-beta{_beta}"] = Method(f"ramp with beta {_beta}", f"{RAMP} --beta {_beta}")
# Sweeps pass through ramp itself.
del METHODS["ramp-tau5"], METHODS["ramp-beta6"]
# What the search for a recipe tried, each a single change.
OURS, COLD, AT, WARM, TRADES = (
    METHODS[name].options for name in ("adaptive", "adaptive-cold", "pgd-at", "pgd-at-warm", "trades")
)
METHODS |= {
    "pgd-at-lr0.03": Method("PGD-AT, a third of the learning rate", f"{AT} --lr 0.03"),
    "pgd-at-longer": Method("PGD-AT for twice the epochs", AT, longer=2),
    "pgd-at-warm-lr0.3": Method("PGD-AT from the teacher's weights, three times the learning rate", f"{WARM} --lr 0.3"),
    "pgd-at-warm-times-5": Method(
        "PGD-AT from the teacher's weights, its loss times 5", f"{OURS} {EVERY}", {"one_hot": True, "mixing": False}
    ),
    "pgd-at-weighted-mean-1": Method(
        "pgd-at-weighted, the weights of a batch divided by their mean",
        OURS,
        {"one_hot": True, "mixing": False, "mean_1": True},
    ),
    "trades-lr0.03": Method("TRADES, a third of the learning rate", f"{TRADES} --lr 0.03"),
    "trades-lr0.3": Method("TRADES, three times the learning rate", f"{TRADES} --lr 0.3"),
    "trades-longer": Method("TRADES for twice the epochs", TRADES, longer=2),
    "adaptive-cold-lr0.03": Method("from random weights, a third of the learning rate", f"{COLD} --lr 0.03"),
    "adaptive-cold-lr0.3": Method("from random weights, three times the learning rate", f"{COLD} --lr 0.3"),
    "adaptive-cold-longer": Method("from random weights, twice the epochs", COLD, longer=2),
    "adaptive-longer": Method("twice the epochs", OURS, longer=2),
    "adaptive-lr0.03": Method("a third of the learning rate", f"{OURS} --lr 0.03"),
    "adaptive-lr0.3": Method("three times the learning rate", f"{OURS} --lr 0.3"),
    "adaptive-normalized": Method("each sample's loss divided by 1 + beta_i", OURS, {"normalized": True}),
    "adaptive-tau1": Method("the teacher as it is, tau 1", f"{OURS} --tau 1"),
    "adaptive-tau5": Method("a softer teacher, tau 5", f"{OURS} --tau 5"),
    "adaptive-beta2": Method("beta_i = 2 softmax(S(x'))[y]", f"{OURS} --beta 2"),
    "adaptive-label": Method("plus the cross-entropy with the label", OURS, {"label": 1.0}),
    "adaptive-logit-penalty": Method("plus 0.01 times the mean square logit", OURS, {"logit_penalty": 0.01}),
    "adaptive-20-steps": Method("a training attack of 20 steps instead of 10", f"{OURS} --steps 20"),
    "adaptive-kl-attack": Method("a training attack on the consistency term", OURS, {"objective": "kl"}),
    "adaptive-two-forwards": Method("BatchNorm sees clean and adversarial images apart", f"{OURS} --two-forwards"),
    "adaptive-ema": Method("a moving average of the weights, 0.99", f"{OURS} --ema 0.99"),
}

MAIN = ("clean", "pgd-at", "trades", "literal", "detach", "ramp", "adaptive")
CONTROLS = (
    "adaptive-cold",
    "adaptive-clean-guidance",
    "adaptive-one-hot",
    "pgd-at-lr0.3",
    "pgd-at-times-5",
    "pgd-at-warm",
    "pgd-at-weighted",
    "pgd-at-weighted-cold",
    "pgd-at-weighted-batch",
    "pgd-at-weighted-shared",
    "trades-recipe",
)
ABLATION = ("ramp", "ramp-cold", "ramp-no-guidance", "ramp-beta0")
TAU_SWEEP = tuple("ramp" if tau == 5 else f"ramp-tau{tau}" for tau in TAUS)
BETA_SWEEP = tuple("ramp" if beta == 6 else f"ramp-beta{beta}" for beta in BETAS)
SEARCH = tuple(METHODS)[list(METHODS).index("pgd-at-lr0.03") :]
SEARCH_SEEDS = 2
STEPS = ("adaptive-normalized", "pgd-at-weighted-mean-1")  # of the search, but with all seeds: a finding rests on them
CAPACITY = ("clean", "pgd-at", "teacher-only", "ramp", "adaptive")
WIDTHS = ("digits-4", "digits", "digits-32")  # of the digits net, 16 in the middle
LARGER = ("clean", "pgd-at", "adaptive", "adaptive-cold")  # at the largest width on mnist5k too, as a search


@dataclass(frozen=True)
class Run:
    """One line of the study: what is trained on what, with which seed."""

    dataset: str
    arch: str
    method: str
    eps: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder: data set, network, method and the rest."""
        return f"{self.dataset}/{self.arch}/{self.method}-eps{self.eps:.3g}-seed{self.seed}"


def grid(profile: str, dataset: str, arch: str | None, seeds: int) -> Iterator[Run]:
    """All runs of a profile ("quick" or "full") on a data set, the most telling first, each once."""
    setting = SETTINGS[dataset]
    arch = arch or setting.arch
    main = MAIN + CONTROLS
    plan = [(arch, main, setting.eps[:1], seeds)]
    if profile == "full":
        plan += [(arch, SEARCH, setting.eps[:1], min(seeds, SEARCH_SEEDS)), (arch, MAIN, setting.eps[1:], seeds)]
    if profile == "full" and dataset == "digits":
        plan += [(arch, (*STEPS, *ABLATION, *TAU_SWEEP, *BETA_SWEEP), setting.eps[:1], seeds)]
        plan += [(width, CAPACITY, setting.eps[:1], seeds) for width in WIDTHS]
    if profile == "full" and dataset == "mnist5k":
        plan += [(WIDTHS[-1], LARGER, setting.eps[:1], min(seeds, SEARCH_SEEDS))]
    done = set()
    for net, methods, radii, repeated in plan:
        for seed, eps, method in product(range(repeated), radii, methods):
            run = Run(dataset, net, method, eps, seed)
            if run not in done:
                done.add(run)
                yield run
