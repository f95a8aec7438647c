"""Forward plus backward of the loss on this machine, against Eq. 17 as people write it. Prints a Markdown table.

python benchmarks/loss.py          (--help explains the options)
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cktat_loss import functional

TAU, BETA = 5.3, 5.7
SHAPES = ((128, 10), (4096, 10), (512, 100), (256, 1000), (64, 21841))
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def usual(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    guidance = F.kl_div(F.log_softmax(adv, 1), F.softmax(teacher / TAU, 1), reduction="batchmean")
    return guidance + BETA * F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="batchmean")


def ours(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    return functional.cktat_loss(clean, adv, teacher, TAU, BETA)


def closed_form(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    return functional.cktat_loss(clean, adv, teacher, TAU, BETA, backend="torch")


def logits(n: int, classes: int, noise: float | None, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of scale 4; with ``noise``, the adversarial ones are the clean ones and that much noise."""
    clean, adv, teacher = 4 * torch.randn(3, n, classes, device=device)
    if noise is not None:
        adv = clean + noise * adv / 4
    return clean.clone().requires_grad_(), adv.clone().requires_grad_(), teacher.clone()


def seconds(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], repeats: int) -> float:
    wait = torch.cuda.synchronize if inputs[0].is_cuda else int
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.autograd.grad(loss(*inputs), inputs[:2])
    wait()
    return (time.perf_counter() - start) / repeats


def compare(contenders: dict[str, Loss], inputs: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds a call, the contenders taking turns."""
    for loss in contenders.values():
        seconds(loss, inputs, 2)
    repeats = max(1, int(0.02 / seconds(usual, inputs, 1)))
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, loss in contenders.items():
            runs[name].append(seconds(loss, inputs, repeats))
    return runs


def row(runs: dict[str, list[float]]) -> str:
    """Microseconds of the usual expression, and how many times faster each contender is: 20, 50 and 80 % quantiles."""
    cells = [f"{1e6 * statistics.median(runs['usual']):.0f}"]
    for name, times in runs.items():
        if name != "usual":
            ratios = sorted(usual / own for usual, own in zip(runs["usual"], times, strict=True))
            low, middle, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.2, 0.5, 0.8))
            cells.append(f"**{middle:.2f}** ({low:.2f} - {high:.2f})")
    return " | ".join(cells)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU's)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds of each contender (default: 21)")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of both (needs a C++ compiler)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    contenders: dict[str, Loss] = {"usual": usual, "ours": ours}
    if args.device == "cuda":
        contenders["closed form"] = closed_form
    if args.compile:
        contenders |= {"usual, compiled": torch.compile(usual), "ours, compiled": torch.compile(ours)}
    print(
        f"{machine(args.device)}, {args.threads} CPU thread(s), "
        f"torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}; float32, forward "
        "and backward; medians (20 - 80 % quantiles) of the ratio, round by round\n"
    )
    print(
        "| N x C | logits | usual, us | " + " | ".join(f"{name}, times faster" for name in list(contenders)[1:]) + " |"
    )
    print("|---|---|---|" + "---|" * (len(contenders) - 1))
    for noise, kind in ((None, "independent"), (1.0, "noise 1"), (0.01, "small KL")):
        for n, classes in SHAPES:
            torch.compiler.reset()
            runs = compare(contenders, logits(n, classes, noise, args.device), args.rounds)
            print(f"| {n} x {classes} | {kind} | {row(runs)} |", flush=True)


if __name__ == "__main__":
    main()
