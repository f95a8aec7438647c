"""When the Triton kernels are taken, what they launch, and what they leave in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cktat_loss import CKTATLoss, _autograd, functional, kernels
from tests import oracle

launch = pytest.importorskip("cktat_loss.kernels.launch", reason="needs Triton")
pytestmark = [pytest.mark.kernels, pytest.mark.not_on("torch", "gpu")]

TAU, BETA = 0.7, 5.3
FAMILIES = pytest.mark.parametrize("shape", [(128, 10), (300, 10), (3, 5003)], ids=["one program", "rows", "streaming"])


def logits(n: int = 5, classes: int = 10, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = ((3 * torch.randn(n, classes)).to(dtype) for _ in range(3))
    return clean.requires_grad_(), adv.requires_grad_(), teacher


def loss_of(*inputs: Tensor, **options: Any) -> Any:
    return functional.cktat_loss(*inputs, TAU, BETA, backend="triton", **options)


def held(loss: Tensor) -> list[Tensor | None]:
    """The gradients that the forward pass has made."""
    return list(loss.grad_fn.precomputed)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""

    def counted(self: Any, *args: Any, launch: Any = launch.Plan.launch) -> None:
        names.append(self.kernel.__name__)
        with _disable_current_modes():  # a dispatch mode must not see the interpreter's own operations
            launch(self, *args)

    names: list[str] = []
    monkeypatch.setattr(launch.Plan, "launch", counted)
    return names


# When.


def test_on_cpu_tensors_by_name_alone(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autograd, "choose", _autograd.choose.__wrapped__)
    for backend in ("auto", "torch"):
        functional.cktat_loss(*logits(), backend=backend).backward()
    assert launches == []
    clean, adv, teacher = logits()
    CKTATLoss(nn.Identity(), TAU, BETA, backend="triton")(clean, adv, teacher).backward()
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    assert oracle.gradient_error(adv.grad, true.d_adv / 5, true.unit_adv / 5) <= 2e-5
    assert launches == ["rows_kernel", "rows_kernel"]


def test_float64_is_refused_by_name() -> None:
    clean, adv, teacher = logits()
    with pytest.raises(TypeError, match=r"backend='triton' takes half and single precision, got adv_logits: .*float64"):
        loss_of(clean, adv.double(), teacher)


def test_tensors_without_memory_of_their_own_are_left_to_plain_ops() -> None:
    from torch._subclasses import FakeTensorMode

    class Wrapped(Tensor):
        pass

    clean, adv, teacher = logits()
    assert kernels.supports(clean)
    assert not kernels.supports(clean.detach().as_subclass(Wrapped))
    with FakeTensorMode() as mode:
        assert not kernels.supports(mode.from_tensor(clean))
        loss = functional.cktat_loss(*(mode.from_tensor(x) for x in (clean, adv, teacher)), TAU, BETA)
    assert loss.shape == ()


def test_a_graph_has_plain_ops_instead(launches: list[str]) -> None:
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    inputs = logits()
    compiled(*inputs).backward()
    assert launches == []


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.script")  # torch's own, when it first loads its forward mode
@pytest.mark.parametrize("f", [torch.func.grad, torch.func.hessian, torch.func.jacfwd], ids=lambda f: f.__name__)
def test_transforms_have_them_too(f: Callable[..., Any], launches: list[str]) -> None:
    clean, adv, teacher = (x.detach() for x in logits(3, 4))

    def loss(backend: Any) -> Callable[[Tensor], Tensor]:
        return lambda a: functional.cktat_loss(clean, a, teacher, TAU, BETA, backend=backend)

    torch.testing.assert_close(f(loss("triton"))(adv), f(loss("torch"))(adv))
    many = torch.stack((adv, 2 * adv))
    torch.testing.assert_close(torch.vmap(f(loss("triton")))(many), torch.vmap(f(loss("torch")))(many))
    assert launches == []


# What they launch.


@contextmanager
def torch_ops() -> Iterator[Counter[str]]:
    """The operations that torch is asked for, without allocations and views."""
    nothing = {
        "detach",
        "new_empty",
        "empty.memory_format",
        "empty_like",
        "view",
        "fill_.Scalar",
        "ones_like",
        "expand",
    }

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = op.name().removeprefix("aten::")
            seen.update([name] * (name not in nothing))
            return op(*args, **(kwargs or {}))

    seen: Counter[str] = Counter()
    with Counting():
        yield seen


@FAMILIES
@pytest.mark.parametrize("options", ["", "y", "return_terms", "beta", "detach_clean"])
@pytest.mark.parametrize(("dtype", "upstream"), [(torch.float32, 1.0), (torch.float32, 2.5), (torch.float16, 2.5)])
def test_a_launch_forward_and_one_backward(
    dtype: torch.dtype, upstream: float, options: str, shape: tuple[int, int], launches: list[str]
) -> None:
    """And where several programs share a loss, one sum of torch's; nothing else but memory."""
    clean, adv, teacher = logits(*shape, dtype)
    weights = torch.rand(shape[0]) if options == "beta" else BETA
    asked: dict[str, Any] = {"y": {"y": torch.arange(shape[0]) % 10}, "": {}, "beta": {}}.get(options, {options: True})
    scale = torch.tensor(upstream)
    with torch_ops() as seen:
        loss = functional.cktat_loss(clean, adv, teacher, TAU, weights, backend="triton", **asked)
        loss = loss[0] if options == "return_terms" else loss
        torch.autograd.grad(loss, adv if options == "detach_clean" else (clean, adv), scale)
    assert launches == ["streaming_kernel" if shape[1] > launch.ROWS_UP_TO else "rows_kernel"] * 2
    looked_at = Counter({"min": 1, "max": 1, "_local_scalar_dense": 2}) if options == "y" else Counter()
    assert seen - looked_at == Counter(sum=int(shape != (128, 10)))


def test_an_empty_batch_launches_nothing(launches: list[str]) -> None:
    loss = loss_of(*logits(0))
    loss.backward()
    assert loss.isnan()
    assert launches == []


@FAMILIES
def test_bit_for_bit_the_same_again(shape: tuple[int, int]) -> None:
    inputs = logits(*shape)
    results = []
    for _ in range(2):
        loss = loss_of(*inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs[:2])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_hooks_of_a_profiler_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct launch skips Triton's hooks only if nobody has set one."""
    launched: list[str] = []

    class Compiled:
        function = packed_metadata = None

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args: launched.append("with hooks")

        def run(self, *args: Any) -> None:
            launched.append("without hooks")

    plan = launch.Plan(None, 1, {}, {}, Compiled())
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    for enter, leave in ((None, None), (print, None), (None, print)):
        monkeypatch.setattr(launch, "RUNTIME", SimpleNamespace(launch_enter_hook=enter, launch_exit_hook=leave))
        plan.launch(1, True, 0)
    monkeypatch.setattr(launch, "RUNTIME", None)  # a version of Triton that does not say
    plan.launch(1, True, 0)
    assert launched == ["without hooks", *["with hooks"] * 3]


# What they leave in memory.


@FAMILIES
def test_at_upstream_one_the_held_gradients_are_the_result(shape: tuple[int, int]) -> None:
    """The backward launch does not touch them."""
    inputs = logits(*shape)
    loss = loss_of(*inputs)
    buffers = held(loss)
    for buffer in buffers:
        assert buffer is not None
        buffer[-1, -1] = 7.0  # what nobody would compute
    pointers = [buffer.data_ptr() for buffer in buffers if buffer is not None]
    del buffers, buffer
    results = torch.autograd.grad(loss, inputs[:2])
    assert [d.data_ptr() for d in results] == pointers
    assert all(d[-1, -1] == 7.0 for d in results)


@FAMILIES
@pytest.mark.parametrize("upstream", [2.5, 0.0, -1.0, float("nan")])
def test_at_another_upstream_they_are_computed_anew_into_the_same_memory(
    upstream: float, shape: tuple[int, int]
) -> None:
    inputs = logits(*shape, dtype=torch.bfloat16)
    loss = loss_of(*inputs)
    pointers = [buffer.data_ptr() for buffer in held(loss) if buffer is not None]
    for buffer in held(loss):
        assert buffer is not None
        buffer.fill_(torch.nan)
    del buffer
    results = torch.autograd.grad(loss, inputs[:2], torch.tensor(upstream))
    assert [d.data_ptr() for d in results] == pointers
    if upstream != upstream:
        assert all(d.isnan().all() for d in results)
        return
    true, scale = oracle.truth(*inputs, TAU, BETA), upstream / shape[0]
    for d, expected, unit in zip(results, true[3:5], true[5:], strict=True):
        assert oracle.gradient_error(d, scale * expected, abs(scale) * unit) <= 2e-5


@FAMILIES
@pytest.mark.parametrize("first", [1.0, 2.5])
def test_a_second_pass_has_memory_of_its_own(first: float, shape: tuple[int, int]) -> None:
    inputs = logits(*shape)
    loss = loss_of(*inputs)
    pointers = {buffer.data_ptr() for buffer in held(loss) if buffer is not None}
    kept = torch.autograd.grad(loss, inputs[:2], torch.tensor(first), retain_graph=True)
    copies = [d.clone() for d in kept]
    again = torch.autograd.grad(loss, inputs[:2], torch.tensor(3.5 - first), retain_graph=True)
    assert pointers.isdisjoint(d.data_ptr() for d in again)
    assert all(torch.equal(d, copy) for d, copy in zip(kept, copies, strict=True))


LAZY: dict[str, tuple[torch.dtype, torch.dtype, str]] = {
    "float16": (torch.float16, torch.float16, "mean"),
    "clean float16": (torch.float16, torch.float32, "sum"),
    "adv float16": (torch.float32, torch.float16, "mean"),
    "none": (torch.float32, torch.float32, "none"),
}


@pytest.mark.parametrize("name", LAZY)
def test_gradients_that_would_not_be_right_yet_wait_for_the_backward_pass(name: str) -> None:
    of_clean, of_adv, reduction = LAZY[name]
    clean, adv, teacher = logits()
    clean, adv = clean.detach().to(of_clean).requires_grad_(), adv.detach().to(of_adv).requires_grad_()
    assert held(loss_of(clean, adv, teacher, reduction=reduction)) == [None, None]


def test_float16_logits_that_need_no_gradient_make_nobody_wait() -> None:
    clean, adv, teacher = logits()
    half = clean.detach().half().requires_grad_()
    assert [d is None for d in held(loss_of(half, adv, teacher.half(), detach_clean=True))] == [True, False]
    assert [d is None for d in held(loss_of(half.detach(), adv, teacher))] == [True, False]
    assert [d is None for d in held(loss_of(clean, adv.detach().half(), teacher))] == [False, True]


def test_marked_tests_reach_the_kernels(launches: list[str]) -> None:
    """``backends.use`` sends the loss of CPU tensors to the kernels."""
    functional.cktat_loss(*logits()).backward()
    assert launches == ["rows_kernel"] * 2
