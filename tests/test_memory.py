"""Forward and backward hold at most four elements a logit position at once, the two gradients included.

Counted by the profiler at the CPU allocator, so temporaries inside an operator count too.
"""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cktat_loss.functional import cktat_loss, cktat_loss_and_grads

SHAPES = pytest.mark.parametrize("shape", [(64, 21841), (512, 1000)], ids=str)


def peak_bytes(step, trace: Path) -> int:
    step()  # what is allocated once, for good
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    profiler.export_chrome_trace(str(trace))
    del kept
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@SHAPES
def test_the_measure_sees_what_it_should(shape: tuple[int, int], tmp_path: Path) -> None:
    """Three tensors at once, though only one is left."""
    x = torch.randn(shape)
    assert 3.0 <= peak_bytes(lambda: (x + 1) * (x + 2), tmp_path / "trace") / (4 * x.numel()) < 3.01


@SHAPES
@pytest.mark.parametrize("near", [False, True])
def test_forward_and_backward(near: bool, shape: tuple[int, int], tmp_path: Path) -> None:
    """Also where a tiny KL is summed a second time."""
    base = torch.randn(shape)
    clean, adv, teacher = ((base if near else 0) + (1e-3 if near else 1) * torch.randn(shape) for _ in range(3))
    clean.requires_grad_()
    adv.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(cktat_loss(clean, adv, teacher, 1.0), (clean, adv))

    per_position = peak_bytes(step, tmp_path / "trace") / (4 * clean.numel())
    assert 2 <= per_position <= 4


@SHAPES
def test_loss_and_grads(shape: tuple[int, int], tmp_path: Path) -> None:
    clean, adv, teacher = torch.randn(3, *shape)
    step_peak = peak_bytes(lambda: cktat_loss_and_grads(clean, adv, teacher), tmp_path / "trace")
    assert 2 <= step_peak / (4 * clean.numel()) <= 4


@SHAPES
def test_no_gradient_no_memory(shape: tuple[int, int], tmp_path: Path) -> None:
    """Without gradients, a block at a time is all there is."""
    clean, adv, teacher = torch.randn(3, *shape)
    per_position = peak_bytes(lambda: cktat_loss(clean, adv, teacher), tmp_path / "trace") / (4 * clean.numel())
    assert per_position <= 1
