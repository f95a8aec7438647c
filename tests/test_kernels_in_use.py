"""The Triton backend as users meet it: when it is taken, as operators, without a glance at the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cktat_loss import CKTATLoss, functional, kernels, operators, ops
from tests import oracle
from tests.forms import by_autograd, rows_of_loss

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.interpreter

TAU, BETA = 0.7, 5.3


def logits(n: int = 5, classes: int = 10, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = ((3 * torch.randn(n, classes)).to(dtype) for _ in range(3))
    return clean.requires_grad_(), adv.requires_grad_(), teacher


def test_by_name_on_cpu_tensors(launches: list[str]) -> None:
    clean, adv, teacher = logits()
    criterion = CKTATLoss(nn.Identity(), TAU, BETA, backend="triton")
    criterion(clean, adv, teacher).backward()
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    assert oracle.gradient_error(adv.grad, true.d_adv / 5, true.unit_adv / 5) <= 2e-5
    assert launches == ["rows_kernel", "sum_kernel", "rows_backward_kernel"]


def test_on_cpu_tensors_by_name_alone(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_to_triton", ops._to_triton.__wrapped__)  # type: ignore[attr-defined]
    for backend in ("auto", "torch"):
        functional.cktat_loss(*logits(), backend=backend).backward()  # type: ignore[arg-type]
    assert launches == []


def test_float64_is_refused_by_name() -> None:
    clean, adv, teacher = logits()
    with pytest.raises(TypeError, match=r"backend='triton' takes half and single precision, got adv_logits: .*float64"):
        functional.cktat_loss(clean, adv.double(), teacher, backend="triton")


def test_tensors_without_memory_of_their_own_are_left_to_the_closed_form() -> None:
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


def test_launches_and_nothing_else(launches: list[str]) -> None:
    """A training step of the loss: two launches forward, one backward, and no operation of torch's beside memory."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[op.name()] += 1
            return op(*args, **(kwargs or {}))

    seen: Counter[str] = Counter()
    clean, adv, teacher = logits()
    upstream, beta = torch.tensor(3.0), torch.rand(5)
    with Counting():
        loss = functional.cktat_loss(clean, adv, teacher, TAU, beta, backend="triton")
        torch.autograd.grad(loss, (clean, adv), upstream)
    memory = {"aten::detach", "aten::new_empty", "aten::empty.memory_format", "aten::fill_.Scalar", "aten::view"}
    assert set(seen) <= memory, seen
    assert launches == ["rows_kernel", "sum_kernel", "rows_backward_kernel"]


@pytest.mark.parametrize("classes", [10, 5003])
def test_bit_for_bit_the_same_again(classes: int) -> None:
    args = *logits(300 if classes == 10 else 3, classes), TAU, BETA
    first = functional.cktat_loss_and_grads(*args, backend="triton")
    for one, other in zip(first, functional.cktat_loss_and_grads(*args, backend="triton"), strict=True):
        assert torch.equal(one, other)
    graphs = [by_autograd(rows_of_loss, *args) for _ in range(2)]
    for one, other in zip(*graphs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in opcheck
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operators(dtype: torch.dtype) -> None:
    clean, adv, teacher = logits(dtype=dtype)
    tau = torch.tensor(TAU)
    torch.library.opcheck(operators.terms, (clean, adv, teacher, tau))
    state = operators.terms(clean, adv, teacher, tau)[2].detach()
    for needed in ((True, True), (True, False), (False, True)):
        inputs = clean.detach(), adv.detach(), teacher, tau, state, torch.rand(5), torch.rand(5), *needed
        torch.library.opcheck(operators.gradients, inputs)


def test_operators_under_autocast() -> None:
    clean, adv, teacher = logits()
    plain = operators.terms(clean, adv, teacher, torch.tensor(TAU))
    with torch.autocast("cpu", torch.bfloat16):
        inside = operators.terms(clean, adv, teacher, torch.tensor(TAU))
    for one, other in zip(inside, plain, strict=True):
        assert torch.equal(one, other)


def test_an_operator_differentiated_twice_raises() -> None:
    clean, adv, teacher = logits()
    guidance, consistency, _ = operators.terms(clean, adv, teacher, torch.tensor(TAU))
    (d_adv,) = torch.autograd.grad((guidance + consistency).sum(), adv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        d_adv.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_as_operators(reduction: Any, launches: list[str]) -> None:
    """One graph with the kernels in it, whatever tau, beta and the batch become, compiled anew once for each."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float, beta: float) -> Tensor:
        return functional.cktat_loss(clean, adv, teacher, tau, beta, reduction=reduction, backend="triton")

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    steps = (5, 0.7, 5.3), (5, 1.7, 5.3), (5, 2.7, 5.3), (5, 2.7, 1.3), (5, 2.7, 2.3), (7, 3.1, 3.3), (9, 1.0, 2.0)
    for n, tau, beta in steps:
        clean, adv, teacher = logits(n)
        value = compiled(clean, adv, teacher, tau, beta)
        rows, d_clean, d_adv = value.detach(), *torch.autograd.grad(value.sum(), (clean, adv))
        true = oracle.truth(clean, adv, teacher, tau, beta)
        expected = true.rows if reduction == "none" else getattr(true.rows, reduction)()
        scale = 1 / n if reduction == "mean" else 1.0
        assert oracle.loss_error(rows, expected) <= 2e-5
        assert oracle.gradient_error(d_clean, scale * true.d_clean, scale * true.unit_clean) <= 2e-5
        assert oracle.gradient_error(d_adv, scale * true.d_adv, scale * true.unit_adv) <= 2e-5
    assert counter.frame_count <= 4
    assert set(launches) == {"rows_kernel", "rows_backward_kernel"}


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.script")  # torch's own, when it first loads its forward mode
@pytest.mark.parametrize("f", [torch.func.grad, torch.func.hessian], ids=["grad", "hessian"])
def test_transforms_by_name(f: Callable[..., Any]) -> None:
    clean, adv, teacher = (x.detach() for x in logits(3, 4))

    def loss(backend: Any) -> Callable[[Tensor], Tensor]:
        return lambda a: functional.cktat_loss(clean, a, teacher, TAU, BETA, backend=backend)

    torch.testing.assert_close(f(loss("triton"))(adv), f(loss("torch"))(adv))
    many = torch.stack((adv, 2 * adv))
    torch.testing.assert_close(torch.vmap(f(loss("triton")))(many), torch.vmap(f(loss("torch")))(many))


def test_an_empty_batch_launches_nothing(launches: list[str]) -> None:
    functional.cktat_loss(*logits(0), backend="triton").backward()
    assert kernels.loss_and_grads(*logits(0), TAU, BETA, "mean").loss.isnan()
    assert launches == []
