"""Promises that only a GPU shows: graphs, streams, synchronisation, mixed precision, memory. ``pytest --backend=gpu``

The tests of the loss run there too, on the GPU's tensors: see conftest.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from cktat_loss import CKTATLoss, adaptive_beta
from cktat_loss.functional import cktat_loss
from tests import oracle

launch = pytest.importorskip("cktat_loss.kernels.launch", reason="needs Triton")
pytestmark = [pytest.mark.kernels, pytest.mark.not_on("torch", "interpreter")]

ROOT = Path(__file__).parents[1]
TAU, BETA = 0.7, 5.3
Run = Callable[..., tuple[Tensor, ...]]
SHAPES = pytest.mark.parametrize("shape", [(128, 10), (256, 1000), (8, 21841)], ids=str)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """PyTorch raises where the CPU would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def logits(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = ((3 * torch.randn(shape)).to("cuda", dtype) for _ in range(3))
    return clean.requires_grad_(), adv.requires_grad_(), teacher


def step(clean: Tensor, adv: Tensor, teacher: Tensor, beta: float | Tensor = BETA) -> tuple[Tensor, ...]:
    loss = cktat_loss(clean, adv, teacher, TAU, beta)
    return loss.detach(), *torch.autograd.grad(loss, (clean, adv))


def recipe(clean: Tensor, adv: Tensor, teacher: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """A loss with labels and both terms, and a grad_output that is not one."""
    loss, terms = cktat_loss(clean, adv, teacher, TAU, BETA, y=y, return_terms=True)
    d_clean, d_adv = torch.autograd.grad(0.25 * loss, (clean, adv))
    return loss.detach(), 4 * d_clean, 4 * d_adv, *terms


BOTH = pytest.mark.parametrize("run", [step, recipe])


def others(run: Run, n: int) -> Tensor:
    """Arguments of a run beside the logits: weights or labels."""
    return torch.rand(n, device="cuda") if run is step else torch.randint(10, (n,), device="cuda")


def assert_right(result: tuple[Tensor, ...], *args: Any) -> None:
    true, n = oracle.truth(*(x.cpu() if isinstance(x, Tensor) else x for x in args)), len(args[0])
    loss, d_clean, d_adv, *terms = (x.cpu() for x in result)
    for term, expected in zip(terms, true[:2], strict=False):
        assert oracle.loss_error(term, expected) <= 2e-5
    assert oracle.loss_error(loss, true.rows.mean()) <= 2e-5
    assert oracle.gradient_error(d_clean, true.d_clean / n, true.unit_clean / n) <= 2e-5
    assert oracle.gradient_error(d_adv, true.d_adv / n, true.unit_adv / n) <= 2e-5


def truth_of(run: Run, inputs: tuple[Tensor, ...], other: Tensor) -> tuple[Any, ...]:
    return (*inputs, TAU, other) if run is step else (*inputs, TAU, BETA, other)


@SHAPES
@BOTH
def test_auto_takes_the_kernels(run: Run, shape: tuple[int, int]) -> None:
    inputs, other = logits(shape), others(run, shape[0])
    with patch.object(launch.Plan, "launch", autospec=True, side_effect=launch.Plan.launch) as launches:
        result = run(*inputs, other)
    kernels = [call.args[0].kernel.__name__ for call in launches.call_args_list]
    assert kernels == ["streaming_kernel" if shape[1] > launch.ROWS_UP_TO else "rows_kernel"] * 2
    assert_right(result, *truth_of(run, inputs, other))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@SHAPES
@BOTH
def test_no_waiting(run: Run, shape: tuple[int, int]) -> None:
    inputs = logits(shape)
    for other in (others(run, shape[0]), *([BETA, torch.ones((), device="cuda")] if run is step else [])):
        run(*inputs, other)  # compiles
        with no_synchronisation():
            run(*inputs, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("wrong", [-100, -1, 10, 2**31 + 3, 2**62])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_label_that_is_no_class_is_nan_for_its_row_alone(backend: Any, wrong: int) -> None:
    """Nobody looks, nobody waits, and no assertion fails on the device."""
    clean, adv, teacher = logits((7, 10))
    y = torch.tensor([0, 1, wrong, 3, wrong, 5, 6], device="cuda")
    with no_synchronisation():
        rows = cktat_loss(clean, adv, teacher, TAU, BETA, y=y, reduction="none", backend=backend)
        gradients = torch.autograd.grad(rows.sum(), (clean, adv))
        weights = adaptive_beta(adv, y)
    for out in (rows, weights, *(d.sum(1) for d in gradients)):
        assert out.isnan().tolist() == [False, False, True, False, True, False, False]


@SHAPES
@BOTH
def test_bit_for_bit_the_same_again(run: Run, shape: tuple[int, int]) -> None:
    inputs, other = logits(shape), others(run, shape[0])
    first = run(*inputs, other)
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(first, run(*inputs, other), strict=True))


def capture_and_replay(run: Run, shape: tuple[int, int]) -> None:
    """Capture a run once, and replay it on other logits and other weights or labels."""
    inputs, other = logits(shape), others(run, shape[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs, other)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*inputs, other)
    for _ in range(3):
        with torch.no_grad():
            for x in (*inputs, other):
                x.copy_(3 * torch.randn(shape) if x.ndim == 2 else others(run, shape[0]))
        graph.replay()
        torch.cuda.synchronize()
        assert_right(result, *truth_of(run, inputs, other))


@SHAPES
@BOTH
def test_in_a_cuda_graph(run: Run, shape: tuple[int, int]) -> None:
    """A capture that fails breaks every later random call of its process, so it gets a process of its own."""
    program = (
        f"from tests import test_gpu as t; t.torch.manual_seed(0); t.capture_and_replay(t.{run.__name__}, {shape})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@SHAPES
@BOTH
def test_two_streams_at_once(run: Run, shape: tuple[int, int]) -> None:
    """Bit for bit what each gets alone."""
    many = [(*logits(shape), others(run, shape[0])) for _ in range(2)]
    alone = [run(*inputs) for inputs in many]
    streams = [torch.cuda.Stream() for _ in many]
    torch.cuda.synchronize()
    for _ in range(20):
        together: list[Any] = []
        for stream, inputs in zip(streams, many, strict=True):
            with torch.cuda.stream(stream):
                together.append(run(*inputs))
        torch.cuda.synchronize()
        for expected, got in zip(alone, together, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_mixed_precision_training(adaptive: bool, dtype: torch.dtype) -> None:
    """A student learns under autocast and GradScaler, which never finds a gradient that is not finite."""
    x, y = torch.randn(64, 20, device="cuda"), torch.randint(10, (64,), device="cuda")
    student = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    teacher = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    criterion = CKTATLoss(teacher, tau=2.0, beta=6.0, adaptive=adaptive, detach_clean=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype):
            clean, adv = student(x), student(x + 0.1 * torch.randn_like(x).sign())
            loss = criterion(clean, adv, x, y=y if adaptive else None)
        assert (clean.dtype, loss.dtype) == (dtype, torch.float32)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not scaler.is_enabled() or scaler.get_scale() == 65536  # it halves with every step that it skips
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradients(dtype: torch.dtype) -> None:
    """Nothing of the size of the logits beside them, and nothing at all without a graph."""
    inputs = logits((512, 1000), dtype)
    size = inputs[0].numel() * inputs[0].element_size()

    def peak(run: Run) -> float:
        run(*inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # What was asked for, not the blocks that the allocator had at hand.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        kept = run(*inputs)
        torch.cuda.synchronize()
        del kept
        return float(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before) / size

    assert 2 <= peak(step) <= 2.1
    assert 2 <= peak(lambda *x: recipe(*x, others(recipe, 512))) <= 4.2  # and what they are scaled to
    assert peak(lambda *x: cktat_loss(*(y.detach() for y in x), TAU, BETA)) <= 0.1


def test_compiled() -> None:
    """Plain ops in one graph, for any tau, beta and batch."""
    torch.compiler.reset()
    compiled = torch.compile(cktat_loss, fullgraph=True)
    for n, tau, beta in ((128, 0.7, 5.3), (128, 1.7, 5.3), (128, 2.7, 1.3), (96, 3.7, 2.3), (64, 0.9, 0.7)):
        clean, adv, teacher = logits((n, 100))
        loss = compiled(clean, adv, teacher, tau, beta)
        assert_right((loss.detach(), *torch.autograd.grad(loss, (clean, adv))), clean, adv, teacher, tau, beta)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    inputs = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in logits((128, 10))]
    assert_right(step(*inputs), *inputs, TAU, BETA)


def test_changing_logits_in_place_before_backward_is_noticed() -> None:
    clean, adv, teacher = logits((8, 10))
    changed = adv * 1
    loss = cktat_loss(clean, changed, teacher, TAU, BETA)
    changed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_more_logits_than_32_bits_count() -> None:
    free, _ = torch.cuda.mem_get_info()
    n, classes = 2**31 // 21841 + 2, 21841
    if free < 4 * 2 * n * classes + 2**30:
        pytest.skip("needs 19 GB of GPU memory")
    clean = torch.randn(n, classes, device="cuda", dtype=torch.bfloat16)
    adv = torch.randn(n, classes, device="cuda", dtype=torch.bfloat16)
    loss = cktat_loss(clean.requires_grad_(), adv.requires_grad_(), clean, TAU, BETA, reduction="sum")
    d_clean, d_adv = torch.autograd.grad(loss, (clean, adv))
    last = slice(n - 3, n)
    parts = [x[last].cpu() for x in (clean, adv, clean)]
    true = oracle.truth(*parts, TAU, BETA)
    assert oracle.gradient_error(d_clean[last].cpu(), true.d_clean, true.unit_clean) <= 2e-5
    assert oracle.gradient_error(d_adv[last].cpu(), true.d_adv, true.unit_adv) <= 2e-5
