"""The most memory that a call holds at once, over what was there before it; and the pages that it has to ask for."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces each start and stop on stderr


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Of one call, which should not be the first: that may allocate for good.

    CPU: allocations and releases as PyTorch's profiler sees them at the allocator, added up in their order. CUDA: the
    allocator's own count.
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    del kept
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def page_faults(call: Callable[[], object]) -> int | None:
    """How often a call touches memory that the operating system has yet to give; None where it doesn't say (Windows).

    The C library may give large tensors back and ask for them again, or keep them. Which of the two depends on what the
    process did before, so that equal calls can differ by half in time: this tells them apart.
    """
    try:
        import resource
    except ImportError:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
