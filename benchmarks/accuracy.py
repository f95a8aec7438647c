"""How far off each contender is, against float64: ordinary, saturated, masked and half-precision logits, and tiny KLs.

python -m benchmarks.accuracy          (--help explains the options)

Writes accuracy-<device>.csv. The truth is cktat_loss/reference.py in float64, from the very logits that a contender
gets, rounding to half precision included.

    loss      largest |error| / max(|true|, 1e-3) of a row
    d_adv     largest |error|, over the larger of its row's largest entry and 1 + beta
    d_clean   likewise, with beta max(1, max |log p_c - log p_a|)
    KL        |error| / true, of each row: its median, its worst, and the share of rows whose KL is negative

Where softmaxes saturate, a gradient is a difference of near-equal numbers, and an error relative to it would mean
nothing: hence the units of the gradients.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import contenders, machine, tables
from benchmarks.contenders import BETA, TAU, Loss
from cktat_loss import reference

ROWS, CLASSES = 512, 100
TINY_GAP = 2e-3
GAPS = tuple(10 ** (-step / 3) for step in range(13))  # from 1 to 1e-4
MASKED = 0.1  # of the classes

Logits = tuple[Tensor, Tensor, Tensor]  # clean, adversarial, teacher
Row = dict[str, object]


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    make: Callable[[int, int], Logits]


def ordinary(n: int, classes: int) -> Logits:
    """Independent, of scale 4."""
    clean, adv, teacher = 4 * torch.randn(3, n, classes)
    return clean, adv, teacher


def saturated(n: int, classes: int) -> Logits:
    """Anywhere between -200 and 200."""
    clean, adv, teacher = 400 * torch.rand(3, n, classes) - 200
    return clean, adv, teacher


def masked(n: int, classes: int) -> Logits:
    """Ordinary ones, the last classes at -inf in all three, as for classes that a task leaves out."""
    logits = ordinary(n, classes)
    for x in logits:
        x[:, classes - math.ceil(MASKED * classes) :] = -torch.inf
    return logits


def near(n: int, classes: int, gap: float) -> Logits:
    """At 30 +- 5, and noise of the size of the gap apart: a KL of about gap^2, as late in training."""
    base = 30 + 5 * torch.randn(n, classes, dtype=torch.float64)
    clean, adv, teacher = (base + gap * torch.randn_like(base) for _ in range(3))
    return clean, adv, teacher


CASES = (
    Case("ordinary", torch.float32, ordinary),
    Case("saturated", torch.float32, saturated),
    Case("masked classes", torch.float32, masked),
    Case("bfloat16", torch.bfloat16, ordinary),
    Case("float16", torch.float16, ordinary),
)


class Result(NamedTuple):
    rows: Tensor
    d_clean: Tensor | None
    d_adv: Tensor | None


def differentiate(loss: Loss, logits: Logits, tau: float, beta: float) -> Result:
    """A loss a row, and the gradients of their sum."""
    clean, adv, teacher = logits
    clean, adv = clean.detach().requires_grad_(), adv.detach().requires_grad_()
    rows = loss(clean, adv, teacher, tau, beta, "none")
    return Result(rows.detach(), *torch.autograd.grad(rows.sum(), (clean, adv), allow_unused=True))


def true_rows(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float, _: str) -> Tensor:
    guidance, consistency = reference.cktat_terms(clean, adv, teacher, tau)
    return guidance + beta * consistency


def doubled(logits: Logits) -> Logits:
    clean, adv, teacher = (x.double() for x in logits)
    return clean, adv, teacher


def largest(errors: Tensor) -> float:
    return errors.max().item()  # NaN if any is


def errors(actual: Result, true: Result, logits: Logits, beta: float) -> dict[str, float]:
    assert true.d_clean is not None
    assert true.d_adv is not None
    result = {"loss": largest((actual.rows.double() - true.rows).abs() / true.rows.abs().clamp(min=1e-3))}
    clean, adv, _ = doubled(logits)
    apart = (clean.log_softmax(1) - adv.log_softmax(1)).abs().nan_to_num(0.0, 0.0, 0.0)  # masked: inf - inf
    units = {"d_clean": beta * apart.amax(1, keepdim=True).clamp(min=1.0), "d_adv": torch.tensor(1.0 + beta)}
    for name, unit in units.items():
        own, right = getattr(actual, name), getattr(true, name)
        if own is not None:
            size = torch.maximum(right.abs().amax(1, keepdim=True), unit.to(right.device))
            result[name] = largest((own.double() - right).abs() / size)
    return result


def kl_errors(kl: Tensor, true: Tensor) -> dict[str, float]:
    relative = (kl.double() - true).abs() / true
    return {
        "KL, median": relative.median().item(),
        "KL, worst": largest(relative),
        "KL, negative": (kl < 0).double().mean().item(),
    }


class Bench(NamedTuple):
    losses: Mapping[str, Loss]
    device: str
    n: int
    classes: int

    def logits(self, make: Callable[[int, int], Logits], dtype: torch.dtype) -> Logits:
        clean, adv, teacher = (x.to(self.device, dtype) for x in make(self.n, self.classes))
        return clean, adv, teacher

    def case(self, case: Case) -> Iterator[Row]:
        """Loss and gradients."""
        logits = self.logits(case.make, case.dtype)
        true = differentiate(true_rows, doubled(logits), TAU, BETA)
        for name, loss in self.losses.items():
            for measure, error in errors(differentiate(loss, logits, TAU, BETA), true, logits, BETA).items():
                yield {"case": case.name, "contender": name, "measure": measure, "value": error}

    def near(self, gap: float, case: str) -> Iterator[Row]:
        """One KL, by tau = 1 and beta = 0: that of the guidance, which goes the way of the other."""
        logits = self.logits(lambda n, classes: near(n, classes, gap), torch.float32)
        true = true_rows(*doubled(logits), 1.0, 0.0, "")
        for name, loss in self.losses.items():
            kl = differentiate(loss, logits, 1.0, 0.0).rows
            for measure, error in kl_errors(kl, true).items():
                true_kl = true.median().item()
                yield {"case": case, "contender": name, "measure": measure, "value": error, "true_kl": true_kl}

    def run(self) -> Iterator[Row]:
        for _, cases in groupby(CASES, lambda case: case.dtype):  # each dtype is a compilation
            torch.compiler.reset()
            for case in cases:
                yield from self.case(case)
        torch.compiler.reset()
        yield from self.near(TINY_GAP, "small KL")
        for gap in GAPS:
            yield from self.near(gap, "sweep")


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--device", default=machine.default_device(), choices=("cpu", "cuda"), help="(default: a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="default: %(default)s")
    parser.add_argument("--classes", type=int, default=CLASSES, metavar="C", help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    chosen, left_out = contenders.choose(args.device, not args.no_compile)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    losses = {name: contenders.compiled(c.loss) if c.compiled else c.loss for name, c in chosen.items()}
    where = {"rows": args.rows, "classes": args.classes, **machine.environment(args.device)}
    rows = [row | where for row in Bench(losses, args.device, args.rows, args.classes).run()]
    path: Path = args.out / f"accuracy-{machine.slug(args.device)}.csv"
    machine.write(path, rows)
    print(f"\n{tables.accuracy_tables(machine.read(path))}\nsaved {path}")
    return path


if __name__ == "__main__":
    main()
