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

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.machine import Row
from benchmarks.speed import BETA, EAGER, TAU, Loss, compiled
from cktat_loss import reference

ROWS, CLASSES, MASKED = 512, 100, 10
GAPS = tuple(10 ** (-step / 3) for step in range(13))  # of the sweep, from 1 to 1e-4
CASES = [
    ("ordinary", torch.float32, 0.0),
    ("saturated", torch.float32, 0.0),
    ("masked classes", torch.float32, 0.0),
    ("bfloat16", torch.bfloat16, 0.0),
    ("float16", torch.float16, 0.0),
    ("small KL", torch.float32, 2e-3),
    *(("sweep", torch.float32, gap) for gap in GAPS),
]


def make(case: str, gap: float) -> Tensor:
    """Return clean, adversarial and teacher logits (3, N, C)."""
    if gap:  # logits of 30 +- 5 that differ by noise of the size of the gap: their KL is about gap^2
        base = 30 + 5 * torch.randn(ROWS, CLASSES, dtype=torch.float64)
        return base + gap * torch.randn(3, ROWS, CLASSES, dtype=torch.float64)
    if case == "saturated":
        return 400 * torch.rand(3, ROWS, CLASSES) - 200
    logits = 4 * torch.randn(3, ROWS, CLASSES)
    if case == "masked classes":  # the same in all three, as for classes that a task leaves out
        logits[:, :, -MASKED:] = -torch.inf
    return logits


def differentiate(loss: Loss, logits: Tensor, tau: float, beta: float) -> tuple[Tensor, ...]:
    """Return one loss per row (N, 1), and the gradients of their sum to the clean and the adversarial logits (N, C)."""
    clean, adv, teacher = (x.detach().clone() for x in logits)
    rows = loss(clean.requires_grad_(), adv.requires_grad_(), teacher, tau, beta, "none")
    return rows.detach()[:, None], *torch.autograd.grad(rows.sum(), (clean, adv))


def truth(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float, _: str) -> Tensor:
    guidance, consistency = reference.cktat_terms(clean, adv, teacher, tau)
    return guidance + beta * consistency


def errors(actual: Sequence[Tensor], true: Sequence[Tensor], logits: Tensor, beta: float) -> dict[str, float]:
    """Return the largest error of loss and gradients, in the units of the module's docstring; NaN if any is."""
    clean, adv, _ = logits.double().log_softmax(2)
    apart = (clean - adv).abs().nan_to_num(0.0, 0.0, 0.0)  # masked: inf - inf
    units = {"loss": 1e-3, "d_clean": beta * apart.amax(1, keepdim=True).clamp(min=1.0), "d_adv": 1.0 + beta}
    found = {}
    for (name, unit), own, right in zip(units.items(), actual, true, strict=True):
        size = right.abs().amax(1, keepdim=True).clamp(min=unit)
        found[name] = ((own.double() - right).abs() / size).max().item()
    return found


def kl_errors(kl: Tensor, true: Tensor) -> dict[str, float]:
    relative = (kl.double() - true).abs() / true
    return {
        "KL, median": relative.median().item(),
        "KL, worst": relative.max().item(),
        "KL, negative": (kl < 0).double().mean().item(),
    }


def measure(case: str, dtype: torch.dtype, gap: float, losses: Mapping[str, Loss], device: str) -> Iterator[Row]:
    """Yield one row per contender and measure."""
    # For a gap one KL, by tau = 1 and beta = 0: the guidance, whose arithmetic is that of the consistency.
    tau, beta = (1.0, 0.0) if gap else (TAU, BETA)
    logits = make(case, gap).to(device, dtype)
    true = differentiate(truth, logits.double(), tau, beta)
    of = {"case": case, "rows": ROWS, "classes": CLASSES}
    of |= {"true_kl": true[0].median().item()} if gap else {}
    for name, loss in losses.items():
        actual = differentiate(loss, logits, tau, beta)
        found = kl_errors(actual[0], true[0]) if gap else errors(actual, true, logits, beta)
        yield from ({**of, "contender": name, "measure": kind, "value": error} for kind, error in found.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = args.out / f"accuracy-{machine.slug(args.device)}.csv"
    losses = EAGER if args.no_compile else {**EAGER, **compiled()}
    rows: list[Row] = []
    for case in CASES:
        rows += measure(*case, losses, args.device)
        machine.write(path, rows, args.device)  # each time, so that nothing is lost when the time is up
    print(f"saved {path}")


if __name__ == "__main__":
    main()
