"""What one training step costs, phase by phase: CKTAT, PGD-AT, and TRADES as its authors' code runs it.

    python -m benchmarks.step                                 ResNet-18, batch 32, 32 x 32, PGD-10, on the CPU
    python -m benchmarks.step --flops --batch 1               count operations instead, and what a run takes on a GPU
    python -m benchmarks.step --flops --batch 1 --arch wrn-34-10

All take turns on one model, so that what else the machine does falls on each alike: compare the ratios, not the
seconds of two runs. TRADES' code (github.com/yaodongyu/TRADES) runs the clean images through the model again in every
step of its attack, and twice for its loss; `TRADES, lean` is the same algorithm without that.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import machine, markdown
from benchmarks.timing import quantiles
from cktat_loss import CKTATLoss

sys.path.insert(0, str(machine.ROOT / "examples"))

from models import build
from pgd import eval_mode, pgd

PHASES = ("attack", "teacher", "student")  # the student's forward and backward, with the optimizer's step
EPS, STEP, BETA, CLASSES = 8 / 255, 2 / 255, 6.0, 10
Rounds = dict[str, list[dict[str, float]]]  # by contender, the seconds of each phase in each round

# For the estimate of hours: CIFAR-10 without 1000 validation images, and the epochs of examples/train.py.
IMAGES, CLEAN_EPOCHS, EPOCHS = 49_000, 100, 110
PEAK, SHARE = 312e12, 0.4  # dense bf16 FLOP/s of an A100 by its data sheet, and how much of it we assume to be reached

WHY = """\
CKTAT's advantage over TRADES comes from TRADES' code, which repeats the clean forward in every step of its attack
and once more, with its backward, in its loss. Without that (TRADES, lean) both need the same: TRADES one clean
forward for its attack, CKTAT one of its teacher."""


class Phases:
    """Adds up the seconds of each phase of a step."""

    def __init__(self, device: str, now: Callable[[], float]) -> None:
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._now = now
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = self._now()
        yield
        self._wait()
        self._seconds[name] += self._now() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call of this."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


class Bench:
    """One model, one batch, and a method for each contender: one training step, its phases timed by `clock`."""

    def __init__(self, arch: str, batch: int, size: int, steps: int, clock: Phases, device: str) -> None:
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
            loss = self.criterion(
                clean_logits=clean_logits, adv_logits=adv_logits, teacher_logits=teacher_logits, y=self.y
            )
            self._descend(loss)

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


def report(rows: list[dict[str, str | float]], times: Rounds) -> str:
    """Medians, and 20 - 80 % quantiles where they matter."""
    cell = {(row["contender"], row["phase"]): row for row in rows}
    lines = []
    for name in times:
        if name == "one forward":
            continue
        seconds = (f"{cell[name, phase]['s_50']:.3g}" if (name, phase) in cell else "-" for phase in ("step", *PHASES))
        lines.append([name, *seconds, spread(cell[name, "step"], "ratio")])
    text = markdown.table(["", "step, s", *(f"{phase}, s" for phase in PHASES), "times a PGD-AT step"], lines)
    for above, below, phase, other in (
        ("CKTAT's teacher", "one forward in eval mode", ("CKTAT", "teacher"), ("one forward", "forward")),
        ("a CKTAT step", "a TRADES step", ("CKTAT", None), ("TRADES", None)),
        ("a CKTAT step", "a lean TRADES step", ("CKTAT", None), ("TRADES, lean", None)),
    ):
        one, two = (
            [sum(phases.values()) if part is None else phases[part] for phases in times[name]]
            for name, part in (phase, other)
        )
        text += f"\n{above} / {below}: {spread(quantiles([a / b for a, b in zip(one, two, strict=True)], 'x'), 'x')}\n"
    return f"{text}\n{WHY}"


def spread(of: Mapping[str, Any], name: str) -> str:
    return f"**{of[f'{name}_50']:.2f}** ({of[f'{name}_20']:.2f} - {of[f'{name}_80']:.2f})"


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
    lines = []
    contenders = {"clean": bench.clean, **bench.contenders}
    for name, step in contenders.items():
        with Flops() as counter:
            step()
        flops = counter.total / len(bench.x)
        epochs = CLEAN_EPOCHS if name == "clean" else EPOCHS
        hours = flops * IMAGES * epochs / (SHARE * PEAK) / 3600
        lines.append([name, f"{flops / 1e9:.1f}", epochs, f"{hours:.1f}"])
    head = ["", "GFLOP an image", "training on CIFAR-10, epochs", "hours of an A100, estimated"]
    return f"""{markdown.table(head, lines)}
Counted: convolutions and matrix products, a multiply-add as 2. The hours are an estimate, for
{IMAGES:,} images an epoch at an assumed {SHARE:.0%} of the {PEAK:.3g} dense bf16 FLOP/s of an A100,
without loading and validation. No GPU was timed; whatever is not counted makes it longer."""


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18", help="of examples/models.py (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=32, help="images a step (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=32, help="of the images, in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=10, help="of the attack (default: %(default)s)")
    parser.add_argument("--flops", action="store_true", help="count operations instead of measuring time")
    parser.add_argument(
        "--rounds", type=positive, default=7, help="timed steps of each contender (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "step.csv", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # Of one thread, the CPU's time: what else runs on the machine does not count.
    cpu_time = args.device == "cpu" and args.threads == 1
    clock = Phases(args.device, time.process_time if cpu_time else time.perf_counter)
    try:
        bench = Bench(args.arch, args.batch, args.size, args.steps, clock, args.device)
    except ValueError as error:
        parser.error(str(error))

    if args.flops:
        print(f"{args.arch}, {args.size} x {args.size}, {args.steps} attack steps\n\n{count_flops(bench)}")
        return
    where = {
        "arch": args.arch,
        "batch": args.batch,
        "size": args.size,
        "attack_steps": args.steps,
        "rounds": args.rounds,
        "clock": "CPU time" if cpu_time else "wall clock",
        **machine.environment(args.device),
    }
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print("medians; in brackets 20 - 80 % quantiles, of ratios round by round\n", flush=True)
    times = measure(bench, args.rounds)
    rows = table(times)
    print(report(rows, times))
    machine.write(args.out, [row | where for row in rows])
    print(f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
