"""warm_start copies all of the weights or none, in place, and changes nothing but values."""

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from cktat_loss.warm_start import WarmStartReport, warm_start


class Net(nn.Module):
    """Conv, BatchNorm statistics, an integer buffer and a scalar one; no two instances alike."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        self.register_buffer("order", torch.randperm(100))
        self.register_buffer("scale", torch.randn(()))
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_()
        self.norm.num_batches_tracked.fill_(int(torch.randint(1, 10**6, ())))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3))) * self.scale


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        if tied:
            self.out.weight = self.embed.weight


NAMES = tuple(Net().state_dict())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_refused(student: nn.Module, teacher: object, kind: type[Exception], match: str, strict: bool = True) -> str:
    """The call raises, names its argument and leaves the student as it was."""
    before = snapshot(student)
    with pytest.raises(kind, match=match) as caught:
        warm_start(student, teacher, strict=strict)  # type: ignore[arg-type]
    assert_same(student.state_dict(), before)
    return str(caught.value)


# What is copied.


def test_parameters_and_buffers_are_copied() -> None:
    student, teacher = Net(), Net()
    scratch, teachers = student.scratch.clone(), snapshot(teacher)
    assert warm_start(student, teacher) == WarmStartReport(NAMES, (), (), ())
    assert {"norm.running_mean", "norm.num_batches_tracked", "order", "scale"} <= set(NAMES)
    assert_same(student.state_dict(), teachers)
    assert_same(teacher.state_dict(), teachers)
    assert_same(student.scratch, scratch)  # not part of a state_dict, so not part of the weights
    x = torch.randn(2, 3, 5, 5)
    assert_same(student.eval()(x), teacher.eval()(x))


def test_a_state_dict_is_read_as_its_module_is() -> None:
    student, teacher = Net(), Net()
    assert warm_start(student, teacher.state_dict()).copied == NAMES
    assert_same(student.state_dict(), teacher.state_dict())


def test_nan_and_infinity_are_copied() -> None:
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[float("nan"), float("inf")], [-float("inf"), -0.0]]))
    warm_start(student, teacher)
    assert_same(student.weight, teacher.weight)


# How: in place, cast, and nothing else changes.


def test_no_storage_changes_hands() -> None:
    student, teacher = Net(), Net()
    before = {name: (id(t), t.data_ptr()) for name, t in student.state_dict(keep_vars=True).items()}
    warm_start(student, teacher)
    after = {name: (id(t), t.data_ptr()) for name, t in student.state_dict(keep_vars=True).items()}
    assert after == before
    copied = snapshot(student)
    for tensor in teacher.state_dict().values():
        tensor.zero_()
    assert_same(student.state_dict(), copied)


def test_an_optimizer_made_before_stays_valid() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    warm_start(student, teacher)
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert_same(student.weight.detach(), teacher.weight.detach() - 0.5)


def test_modes_and_requires_grad_stay_as_they_are() -> None:
    student, teacher = Net(), Net()
    student.norm.eval()
    student.conv.weight.requires_grad_(False)
    teacher.eval()
    teacher.requires_grad_(False)
    teacher.conv.train()

    def state(model: nn.Module) -> tuple[list[bool], list[bool], list[bool]]:
        parameters = list(model.parameters())
        modes = [module.training for module in model.modules()]
        return (
            modes,
            [p.requires_grad for p in parameters],
            [p.is_leaf and p.grad is None for p in parameters],
        )

    before = state(student), state(teacher)
    warm_start(student, teacher)
    assert (state(student), state(teacher)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_cast_to_the_students_dtype(dtype: torch.dtype) -> None:
    student, teacher = Net().to(dtype), Net()
    warm_start(student, teacher)
    assert student.conv.weight.dtype is dtype
    assert student.order.dtype is torch.int64
    assert_same(student.conv.weight, teacher.conv.weight.to(dtype))
    assert_same(student.order, teacher.order)


def test_integers_and_booleans_are_cast_to_each_other() -> None:
    student, teacher = nn.Module(), nn.Module()
    student.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
    teacher.register_buffer("mask", torch.tensor([1, 0, 1], dtype=torch.uint8))
    warm_start(student, teacher)
    assert student.mask.tolist() == [True, False, True]


def test_memory_formats_and_strides_stay() -> None:
    student, teacher = Net().to(memory_format=torch.channels_last), Net()
    student.register_buffer("turned", torch.zeros(4, 3).t())
    teacher.register_buffer("turned", torch.randn(6, 4)[::2])
    strides = {name: tensor.stride() for name, tensor in student.state_dict().items()}
    warm_start(student, teacher)
    assert {name: tensor.stride() for name, tensor in student.state_dict().items()} == strides
    assert_same(student.state_dict(), teacher.state_dict())


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
def test_strict_refuses_one_misfit_of_any_kind(misfit: str) -> None:
    student, state = Net(), Net().state_dict()
    if misfit == "missing":
        del state["scale"]
    elif misfit == "unexpected":
        state["added"] = torch.zeros(1)
    else:
        state["scale"] = torch.zeros(1)  # one element as well, but another shape
    assert_refused(student, state, ValueError, f"{misfit}: (scale|added)")
    report = warm_start(student, state, strict=False)
    assert len(getattr(report, misfit)) == 1
    assert len(report.copied) == len(NAMES) - (misfit != "unexpected")


def test_not_strict_copies_what_matches_and_reports_the_rest() -> None:
    student, teacher = DataParallel(Net()), Net(classes=7)
    del teacher.conv
    teacher.extra = nn.Linear(2, 2, bias=False)
    before = snapshot(student.module)
    report = warm_start(student, teacher, strict=False)
    assert report.missing == ("conv.weight", "conv.bias")
    assert report.unexpected == ("extra.weight",)
    assert report.mismatched == ("head.weight", "head.bias")
    kept = report.missing + report.mismatched
    assert report.copied == tuple(name for name in NAMES if name not in kept)
    for name, tensor in student.module.state_dict().items():
        assert_same(tensor, (before if name in kept else teacher.state_dict())[name])


@pytest.mark.parametrize("teacher", [nn.Conv1d(2, 2, 1), {}, {"other": torch.ones(1)}])
def test_nothing_that_matches_is_an_error_even_if_not_strict(teacher: object) -> None:
    assert_refused(nn.Linear(2, 3, bias=False), teacher, ValueError, "nothing was copied", strict=False)


def test_models_without_weights_fit() -> None:
    assert warm_start(nn.ReLU(), nn.ReLU()) == WarmStartReport((), (), (), ())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.complex64)),
        (torch.zeros(2, dtype=torch.complex64), torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int8)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2).to_sparse()),
    ],
    ids=["complex to real", "real to complex", "integer to float", "float to integer", "sparse to dense"],
)
def test_what_no_cast_should_bridge_is_a_mismatch(ours: Tensor, theirs: Tensor) -> None:
    student = nn.Module()
    student.register_buffer("value", ours)
    message = assert_refused(student, {"value": theirs}, ValueError, r"mismatched: value \(teacher \(2,\) \w+")
    assert ("torch.sparse_coo" in message) == theirs.is_sparse


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_quantised_weights_are_a_mismatch() -> None:
    state = nn.Linear(2, 2).state_dict()
    state["weight"] = torch.quantize_per_tensor(state["weight"], 0.1, 0, torch.qint8)
    assert_refused(nn.Linear(2, 2), state, ValueError, "mismatched: weight .*qint8")


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


# Tensors without values, or that can't be written.


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_meta_tensors_are_refused(side: str) -> None:
    models = {"student": Net(), "teacher": Net()}
    models[side].head.to("meta")
    before = {name: tensor.clone() for name, tensor in models["student"].state_dict().items()}
    with pytest.raises(ValueError, match=rf"{side}: head\.weight must have values, but is on the meta device"):
        warm_start(**models)
    for name, tensor in models["student"].state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[name])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_lazy_parameters_are_refused(side: str) -> None:
    models: dict[str, nn.Module] = {"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)}
    models[side] = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=rf"{side}: weight must have values, but is lazy"):
        warm_start(**models)


def test_an_expanded_buffer_is_refused() -> None:
    student = Net()
    student.register_buffer("zero", torch.zeros(1).expand(4))
    teacher = {**Net().state_dict(), "zero": torch.ones(4)}
    assert_refused(student, teacher, ValueError, "student: zero must be writable, but is expanded")


def test_an_inference_tensor_is_refused_to_write_and_fine_to_read() -> None:
    with torch.inference_mode():
        inference = nn.Linear(2, 2)
    assert_refused(inference, nn.Linear(2, 2), ValueError, "student: weight must be writable, but is an inf")
    student = nn.Linear(2, 2)
    warm_start(student, inference)
    assert torch.equal(student.weight, inference.weight)


def test_a_state_dict_made_of_copies_is_refused() -> None:
    student = nn.Linear(2, 2)
    student.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({name: t.clone() for name, t in state.items()})
    )
    assert_refused(student, nn.Linear(2, 2), TypeError, "student: weight in its state_dict must be one of its")


# Extra state.


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"note": id(self)}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("extra state isn't weights")


def test_extra_state_is_left_out() -> None:
    for student, teacher in [(Extra(2, 2), Extra(2, 2)), (Extra(2, 2), nn.Linear(2, 2))]:
        assert warm_start(student, teacher).copied == ("weight", "bias")
    student, teacher = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(Extra(2, 2))
    assert warm_start(student, teacher.state_dict()).copied == ("0.weight", "0.bias")


def test_other_entries_that_are_no_tensors_are_refused() -> None:
    teacher = nn.Linear(2, 2)
    teacher.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(packed=(1, 2)))
    assert_refused(nn.Linear(2, 2), teacher, TypeError, "teacher: packed must be a tensor, got tuple")


# Tied weights.


@pytest.mark.parametrize("left_out", [None, "embed.weight", "out.weight"])
def test_tied_weights_stay_tied_and_one_name_is_enough(left_out: str | None) -> None:
    student, state = Tied(), Tied().state_dict()
    state.pop(left_out, None)
    assert warm_start(student, state) == WarmStartReport(("embed.weight", "out.weight"), (), (), ())
    assert student.out.weight is student.embed.weight
    assert_same(student.out.weight.detach(), next(iter(state.values())))


def test_weights_tied_by_storage_alone_count_as_tied() -> None:
    student = Tied(tied=False)
    student.out.weight = nn.Parameter(student.embed.weight.detach())
    assert warm_start(student, {"embed.weight": torch.ones(5, 3)}).missing == ()
    assert student.out.weight.data_ptr() == student.embed.weight.data_ptr()


def test_a_missing_name_that_is_not_tied_is_missing() -> None:
    assert_refused(Tied(tied=False), {"embed.weight": torch.ones(5, 3)}, ValueError, "missing: out.weight")


def test_views_of_one_storage_are_not_tied() -> None:
    flat = torch.zeros(6)
    student = nn.Module()
    student.register_buffer("first", flat[:3])
    student.register_buffer("second", flat[3:])
    warm_start(student, {"first": torch.ones(3), "second": torch.full((3,), 2.0)})
    assert flat.tolist() == [1, 1, 1, 2, 2, 2]
    assert_refused(student, {"first": torch.ones(3)}, ValueError, "missing: second")


def test_tied_weights_that_differ_in_the_teacher_are_a_mismatch() -> None:
    student, teacher = Tied(), Tied(tied=False)
    assert_refused(student, teacher, ValueError, r"mismatched: out\.weight \(tied to embed\.weight in the student")
    report = warm_start(student, teacher, strict=False)
    assert (report.copied, report.mismatched) == (("embed.weight",), ("out.weight",))
    assert_same(student.out.weight, teacher.embed.weight)


def test_tied_weights_saved_twice_are_the_same_also_with_nan() -> None:
    weight = torch.randn(5, 3)
    weight[0, 0] = float("nan")
    assert warm_start(Tied(), {"embed.weight": weight, "out.weight": weight.clone()}).mismatched == ()


# One model in both places.


@pytest.mark.parametrize(
    "view",
    [lambda m: m, DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: m.state_dict()],
    ids=["itself", "wrapped", "compiled", "state_dict"],
)
def test_student_and_teacher_must_be_two(view: Callable[[nn.Module], Any]) -> None:
    model = Net()
    assert_refused(model, view(model), ValueError, "teacher must share no memory with student")
    if isinstance(view(model), nn.Module):
        assert_refused(view(model), model, ValueError, "teacher must share no memory with student")


@pytest.mark.parametrize("shared", ["parameter", "buffer", "view"])
def test_a_shared_tensor_is_refused(shared: str) -> None:
    student, teacher = Net(), Net()
    if shared == "parameter":
        teacher.head.bias = student.head.bias
    elif shared == "buffer":
        teacher.norm.running_var = student.norm.running_var
    else:
        teacher.head.bias.data = student.conv.bias.detach()[2:]
    name = "norm.running_var" if shared == "buffer" else "head.bias"
    assert_refused(student, teacher, ValueError, f"share no memory with student, but shares {name}", strict=False)


# Arguments and the report.


@pytest.mark.parametrize("student", [{}, None, "resnet18", Net])
def test_a_student_that_is_no_module(student: Any) -> None:
    with pytest.raises(TypeError, match=r"student must be an nn\.Module, got (dict|NoneType|str|type)"):
        warm_start(student, Net())


@pytest.mark.parametrize("teacher", [None, 3, torch.ones(2), [torch.ones(2)], b"teacher.pt", Net])
def test_a_teacher_of_no_known_kind(teacher: Any) -> None:
    assert_refused(Net(), teacher, TypeError, f"teacher must be .* path, got {type(teacher).__name__}")


@pytest.mark.parametrize("strict", [None, 1, "yes"])
def test_strict_is_a_bool(strict: Any) -> None:
    assert_refused(Net(), Net(), TypeError, f"strict must be True or False, got {strict!r}", strict=strict)


def test_the_report_reads_well_and_stays_as_it_is() -> None:
    report = WarmStartReport(("a", "b"), ("c",), (), ("d", "e"))
    assert str(report) == "copied 2, missing 1, unexpected 0, mismatched 2\n  missing: c\n  mismatched: d, e"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.copied = ()  # type: ignore[misc]


def test_importing_it_loads_no_optional_package() -> None:
    code = "import sys, cktat_loss.warm_start; sys.exit('safetensors' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
