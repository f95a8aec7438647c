"""What quickstart.py needs and has nothing to do with CKTAT: model, data, the picture."""

import argparse
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

INK, MUTED, BLUE, ORANGE, RIGHT, WRONG = "#1f2933", "#616e7c", "#2463a8", "#d9730d", "#1a7f4b", "#c2272d"
GUIDANCE, CONSISTENCY = r"guidance  $\mathrm{KL}(p_t \| p_a)$", r"consistency  $\mathrm{KL}(p_c \| p_a)$"


Split = tuple[Tensor, Tensor]  # images (N, 1, 8, 8) in [0, 1], labels (N,)


class Block(nn.Module):
    """Two 3x3 convolutions around a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.skip(x))


class DigitNet(nn.Sequential):
    """A ResNet with two blocks for digits of 8x8 pixels, or of MNIST's 28x28, which its stem halves first.

    Takes pixels in [0, 1]: its BatchNorms do the normalising.
    """

    def __init__(self, width: int = 16, classes: int = 10, size: int = 8) -> None:
        stride = 1 if size == 8 else 2
        side = size // (2 * stride)
        stem = nn.Sequential(nn.Conv2d(1, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = Block(width, width, stride=1), Block(width, 2 * width, stride=2)
        super().__init__(stem, *blocks, nn.Flatten(), nn.Linear(2 * width * side * side, classes))


def load_data(seed: int, device: torch.device) -> tuple[Split, Split, Split]:
    """Digits for training, for choosing settings (validation) and for the final numbers (test)."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=500, random_state=seed, stratify=labels)
    train, validation = train_test_split(rest, test_size=200, random_state=seed, stratify=labels[rest])
    x = torch.tensor(images / 16, dtype=torch.float32, device=device).view(-1, 1, 8, 8)
    y = torch.tensor(labels, dtype=torch.int64, device=device)
    return (x[train], y[train]), (x[validation], y[validation]), (x[test], y[test])


def png_path(text: str) -> Path:
    """An argparse type: a .png path in a folder that can be written to (made if missing)."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a file whose name ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a folder that can be written to ({error})") from None
    return path


@dataclass
class Curves:
    """What the validation split says, at the warm start and after each adversarial epoch."""

    guidance: list[float] = field(default_factory=list)
    consistency: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    robust: list[float] = field(default_factory=list)

    def last(self) -> str:
        """The latest values, for a progress bar."""
        terms = f"guidance {self.guidance[-1]:.3f}, consistency {self.consistency[-1]:.3f}"
        return f"{terms}, clean {self.clean[-1]:.1%}, PGD {self.robust[-1]:.1%}"


@dataclass
class Attacked:
    """One model on the test split, all on the CPU: hits (N,) per attack; and images with its predictions."""

    name: str
    zero_gradients: bool
    labels: Tensor
    predicted: Tensor  # of the clean images
    clean: Tensor
    pgd: Tensor
    apgd: Tensor
    images: Tensor
    adversarial: Tensor  # APGD's where that fooled the model, else PGD-20's
    fooled_into: Tensor  # the predictions of those


def save_figure(path: Path, curves: Curves, teacher: Attacked, student: Attacked, *, eps: float) -> None:
    """Draw the figure and put it at `path` in one move, so that no half-written file is ever there."""
    figure = Figure(figsize=(11, 7.2), facecolor="white")
    FigureCanvasAgg(figure)
    before, after = (f"{model.apgd.float().mean().item():.1%}" for model in (teacher, student))
    title = f"CKTAT on digits: accuracy under APGD, eps = {eps:g}: teacher {before}, student {after}"
    figure.text(0.065, 0.952, title, size=14, weight="bold", color=INK)
    panels = figure.add_gridspec(1, 2, left=0.065, right=0.985, top=0.885, bottom=0.575, wspace=0.16)
    draw_curves(panels.subplots(), curves)
    grid = figure.add_gridspec(3, 10, left=0.155, right=0.985, top=0.475, bottom=0.045, wspace=0.1, hspace=0.38)
    draw_digits(grid.subplots(), teacher, student)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def draw_curves(panels: Any, curves: Curves) -> None:
    """Both loss terms on the left, clean and robust accuracy on the right, by epoch."""
    left, right = panels
    draw_lines(left, {GUIDANCE: curves.guidance, CONSISTENCY: curves.consistency})
    left.set_title("Loss terms, validation data", loc="left", size=11, color=INK)
    left.set_yscale("log")
    left.set_ylim(bottom=max(left.get_ylim()[0], 0.02))  # after a collapse, the consistency term is 0
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    left.yaxis.set_minor_locator(NullLocator())
    draw_lines(right, {"clean": curves.clean, "under PGD": curves.robust})
    right.set_title("Student's accuracy, validation data", loc="left", size=11, color=INK)
    right.set_ylim(0, 1.03)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))


def draw_lines(axes: Axes, lines: dict[str, list[float]]) -> None:
    """Values by epoch; epoch 0 is the warm start."""
    for color, (label, values) in zip((BLUE, ORANGE), lines.items(), strict=True):
        axes.plot(values, color=color, lw=2, marker="o", ms=3.5, label=label)
    axes.set_xlabel("adversarial epoch (0: the warm start)", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e7eb", lw=0.8)
    axes.tick_params(colors=MUTED, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.legend(frameon=False, labelcolor=INK)


def draw_digits(grid: Any, teacher: Attacked, student: Attacked) -> None:
    """The first test image of each class: clean with both models' predictions, then attacked for either model."""
    labels = teacher.labels.tolist()
    chosen = [labels.index(digit) for digit in sorted(set(labels))]
    rows = [
        ("clean", teacher.images, {0.24: ("T", teacher.predicted), 0.76: ("S", student.predicted)}),
        ("attack on the\nteacher (T)", teacher.adversarial, {0.5: ("T", teacher.fooled_into)}),
        ("attack on the\nstudent (S)", student.adversarial, {0.5: ("S", student.fooled_into)}),
    ]
    for row, (name, images, captions) in zip(grid, rows, strict=True):
        row[0].text(-0.2, 0.5, name, transform=row[0].transAxes, ha="right", va="center", color=INK)
        for axes in row:
            axes.set_axis_off()
        for axes, i in zip(row, chosen, strict=False):
            axes.imshow(images[i, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            for x, (model, classes) in captions.items():
                mark, color = ("✓", RIGHT) if classes[i] == labels[i] else ("✗", WRONG)
                text = f"{model} {classes[i]} {mark}"
                axes.text(x, -0.07, text, transform=axes.transAxes, ha="center", va="top", color=color, size=9)
