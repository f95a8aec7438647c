"""What a small loss costs the host of a GPU: CPU time and kernel launches of forward and backward, in turns.

python -m benchmarks host          (--help explains the options)

Launches are counted by torch's profiler, the fill of the upstream gradient among them. Backward passes run in
the calling thread; torch's own thread, woken up, costs every contender the same on top.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.contenders import BETA, TAU, log_targets, ours, usual
from benchmarks.timing import Call, CPUClock, quantiles, take_turns
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
        "ours, upstream 1/4": lambda: ours(clean, adv, teacher) / 4,
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


def launches(call: Call, counter: Callable[[], int] | None) -> int:
    """Of kernels, as the host makes them; what a GPU fills or copies on its own is none."""
    if counter is not None:
        before = counter()
        call()
        return counter() - before
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


def measure(
    n: int, classes: int, rounds: int, compiling: bool, counter: Callable[[], int] | None
) -> Iterator[dict[str, object]]:
    calls = contenders(n, classes, compiling)
    with undisturbed():
        for call in calls.values():
            for _ in range(20):
                call()
        times, _ = take_turns(calls, CPUClock(1), lambda _: rounds)
        counted = {name: launches(call, counter) for name, call in calls.items()}
    for name, taken in times.items():
        yield machine.environment("cuda") | {
            "host": machine.environment("cpu")["machine"],
            "gpu": "real" if machine.computes() else "none",
            "n": n,
            "classes": classes,
            "contender": name,
            **quantiles([1e6 * seconds for seconds in taken], "us"),
            "of_usual": statistics.median(taken) / statistics.median(times["usual"]),
            "launches": counted[name],
            "rounds": rounds,
        }


def function(text: str) -> Callable[[], int]:
    module, name = text.split(":")
    found: Callable[[], int] = getattr(importlib.import_module(module), name)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of host.csv (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--counter",
        type=function,
        metavar="MODULE:FUNCTION",
        help="says how many kernels were launched so far, where torch's profiler cannot (default: the profiler)",
    )
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU, or a CUDA runtime that does nothing")
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name(), "" if machine.computes() else "(which computes nothing: the host's time alone)")
    rows = []
    for n, classes in SHAPES:
        for row in measure(n, classes, args.rounds, not args.no_compile, args.counter):
            print(
                f"{n} x {classes}  {row['contender']:28}{row['us_50']:8.1f} us  {row['launches']} launches", flush=True
            )
            rows.append(row)
    machine.write(args.out / "host.csv", rows)


if __name__ == "__main__":
    main()
