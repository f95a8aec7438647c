"""What a small loss costs the host of a GPU: CPU time and kernel launches of forward and backward, in turns.

python -m benchmarks host          (--help explains the options)

Launches are counted by torch's profiler. Backward passes run in the calling thread; torch's own thread, woken up,
costs every contender the same on top.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.contenders import BETA, TAU, log_targets, ours, usual
from benchmarks.timing import Call, CPUClock, take_turns
from cktat_loss import CKTATLoss

SHAPES = ((128, 10), (1024, 1000))


class Empty(torch.autograd.Function):
    """The least that a loss with two gradients can cost."""

    @staticmethod
    def forward(ctx: object, clean: Tensor, adv: Tensor) -> Tensor:
        return clean.new_empty(())

    @staticmethod
    def backward(ctx: object, *_: Tensor) -> tuple[None, None]:
        return None, None


def contenders(n: int, classes: int, compiling: bool) -> dict[str, Call]:
    """Forward and backward of each, on the same logits."""
    clean, adv = (torch.zeros(n, classes, device="cuda", requires_grad=True) for _ in range(2))
    teacher, y = torch.zeros(n, classes, device="cuda"), torch.zeros(n, dtype=torch.int64, device="cuda")
    criterion = CKTATLoss(None, tau=TAU, beta=BETA)
    recipe = CKTATLoss(None, tau=TAU, beta=BETA, adaptive=True, detach_clean=True)
    losses = {
        "an empty autograd.Function": lambda: Empty.apply(clean, adv),
        "ours": lambda: ours(clean, adv, teacher),
        "ours, CKTATLoss": lambda: criterion(clean, adv, teacher_logits=teacher),
        "ours, the recipe": lambda: recipe(clean, adv, teacher_logits=teacher, y=y, return_terms=True)[0],
        "usual": lambda: usual(clean, adv, teacher),
        "usual, log_target": lambda: log_targets(clean, adv, teacher),
    }
    if compiling:
        fast, fast_ours = torch.compile(usual), torch.compile(ours)
        losses["usual, compiled"] = lambda: fast(clean, adv, teacher)
        losses["ours, compiled"] = lambda: fast_ours(clean, adv, teacher)

    def step(loss: Call) -> Call:
        def both() -> None:
            loss().backward()  # type: ignore[attr-defined]
            clean.grad = adv.grad = None

        return both

    return {name: step(loss) for name, loss in losses.items()}


def launches(call: Call) -> int:
    """Of kernels, as the host makes them; what a GPU fills or copies on its own is none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in profile.events())


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection, no second thread."""
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        gc.enable()


def measure(n: int, classes: int, rounds: int, compiling: bool, fake: bool) -> Iterator[dict[str, object]]:
    calls = contenders(n, classes, compiling)
    with undisturbed():
        for call in calls.values():
            for _ in range(20):
                call()
        times, _ = take_turns(calls, CPUClock(1), lambda _: rounds)
        medians = {name: 1e6 * statistics.median(taken) for name, taken in times.items()}
    for name, call in calls.items():
        yield machine.environment("cuda") | {
            "n": n,
            "classes": classes,
            "contender": name,
            "cpu_us": medians[name],
            "of_usual": medians[name] / medians["usual"],
            "launches": "" if fake else launches(call),
            "gpu": "none" if fake else "real",
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "host.csv", help="CSV (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--fake", action="store_true", help="the GPU is none: only the host's time means something")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU, or a CUDA runtime that does nothing")
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name(), "(host time only)" if args.fake else "")
    rows = []
    for n, classes in SHAPES:
        for row in measure(n, classes, args.rounds, not args.no_compile, args.fake):
            print(
                f"{n} x {classes}  {row['contender']:28}{row['cpu_us']:8.1f} us  {row['launches']} launches", flush=True
            )
            rows.append(row)
    machine.write(args.out, rows)


if __name__ == "__main__":
    main()
