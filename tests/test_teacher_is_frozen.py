"""Nothing that happens to the teacher, the student or the criterion changes what the teacher says."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from cktat_loss import CKTATLoss, functional, warm_start

EAGER = {"backend": "eager"}  # nothing here is about speed


def make_net(width: int = 8) -> nn.Sequential:
    """BatchNorm with statistics of its own and Dropout, so that train mode shows in the output."""
    net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(), nn.Linear(width, 3))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


class Recorder(nn.Module):
    """Notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.seen: list[Tensor] = []
        self.grad_modes: list[bool] = []
        self.modes: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.grad_modes.append(torch.is_grad_enabled())
        self.modes.append([m.training for m in self.modules()])
        return self.head(x)


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen_norm = nn.BatchNorm1d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no disk left")


class TwoHeads(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.normalised = self.head.weight / self.head.weight.norm()  # not a leaf, as weight_norm leaves behind


@pytest.fixture
def teacher():
    return make_net()


@pytest.fixture
def batch():
    """clean_logits, adv_logits, x."""
    return torch.randn(16, 3), torch.randn(16, 3), torch.randn(16, 4)


@pytest.fixture
def lone_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def expected_loss(teacher, batch):
    clean, adv, x = batch
    with torch.no_grad():
        logits = copy.deepcopy(teacher).eval()(x)
    return functional.cktat_loss(clean, adv, logits)


def modes(module):
    return [m.training for m in module.modules()]


def tensors(module):
    return [t.detach().clone() for t in module.state_dict().values()]


def train(module, x, steps=3):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        module.train()(x).square().sum().backward()
        optimizer.step()


# A copy, taken when the criterion is made.


def test_training_the_original_changes_nothing(teacher, batch):
    criterion, expected = CKTATLoss(teacher), expected_loss(teacher, batch)
    train(teacher, batch[2])
    assert not torch.allclose(expected_loss(teacher, batch), expected)  # the original did move
    assert torch.equal(criterion(*batch), expected)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda net: net.to("meta"), id="to meta"),
        pytest.param(lambda net: net.double(), id="double"),
        pytest.param(lambda net: net[4].weight.data.zero_(), id="in place"),
        pytest.param(lambda net: net[1].running_mean.fill_(9.0), id="statistics"),
        pytest.param(lambda net: setattr(net[4], "bias", None), id="surgery"),
        pytest.param(lambda net: net.requires_grad_(True).train(), id="thawed"),
        pytest.param(lambda net: net.load_state_dict(make_net().state_dict()), id="loaded"),
    ],
)
def test_changing_the_original_changes_nothing(teacher, batch, change):
    criterion, expected = CKTATLoss(teacher), expected_loss(teacher, batch)
    change(teacher)
    assert torch.equal(criterion(*batch), expected)


def test_the_student_itself_can_be_the_teacher(teacher, batch):
    student, x = teacher, batch[2]
    criterion, expected = CKTATLoss(student), expected_loss(student, batch)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    criterion(clean_logits=student(x), adv_logits=student(x + 0.1), x=x).backward()
    assert all(p.grad is not None for p in student.parameters())
    optimizer.step()
    assert torch.equal(criterion(*batch), expected)


def test_no_memory_is_shared_with_the_original(teacher):
    copied = CKTATLoss(teacher).teacher
    ours = {t.data_ptr() for t in teacher.state_dict().values()}
    assert ours.isdisjoint(t.data_ptr() for t in copied.state_dict().values())


def test_the_original_is_left_as_it_was(teacher, batch):
    teacher[0].requires_grad_(False)
    teacher[1].eval()
    before = modes(teacher), [p.requires_grad for p in teacher.parameters()], tensors(teacher)
    CKTATLoss(teacher)(*batch)
    assert before[:2] == (modes(teacher), [p.requires_grad for p in teacher.parameters()])
    torch.testing.assert_close(tensors(teacher), before[2], rtol=0, atol=0)


def test_a_teacher_of_another_architecture(batch):
    teacher, student = make_net(width=20), make_net(width=5)
    clean, adv = student(batch[2]), student(batch[2] + 0.1)
    loss = CKTATLoss(teacher)(clean, adv, batch[2])
    assert torch.equal(loss, expected_loss(teacher, (clean, adv, batch[2])))
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_teacher_that_cannot_be_copied_is_a_clear_error(batch):
    with pytest.raises(ValueError, match=r"teacher \(Uncopyable\) cannot be deep-copied: .*copy_teacher=False") as info:
        CKTATLoss(Uncopyable())
    assert info.value.__cause__ is not None
    CKTATLoss(Uncopyable(), copy_teacher=False)


# Unwrapped.


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(DistributedDataParallel, id="DDP"),
        pytest.param(DataParallel, id="DataParallel"),
        pytest.param(AveragedModel, id="AveragedModel"),
        pytest.param(lambda net: torch.compile(net, **EAGER), id="compile"),
        pytest.param(lambda net: torch.compile(DistributedDataParallel(AveragedModel(net)), **EAGER), id="all"),
        pytest.param(lambda net: AveragedModel(torch.compile(DataParallel(net), **EAGER)), id="all the other way"),
    ],
)
@pytest.mark.usefixtures("lone_process")
def test_wrappers_are_taken_off(teacher, batch, wrap):
    expected = expected_loss(teacher, batch)
    criterion = CKTATLoss(wrap(teacher))
    assert type(criterion.teacher) is nn.Sequential
    assert criterion.teacher is not teacher
    assert torch.equal(criterion(*batch), expected)


def test_an_averaged_model_gives_its_average(teacher, batch):
    averaged = AveragedModel(teacher)
    train(teacher, batch[2])
    averaged.update_parameters(teacher)
    averaged.update_parameters(make_net())
    assert torch.equal(CKTATLoss(averaged)(*batch), expected_loss(averaged.module, batch))


# How it is run.


def test_it_runs_in_eval_mode_without_gradients():
    criterion = CKTATLoss(Recorder())
    x = torch.randn(5, 4, requires_grad=True)
    loss = criterion(torch.randn(5, 3), torch.randn(5, 3, requires_grad=True), x)
    criterion.terms(torch.randn(5, 3), torch.randn(5, 3), x)
    assert criterion.teacher.grad_modes == [False, False]
    assert criterion.teacher.modes == [[False, False]] * 2
    assert torch.is_grad_enabled()
    loss.backward()
    assert x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in criterion.teacher.parameters())


@pytest.mark.parametrize("copy_teacher", [True, False])
@pytest.mark.parametrize(
    "thaw",
    [
        pytest.param(lambda criterion: criterion.train(), id="criterion.train"),
        pytest.param(lambda criterion: criterion.teacher.train(), id="teacher.train"),
        pytest.param(lambda criterion: criterion.teacher[1].train(), id="one layer"),
    ],
)
def test_train_mode_reaches_nothing(teacher, batch, thaw, copy_teacher):
    teacher.eval()
    expected = expected_loss(teacher, batch)
    criterion = CKTATLoss(teacher, copy_teacher=copy_teacher)
    thaw(criterion)
    before, state = modes(criterion.teacher), tensors(criterion.teacher)
    assert torch.equal(criterion(*batch), expected)
    assert modes(criterion.teacher) == before
    torch.testing.assert_close(tensors(criterion.teacher), state, rtol=0, atol=0)


def test_criterion_train_leaves_the_copy_in_eval_mode(teacher):
    criterion = CKTATLoss(teacher.train()).train()
    assert not any(modes(criterion.teacher))
    assert criterion.training


@pytest.mark.parametrize("copy_teacher", [True, False])
def test_an_exception_in_the_teacher_restores_modes(batch, copy_teacher):
    criterion = CKTATLoss(Raising(), copy_teacher=copy_teacher)
    criterion.teacher.train()
    criterion.teacher.frozen_norm.eval()
    with pytest.raises(OSError, match="no disk left"):
        criterion(*batch)
    assert modes(criterion.teacher) == [True, True, False]
    assert torch.is_grad_enabled()


def test_a_teacher_without_logits_is_a_clear_error(batch):
    with pytest.raises(TypeError, match=r"teacher\(x\) must be a tensor of logits \(N, C\), got a tuple"):
        CKTATLoss(TwoHeads())(*batch)


def test_integer_inputs_go_in_as_they_are():
    teacher = nn.EmbeddingBag(10, 3)
    tokens = torch.randint(10, (5, 7))
    clean, adv = torch.randn(5, 3), torch.randn(5, 3)
    expected = functional.cktat_loss(clean, adv, teacher(tokens))
    assert torch.equal(CKTATLoss(teacher)(clean, adv, tokens), expected)


# Nobody trains it, saves it or counts it.


def test_it_is_no_part_of_the_criterions_state(teacher):
    criterion = CKTATLoss(teacher)
    assert [*criterion.parameters(), *criterion.named_parameters(), *criterion.buffers()] == []
    assert [*criterion.named_buffers(), *criterion.children()] == []
    assert [*criterion.modules()] == [criterion]
    assert criterion.state_dict() == {}
    criterion.load_state_dict({})
    assert not any(p.requires_grad for p in criterion.requires_grad_(True).teacher.parameters())


def test_it_cannot_be_replaced_by_assignment(teacher):
    """nn.Module would take the new one for a trainable child, and the old one would still be the teacher."""
    criterion = CKTATLoss(teacher)
    with pytest.raises(AttributeError, match="teacher"):
        criterion.teacher = make_net()
    assert [*criterion.parameters()] == []


def test_it_is_no_part_of_a_model_that_holds_the_criterion(teacher):
    model = nn.ModuleDict({"student": make_net(), "criterion": CKTATLoss(teacher)})
    assert all(name.startswith("student.") for name in model.state_dict())
    assert {*model.parameters()} == {*model["student"].parameters()}


class Both(nn.Module):
    """A module as in Lightning, with the teacher and the criterion that has its copy."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = make_net()
        self.criterion = CKTATLoss(self.teacher)


def test_loading_a_module_that_holds_both_restores_the_teacher_alone(batch):
    """So load the teacher first and make the criterion then, as CKTATLoss says."""
    trained, resumed = Both(), Both()
    old = resumed.criterion(*batch)
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(expected_loss(resumed.teacher, batch), trained.criterion(*batch))
    assert torch.equal(resumed.criterion(*batch), old)
    resumed.criterion = CKTATLoss(resumed.teacher)
    assert torch.equal(resumed.criterion(*batch), trained.criterion(*batch))
    assert "Load the teacher's weights first" in CKTATLoss.__doc__


# Yet it goes where the criterion goes.


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda criterion: criterion.half(), torch.float16),
        (lambda criterion: criterion.bfloat16(), torch.bfloat16),
        (lambda criterion: criterion.double(), torch.float64),
        (lambda criterion: criterion.to(torch.float64), torch.float64),
        (lambda criterion: nn.ModuleList([criterion]).to(dtype=torch.float64)[0], torch.float64),
    ],
)
def test_casting_the_criterion_casts_it(teacher, batch, move, dtype):
    criterion = CKTATLoss(teacher)
    assert move(criterion) is criterion
    assert {t.dtype for t in criterion.teacher.state_dict().values() if t.is_floating_point()} == {dtype}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    clean, adv, x = batch
    loss, expected = criterion(clean, adv, x.to(dtype)), expected_loss(teacher, batch)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0.0, check_dtype=False)


def test_moving_the_criterion_moves_it(teacher):
    criterion = CKTATLoss(teacher).to("meta")
    assert {t.device.type for t in criterion.teacher.state_dict().values()} == {"meta"}
    assert {p.device.type for p in teacher.parameters()} == {"cpu"}


@pytest.mark.parametrize("make", [lambda: CKTATLoss(None), lambda: CKTATLoss(nn.Flatten())])
def test_criteria_without_weights_move_too(batch, make):
    clean, adv, _ = batch
    assert make().to(torch.float64)(clean, adv, teacher_logits=adv).item() > 0


@pytest.mark.parametrize("copy_teacher", [True, False])
@pytest.mark.parametrize(
    "clone",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda criterion: pickle.loads(pickle.dumps(criterion)), id="pickle"),
        pytest.param(lambda criterion: saved_and_loaded(criterion), id="torch.save"),
    ],
)
def test_clones_give_the_same_loss(teacher, batch, clone, copy_teacher):
    criterion = CKTATLoss(
        teacher,
        tau=2.5,
        beta=1.5,
        adaptive=True,
        reduction="none",
        detach_clean=True,
        copy_teacher=copy_teacher,
        backend="torch",
    )
    criterion.beta = 0.5
    other = clone(criterion)
    y = torch.arange(16) % 3
    expected = criterion(*batch, y=y)
    assert torch.equal(other(*batch, y=y), expected)
    assert repr(other) == repr(criterion)
    assert other.state_dict() == {}
    criterion.teacher[4].weight.data.zero_()
    assert torch.equal(other(*batch, y=y), expected)


def saved_and_loaded(criterion):
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# copy_teacher=False shares the object.


def test_a_shared_teacher_is_the_object_passed(teacher, batch):
    criterion = CKTATLoss(teacher, copy_teacher=False)
    assert criterion.teacher is teacher
    teacher[0].requires_grad_(False)
    teacher[1].eval()
    before = modes(teacher), [p.requires_grad for p in teacher.parameters()]
    state = tensors(teacher)
    assert torch.equal(criterion(*batch), expected_loss(teacher, batch))
    assert before == (modes(teacher), [p.requires_grad for p in teacher.parameters()])
    torch.testing.assert_close(tensors(teacher), state, rtol=0, atol=0)
    assert [*criterion.parameters()] == []
    assert criterion.state_dict() == {}


def test_a_shared_teacher_shows_every_change(teacher, batch):
    criterion = CKTATLoss(teacher, copy_teacher=False)
    before = criterion(*batch)
    train(teacher, batch[2])
    assert torch.equal(criterion(*batch), expected_loss(teacher, batch))
    assert not torch.allclose(criterion(*batch), before)
    criterion.double()
    assert teacher[0].weight.dtype == torch.float64


def test_a_shared_compiled_teacher_stays_compiled(teacher, batch):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile(teacher, backend=backend)
    criterion, expected = CKTATLoss(compiled, copy_teacher=False), expected_loss(teacher, batch)
    assert criterion.teacher is compiled
    before, state = modes(compiled), tensors(teacher)
    assert torch.equal(criterion(*batch), expected)
    assert len(calls) == 1
    assert modes(compiled) == before == [True] * len(before)
    torch.testing.assert_close(tensors(teacher), state, rtol=0, atol=0)


def test_warm_start_and_criterion_agree_at_the_start(teacher, batch):
    """A student that was just warm-started has nothing to learn with tau = 1 and no attack."""
    student = make_net()
    warm_start(student, teacher)
    logits = student.eval()(batch[2])
    loss = CKTATLoss(teacher, tau=1.0)(logits, logits, batch[2])
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.abs().max() == 0 for p in student.parameters())
