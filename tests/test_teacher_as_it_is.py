"""The loss with ``x`` is the loss with ``teacher_logits=teacher(x)`` in eval mode, or the teacher is refused."""

import copy
import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from cktat_loss import CKTATLoss, functional

EAGER = {"backend": "eager"}


def make_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    net[1].running_mean.normal_()
    return net


@pytest.fixture
def batch():
    """clean_logits, adv_logits, x."""
    return torch.randn(16, 3), torch.randn(16, 3), torch.rand(16, 4)


def assert_right(teacher: nn.Module, batch: tuple[Tensor, Tensor, Tensor], **options: bool) -> None:
    """Three calls give the loss of ``teacher(x)``, and the criterion leaves no trace in the teacher."""
    clean, adv, x = batch
    criterion = CKTATLoss(teacher, **options)
    with torch.no_grad():
        expected = functional.cktat_loss(clean, adv, copy.deepcopy(teacher).eval()(x))
    for _ in range(3):
        assert torch.equal(criterion(clean, adv, x), expected)


# The input goes in as it is.


class BrainFloatInside(nn.Module):
    """A float32 parameter first, and layers that take bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class ScalesPixelsItself(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - 0.5) / 0.01).bfloat16() @ self.weight.bfloat16().t()


class HalfFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4).half())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x / 1e5)


class LooksUpIds(nn.Module):
    """Ids that float16 cannot hold, passed as floats."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5000, 3).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x[:, 0].long())


def test_a_teacher_that_takes_another_dtype_than_its_first_parameters(batch):
    clean, adv, x = batch
    assert_right(BrainFloatInside(), (clean, adv, x.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_teacher_that_scales_its_pixels(batch, dtype):
    assert_right(ScalesPixelsItself(dtype), batch)


def test_inputs_beyond_the_range_of_a_parameters_dtype(batch):
    clean, adv, x = batch
    assert_right(HalfFirst(), (clean, adv, 1e6 * x))


def test_ids_that_a_cast_would_round(batch):
    clean, adv, _ = batch
    assert_right(LooksUpIds(), (clean, adv, torch.randint(2049, 4999, (16, 1)).float()))


def test_inputs_that_are_no_tensor(batch):
    class Takes(nn.Module):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return x["pixels"][:, :3] * 2

    clean, adv, x = batch
    expected = functional.cktat_loss(clean, adv, x[:, :3] * 2)
    assert torch.equal(CKTATLoss(Takes())(clean, adv, {"pixels": x}), expected)


@pytest.mark.parametrize("copy_teacher", [True, False])
def test_a_dtype_that_the_teacher_does_not_take(batch, copy_teacher):
    criterion = CKTATLoss(make_net(), copy_teacher=copy_teacher).half()
    with pytest.raises(RuntimeError, match="x is float32, the teacher has float16: cast x, or use autocast") as info:
        criterion(*batch)
    assert "dtype" in str(info.value).splitlines()[0]  # the teacher's own words come first
    clean, adv, x = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        criterion.float()
        torch.testing.assert_close(criterion(clean, adv, x), CKTATLoss(criterion.teacher)(clean, adv, x))


def test_other_errors_of_the_teacher_stay_as_they_are(batch):
    clean, adv, x = batch
    with pytest.raises(RuntimeError) as info:
        CKTATLoss(make_net())(clean, adv, x[:, :3])
    assert "cast x" not in str(info.value)


def test_no_hint_on_the_dtype_of_ids(batch):
    clean, adv, _ = batch
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Flatten())
    with pytest.raises(IndexError) as info:
        CKTATLoss(embedding)(clean, adv, torch.full((len(clean), 1), 5))
    assert "cast x" not in str(info.value)


def test_a_hint_on_the_dtype_of_pixels(batch):
    clean, adv, x = batch
    with pytest.raises(RuntimeError, match="x is uint8, the teacher has float32: cast x"):
        CKTATLoss(make_net())(clean, adv, x.to(torch.uint8))


def test_a_teacher_that_returns_its_logits_in_an_object(batch):
    class Output(nn.Module):
        def forward(self, x: Tensor) -> types.SimpleNamespace:
            return types.SimpleNamespace(logits=x)

    with pytest.raises(TypeError, match=r"teacher\(x\) must be a tensor .* SimpleNamespace: pass its \.logits"):
        CKTATLoss(Output())(*batch)


def test_it_runs_in_the_callers_autocast(batch):
    clean, adv, x = batch
    net = make_net().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CKTATLoss(net)(clean, adv, x)
        with torch.no_grad():
            assert torch.equal(loss, functional.cktat_loss(clean, adv, net(x)))


# A wrapper is taken off only if nothing is lost.


class Normalized(nn.Module):
    """Passes attributes on, as many wrappers do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.5) / 0.25)


class Scaled(DataParallel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 * x)


class ScaledAverage(AveragedModel):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 * x)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: 2 * output)
    return module


def pre_hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return module


def with_forward_of_its_own(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(lambda self, x: self.module(2 * x), module)
    return module


@pytest.mark.parametrize("copy_teacher", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda net: Normalized(torch.compile(net, **EAGER)), id="delegating to a compiled net"),
        pytest.param(lambda net: Normalized(AveragedModel(net)), id="delegating to an average"),
        pytest.param(lambda net: Normalized(DataParallel(net)), id="delegating to DataParallel"),
        pytest.param(lambda net: hooked(AveragedModel(net)), id="hook on an average"),
        pytest.param(lambda net: pre_hooked(DataParallel(net)), id="hook on DataParallel"),
        pytest.param(lambda net: AveragedModel(hooked(DataParallel(net))), id="hook in between"),
        pytest.param(Scaled, id="subclass of DataParallel"),
        pytest.param(ScaledAverage, id="subclass of AveragedModel"),
        pytest.param(lambda net: with_forward_of_its_own(DataParallel(net)), id="forward of its own"),
    ],
)
def test_nothing_that_a_wrapper_does_is_lost(batch, wrap, copy_teacher):
    assert_right(wrap(make_net()).eval(), batch, copy_teacher=copy_teacher)


def test_a_bound_method_is_copied_with_its_module(batch):
    net = make_net()
    net.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, 2 * x), net)
    assert_right(net, batch)


# Graphs.


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.unflatten(1, (2, 2)))[0][:, -1]


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 2))
        rate = 0.5 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=rate).flatten(1)[:, :3]


class CountsPixels(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :3]


KINDS = {
    "dropout": lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout()),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "RReLU": lambda: nn.Sequential(nn.Linear(4, 3), nn.RReLU()),
    "recurrent": Recurrent,
    "attention": Attends,
    "InstanceNorm": CountsPixels,
}


def exported(net: nn.Module, *, strict: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export's own
        return torch.export.export(net, (torch.rand(16, 4),), strict=strict).module()


@pytest.mark.parametrize("copy_teacher", [True, False])
@pytest.mark.parametrize("place", [lambda module: module, nn.Sequential], ids=["whole", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_exported_in_train_mode_is_refused(kind, place, copy_teacher):
    teacher = place(exported(KINDS[kind]().train()))
    with pytest.raises(ValueError, match=r"teacher must be in eval mode, .*: export it in eval mode"):
        CKTATLoss(teacher, copy_teacher=copy_teacher)


@pytest.mark.parametrize("copy_teacher", [True, False])
@pytest.mark.parametrize("place", [lambda module: module, nn.Sequential], ids=["whole", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_exported_in_eval_mode_runs_as_it_is(kind, batch, place, copy_teacher):
    net = KINDS[kind]().eval()
    clean, adv, x = batch
    with torch.no_grad():
        expected = functional.cktat_loss(clean, adv, net(x))
    criterion = CKTATLoss(place(exported(net)), copy_teacher=copy_teacher).train()
    for _ in range(3):
        torch.testing.assert_close(criterion(clean, adv, x), expected)


def test_strict_export_too(batch):
    with pytest.raises(ValueError, match="export it in eval mode"):
        CKTATLoss(exported(make_net().train(), strict=True))
    net = make_net().eval()
    assert_right_exported = CKTATLoss(exported(net, strict=True))
    assert torch.equal(assert_right_exported(*batch), CKTATLoss(net)(*batch))


def test_a_traced_graph_with_train_mode_built_in_is_refused():
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

    with pytest.raises(ValueError, match="export it in eval mode"):
        CKTATLoss(torch.fx.symbolic_trace(Drops().train()))
    CKTATLoss(torch.fx.symbolic_trace(Drops().eval()))
    CKTATLoss(torch.fx.symbolic_trace(make_net().train()))  # its layers are modules, which eval() reaches


@pytest.mark.parametrize("copy_teacher", [True, False])
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_is_refused(copy_teacher):
    net = make_net().eval()
    scripted = torch.jit.script(net)
    for teacher in (
        scripted,
        torch.jit.trace(net, torch.rand(2, 4)),
        torch.jit.freeze(scripted),
        nn.Sequential(scripted),
    ):
        with pytest.raises(TypeError, match=r"teacher must not be TorchScript, .* pass teacher_logits= instead"):
            CKTATLoss(teacher, copy_teacher=copy_teacher)


# Values.


@pytest.mark.parametrize("copy_teacher", [True, False])
def test_a_teacher_without_values_is_refused(copy_teacher):
    with pytest.raises(ValueError, match=r"teacher must have values, but 0\.weight is on the meta device"):
        CKTATLoss(make_net().to("meta"), copy_teacher=copy_teacher)
    with pytest.raises(ValueError, match=r"teacher must have values, but 0\.weight is lazy: run a forward pass first"):
        CKTATLoss(nn.Sequential(nn.LazyLinear(3)), copy_teacher=copy_teacher)


class Holder(nn.Module):
    """A module that is made on the meta device, as large models are, and then filled."""

    def __init__(self, teacher: nn.Module, copy_teacher: bool) -> None:
        super().__init__()
        self.student = nn.Linear(4, 3)
        self.criterion = CKTATLoss(teacher, copy_teacher=copy_teacher)


@pytest.mark.parametrize("copy_teacher", [True, False])
@pytest.mark.parametrize("on_meta", [True, False])
def test_to_empty_keeps_the_teachers_values(batch, copy_teacher, on_meta):
    teacher = make_net().eval()
    teacher[3].weight = nn.Parameter(teacher[3].weight.expand(3, 8).clone())
    expected = CKTATLoss(teacher)(*batch)
    with torch.device("meta" if on_meta else "cpu"):
        holder = Holder(teacher, copy_teacher)
    holder.to_empty(device="cpu")
    holder.load_state_dict(nn.ModuleDict({"student": nn.Linear(4, 3)}).state_dict())
    assert torch.equal(holder.criterion(*batch), expected)
    holder.criterion.to_empty(device="cpu", recurse=False)
    assert torch.equal(holder.criterion(*batch), expected)


def test_to_empty_keeps_tied_weights(batch):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))[:, :3]

    holder = Holder(Tied(), True)
    expected = holder.criterion(*batch)
    holder.to_empty(device="cpu")
    assert torch.equal(holder.criterion(*batch), expected)
    assert holder.criterion.teacher.first.weight is holder.criterion.teacher.second.weight


def test_a_shared_teacher_that_is_a_child_is_the_users_to_fill(batch):
    holder = Holder(make_net().eval(), False)
    holder.teacher = holder.criterion.teacher
    state, expected = copy.deepcopy(holder.state_dict()), holder.criterion(*batch)
    holder.to_empty(device="cpu")
    holder.load_state_dict(state)
    assert torch.equal(holder.criterion(*batch), expected)


def test_a_teacher_that_was_on_the_meta_device_cannot_come_back(batch):
    criterion = CKTATLoss(make_net()).to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        criterion.to_empty(device="cpu")


def test_an_export_of_a_batchnorm_without_statistics(batch):
    """Its operator says training=True in eval mode too, and means that there are no statistics."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    clean, adv, x = batch
    with torch.no_grad():
        expected = functional.cktat_loss(clean, adv, net(x))
    torch.testing.assert_close(CKTATLoss(exported(net))(clean, adv, x), expected)


def drops(x: Tensor, p: float, training: bool) -> Tensor:
    return nn.functional.dropout(x, p, training)


torch.fx.wrap("drops")


class Drops(nn.Module):
    """Dropout by functions, with the arguments by position, which tracing bakes in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :3]
        return drops(x, 0.5, self.training) if self.kind == "Python" else torch.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("kind", ["Python", "built-in"])
def test_a_traced_graph_with_functions_in_train_mode_is_refused(batch, kind):
    with pytest.raises(ValueError, match=r"teacher must be in eval mode, .*: export it in eval mode"):
        CKTATLoss(torch.fx.symbolic_trace(Drops(kind).train()))
    assert_right(torch.fx.symbolic_trace(Drops(kind).eval()), batch)
