"""A teacher whose deep copy would go on using the original, or would lose something, is refused."""

import functools
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cktat_loss import CKTATLoss, functional


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class Transform:
    """An object such as torchvision's Lambda."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.functions = [function]

    def __call__(self, x: Tensor) -> Tensor:
        return self.functions[0](x)


class Stages(nn.Module):
    """A module that keeps a function of itself in an attribute of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = make_net()
        function = lambda x: self.body(x)  # noqa: E731
        kept: dict[str, object] = {
            "list": [function],
            "dict": {"call": function},
            "namespace": types.SimpleNamespace(call=function),
            "callable object": Transform(function),
            "partial": functools.partial(function),
            "decorated function": torch.no_grad()(function),
            "compiled function": torch.compile(function, backend="eager"),
            "bound function": types.MethodType(lambda self, x: function(x), self),
            "weak reference": weakref.ref(self),
        }
        self.kept = kept[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


KINDS = (
    *("list", "dict", "namespace", "callable object", "partial", "decorated function", "compiled function"),
    *("bound function", "weak reference"),
)


def with_forward(make: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> nn.Module:
    net = make_net()
    net.forward = make(net)
    return net


def with_a_bound_method(net: nn.Module) -> Callable[[Tensor], Tensor]:
    forward = net.forward
    return lambda x: forward((x - 0.5) / 0.25)


def with_a_default(net: nn.Module) -> Callable[[Tensor], Tensor]:
    other = make_net().eval()
    return lambda x, net=other: net(x)


def with_a_list(net: nn.Module) -> Callable[[Tensor], Tensor]:
    layers = list(net)
    return lambda x: layers[2](x)


def with_an_object(net: nn.Module) -> Callable[[Tensor], Tensor]:
    class Holder:
        def __init__(self) -> None:
            self.layer = net[2]

    holder = Holder()
    return lambda x: holder.layer(x)


def hooked_by_a_head() -> nn.Module:
    net, head = make_net(), nn.Linear(3, 3)
    net.register_forward_hook(lambda module, args, output: head(output))
    return net


def hooked_by_parameters() -> nn.Module:
    net, a, b = make_net(), nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
    net[0].register_forward_hook(lambda module, args, output: output + args[0] @ a @ b)
    return net


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        return self


class SharesMemory(nn.Linear):
    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        new = SharesMemory(4, 3)
        new.load_state_dict(self.state_dict(), assign=True)
        return new


def assert_right_if_shared(teacher: nn.Module) -> None:
    criterion = CKTATLoss(teacher, copy_teacher=False)
    assert criterion.teacher is teacher
    clean, adv, x = torch.randn(16, 3), torch.randn(16, 3), torch.rand(16, 4)
    with torch.no_grad():
        expected = functional.cktat_loss(clean, adv, teacher(x))
    assert torch.equal(criterion(clean, adv, x), expected)


CASES = {
    **{f"function in a {kind}": (functools.partial(Stages, kind), "refers to a Stages") for kind in KINDS},
    "compiled forward": (
        lambda: with_forward(lambda net: torch.compile(net.forward, backend="eager")), "refers to a Sequential"
    ),
    "forward in a closure": (lambda: with_forward(with_a_bound_method), "refers to a Sequential"),
    "default argument": (lambda: with_forward(with_a_default), "refers to a Sequential"),
    "list in a closure": (lambda: with_forward(with_a_list), "refers to a Linear"),
    "object in a closure": (lambda: with_forward(with_an_object), "refers to a Linear"),
    "hook with a module": (hooked_by_a_head, "refers to a Linear"),
    "hook with parameters": (hooked_by_parameters, "refers to a Parameter"),
    "copies itself": (lambda: CopiesItself(4, 3), "its copy shares"),
    "shared memory": (lambda: SharesMemory(4, 3), r"its copy shares \S*weight, \S*bias"),
}  # fmt: skip


@pytest.mark.parametrize("place", [lambda module: module, nn.Sequential], ids=["whole", "inside"])
@pytest.mark.parametrize("case", CASES)
def test_sharing_is_refused(case, place):
    make, message = CASES[case]
    teacher = place(make()).eval()
    with pytest.raises(ValueError, match=rf"teacher cannot be deep-copied: .*{message}.*copy_teacher=False"):
        CKTATLoss(teacher)
    assert_right_if_shared(teacher)


NET = make_net()
FORWARD = NET.forward


def test_a_function_with_a_global_module_is_refused():
    """A script or notebook keeps its models in globals."""
    net = make_net()
    net.forward = lambda x: FORWARD(x)
    with pytest.raises(ValueError, match="refers to a Sequential"):
        CKTATLoss(net)


@pytest.mark.parametrize("place", [lambda module: module, nn.Sequential], ids=["whole", "inside"])
def test_losing_hooks_is_refused(place):
    """PyTorch's own deepcopy of a compiled module leaves its hooks out."""
    compiled = torch.compile(make_net(), backend="eager")
    compiled.register_forward_hook(lambda module, args, output: 2 * output)
    teacher = place(compiled).eval()
    with pytest.raises(ValueError, match=r"its copy loses the hooks of .*copy_teacher=False"):
        CKTATLoss(teacher)
    assert_right_if_shared(teacher)


def with_own_forward(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(lambda self, x: 2 * x, module)
    return module


def with_attribute(module: nn.Module) -> nn.Module:
    module.temperature = 3.0
    return module


@pytest.mark.parametrize("place", [lambda module: module, nn.Sequential], ids=["whole", "inside"])
@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (lambda: with_own_forward(torch.fx.symbolic_trace(make_net().eval())), "forward"),
        (lambda: with_attribute(torch.fx.symbolic_trace(make_net().eval())), "temperature"),
        (lambda: with_own_forward(torch.compile(make_net(), backend="eager")), "the forward"),
    ],
    ids=["forward of a graph", "attribute of a graph", "forward of a compiled wrapper"],
)
def test_losing_is_refused(make, lost, place):
    with pytest.raises(ValueError, match=rf"its copy loses {lost} of .*copy_teacher=False"):
        CKTATLoss(place(make()).eval())


def constant_in_a_hook() -> nn.Module:
    net, mean = make_net(), torch.zeros(4)
    net[0].register_forward_hook(lambda module, args, output: output - mean)
    return net


def compiled_in_place() -> nn.Module:
    net = make_net()
    net.compile(backend="eager")
    return net


class Activation(nn.Module):
    """A module with a compiled function that refers to no module."""

    def __init__(self) -> None:
        super().__init__()
        self.function = torch.compile(torch.nn.functional.gelu, backend="eager")
        self.function(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "make", [constant_in_a_hook, compiled_in_place, Activation, lambda: nn.LSTM(4, 3, num_layers=2)]
)
def test_other_functions_and_references_are_copied(make):
    """A constant tensor, torch's own compiled call, and the weak references of recurrent layers change nothing."""
    teacher = make().eval()
    assert CKTATLoss(teacher).teacher is not teacher
