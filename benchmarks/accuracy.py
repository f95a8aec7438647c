"""Errors of each contender against float64: ordinary, saturated, masked and half-precision logits, and tiny KLs.

    python -m benchmarks.accuracy          (--help explains the options)

Writes accuracy-<device>.csv. The truth is cktat_loss/reference.py in float64, from the very logits that a contender
gets, rounded to half precision or not.

    loss      largest |error| / max(|true|, 1e-3) of a row
    d_adv     largest |error|, divided by the larger of its row's largest entry and 1 + beta
    d_clean   likewise, with beta max(1, max |log p_c - log p_a|)
    KL        |error| / true of each row: the median, the worst, and the share of rows whose KL is negative

Where softmaxes saturate, a gradient is a difference of near-equal numbers, and an error relative to the gradient would
mean nothing. So gradients have units of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.speed import BETA, EAGER, TAU, Loss, compiled
from cktat_loss import reference

ROWS, CLASSES = 512, 100
TINY_GAP = 2e-3
GAPS = tuple(10 ** (-step / 3) for step in range(13))  # from 1 to 1e-4
MASKED = 0.1  # of the classes

Logits = tuple[Tensor, Tensor, Tensor]  # clean, adversarial, teacher
Make = Callable[[int, int], Logits]
Row = dict[str, object]


def ordinary(n: int, classes: int) -> Logits:
    """Return independent logits of scale 4."""
    clean, adv, teacher = 4 * torch.randn(3, n, classes)
    return clean, adv, teacher


def saturated(n: int, classes: int) -> Logits:
    """Return logits between -200 and 200."""
    clean, adv, teacher = 400 * torch.rand(3, n, classes) - 200
    return clean, adv, teacher


def masked(n: int, classes: int) -> Logits:
    """Return ordinary logits, the last classes at -inf in all three, as for classes that a task leaves out."""
    logits = ordinary(n, classes)
    for x in logits:
        x[:, classes - math.ceil(MASKED * classes) :] = -torch.inf
    return logits


def near(n: int, classes: int, gap: float) -> Logits:
    """Return logits of 30 +- 5 that differ by noise of the size of the gap. Their KL is about gap^2."""
    base = 30 + 5 * torch.randn(n, classes, dtype=torch.float64)
    clean, adv, teacher = (base + gap * torch.randn_like(base) for _ in range(3))
    return clean, adv, teacher


CASES: tuple[tuple[str, torch.dtype, Make], ...] = (
    ("ordinary", torch.float32, ordinary),
    ("saturated", torch.float32, saturated),
    ("masked classes", torch.float32, masked),
    ("bfloat16", torch.bfloat16, ordinary),
    ("float16", torch.float16, ordinary),
)


class Result(NamedTuple):
    rows: Tensor
    d_clean: Tensor
    d_adv: Tensor


def differentiate(loss: Loss, logits: Logits, tau: float, beta: float) -> Result:
    """Return one loss per row, and the gradients of their sum."""
    clean, adv, teacher = logits
    clean, adv = clean.detach().requires_grad_(), adv.detach().requires_grad_()
    rows = loss(clean, adv, teacher, tau, beta, "none")
    return Result(rows.detach(), *torch.autograd.grad(rows.sum(), (clean, adv)))


def true_rows(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float, _: str) -> Tensor:
    guidance, consistency = reference.cktat_terms(clean, adv, teacher, tau)
    return guidance + beta * consistency


def doubled(logits: Logits) -> Logits:
    clean, adv, teacher = (x.double() for x in logits)
    return clean, adv, teacher


def errors(actual: Result, true: Result, logits: Logits, beta: float) -> dict[str, float]:
    """Return the largest error of loss and gradients, in the units of the module's docstring; NaN if any is."""
    clean, adv, _ = doubled(logits)
    apart = (clean.log_softmax(1) - adv.log_softmax(1)).abs().nan_to_num(0.0, 0.0, 0.0)  # masked: inf - inf
    units = {"d_clean": beta * apart.amax(1, keepdim=True).clamp(min=1.0), "d_adv": adv.new_tensor(1.0 + beta)}
    result = {"loss": ((actual.rows.double() - true.rows).abs() / true.rows.abs().clamp(min=1e-3)).max().item()}
    for name, unit in units.items():
        own, right = getattr(actual, name), getattr(true, name)
        size = torch.maximum(right.abs().amax(1, keepdim=True), unit)
        result[name] = ((own.double() - right).abs() / size).max().item()
    return result


def kl_errors(kl: Tensor, true: Tensor) -> dict[str, float]:
    relative = (kl.double() - true).abs() / true
    return {
        "KL, median": relative.median().item(),
        "KL, worst": relative.max().item(),
        "KL, negative": (kl < 0).double().mean().item(),
    }


def measure(losses: Mapping[str, Loss], device: str, n: int, classes: int) -> Iterator[Row]:
    """Yield one row per case, contender and measure."""
    for case, dtype, make in CASES:
        logits: Logits = tuple(x.to(device, dtype) for x in make(n, classes))
        true = differentiate(true_rows, doubled(logits), TAU, BETA)
        for name, loss in losses.items():
            for kind, error in errors(differentiate(loss, logits, TAU, BETA), true, logits, BETA).items():
                yield {"case": case, "contender": name, "measure": kind, "value": error}
    # One KL, by tau = 1 and beta = 0: the guidance, whose arithmetic is that of the consistency.
    for case, gap in (("small KL", TINY_GAP), *(("sweep", gap) for gap in GAPS)):
        logits = tuple(x.to(device, torch.float32) for x in near(n, classes, gap))
        true_kl = true_rows(*doubled(logits), 1.0, 0.0, "")
        for name, loss in losses.items():
            kl = differentiate(loss, logits, 1.0, 0.0).rows
            for kind, error in kl_errors(kl, true_kl).items():
                of = {"case": case, "contender": name, "measure": kind}
                yield {**of, "value": error, "true_kl": true_kl.median().item()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="default: %(default)s")
    parser.add_argument("--classes", type=int, default=CLASSES, metavar="C", help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    losses = EAGER if args.no_compile else {**EAGER, **compiled()}
    where = {"rows": args.rows, "classes": args.classes, **machine.environment(args.device)}
    path: Path = args.out / f"accuracy-{machine.slug(args.device)}.csv"
    rows: list[Row] = []
    for row in measure(losses, args.device, args.rows, args.classes):
        if rows and row["case"] != rows[-1]["case"]:
            machine.write(path, rows)
            print(f"{rows[-1]['case']}: done", flush=True)
        rows.append({**row, **where})
    machine.write(path, rows)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
