"""What one training step costs, phase by phase: CKTAT, PGD-AT, and TRADES as its authors' code runs it.

    python benchmarks/step.py                                 ResNet-18, batch 32, 32 x 32, PGD-10, on the CPU
    python benchmarks/step.py --flops --batch 1               count operations instead, and what a run takes on a GPU
    python benchmarks/step.py --flops --batch 1 --arch wrn-34-10

All take turns on one model, so that what else the machine does falls on each alike: compare the ratios, not the
seconds of two runs. TRADES' code (github.com/yaodongyu/TRADES) runs the clean images through the model again in every
step of its attack, and twice for its loss; `TRADES, lean` is the same algorithm without that.
"""

import csv
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from models import build
from pgd import eval_mode, pgd
from runtime import Clock, UserError, device_of, number, parse

from cktat_loss import CKTATLoss

PHASES = ("attack", "teacher", "student")  # the student's forward and backward, with the optimizer's step
EPS, STEP, BETA, CLASSES = 8 / 255, 2 / 255, 6.0, 10
Rounds = dict[str, list[dict[str, float]]]  # by contender, the seconds of each phase in each round

# For the estimate of hours: CIFAR-10 without 1000 validation images, and the epochs of train.py.
IMAGES, CLEAN_EPOCHS, EPOCHS = 49_000, 100, 110
PEAK, SHARE = 312e12, 0.4  # dense bf16 FLOP/s of an A100 by its data sheet, and how much of it we assume to be reached

WHY = """\
CKTAT's advantage over TRADES comes from TRADES' code, which repeats the clean forward in every step of its attack
and once more, with its backward, in its loss. Without that (TRADES, lean) both need the same: TRADES one clean
forward for its attack, CKTAT one of its teacher."""


class Bench:
    """One model, one batch, and a method for each contender: one training step, its phases timed by `clock`."""

    def __init__(self, arch: str, batch: int, size: int, steps: int, clock: Clock, device: torch.device) -> None:
        self.model = build(arch, CLASSES, size=size, channels=3).to(device)
        self.x = torch.rand(batch, 3, size, size, device=device)
        self.y = torch.randint(CLASSES, (batch,), device=device)
        self.steps, self.clock = steps, clock
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.criterion = CKTATLoss(self.model, tau=2.0, beta=BETA, adaptive=True, detach_clean=True)

    @property
    def contenders(self) -> dict[str, Callable[[], None]]:
        return {"PGD-AT": self.pgd_at, "CKTAT": self.cktat, "TRADES": self.trades, "TRADES, lean": self.trades_lean}

    def clean(self) -> None:
        """A step of the teacher's own training."""
        self._descend(F.cross_entropy(self.model(self.x), self.y))

    def pgd_at(self) -> None:
        with self.clock("attack"):
            x_adv = pgd(self.model, self.x, self.y, eps=EPS, step=STEP, steps=self.steps)
        with self.clock("student"):
            self._descend(F.cross_entropy(self.model(x_adv), self.y))

    def cktat(self) -> None:
        with self.clock("attack"):
            x_adv = pgd(self.model, self.x, self.y, eps=EPS, step=STEP, steps=self.steps)
        with self.clock("teacher"), torch.no_grad():
            teacher_logits = self.criterion.teacher(self.x)
        with self.clock("student"):
            clean_logits, adv_logits = self.model(torch.cat([self.x, x_adv])).chunk(2)
            logits = {"clean_logits": clean_logits, "adv_logits": adv_logits, "teacher_logits": teacher_logits}
            self._descend(self.criterion(**logits, y=self.y))

    def trades(self) -> None:
        with self.clock("attack"), eval_mode(self.model):
            x_adv = self.x + 0.001 * torch.randn_like(self.x)
            for _ in range(self.steps):
                x_adv.requires_grad_()
                kl = self._kl(x_adv, self.model(self.x))
                (gradient,) = torch.autograd.grad(kl, x_adv)
                x_adv = x_adv.detach() + STEP * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, self.x - EPS), self.x + EPS).clamp(0, 1)
        with self.clock("student"):
            natural = F.cross_entropy(self.model(self.x), self.y)
            self._descend(natural + BETA * self._kl(x_adv, self.model(self.x)) / len(self.x))

    def trades_lean(self) -> None:
        with self.clock("attack"):
            start = self.x + 0.001 * torch.randn_like(self.x)
            ball = {"eps": EPS, "step": STEP, "steps": self.steps}
            x_adv = pgd(self.model, self.x, self.y, **ball, objective="kl", start=start)
        with self.clock("student"):
            clean_logits = self.model(self.x)
            self._descend(F.cross_entropy(clean_logits, self.y) + BETA * self._kl(x_adv, clean_logits) / len(self.x))

    def one_forward(self) -> None:
        """What the teacher's forward has to be measured against."""
        with self.clock("forward"), eval_mode(self.model), torch.no_grad():
            self.model(self.x)

    def _kl(self, x_adv: Tensor, clean_logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(self.model(x_adv), 1), F.softmax(clean_logits, 1), reduction="sum")

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def measure(bench: Bench, rounds: int) -> Rounds:
    """The contenders taking turns, after a round that is not counted."""
    contenders = {**bench.contenders, "one forward": bench.one_forward}
    times: Rounds = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, step in contenders.items():
            step()
            times[name].append(bench.clock.take())
    return {name: rounds_[1:] for name, rounds_ in times.items()}


def table(times: Rounds) -> list[dict[str, str | float]]:
    """A row a contender and phase: 20, 50 and 80 % quantiles of its seconds, and of its ratio to a PGD-AT step."""
    base = [sum(phases.values()) for phases in times["PGD-AT"]]
    rows: list[dict[str, str | float]] = []
    for name, rounds in times.items():
        for phase in ("step", *rounds[0]):
            seconds = [sum(phases.values()) if phase == "step" else phases[phase] for phases in rounds]
            ratios = [own / step for own, step in zip(seconds, base, strict=True)]
            rows.append({"contender": name, "phase": phase, **quantiles(seconds, "s"), **quantiles(ratios, "ratio")})
    return rows


def quantiles(values: Iterable[float], name: str) -> dict[str, float]:
    ordered = sorted(values)
    return {f"{name}_{percent}": ordered[round(percent / 100 * (len(ordered) - 1))] for percent in (20, 50, 80)}


def markdown(rows: list[dict[str, str | float]], times: Rounds) -> str:
    """Medians, and 20 - 80 % quantiles where they matter."""
    cell = {(row["contender"], row["phase"]): row for row in rows}
    lines = [f"| | step, s | {', s | '.join(PHASES)}, s | times a PGD-AT step |", "|---" * (3 + len(PHASES)) + "|"]
    for name in times:
        if name == "one forward":
            continue
        step = cell[name, "step"]
        parts = (f"{cell[name, phase]['s_50']:.3g}" if (name, phase) in cell else "-" for phase in PHASES)
        ratio = f"**{step['ratio_50']:.2f}** ({step['ratio_20']:.2f} - {step['ratio_80']:.2f})"
        lines.append(f"| {name} | {step['s_50']:.3g} | {' | '.join(parts)} | {ratio} |")
    for above, below, phase, other in (
        ("CKTAT's teacher", "one forward in eval mode", ("CKTAT", "teacher"), ("one forward", "forward")),
        ("a CKTAT step", "a TRADES step", ("CKTAT", None), ("TRADES", None)),
        ("a CKTAT step", "a lean TRADES step", ("CKTAT", None), ("TRADES, lean", None)),
    ):
        one, two = (
            [sum(phases.values()) if part is None else phases[part] for phases in times[name]]
            for name, part in (phase, other)
        )
        ratio = quantiles([a / b for a, b in zip(one, two, strict=True)], "")
        lines += ["", f"{above} / {below}: **{ratio['_50']:.2f}** ({ratio['_20']:.2f} - {ratio['_80']:.2f})"]
    return "\n".join([*lines, "", WHY])


class Flops(TorchDispatchMode):
    """Adds up torch's own counts: convolutions and matrix products, a multiply-add as 2.

    FlopCounterMode does not bear torch.autograd.grad on a model's input, which is what an attack is.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(bench: Bench) -> str:
    """Floating-point operations of a step, an image, and the hours of a run that follow from them."""
    lines = ["| | GFLOP an image | training on CIFAR-10, epochs | hours of an A100, estimated |", "|---|---|---|---|"]
    contenders = {"clean": bench.clean, **bench.contenders}
    for name, step in contenders.items():
        with Flops() as counter:
            step()
        flops = counter.total / len(bench.x)
        epochs = CLEAN_EPOCHS if name == "clean" else EPOCHS
        hours = flops * IMAGES * epochs / (SHARE * PEAK) / 3600
        lines.append(f"| {name} | {flops / 1e9:.1f} | {epochs} | {hours:.1f} |")
    return "\n".join(
        [
            *lines,
            "",
            "Counted: convolutions and matrix products, a multiply-add as 2. The hours are an estimate, for\n"
            f"{IMAGES:,} images an epoch at an assumed {SHARE:.0%} of the {PEAK:.3g} dense bf16 FLOP/s of an A100,\n"
            "without loading and validation. No GPU was timed; whatever is not counted makes it longer.",
        ]
    )


@dataclass
class MeasureOptions:
    arch: str = "resnet18"
    """of examples/models.py"""
    batch: Annotated[int, number(int, 1, 1e6)] = 32
    """images a step"""
    size: Annotated[int, number(int, 1, 1e4)] = 32
    """height and width of the images"""
    steps: Annotated[int, number(int, 1, 1000)] = 10
    """of the attack"""
    flops: bool = False
    """count operations instead of measuring time"""


@dataclass
class HowOptions:
    rounds: Annotated[int, number(int, 1, 1e6)] = 7
    """timed steps of each contender"""
    threads: Annotated[int, number(int, 1, 1024)] = 1
    """of the CPU"""
    device: str = "cpu"
    """auto, cpu, cuda, ..."""
    out: Path = Path(__file__).parent / "results" / "step.csv"
    """CSV file of the times"""


@dataclass
class Options(MeasureOptions, HowOptions):
    """All of them."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Options, sys.argv[1:] if argv is None else argv, about=__doc__)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # Of one thread, the CPU's time: what else runs on the machine does not count.
    try:
        device = device_of(args.device)
        cpu_time = device.type == "cpu" and args.threads == 1
        clock = Clock(device, time.process_time if cpu_time else time.perf_counter)
        bench = Bench(args.arch, args.batch, args.size, args.steps, clock, device)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")

    where = {
        "arch": args.arch,
        "batch": args.batch,
        "size": args.size,
        "attack_steps": args.steps,
        "rounds": args.rounds,
        "clock": "CPU time" if cpu_time else "wall clock",
        "threads": args.threads,
        "device": str(device),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if args.flops:
        print(f"{args.arch}, {args.size} x {args.size}, {args.steps} attack steps\n\n{count_flops(bench)}")
        return
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print("medians; in brackets 20 - 80 % quantiles, of ratios round by round\n", flush=True)
    times = measure(bench, args.rounds)
    rows = table(times)
    print(markdown(rows, times))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows(row | where for row in rows)
    print(f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
