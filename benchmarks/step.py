"""Time of one training step: CKTAT, PGD-AT, and TRADES as its authors' code runs it.

    python -m benchmarks.step          ResNet-18, 32 x 32, PGD-10 (--help explains the options)

All take turns on one model. So compare the ratios of one run, not the seconds of two. TRADES' code
(github.com/yaodongyu/TRADES) runs the clean images through the model again in every step of its attack, and twice for
its loss. `TRADES, lean` is the same algorithm without these repetitions. Writes step-<device>.csv.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, speed
from cktat_loss import CKTATLoss

sys.path.append(str(machine.ROOT / "examples"))

from networks import build
from pgd import eval_mode, pgd

EPS, STEP, BETA, CLASSES, PIXELS = 8 / 255, 2 / 255, 6.0, 10, 32
BATCH = {"cpu": 8, "cuda": 128}


class Bench:
    """One model and one batch, and a method per contender: one training step."""

    def __init__(self, arch: str, batch: int, steps: int, device: str) -> None:
        self.model = build(arch, "cifar10", CLASSES).to(device)
        self.x = torch.rand(batch, 3, PIXELS, PIXELS, device=device)
        self.y = torch.randint(CLASSES, (batch,), device=device)
        self.attack = partial(pgd, self.model, self.x, self.y, eps=EPS, step=STEP, steps=steps)
        self.steps = steps
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.criterion = CKTATLoss(self.model, tau=2.0, beta=BETA, adaptive=True, detach_clean=True)

    def contenders(self) -> dict[str, Callable[[], object]]:
        return {
            "PGD-AT": self.pgd_at,
            "CKTAT": self.cktat,
            "TRADES": self.trades,
            "TRADES, lean": self.trades_lean,
            "the attack of PGD-AT and CKTAT": self.attack,
            "one forward": self.one_forward,
        }

    def pgd_at(self) -> None:
        self._descend(F.cross_entropy(self.model(self.attack()), self.y))

    def cktat(self) -> None:
        clean, adv = self.model(torch.cat([self.x, self.attack()])).chunk(2)
        self._descend(self.criterion(clean_logits=clean, adv_logits=adv, x=self.x, y=self.y))

    def trades(self) -> None:
        with eval_mode(self.model):
            x_adv = self._near()
            for _ in range(self.steps):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(self._kl(x_adv, self.model(self.x)), x_adv)
                x_adv = x_adv.detach() + STEP * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, self.x - EPS), self.x + EPS).clamp(0, 1)
        natural = F.cross_entropy(self.model(self.x), self.y)
        self._descend(natural + BETA * self._kl(x_adv, self.model(self.x)) / len(self.x))

    def trades_lean(self) -> None:
        x_adv = self.attack(loss="kl", start=self._near())
        clean = self.model(self.x)
        self._descend(F.cross_entropy(clean, self.y) + BETA * self._kl(x_adv, clean) / len(self.x))

    def one_forward(self) -> None:
        """Run what CKTAT's teacher costs."""
        with eval_mode(self.model), torch.no_grad():
            self.model(self.x)

    def _near(self) -> Tensor:
        return self.x + 0.001 * torch.randn_like(self.x)

    def _kl(self, x_adv: Tensor, clean_logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(self.model(x_adv), 1), F.softmax(clean_logits, 1), reduction="sum")

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def wall_seconds(step: Callable[[], object]) -> float:
    """Return the time of a step on a GPU, waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def table(times: dict[str, list[float]], **where: object) -> list[dict[str, object]]:
    """Return one row per contender: quantiles of its seconds, and of its ratio to a PGD-AT step, round by round."""
    rows = []
    for name, seconds in times.items():
        ratios = [own / base for own, base in zip(seconds, times["PGD-AT"], strict=True)]
        quantiles = {**speed.quantiles(seconds, "s"), **speed.quantiles(ratios, "ratio")}
        rows.append({"contender": name, **quantiles, "rounds": len(seconds), **where})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--arch", default="resnet18", help="of examples/networks.py (default: %(default)s)")
    parser.add_argument("--batch", type=int, help=f"images per step (default: {BATCH})")
    parser.add_argument("--steps", type=int, default=10, help="of the attack (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = args.batch or BATCH[args.device]
    contenders = Bench(args.arch, batch, args.steps, args.device).contenders()
    for step in contenders.values():
        step()  # the first one is not timed
    clock = wall_seconds if args.device == "cuda" else speed.cpu_seconds
    times = speed.take_turns({name: partial(clock, step) for name, step in contenders.items()}, seconds=20.0)
    path = args.out / f"step-{machine.slug(args.device)}.csv"
    machine.write(path, table(times, arch=args.arch, batch=batch, attack_steps=args.steps), args.device)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
