"""What only a GPU shows: CUDA graphs, streams, synchronisation, mixed precision, memory. ``pytest -m gpu``

The tests of the loss run there too, on the GPU's tensors: see conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cktat_loss import CKTATLoss, adaptive_beta, kernels
from cktat_loss.functional import cktat_loss, cktat_loss_and_grads
from tests import oracle

pytestmark = pytest.mark.gpu

TAU, BETA = 0.7, 5.3
SHAPES = pytest.mark.parametrize("shape", [(128, 10), (256, 1000), (8, 21841)], ids=str)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """PyTorch raises where the CPU would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def logits(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = ((3 * torch.randn(shape)).to("cuda", dtype) for _ in range(3))
    return clean.requires_grad_(), adv.requires_grad_(), teacher


def step(clean: Tensor, adv: Tensor, teacher: Tensor, beta: float | Tensor = BETA) -> tuple[Tensor, ...]:
    loss = cktat_loss(clean, adv, teacher, TAU, beta)
    return loss.detach(), *torch.autograd.grad(loss, (clean, adv))


def one_pass(clean: Tensor, adv: Tensor, teacher: Tensor, beta: float | Tensor = BETA) -> tuple[Tensor, ...]:
    return tuple(cktat_loss_and_grads(clean, adv, teacher, TAU, beta))


BOTH = pytest.mark.parametrize("run", [step, one_pass], ids=["graph", "one pass"])


def assert_right(result: tuple[Tensor, ...], *args: Any) -> None:
    true, n = oracle.truth(*(x.cpu() if isinstance(x, Tensor) else x for x in args)), len(args[0])
    loss, d_clean, d_adv = (x.cpu() for x in result)
    assert oracle.loss_error(loss, true.rows.mean()) <= 2e-5
    assert oracle.gradient_error(d_clean, true.d_clean / n, true.unit_clean / n) <= 2e-5
    assert oracle.gradient_error(d_adv, true.d_adv / n, true.unit_adv / n) <= 2e-5


@SHAPES
@BOTH
def test_auto_takes_the_kernels(run: Callable[..., Any], shape: tuple[int, int]) -> None:
    inputs = logits(shape)
    assert all(map(kernels.supports, inputs))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        result = run(*inputs)
        torch.cuda.synchronize()
    names = [event.key for event in profiler.key_averages()]
    assert any("rows_kernel" in name or "streaming_kernel" in name for name in names), names
    assert_right(result, *inputs, TAU, BETA)


@SHAPES
@BOTH
def test_no_waiting(run: Callable[..., Any], shape: tuple[int, int], no_synchronisation: None) -> None:
    inputs = logits(shape)
    for beta in (BETA, torch.ones((), device="cuda"), torch.rand(shape[0], device="cuda")):
        run(*inputs, beta)


@SHAPES
@BOTH
def test_in_a_cuda_graph(run: Callable[..., Any], shape: tuple[int, int]) -> None:
    """Captured once, replayed on other logits and other weights."""
    inputs, beta = logits(shape), torch.rand(shape[0], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs, beta)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*inputs, beta)
    for _ in range(3):
        with torch.no_grad():
            for x in inputs:
                x.copy_(3 * torch.randn(shape))
            beta.copy_(6 * torch.rand(shape[0]))
        graph.replay()
        torch.cuda.synchronize()
        assert_right(result, *inputs, TAU, beta)


@SHAPES
@BOTH
def test_two_streams_at_once(run: Callable[..., Any], shape: tuple[int, int]) -> None:
    """Bit for bit what each gets alone."""
    many = [logits(shape) for _ in range(2)]
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
    """A student learns under autocast and GradScaler; no step is lost to a gradient that is not finite."""
    x, y = torch.randn(64, 20, device="cuda"), torch.randint(10, (64,), device="cuda")
    student = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    teacher = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).cuda()
    criterion = CKTATLoss(teacher, tau=2.0, beta=6.0, detach_clean=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype):
            clean, adv = student(x), student(x + 0.1 * torch.randn_like(x).sign())
            loss = criterion(clean, adv, x, beta=adaptive_beta(adv, y) if adaptive else None)
        assert (clean.dtype, loss.dtype) == (dtype, torch.float32)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradients(dtype: torch.dtype) -> None:
    """Nothing of the size of the logits beside them, and nothing at all without a graph."""
    inputs = logits((512, 1000), dtype)
    size = inputs[0].numel() * inputs[0].element_size()

    def peak(run: Callable[..., Any]) -> float:
        run(*inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run(*inputs)
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / size

    assert 2 <= peak(step) <= 2.1
    assert 2 <= peak(one_pass) <= 2.1
    assert peak(lambda *x: cktat_loss(*(y.detach() for y in x), TAU, BETA)) <= 0.1


def test_more_logits_than_32_bits_count() -> None:
    free, _ = torch.cuda.mem_get_info()
    n, classes = 2**31 // 21841 + 2, 21841
    if free < 4 * 2 * n * classes + 2**30:
        pytest.skip("needs 19 GB of GPU memory")
    clean = torch.randn(n, classes, device="cuda", dtype=torch.bfloat16)
    adv = torch.randn(n, classes, device="cuda", dtype=torch.bfloat16)
    _, d_clean, d_adv = cktat_loss_and_grads(clean, adv, clean, TAU, BETA, reduction="sum")
    last = slice(n - 3, n)
    parts = [x[last].cpu() for x in (clean, adv, clean)]
    true = oracle.truth(*parts, TAU, BETA)
    assert oracle.gradient_error(d_clean[last].cpu(), true.d_clean, true.unit_clean) <= 2e-5
    assert oracle.gradient_error(d_adv[last].cpu(), true.d_adv, true.unit_adv) <= 2e-5
