"""warm_start copies all of the weights or none, in place, and changes nothing but values."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from cktat_loss import WarmStartReport, warm_start


class Net(nn.Module):
    """Conv, BatchNorm statistics, an integer buffer and a scalar one; no two instances alike."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        self.register_buffer("order", torch.randperm(100))
        self.register_buffer("scale", torch.randn(()))
        self.register_buffer("turned", torch.randn(4, 3).t())
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_()
        self.norm.num_batches_tracked.fill_(int(torch.randint(1, 10**6, ())))


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        if tied:
            self.out.weight = self.embed.weight


NAMES = tuple(Net().state_dict())


def with_buffers(**buffers: Tensor) -> nn.Module:
    module = nn.Module()
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_refused(student: nn.Module, teacher: object, kind: type[Exception], match: str, strict: bool = True) -> str:
    """The call raises, names its argument and leaves the student as it was."""
    before = snapshot(student)
    with pytest.raises(kind, match=match) as caught:
        warm_start(student, teacher, strict=strict)  # type: ignore[arg-type]
    for name, tensor in student.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[name])
    return str(caught.value)


# What is copied, and where to.


def test_parameters_and_buffers_are_copied() -> None:
    student, teacher = Net(), Net()
    teacher.norm.running_mean.copy_(torch.tensor([float("nan"), float("inf"), -float("inf"), 0]))
    scratch, teachers = student.scratch.clone(), snapshot(teacher)
    assert warm_start(student, teacher) == WarmStartReport(NAMES, (), (), ())
    assert {"norm.running_mean", "norm.num_batches_tracked", "order", "scale"} <= set(NAMES)
    assert_same(student.state_dict(), teachers)
    assert_same(teacher.state_dict(), teachers)
    assert_same(student.scratch, scratch)  # not part of a state_dict, so not part of the weights


def test_nothing_but_values_changes() -> None:
    """The student's tensors are those that its optimizer holds, in their own memory; modes and gradients stay."""

    def state(model: nn.Module) -> tuple[list[bool], list[tuple[object, ...]]]:
        tensors = model.state_dict(keep_vars=True).values()
        places = [(id(t), t.data_ptr(), t.stride(), t.requires_grad, t.is_leaf, t.grad is None) for t in tensors]
        return [module.training for module in model.modules()], places

    student, teacher = Net().to(memory_format=torch.channels_last), Net().eval().requires_grad_(False)
    student.norm.eval()
    student.conv.weight.requires_grad_(False)
    teacher.conv.train()
    teacher.turned = torch.randn(6, 4)[::2]
    before = state(student), state(teacher)
    warm_start(student, teacher)
    assert (state(student), state(teacher)) == before

    copied = snapshot(student)
    assert_same(copied, teacher.state_dict())
    for tensor in teacher.state_dict().values():
        tensor.zero_()
    assert_same(student.state_dict(), copied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_cast_to_the_students_dtype(dtype: torch.dtype) -> None:
    student, teacher = Net().to(dtype), Net()
    warm_start(student, teacher)
    assert (student.conv.weight.dtype, student.order.dtype) == (dtype, torch.int64)
    assert_same(student.conv.weight, teacher.conv.weight.to(dtype))
    assert_same(student.order, teacher.order)


def test_integers_and_booleans_are_cast_to_each_other() -> None:
    student = with_buffers(mask=torch.zeros(3, dtype=torch.bool))
    warm_start(student, {"mask": torch.tensor([1, 0, 1], dtype=torch.uint8)})
    assert student.mask.tolist() == [True, False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_values_are_moved_to_the_students_device() -> None:
    student, teacher = nn.LSTM(3, 4, 2).cuda(), nn.LSTM(3, 4, 2)  # its weights share one storage on a GPU
    pointers = [p.data_ptr() for p in student.parameters()]
    warm_start(student, teacher)
    assert [p.data_ptr() for p in student.parameters()] == pointers
    assert_same([p.cpu() for p in student.parameters()], list(teacher.parameters()))
    warm_start(teacher, student)


# All or nothing.


def test_strict_lists_every_misfit_and_writes_nothing() -> None:
    student, teacher = Net(), Net(classes=7)
    del teacher.norm
    teacher.extra = nn.Linear(2, 2)
    message = assert_refused(student, teacher, ValueError, "teacher doesn't fit student, nothing was copied")
    missing, unexpected, mismatched = message.splitlines()[1:]
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert missing == "  missing: " + ", ".join(f"norm.{kind}" for kind in kinds)
    assert unexpected == "  unexpected: extra.weight, extra.bias"
    assert mismatched == (
        "  mismatched: head.weight (teacher (7, 4) float32, student (2, 4) float32), "
        "head.bias (teacher (7,) float32, student (2,) float32)"
    )


@pytest.mark.parametrize("misfit", ["missing", "unexpected", "mismatched"])
def test_one_misfit_of_any_kind(misfit: str) -> None:
    student, state = DataParallel(Net()), Net().state_dict()
    name = "added" if misfit == "unexpected" else "scale"
    if misfit == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(1)  # one element as scale has, but another shape
    assert_refused(student, state, ValueError, f"nothing was copied:\n  {misfit}: {name}")

    before, copied = snapshot(student.module), tuple(one for one in NAMES if one != name)
    report = warm_start(student, state, strict=False)
    assert report == dataclasses.replace(WarmStartReport(copied, (), (), ()), **{misfit: (name,)})
    assert_same(student.module.state_dict(), {one: (state if one in copied else before)[one] for one in NAMES})


@pytest.mark.parametrize("teacher", [nn.Conv1d(2, 2, 1), {}, {"other": torch.ones(1)}])
def test_nothing_that_matches_is_an_error_even_if_not_strict(teacher: object) -> None:
    assert_refused(nn.Linear(2, 3, bias=False), teacher, ValueError, "nothing was copied", strict=False)


def test_models_without_weights_fit_but_must_be_two() -> None:
    model = nn.ReLU()
    assert warm_start(model, nn.ReLU()) == WarmStartReport((), (), (), ())
    assert_refused(model, model, ValueError, "teacher must share no memory with student, but shares all")


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize(
    ("ours", "theirs", "described"),
    [
        (torch.float32, lambda t: t.to(torch.complex64), "complex64"),
        (torch.complex64, lambda t: t, "float32"),
        (torch.float32, lambda t: t.to(torch.int8), "int8"),
        (torch.int64, lambda t: t, "float32"),
        (torch.float32, Tensor.to_sparse, "float32 sparse_coo"),
        (torch.int64, lambda t: t.to(torch.complex64), "complex64"),
        (torch.int8, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "qint8"),
    ],
    ids=["complex to real", "real to complex", "to float", "to integer", "sparse", "complex to integer", "quantised"],
)
def test_what_no_cast_should_bridge_is_a_mismatch(
    ours: torch.dtype, theirs: Callable[[Tensor], Tensor], described: str
) -> None:
    student, teacher = with_buffers(value=torch.zeros(2, dtype=ours)), {"value": theirs(torch.ones(2))}
    assert_refused(student, teacher, ValueError, rf"mismatched: value \(teacher \(2,\) {described}, student \(2,\)")


def test_a_cast_that_fails_comes_before_the_first_write(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = Net(), Net().double()
    before, to, calls = snapshot(student), Tensor.to, []

    def scarce(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self)
        if len(calls) == 4:
            raise MemoryError
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", scarce)
    with pytest.raises(MemoryError):
        warm_start(student, teacher)
    monkeypatch.undo()
    assert_same(student.state_dict(), before)


# Names that other versions of PyTorch have.


def without_counter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("wrap", [lambda m: m, DataParallel], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    "model", [Net, lambda: nn.BatchNorm2d(3), lambda: nn.InstanceNorm1d(3, track_running_stats=True)]
)
def test_a_batchnorm_without_its_counter(
    model: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    student, teacher = model(), model()
    counters = [tensor for name, tensor in student.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counters) == 1
    counters[0].fill_(7)
    state = without_counter(teacher.state_dict())
    assert warm_start(wrap(student), wrap(teacher) and state) == WarmStartReport(tuple(state), (), (), ())
    assert int(counters[0]) == 7
    assert_same(without_counter(student.state_dict()), state)


def test_a_counter_is_only_spared_beside_statistics() -> None:
    state = {name: tensor for name, tensor in Net().state_dict().items() if not name.startswith("norm.")}
    assert_refused(Net(), state, ValueError, "missing: norm.weight, .*norm.running_var, norm.num_batches_tracked$")
    counter = with_buffers(num_batches_tracked=torch.zeros(()), other=torch.zeros(()))
    assert_refused(counter, {"other": torch.ones(())}, ValueError, "missing: num_batches_tracked")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.Sequential, DataParallel, lambda m: m])
def test_names_of_the_old_weight_norm(wrap: Callable[[nn.Module], nn.Module]) -> None:
    from torch.nn.utils import parametrizations, weight_norm

    student, teacher = parametrizations.weight_norm(nn.Linear(3, 4)), weight_norm(nn.Linear(3, 4))
    report = warm_start(wrap(student), wrap(teacher).state_dict())
    assert (len(report.copied), report.missing, report.unexpected, report.mismatched) == (3, (), (), ())
    x = torch.randn(2, 3)
    assert_same(student(x), teacher(x))


def test_names_like_weight_norms_are_left_alone() -> None:
    student = with_buffers(weight_g=torch.zeros(2), weight_v=torch.zeros(2))
    student.parametrizations = nn.Module()
    student.parametrizations.weight = with_buffers(original0=torch.zeros(2), original1=torch.zeros(2))
    teacher = {name: torch.full((2,), float(k)) for k, name in enumerate(student.state_dict(), start=1)}
    warm_start(student, teacher)
    assert_same(student.state_dict(), teacher)
    assert_refused(
        with_buffers(a=torch.zeros(2)), {"a": torch.ones(2), "a_g": torch.ones(2)}, ValueError, "unexpected: a_g"
    )


# Tensors without values, or that can't be written.


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["lazy", "on the meta device"])
def test_tensors_without_values_are_refused(side: str, kind: str) -> None:
    models = {"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)}
    models[side] = nn.LazyLinear(2) if kind == "lazy" else nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=f"{side}: weight must have values, but is {kind}"):
        warm_start(**models)


def test_what_cannot_be_written_is_refused_before_the_first_write() -> None:
    with torch.inference_mode():
        inference = torch.zeros(4)  # fine to read
    for buffer, why in ((torch.zeros(1).expand(4), "elements share memory"), (inference, "made in inference mode")):
        student, teacher = (
            with_buffers(first=torch.zeros(2), bad=buffer),
            {"first": torch.ones(2), "bad": inference + 1},
        )
        assert_refused(student, teacher, ValueError, f"student: bad must be writable: .*{why}")
    warm_start(student := with_buffers(good=torch.ones(4)), {"good": inference})
    assert student.good.tolist() == [0] * 4


class Immutable(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            raise NotImplementedError("no copy_ for Immutable")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_kind_of_tensor_that_cannot_be_written() -> None:
    student = with_buffers(first=torch.zeros(2), bad=torch.zeros(4).as_subclass(Immutable))
    teacher = {"first": torch.ones(2), "bad": torch.ones(4)}
    with pytest.raises(ValueError, match="student: bad must be writable: no copy_ for Immutable"):
        warm_start(student, teacher)
    assert student.first.tolist() == [0, 0]


def test_looking_whether_weights_can_be_written_writes_nothing() -> None:
    """An error leaves a pending backward pass as it was: autograd would notice a write, even of the same values."""
    student = Net()
    student.register_buffer("bad", torch.zeros(1).expand(4))
    loss = student.head(torch.ones(3, 4)).exp().sum() + student.norm(student.conv(torch.ones(2, 3, 5, 5))).sum()
    versions = [tensor._version for tensor in student.state_dict(keep_vars=True).values()]
    assert_refused(student, {**Net().state_dict(), "bad": torch.ones(4)}, ValueError, "bad must be writable")
    assert [tensor._version for tensor in student.state_dict(keep_vars=True).values()] == versions
    loss.backward()


def test_what_is_not_written_need_not_be_writable() -> None:
    student = with_buffers(first=torch.zeros(2), bad=torch.zeros(1).expand(4))
    assert warm_start(student, {"first": torch.ones(2)}, strict=False).missing == ("bad",)
    assert student.first.tolist() == [1, 1]


def test_tensors_made_of_other_tensors_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    composed = TwoTensor(torch.ones(2), torch.ones(2))
    match = "value must be a tensor with memory of its own, got TwoTensor"
    assert_refused(with_buffers(value=torch.zeros(2)), {"value": composed}, TypeError, f"teacher: {match}")
    with pytest.raises(TypeError, match=f"student: {match}"):
        warm_start(with_buffers(value=composed), {"value": torch.ones(2)})


def test_a_state_dict_made_of_copies_is_refused() -> None:
    student = nn.Linear(2, 2)
    student.register_state_dict_post_hook(lambda module, state, *_: state.update(bias=state["bias"].clone()))
    assert_refused(student, nn.Linear(2, 2), TypeError, "student: bias in its state_dict must be one of its")


# A state_dict of the user's own.


class Own(nn.Module):
    """Its state_dict knows no keep_vars, and has the names of the network inside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        return self.net.state_dict()


class Copying(Own):
    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: tensor.clone() for name, tensor in self.net.state_dict().items()}


class Listing(Own):
    def state_dict(self, **options: Any) -> Any:
        return [*self.net.state_dict().values()]


def test_a_state_dict_of_the_users_own() -> None:
    student, teacher = Own(Net()), Own(Net())
    weight = student.net.head.weight
    assert warm_start(student, teacher) == WarmStartReport(NAMES, (), (), ())
    assert student.net.head.weight is weight
    assert_same(student.state_dict(), teacher.state_dict())
    assert warm_start(Net(), Copying(teacher.net)).copied == NAMES
    assert_refused(student, student.net, ValueError, "teacher must share no memory with student")
    assert_refused(Copying(student.net), teacher, TypeError, "in its state_dict must be one of its parameters or b")


def test_a_state_dict_of_the_users_own_keeps_ties() -> None:
    student, teacher = Own(Tied()), Tied()
    assert warm_start(student, teacher).copied == ("embed.weight", "out.weight")
    assert student.net.out.weight is student.net.embed.weight
    assert_same(student.net.out.weight, teacher.out.weight)
    different = Tied(tied=False)
    assert_refused(student, different, ValueError, r"mismatched: out\.weight \(tied to embed\.weight in the student")


@pytest.mark.parametrize("wrap", [nn.Sequential, DataParallel])
def test_a_state_dict_that_no_parent_can_call(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for pair in ({"student": wrap(Own(Net())), "teacher": Net()}, {"student": Net(), "teacher": wrap(Own(Net()))}):
        with pytest.raises(
            TypeError, match=r"(student|teacher): each of its modules must have a state_dict that can .*"
        ):
            warm_start(**pair)


def test_a_state_dict_that_is_none() -> None:
    assert_refused(
        Net(), Listing(Net()), TypeError, r"teacher: its state_dict\(\) must return tensors by name, got list"
    )


# Entries that are no tensors.


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"note": id(self)}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("extra state isn't weights")


def test_extra_state_is_left_out() -> None:
    extra, plain = nn.Sequential(Extra(2, 2)), nn.Sequential(nn.Linear(2, 2))
    for student, teacher in [(extra, plain), (plain, extra), (plain, extra.state_dict())]:
        assert warm_start(student, copy.deepcopy(teacher)).copied == ("0.weight", "0.bias")


def test_other_entries_that_are_no_tensors_are_refused() -> None:
    teacher = nn.Linear(2, 2)
    teacher.register_state_dict_post_hook(lambda module, state, *_: state.update(packed=(1, 2)))
    assert_refused(nn.Linear(2, 2), teacher, TypeError, "teacher: packed must be a tensor, got tuple")


# Tied weights.


@pytest.mark.parametrize("left_out", [None, "embed.weight", "out.weight"])
def test_tied_weights_stay_tied_and_one_name_is_enough(left_out: str | None) -> None:
    student, weight = Tied(), torch.randn(5, 3).fill_diagonal_(float("nan"))
    state = {name: weight.clone() for name in ("embed.weight", "out.weight") if name != left_out}
    assert warm_start(student, state) == WarmStartReport(("embed.weight", "out.weight"), (), (), ())
    assert student.out.weight is student.embed.weight
    assert_same(student.out.weight.detach(), weight)


def test_only_tied_names_may_be_left_out() -> None:
    student, teacher = Tied(tied=False), {"embed.weight": torch.ones(5, 3)}
    assert_refused(student, teacher, ValueError, "missing: out.weight")
    student.out.weight = nn.Parameter(student.embed.weight.detach())  # tied by storage alone
    assert warm_start(student, teacher).missing == ()
    assert student.out.weight.data_ptr() == student.embed.weight.data_ptr()


def test_views_of_one_storage_are_not_tied() -> None:
    flat = torch.zeros(6)
    student = with_buffers(first=flat[:3], second=flat[3:])
    warm_start(student, {"first": torch.ones(3), "second": torch.full((3,), 2.0)})
    assert flat.tolist() == [1, 1, 1, 2, 2, 2]
    assert_refused(student, {"first": torch.zeros(3)}, ValueError, "missing: second")


def test_tied_weights_that_differ_in_the_teacher_are_a_mismatch() -> None:
    student, teacher = Tied(), Tied(tied=False)
    assert_refused(student, teacher, ValueError, r"mismatched: out\.weight \(tied to embed\.weight in the student")
    report = warm_start(student, teacher, strict=False)
    assert (report.copied, report.mismatched) == (("embed.weight",), ("out.weight",))
    assert_same(student.out.weight, teacher.embed.weight)


# One model in both places.


@pytest.mark.parametrize(
    "view",
    [lambda m: m, DataParallel, lambda m: torch.compile(m, backend="eager"), nn.Module.state_dict],
    ids=["itself", "wrapped", "compiled", "state_dict"],
)
def test_student_and_teacher_must_be_two(view: Callable[[nn.Module], Any]) -> None:
    model = Net()
    assert_refused(model, view(model), ValueError, "teacher must share no memory with student")
    if isinstance(view(model), nn.Module):
        assert_refused(view(model), model, ValueError, "teacher must share no memory with student")


@pytest.mark.parametrize("shared", ["head.bias", "norm.running_var", "head.bias by a view"])
def test_a_shared_tensor_is_refused(shared: str) -> None:
    student, teacher = Net(), Net()
    if shared == "head.bias":
        teacher.head.bias = student.head.bias
    elif shared == "norm.running_var":
        teacher.norm.running_var = student.norm.running_var
    else:
        teacher.head.bias.data = student.conv.bias.detach()[2:]
    match = f"share no memory with student, but shares {shared.split()[0]}$"
    assert_refused(student, teacher, ValueError, match, strict=False)


class AutoEncoder(nn.Module):
    """Two layers whose weights may share memory, transposed."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)
        if tied:
            self.decode.weight = nn.Parameter(self.encode.weight.data.t())


@pytest.mark.parametrize("strict", [True, False])
def test_ties_by_another_view_are_refused(strict: bool) -> None:
    student = AutoEncoder(tied=True)
    match = r"nothing was copied: (en|de)code\.weight shares elements with other weights"
    assert_refused(student, AutoEncoder(tied=False), ValueError, match, strict=strict)


def test_the_same_ties_by_another_view_are_copied() -> None:
    student, teacher = AutoEncoder(tied=True), AutoEncoder(tied=True)
    assert len(warm_start(student, teacher).copied) == 2
    torch.testing.assert_close(student.state_dict(), teacher.state_dict(), rtol=0, atol=0)


# Arguments and the report.


@pytest.mark.parametrize("student", [{}, None, "resnet18", Net])
def test_a_student_that_is_no_module(student: Any) -> None:
    with pytest.raises(TypeError, match=f"student must be an nn.Module, got {type(student).__name__}"):
        warm_start(student, Net())


@pytest.mark.parametrize("teacher", [None, 3, torch.ones(2), [torch.ones(2)], b"teacher.pt", Net])
def test_a_teacher_of_no_known_kind(teacher: Any) -> None:
    assert_refused(Net(), teacher, TypeError, f"teacher must be .* path, got {type(teacher).__name__}")


def test_strict_is_a_bool() -> None:
    assert_refused(Net(), Net(), TypeError, "strict must be True or False, got 1", strict=1)  # type: ignore[arg-type]


def test_the_report_reads_well_and_stays_as_it_is() -> None:
    report = WarmStartReport(("a", "b"), ("c",), (), ("d", "e"))
    assert str(report) == (
        "copied 2, missing 1, unexpected 0, mismatched 2 (non-persistent buffers are never copied)\n"
        "  missing: c\n  mismatched: d, e"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.copied = ()  # type: ignore[misc]
