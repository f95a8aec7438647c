"""Time of one training step, phase by phase: CKTAT, PGD-AT, and TRADES as its authors' code runs it.

    python -m benchmarks.step          ResNet-18, 32 x 32, PGD-10 (--help explains the options)

All take turns on one model. So compare the ratios of one run, not the seconds of two. TRADES' code
(github.com/yaodongyu/TRADES) runs the clean images through the model again in every step of its attack, and twice for
its loss. `TRADES, lean` is the same algorithm without these repetitions. Writes step-<device>.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.speed import quantiles
from cktat_loss import CKTATLoss

sys.path.append(str(machine.ROOT / "examples"))

from networks import build
from pgd import eval_mode, pgd

EPS, STEP, BETA, CLASSES, PIXELS = 8 / 255, 2 / 255, 6.0, 10, 32
BATCH = {"cpu": 8, "cuda": 128}
Rounds = dict[str, list[dict[str, float]]]  # by contender, the seconds of each phase in each round


class Phases:
    """Adds up the seconds of each phase of a step: the processor's time on a CPU, else the wall's."""

    def __init__(self, device: str) -> None:
        self._now = time.process_time if device == "cpu" else time.perf_counter
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = self._now()
        yield
        self._wait()
        self._seconds[name] += self._now() - start

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call of this method."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


class Bench:
    """One model and one batch, and a method per contender: one training step, its phases timed."""

    def __init__(self, arch: str, batch: int, steps: int, device: str) -> None:
        self.model = build(arch, "cifar10", CLASSES).to(device)
        self.x = torch.rand(batch, 3, PIXELS, PIXELS, device=device)
        self.y = torch.randint(CLASSES, (batch,), device=device)
        self.phase = Phases(device)
        self.attack = {"eps": EPS, "step": STEP, "steps": steps}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.criterion = CKTATLoss(self.model, tau=2.0, beta=BETA, adaptive=True, detach_clean=True)

    def contenders(self) -> dict[str, Callable[[], None]]:
        return {
            "PGD-AT": self.pgd_at,
            "CKTAT": self.cktat,
            "TRADES": self.trades,
            "TRADES, lean": self.trades_lean,
            "one forward": self.one_forward,
        }

    def pgd_at(self) -> None:
        with self.phase("attack"):
            x_adv = pgd(self.model, self.x, self.y, **self.attack)
        with self.phase("student"):
            self._descend(F.cross_entropy(self.model(x_adv), self.y))

    def cktat(self) -> None:
        with self.phase("attack"):
            x_adv = pgd(self.model, self.x, self.y, **self.attack)
        with self.phase("teacher"), torch.no_grad():
            teacher_logits = self.criterion.teacher(self.x)
        with self.phase("student"):
            clean, adv = self.model(torch.cat([self.x, x_adv])).chunk(2)
            loss = self.criterion(clean_logits=clean, adv_logits=adv, teacher_logits=teacher_logits, y=self.y)
            self._descend(loss)

    def trades(self) -> None:
        with self.phase("attack"), eval_mode(self.model):
            x_adv = self._near()
            for _ in range(self.attack["steps"]):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(self._kl(x_adv, self.model(self.x)), x_adv)
                x_adv = x_adv.detach() + STEP * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, self.x - EPS), self.x + EPS).clamp(0, 1)
        with self.phase("student"):
            natural = F.cross_entropy(self.model(self.x), self.y)
            self._descend(natural + BETA * self._kl(x_adv, self.model(self.x)) / len(self.x))

    def trades_lean(self) -> None:
        with self.phase("attack"):
            x_adv = pgd(self.model, self.x, self.y, **self.attack, loss="kl", start=self._near())
        with self.phase("student"):
            clean = self.model(self.x)
            self._descend(F.cross_entropy(clean, self.y) + BETA * self._kl(x_adv, clean) / len(self.x))

    def one_forward(self) -> None:
        """Run what the teacher's forward has to be measured against."""
        with self.phase("forward"), eval_mode(self.model), torch.no_grad():
            self.model(self.x)

    def _near(self) -> Tensor:
        return self.x + 0.001 * torch.randn_like(self.x)

    def _kl(self, x_adv: Tensor, clean_logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(self.model(x_adv), 1), F.softmax(clean_logits, 1), reduction="sum")

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def table(times: Rounds) -> list[dict[str, object]]:
    """Return one row per contender and phase: quantiles of its seconds, and of its ratio to a PGD-AT step."""
    base = [sum(phases.values()) for phases in times["PGD-AT"]]
    rows: list[dict[str, object]] = []
    for name, rounds in times.items():
        for phase in ("step", *rounds[0]):
            seconds = [sum(phases.values()) if phase == "step" else phases[phase] for phases in rounds]
            ratios = [own / step for own, step in zip(seconds, base, strict=True)]
            rows.append({"contender": name, "phase": phase, **quantiles(seconds, "s"), **quantiles(ratios, "ratio")})
    return rows


def number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--arch", default="resnet18", help="of examples/networks.py (default: %(default)s)")
    parser.add_argument("--batch", type=number, help=f"images per step (default: {BATCH})")
    parser.add_argument("--steps", type=number, default=10, help="of the attack (default: %(default)s)")
    parser.add_argument("--rounds", type=number, default=7, help="timed steps per contender (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = args.batch or BATCH[args.device]
    bench = Bench(args.arch, batch, args.steps, args.device)
    path: Path = args.out / f"step-{machine.slug(args.device)}.csv"
    times: Rounds = {name: [] for name in bench.contenders()}
    for done in range(-1, args.rounds):
        for name, step in bench.contenders().items():
            step()
            taken = bench.phase.take()
            if done >= 0:  # the first round warms up
                times[name].append(taken)
        print(f"round {done + 1} of {args.rounds}", flush=True)
        if done >= 0:
            of = {"arch": args.arch, "batch": batch, "attack_steps": args.steps, "rounds": done + 1}
            machine.write(path, [{**row, **of, **machine.environment(args.device)} for row in table(times)])
    print(f"saved {path}")


if __name__ == "__main__":
    main()
