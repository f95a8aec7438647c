"""Time, memory and launches of the loss, and its host's share, against Eq. 17 as people write it.

    python -m benchmarks.speed          (--help explains the options)

All contenders of a problem take turns, and ratios are taken round by round, so that other work on the machine slows all
contenders alike. Writes speed-<device>.csv; benchmarks/README.md explains its columns.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pkgutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.machine import Row
from cktat_loss import functional

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces each start and stop on stderr

TAU, BETA = 5.3, 5.7  # not dyadic, since 5 and 6 hide a scalar that lost precision
SHAPES = {
    "cpu": ((128, 10), (512, 100), (256, 1000), (64, 21841)),
    "cuda": (
        (128, 10), (1024, 1000), (4096, 1000), (64, 21841), (128, 21841), (4096, 21841), (4096, 50257), (8192, 32000),
    ),
}  # fmt: skip
KINDS = {"cpu": ("independent", "small KL"), "cuda": ("independent",)}  # the kernels have no branch on the logits
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
COMPILED_AT = (10, 100, 1000, 21841)  # numbers of classes: each takes seconds to compile
LAUNCHES_AT = ((128, 10), (1024, 1000), (128, 21841))
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30  # on a GPU, a reading costs 90 us for overwriting the L2 cache
SECONDS = 10.0  # after which a problem gets no further round
AHEAD = 60.0  # seconds for compiling in parallel
SHORTEST = 0.005  # seconds that a reading of the CPU's clock should span
CYCLES = 2e9  # per second, at least as many as a GPU makes
Call = Callable[[], object]
Clock = Callable[[], float]  # seconds of one call
Loss = Callable[..., Tensor]  # of clean, adversarial and teacher logits, tau, beta and reduction


class Problem(NamedTuple):
    n: int
    classes: int
    dtype: str
    logits: str  # independent, or with a small KL

    def make(self, device: str) -> list[Tensor]:
        """Return clean, adversarial and teacher logits of scale 4.

        For a small KL, as late in training, the adversarial logits are the clean logits plus noise of scale 0.01.
        """
        clean, adv, teacher = (4 * torch.randn(self.n, self.classes, device=device) for _ in range(3))
        adv = clean + 0.01 * adv / 4 if self.logits == "small KL" else adv
        clean, adv, teacher = (x.to(getattr(torch, self.dtype)) for x in (clean, adv, teacher))
        return [clean.requires_grad_(), adv.requires_grad_(), teacher]


# The contenders. Each takes a reduction: "batchmean", or "none" for one loss per row.


def usual(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float, reduction: str) -> Tensor:
    guidance = kl_div(F.log_softmax(adv, 1), F.softmax(teacher / tau, 1), reduction)
    return guidance + beta * kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction)


def log_target(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float, reduction: str) -> Tensor:
    log_a, log_t, log_c = F.log_softmax(adv, 1), F.log_softmax(teacher / tau, 1), F.log_softmax(clean, 1)
    guidance = kl_div(log_a, log_t, reduction, log_target=True)
    return guidance + beta * kl_div(log_a, log_c, reduction, log_target=True)


def kl_div(log_q: Tensor, p: Tensor, reduction: str, log_target: bool = False) -> Tensor:
    loss = F.kl_div(log_q, p, reduction=reduction, log_target=log_target)
    return loss.sum(1) if reduction == "none" else loss


def ours(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float, reduction: str) -> Tensor:
    # On a GPU the kernels, or an error: never the fallback.
    backend: Any = "triton" if clean.is_cuda and not torch.compiler.is_compiling() else "auto"
    how: Any = reduction.removeprefix("batch")
    return functional.cktat_loss(clean, adv, teacher, tau, beta, reduction=how, backend=backend)


EAGER: dict[str, Loss] = {"usual": usual, "usual, log_target": log_target, "ours": ours}


@cache
def compiled() -> dict[str, Loss]:
    """Return the compiled contenders: static in all that is not marked as dynamic."""
    losses = {"usual, compiled": usual, "ours, compiled": ours}
    return {name: torch.compile(loss, dynamic=False) for name, loss in losses.items()}


class Empty(torch.autograd.Function):
    """The least that a loss with two gradients costs its host."""

    @staticmethod
    def forward(ctx: object, clean: Tensor, adv: Tensor) -> Tensor:
        return clean.new_empty(())

    @staticmethod
    def backward(ctx: object, *_: Tensor) -> tuple[None, None]:
        return None, None


def contenders(logits: list[Tensor], compiling: bool) -> dict[str, Call]:
    """Return forward and backward of each contender on these logits, the usual expression first."""
    clean, adv, _ = logits
    losses = dict(EAGER)
    if clean.is_cuda:
        y = torch.randint(clean.shape[1], (len(clean),), device=clean.device)
        recipe = partial(functional.cktat_loss, *logits, 2.0, BETA, y=y, detach_clean=True, return_terms=True)
        losses["ours, upstream 1/4"] = lambda *arguments: ours(*arguments) / 4
        losses["ours, the recipe"] = lambda *_: recipe()[0]
        losses["an empty autograd.Function"] = lambda *_: Empty.apply(clean, adv)
    if compiling and clean.shape[1] in COMPILED_AT:
        losses |= compiled()
        for x in logits:
            torch._dynamo.mark_dynamic(x, 0)  # one compilation serves all numbers of rows

    def step(loss: Loss) -> None:
        loss(*logits, TAU, BETA, "batchmean").backward()
        clean.grad = adv.grad = None

    return {name: partial(step, loss) for name, loss in losses.items()}


def compile_ahead(problems: Sequence[Problem], compiling: bool) -> None:
    """Compile all that a GPU will run, in parallel, into the caches on disk of Triton and torch.compile."""
    began = time.monotonic()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    workers = max(1, min(8, (os.cpu_count() or 2) - 1, len(problems)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        deque(pool.map(partial(compile_one, compiling), problems, timeout=AHEAD))
    except Exception as error:  # measure() will meet it again, and compile what is missing
        print(f"compiling in parallel ended early: {error!r}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)


def compile_one(compiling: bool, problem: Problem) -> None:
    """Run all contenders once on few rows, but as many as the kernels' tiles are made for."""
    few = problem._replace(n=min(problem.n, 512))
    for call in contenders(few.make("cuda"), compiling).values():
        with suppress(Exception):  # the others have to be compiled too
            call()


# The clocks.


def cpu_seconds(call: Call, repeats: int = 1) -> float:
    """Return the processor's time of one call, so that waiting for other processes does not count."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def cpu_clock(call: Call) -> Clock:
    """Return a clock that repeats short calls, which would else be timed with cold caches."""
    return partial(cpu_seconds, call, max(1, int(SHORTEST / max(cpu_seconds(call), 1e-7))))


def host_seconds(call: Call) -> float:
    """Return the host's CPU time of one call on a GPU, for whose results nothing waits."""
    torch.cuda.synchronize()
    return cpu_seconds(call, 10)


def device_seconds(call: Call, host: float, larger: Tensor) -> float:
    """Return a GPU's time of one call by events, after a tensor larger than its L2 cache has been overwritten.

    The GPU sleeps while the host launches, so that events see the device alone.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    larger.zero_()
    torch.cuda._sleep(int(CYCLES * (1.5 * host + 1e-4)))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(clocks: Mapping[str, Clock], seconds: float = SECONDS) -> dict[str, list[float]]:
    """Return the readings of each clock, one per round. Every round starts with another clock."""
    order, end = deque(clocks), time.monotonic() + seconds
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        for name in order:
            times[name].append(clocks[name]())
        order.rotate(-1)
    return times


def quantiles(values: Sequence[float], name: str) -> dict[str, float]:
    """Return the 20, 50 and 80 % quantiles."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {f"{name}_20": tenths[1], f"{name}_50": tenths[4], f"{name}_80": tenths[7]}


# Memory and launches.


def peak_bytes(call: Call, device: str = "cpu") -> int:
    """Return the most bytes that a call holds at once, beyond those before it. The call should not be the first."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak


def launches(call: Call, counter: Callable[[], int] | None) -> int:
    """Return the launches of a call as its host makes them, counted by the counter or by the profiler."""
    call()
    if counter is not None:
        before = counter()
        call()
        return counter() - before
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in profiler.events() or ())


# The program.


def measure(problem: Problem, device: str, compiling: bool) -> Iterator[Row]:
    """Yield one row per contender, and one for a copy that moves as many bytes as the fewest moves would."""
    logits = problem.make(device)
    calls, peaks, notes = contenders(logits, compiling), {}, {}
    for name, call in calls.items():
        try:
            call()
            peaks[name] = peak_bytes(call, device) / (logits[0].numel() * logits[0].element_size())
        except Exception as error:  # whatever a compiler or a full memory says, the others are worth measuring
            notes[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} failed: {error}", flush=True)
    calls = {name: calls[name] for name in peaks}
    source = torch.randn(5 * logits[0].numel() // 2, device=device).to(logits[0].dtype)  # three logits, two gradients
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    gc.collect()
    gc.disable()  # a collection would fall on whoever is being timed
    with torch.autograd.set_multithreading_enabled(False):  # autograd's second thread has a clock of its own
        if device == "cuda":
            taken = take_turns({name: partial(host_seconds, call) for name, call in calls.items()}, SECONDS / 5)
            host = {name: statistics.median(own) for name, own in taken.items()}
            larger = torch.empty(256 << 20, dtype=torch.int8, device=device)
            clocks = {name: partial(device_seconds, call, host[name], larger) for name, call in calls.items()}
        else:
            host, clocks = {}, {name: cpu_clock(call) for name, call in calls.items()}
        times = take_turns(clocks)
    gc.enable()
    for name, own in times.items():
        row: Row = {"contender": name}
        if device == "cpu" or machine.computes():  # else the times are garbage, but for the host's
            faster = [base / one for base, one in zip(times.get("usual", own), own, strict=True)]
            row |= {**quantiles([1e6 * one for one in own], "us"), **quantiles(faster, "times_faster")}
        row |= {"host_us": 1e6 * host[name]} if host else {}
        yield {**row, "peak_elements": peaks.get(name, ""), "rounds": len(own)}
    yield from ({"contender": name, "note": note} for name, note in notes.items())


def shape(text: str) -> tuple[int, int]:
    n, classes = map(int, text.split("x"))
    return n, classes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxC", help="(default: those of the pages)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), metavar="DTYPE")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--counter", type=pkgutil.resolve_name, metavar="MODULE:FUNCTION", help="counts launches")
    args = parser.parse_args(arguments)
    device, compiling = args.device, not args.no_compile
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = args.out / f"speed-{machine.slug(device)}.csv"
    shapes, dtypes = args.shapes or SHAPES[device], args.dtypes or DTYPES[device]
    problems = [Problem(*size, dtype, kind) for size, dtype, kind in product(shapes, dtypes, KINDS[device])]
    if device == "cuda":
        compile_ahead(problems, compiling)
    rows: dict[tuple[Problem, object], Row] = {}
    for problem in problems:
        print(*problem, flush=True)
        for row in measure(problem, device, compiling):
            rows[problem, row["contender"]] = {**problem._asdict(), **row}
            print(f"    {row['contender']}: {row.get('us_50', row.get('host_us', math.nan)):.0f} us", flush=True)
        machine.write(path, [*rows.values()], device)  # each time, so that nothing is lost when the time is up
    # Last, since a profiler of CUDA 13.0 slows down what follows it.
    for problem in problems if device == "cuda" else ():
        if problem[:2] in (args.shapes or LAUNCHES_AT) and problem.dtype == dtypes[0]:
            for name, call in contenders(problem.make(device), compiling).items():
                if "note" not in rows[problem, name]:
                    rows[problem, name]["launches"] = launches(call, args.counter)
            machine.write(path, [*rows.values()], device)
    print(f"saved {path}")
    return int(any("note" in row and str(row["contender"]).startswith("ours") for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
