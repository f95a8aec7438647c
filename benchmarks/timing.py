"""Times of several calls that take turns, so that what else the machine does falls on each alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

QUANTILES = (20, 50, 80)
SHORTEST = 0.005  # seconds that one reading of the clock should span; shorter calls are repeated
# More than the L2 cache of any GPU.
FLUSHED_BYTES = 256 << 20

Call = Callable[[], object]
Key = TypeVar("Key")


class Clock(Protocol):
    name: str

    def __call__(self, call: Call, repeats: int) -> float:
        """Mean seconds of a call."""


class CPUClock:
    """With one thread the processor's time, so that waiting for other processes does not count; else the wall's."""

    def __init__(self, threads: int) -> None:
        self.name, self.read = ("CPU time", time.process_time) if threads == 1 else ("wall clock", time.perf_counter)

    def __call__(self, call: Call, repeats: int) -> float:
        start = self.read()
        for _ in range(repeats):
            call()
        return (self.read() - start) / repeats


class CUDAClock:
    """Events around each call. Between calls the L2 cache is overwritten, as a training step would between losses."""

    name = "CUDA events, L2 flushed"

    def __init__(self) -> None:
        self.cache = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call, repeats: int) -> float:
        events = []
        for _ in range(repeats):
            self.cache.zero_()
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / repeats


def clock_for(device: str, threads: int) -> Clock:
    return CPUClock(threads) if device == "cpu" else CUDAClock()


def take_turns(
    calls: Mapping[Key, Call], clock: Clock, rounds: Callable[[float], int]
) -> tuple[dict[Key, list[float]], dict[Key, int]]:
    """Seconds of each call, a number a round; and how often a round repeats it.

    The calls should have been made once, to be warm. ``rounds`` is told what a round takes, and answers how many to
    make. Every round starts with another call, so that none always finds the cache as the same other one left it.
    """
    first = {key: clock(call, 1) for key, call in calls.items()}
    repeats = {key: max(1, int(SHORTEST / max(seconds, 1e-7))) for key, seconds in first.items()}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    for turn in range(rounds(sum(first[key] * repeats[key] for key in keys))):
        start = turn % len(keys)
        for key in keys[start:] + keys[:start]:
            times[key].append(clock(calls[key], repeats[key]))
    return times, repeats


def quantiles(values: Iterable[float], name: str) -> dict[str, float]:
    """The 20, 50 and 80 % quantiles: ``name_20``, ...; between two values, the mean weighted by nearness."""
    ordered = sorted(values)
    result = {}
    for percent in QUANTILES:
        below, part = divmod(percent * (len(ordered) - 1), 100)
        above = min(below + 1, len(ordered) - 1)
        result[f"{name}_{percent}"] = ordered[below] + (ordered[above] - ordered[below]) * part / 100
    return result


def speedups(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times faster than the base, round by round."""
    return [b / o for b, o in zip(base, own, strict=True)]
