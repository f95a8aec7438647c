"""Seconds spent in each phase of a training step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the seconds of named phases.

    On CUDA by events on its stream: the CPU, which runs ahead of the GPU, neither waits for it nor is what is timed.
    Elsewhere by `now`, the wall clock.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._on_cuda, self._now = device.type == "cuda", now
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is done inside."""
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            started = self._now()
            yield
            self._seconds[phase] += self._now() - started

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call of this."""
        for phase, start, end in self._events:
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
        taken = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return taken
