"""Time, memory and launches of the loss on this machine, against Eq. 17 as people write it.

python -m benchmarks.loss          (--help explains the options)

All contenders of a problem take turns, round by round. Writes loss-<device>.csv; what each column means and what not to
conclude from it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import contenders, machine
from benchmarks.contenders import Contender, Loss
from benchmarks.eager_cost import counted
from benchmarks.memory import page_faults, peak_bytes
from benchmarks.timing import Call, Clock, clock_for, quantiles, speedups, take_turns

CRITERION = ((128, 10), (512, 100), (256, 1000), (64, 21841))  # with a small KL too, and never skipped for time
GRID = tuple((n, classes) for n in (128, 1024, 4096) for classes in (10, 100, 1000, 21841))
SHAPES = (*GRID, *(shape for shape in CRITERION if shape not in GRID))
DTYPES = ("float32", "bfloat16")
FEWEST_ROUNDS, MOST_ROUNDS = 5, 31
RUNS_BESIDE = 4  # launches, memory, the length of a round and page faults are measured apart
# Elements of each logit position that the fewest moves read and write: three logits; with gradients two more.
MOVES = {"forward": 3, "forward + backward": 5}
BYTES_PER_POSITION = 80  # the usual expression's nine float32, the logits, the gradients, the copy; and some more
COMPILE_SHARE = 0.5  # of the time, at most

Row = dict[str, object]
COLUMNS: Row = dict.fromkeys((
    "n", "classes", "dtype", "logits", "pass", "contender", "shapes", "us_20", "us_50", "us_80",
    "times_faster_20", "times_faster_50", "times_faster_80", "gb_per_s", "of_copy_speed", "rounds", "repeats",
    "launches", "peak_elements", "page_faults", "note",
), "")  # fmt: skip


class Problem(NamedTuple):
    dtype: str
    classes: int
    n: int
    logits: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.n} x {self.classes}, {self.logits}"

    @property
    def positions(self) -> int:
        return self.n * self.classes

    @property
    def weight(self) -> float:
        """Its claim on the time: large problems get more, but not in proportion."""
        return math.sqrt(max(self.positions, 100_000))


def problems(shapes: Sequence[tuple[int, int]], dtypes: Sequence[str]) -> list[Problem]:
    """Those that share a compilation follow each other, the small ones first."""
    return [
        Problem(dtype, classes, n, logits)
        for dtype in dtypes
        for classes, n in sorted((classes, n) for n, classes in shapes)
        for logits in ("independent", "small KL")
        if logits == "independent" or (n, classes) in CRITERION
    ]


def make_logits(problem: Problem, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of scale 4; for a small KL, the adversarial ones are the clean ones and noise of scale 0.01."""
    clean, adv, teacher = 4 * torch.randn(3, problem.n, problem.classes, device=device)
    if problem.logits == "small KL":
        adv = clean + 0.01 * adv / 4
    dtype = getattr(torch, problem.dtype)
    # Rows of one tensor would share storage, and be kept alive by each other.
    return (
        clean.to(dtype, copy=True).requires_grad_(),
        adv.to(dtype, copy=True).requires_grad_(),
        teacher.to(dtype, copy=True),
    )


def calls_of(loss: Loss, logits: tuple[Tensor, Tensor, Tensor], part: Contender) -> dict[str, Call]:
    """Forward without gradients, as in an evaluation; forward and backward, as in training."""

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(*logits)

    def both() -> tuple[Tensor | None, ...]:
        # A contender that leaves a gradient out says so in its note.
        return torch.autograd.grad(loss(*logits), logits[:2], allow_unused=bool(part.note))

    return {"forward": forward, "forward + backward": both}


def copy_of(elements: int, like: Tensor) -> Call:
    """A copy that moves so many elements, half of them read and half written: the floor of the time."""
    source = torch.zeros(max(1, elements // 2), dtype=like.dtype, device=like.device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def launches(call: Call, device: str) -> int:
    """CPU: operators that PyTorch dispatches, views apart. CUDA: kernels and copies that the profiler sees."""
    if device == "cpu":
        return counted(call).launches
    if not machine.computes():  # the profiler would look for the driver's own
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return sum(not getattr(e, "is_user_annotation", False) for e in on_device)


def measure(
    problem: Problem,
    logits: tuple[Tensor, Tensor, Tensor],
    chosen: Mapping[str, Contender],
    losses: Mapping[str, Loss],
    clock: Clock,
    device: str,
    seconds: float,
) -> list[Row]:
    """A row a contender and pass."""
    end = time.monotonic() + seconds
    calls: dict[tuple[str, str], Call] = {}
    extras: dict[tuple[str, str], Row] = {}
    for name, contender in chosen.items():
        for pass_, call in calls_of(losses[name], logits, contender).items():
            # Nothing of a compiled graph goes through PyTorch's dispatcher; and what runs first is not measured.
            count = call() and "" if contender.compiled and device == "cpu" else launches(call, device)
            peak = peak_bytes(call, device) / (problem.positions * logits[0].element_size())
            calls[pass_, name] = call
            extras[pass_, name] = {"launches": count, "peak_elements": peak, "note": contender.note}
    for pass_, moves in MOVES.items():
        calls[pass_, "copy"] = copy_of(moves * problem.positions, logits[0])
        calls[pass_, "copy"]()

    def rounds(seconds_a_round: float) -> int:
        return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int((end - time.monotonic()) / max(seconds_a_round, 1e-9))))

    times, repeats = take_turns(calls, clock, rounds)
    faults = {key: page_faults(call) if device == "cpu" else None for key, call in calls.items()}
    rows: list[Row] = []
    for pass_, moves in MOVES.items():
        moved = moves * problem.positions * logits[0].element_size()
        copied = quantiles(times[pass_, "copy"], "s")["s_50"]
        for name in (*chosen, "copy"):
            own = times[pass_, name]
            middle = quantiles(own, "s")["s_50"]
            faster = speedups(times[pass_, "usual"], own)
            rows.append(
                {
                    "pass": pass_, "contender": name,
                    "shapes": "" if name not in chosen or not chosen[name].compiled else "any N, this C",
                    **quantiles([1e6 * s for s in own], "us"), **quantiles(faster, "times_faster"),
                    "gb_per_s": moved / middle / 1e9, "of_copy_speed": copied / middle,
                    "rounds": len(own), "repeats": repeats[pass_, name], "page_faults": faults[pass_, name],
                    **extras.get((pass_, name), {}),
                }
            )  # fmt: skip
    return rows


def probe(problem: Problem, clock: Clock, device: str) -> float:
    """Seconds of the usual expression, forward and backward, guessed from its first rows."""
    part = problem._replace(n=min(problem.n, 64))
    call = calls_of(contenders.usual, make_logits(part, device), Contender(contenders.usual))["forward + backward"]
    call()
    return clock(call, 1) * problem.n / part.n


def compile_all(
    chosen: Mapping[str, Contender], problem: Problem, device: str
) -> tuple[dict[str, Loss], dict[str, str], float]:
    """Compiled losses for the classes and dtype of a problem; why others failed; the seconds that it took."""
    start = time.monotonic()
    torch.compiler.reset()
    losses, failed = {}, {}
    for name, contender in chosen.items():
        if not contender.compiled:
            continue
        losses[name] = contenders.compiled(contender.loss)
        logits = make_logits(problem._replace(n=min(problem.n, 64)), device)
        contenders.any_rows(*logits)
        try:
            for call in calls_of(losses[name], logits, contender).values():
                call()
        except Exception as error:  # whatever a compiler may say: the others are still worth measuring
            failed[name] = f"torch.compile failed: {type(error).__name__}"
            print(f"{name}: {error}", flush=True)
    return losses, failed, time.monotonic() - start


def run(
    chosen: Mapping[str, Contender], todo: Sequence[Problem], clock: Clock, device: str, minutes: float
) -> Iterator[list[Row]]:
    """All problems within the time, one after the other: each gets its share of what is left, and at least five rounds.

    What does not fit into memory, or would take more than twice its share, gives one row that says so.
    """
    seconds = 60 * minutes
    end = time.monotonic() + seconds
    left = list(todo)
    compiled_for = 0.0
    groups = [list(group) for _, group in groupby(todo, lambda p: (p.dtype, p.classes))]
    for done, group in enumerate(groups):
        here, losses, absent = dict(chosen), {name: c.loss for name, c in chosen.items()}, {}
        compiling = [name for name, c in chosen.items() if c.compiled]
        later = 0.0
        if compiling:
            # At a guess, it takes as long as it took before.
            if compiled_for * (1 + 1 / max(done, 1)) > COMPILE_SHARE * seconds:
                absent = dict.fromkeys(compiling, "no time left to compile: --minutes")
            else:
                made, absent, took = compile_all(chosen, group[0], device)
                losses |= made
                compiled_for += took
                later = compiled_for / (done + 1) * (len(groups) - done - 1)
                later = max(0.0, min(later, COMPILE_SHARE * seconds - compiled_for))
                print(f"{group[0].dtype}, {group[0].classes} classes: compiled in {took:.0f} s", flush=True)
        for name in absent:
            del here[name]
        for problem in group:
            of = {"n": problem.n, "classes": problem.classes, "dtype": problem.dtype, "logits": problem.logits}
            share = max(0.0, end - time.monotonic() - later) * problem.weight / sum(p.weight for p in left)
            left.remove(problem)
            if why := too_large(problem, here, clock, device, share):
                print(f"{problem}: skipped, {why}", flush=True)
                yield [{**of, "note": f"skipped, {why}"}]
                continue
            logits = make_logits(problem, device)
            if any(contender.compiled for contender in here.values()):
                contenders.any_rows(*logits)
            rows = measure(problem, logits, here, losses, clock, device, share)
            print(f"{problem}: {summary(rows)}", flush=True)
            rows += [{"contender": name, "note": f"left out, {why}"} for name, why in absent.items()]
            yield [{**of, **row} for row in rows]


def too_large(problem: Problem, chosen: Mapping[str, Contender], clock: Clock, device: str, share: float) -> str:
    needed, free = BYTES_PER_POSITION * problem.positions, machine.free_bytes(device)
    if needed > free:
        return f"it may need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    if (problem.n, problem.classes) in CRITERION:  # whatever the time: what all else is compared by
        return ""
    seconds = probe(problem, clock, device) * len(chosen) * (FEWEST_ROUNDS + RUNS_BESIDE)
    if seconds > 2 * max(1.0, share):
        return (
            f"{FEWEST_ROUNDS} rounds take about {seconds:.0f} s, and its share of the time is {share:.0f} s: --minutes"
        )
    return ""


def summary(rows: Sequence[Row]) -> str:
    both = {row["contender"]: row for row in rows if row["pass"] == "forward + backward"}
    faster = (f"{name} {row['times_faster_50']:.2f}x" for name, row in both.items() if name not in ("usual", "copy"))
    return f"usual {both['usual']['us_50']:.0f} us; {', '.join(faster)} ({both['usual']['rounds']} rounds)"


def shape(text: str) -> tuple[int, int]:
    n, classes = map(int, text.split("x"))
    return n, classes


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--device", default=machine.default_device(), choices=("cpu", "cuda"), help="(default: a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="NxC", help="default: all")
    parser.add_argument(
        "--dtypes", nargs="+", default=DTYPES, choices=(*DTYPES, "float16"), help="default: %(default)s"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes half of the time")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    chosen, left_out = contenders.choose(args.device, not args.no_compile)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    clock = clock_for(args.device, args.threads)
    where = {**machine.environment(args.device), "clock": clock.name}
    todo = problems(args.shapes, args.dtypes)
    path: Path = args.out / f"loss-{machine.slug(args.device)}.csv"
    rows = [COLUMNS | {"contender": name, "note": f"left out, {why}"} | where for name, why in left_out.items()]
    for more in run(chosen, todo, clock, args.device, args.minutes):
        rows += [COLUMNS | row | where for row in more]
        machine.write(path, rows)  # each time, so that nothing is lost where the time runs out
    print(f"saved {path}")
    return path


if __name__ == "__main__":
    main()
