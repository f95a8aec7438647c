"""Time, memory and launches of the loss, and its host's share, against Eq. 17 as people write it.

    python -m benchmarks.speed          (--help explains the options)

All contenders of a problem take turns, and ratios are taken round by round, so that other work on the machine slows all
contenders alike. Writes speed-<device>.csv; benchmarks/README.md explains its columns.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pkgutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
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
SHORTEST = 0.005  # seconds that a reading of the CPU's clock should span; shorter calls are repeated
CYCLES = 2e9  # per second, at least as many as a GPU makes
Call = Callable[[], object]
Loss = Callable[..., Tensor]  # of clean, adversarial and teacher logits, tau, beta and reduction
Row = dict[str, object]


# The contenders. Each takes a reduction: "batchmean", or "none" for one loss per row.


def usual(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "batchmean"
) -> Tensor:
    guidance = kl_div(F.log_softmax(adv, 1), F.softmax(teacher / tau, 1), reduction)
    return guidance + beta * kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction)


def log_target(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "batchmean"
) -> Tensor:
    log_a, log_t, log_c = F.log_softmax(adv, 1), F.log_softmax(teacher / tau, 1), F.log_softmax(clean, 1)
    guidance = kl_div(log_a, log_t, reduction, log_target=True)
    return guidance + beta * kl_div(log_a, log_c, reduction, log_target=True)


def kl_div(log_q: Tensor, p: Tensor, reduction: str, log_target: bool = False) -> Tensor:
    loss = F.kl_div(log_q, p, reduction=reduction, log_target=log_target)
    return loss.sum(1) if reduction == "none" else loss


def ours(
    clean: Tensor, adv: Tensor, teacher: Tensor, tau: float = TAU, beta: float = BETA, reduction: str = "batchmean"
) -> Tensor:
    # On a GPU the kernels, or an error: never the fallback.
    backend: Any = "triton" if clean.is_cuda and not torch.compiler.is_compiling() else "auto"
    how: Any = reduction.removeprefix("batch")
    return functional.cktat_loss(clean, adv, teacher, tau, beta, reduction=how, backend=backend)


EAGER: dict[str, Loss] = {"usual": usual, "usual, log_target": log_target, "ours": ours}


@cache
def compiled() -> dict[str, Loss]:
    """Return the compiled contenders: static in all but the batch, which any_rows marks."""
    return {
        "usual, compiled": torch.compile(usual, dynamic=False),
        "ours, compiled": torch.compile(ours, dynamic=False),
    }


def any_rows(logits: Sequence[Tensor]) -> None:
    """Mark the batch as dynamic, so that one compilation serves all batch sizes."""
    for x in logits:
        torch._dynamo.mark_dynamic(x, 0)


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
    losses: dict[str, Callable[[], Tensor]] = {name: partial(loss, *logits) for name, loss in EAGER.items()}
    if clean.is_cuda:
        y = torch.randint(clean.shape[1], (len(clean),), device=clean.device)
        recipe = partial(functional.cktat_loss, *logits, 2.0, BETA, y=y, detach_clean=True, return_terms=True)
        losses["ours, upstream 1/4"] = lambda: ours(*logits) / 4
        losses["ours, the recipe"] = lambda: recipe()[0]
        losses["an empty autograd.Function"] = lambda: Empty.apply(clean, adv)
    if compiling and clean.shape[1] in COMPILED_AT:
        any_rows(logits)
        losses |= {name: partial(loss, *logits) for name, loss in compiled().items()}

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        clean.grad = adv.grad = None

    return {name: partial(step, loss) for name, loss in losses.items()}


# The clocks.


def cpu_seconds(call: Call, repeats: int) -> float:
    """Return the processor's time of one call, so that waiting for other processes does not count."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def host_seconds(call: Call) -> float:
    """Return the host's CPU time of one call on a GPU, for whose results nothing waits."""
    torch.cuda.synchronize()
    return cpu_seconds(call, 10)


def device_seconds(call: Call, host: float) -> float:
    """Return a GPU's time of one call by events, with its L2 cache overwritten before.

    The GPU sleeps while the host launches, so that events see the device alone.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    l2_cache().zero_()
    torch.cuda._sleep(int(CYCLES * (1.5 * host + 1e-4)))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def l2_cache() -> Tensor:
    """Return a buffer larger than the L2 cache of any GPU."""
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def take_turns(clocks: Mapping[str, Callable[[], float]], seconds: float = SECONDS) -> dict[str, list[float]]:
    """Return the readings of each clock, one per round. Every round starts with another clock."""
    names = list(clocks)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.monotonic() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(clocks[name]())
    return times


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the garbage collector and autograd's second thread away."""
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        gc.enable()


def quantiles(values: Sequence[float], name: str) -> dict[str, float]:
    """Return the 20, 50 and 80 % quantiles."""
    tenths = statistics.quantiles([*values, *values][: max(2, len(values))], n=10, method="inclusive")
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
    if counter is not None:
        before = counter()
        call()
        return counter() - before
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in profiler.events() or ())


# The problems.


def make_logits(n: int, classes: int, dtype: str, kind: str, device: str) -> list[Tensor]:
    """Return clean, adversarial and teacher logits of scale 4.

    For a small KL, as late in training, the adversarial logits are the clean logits plus noise of scale 0.01.
    """
    clean, adv, teacher = (4 * torch.randn(n, classes, device=device) for _ in range(3))
    adv = clean + 0.01 * adv / 4 if kind == "small KL" else adv
    clean, adv, teacher = (x.to(getattr(torch, dtype)) for x in (clean, adv, teacher))
    return [clean.requires_grad_(), adv.requires_grad_(), teacher]


def measure(logits: list[Tensor], device: str, compiling: bool) -> Iterator[Row]:
    """Yield one row per contender, and one for a copy that moves as many bytes as the fewest moves would."""
    calls, failed = {}, {}
    for name, call in contenders(logits, compiling).items():
        try:
            call()
            call()
            calls[name] = call
        except Exception as error:  # whatever a compiler or a full memory says, the others are worth measuring
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} failed: {error}", flush=True)
    logit = logits[0].detach()
    peaks = {name: peak_bytes(call, device) / (logit.numel() * logit.element_size()) for name, call in calls.items()}
    source = torch.randn(5 * logit.numel() // 2, device=device).to(
        logit.dtype
    )  # read three logits, write two gradients
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    host = {}
    with undisturbed():
        if device == "cuda":
            taken = take_turns({name: partial(host_seconds, call) for name, call in calls.items()}, SECONDS / 5)
            host = {name: statistics.median(own) for name, own in taken.items()}
            clocks = {name: partial(device_seconds, call, host[name]) for name, call in calls.items()}
        else:
            repeats = {name: int(SHORTEST / max(cpu_seconds(call, 1), 1e-7)) for name, call in calls.items()}
            clocks = {name: partial(cpu_seconds, call, max(1, repeats[name])) for name, call in calls.items()}
        times = take_turns(clocks)
    for name, own in times.items():
        row: Row = {"contender": name}
        if device == "cpu" or machine.computes():  # else the times are garbage, but for the host's
            faster = [base / one for base, one in zip(times.get("usual", own), own, strict=True)]
            row |= {**quantiles([1e6 * one for one in own], "us"), **quantiles(faster, "times_faster")}
        row |= {"host_us": 1e6 * host[name]} if host else {}
        yield {**row, "peak_elements": peaks.get(name, ""), "rounds": len(own)}
    yield from ({"contender": name, "note": note} for name, note in failed.items())


def compile_ahead(problems: Sequence[tuple[int, int, str]], compiling: bool) -> None:
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


def compile_one(compiling: bool, problem: tuple[int, int, str]) -> None:
    """Run all contenders once on few rows, but as many as the kernels' tiles are made for."""
    n, classes, dtype = problem
    for call in contenders(make_logits(min(n, 512), classes, dtype, "", "cuda"), compiling).values():
        with suppress(Exception):  # the others have to be compiled too
            call()


def shape(text: str) -> tuple[int, int]:
    n, classes = map(int, text.split("x"))
    return n, classes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxC", help="(default: those of the pages)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), metavar="DTYPE")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument(
        "--counter",
        type=pkgutil.resolve_name,
        metavar="MODULE:FUNCTION",
        help="counts launches where torch's profiler cannot",
    )
    args = parser.parse_args(arguments)
    device, compiling = args.device, not args.no_compile
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path: Path = args.out / f"speed-{machine.slug(device)}.csv"
    shapes, dtypes = args.shapes or SHAPES[device], args.dtypes or DTYPES[device]
    rows: list[Row] = []
    if device == "cuda":
        compile_ahead([(*one, dtype) for one, dtype in product(shapes, dtypes)], compiling)
    for (n, classes), dtype, kind in product(shapes, dtypes, KINDS[device]):
        of = {"n": n, "classes": classes, "dtype": dtype, "logits": kind}
        logits = make_logits(n, classes, dtype, kind, device)
        found = [{**of, **row, **machine.environment(device)} for row in measure(logits, device, compiling)]
        rows += found
        machine.write(path, rows)  # each time, so that nothing is lost when the time is up
        column = "us_50" if "us_50" in found[0] else "host_us"
        told = (f"{row['contender']} {row[column]:.0f} us" for row in found if column in row)
        print(f"{n} x {classes}, {dtype}, {kind}: {'; '.join(told)}", flush=True)
    # Last, since a profiler of CUDA 13.0 slows down what follows it.
    for n, classes in (args.shapes or LAUNCHES_AT) if device == "cuda" else ():
        for name, call in contenders(make_logits(n, classes, dtypes[0], "", device), compiling).items():
            for row in rows:
                if (row["n"], row["classes"], row["dtype"], row["contender"]) == (n, classes, dtypes[0], name):
                    call()
                    row["launches"] = launches(call, args.counter)
        machine.write(path, rows)
    print(f"saved {path}")
    return int(any("note" in row and str(row["contender"]).startswith("ours") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
