"""torch.compile takes a whole training step as one graph, and schedules don't recompile it.

Only the compiler's frontend and autograd run here, save in the last test: that is where graphs break.
"""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cktat_loss import CKTATLoss, functional

SIDE, CLASSES = 6, 5
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
RECIPE = {"adaptive": True, "detach_clean": True}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def counter():
    return CompileCounterWithBackend("aot_eager")


def make_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
    )


def make_batch(n=8):
    x = torch.rand(n, 3, SIDE, SIDE)
    return x, x + 0.1 * torch.randn_like(x), torch.randint(CLASSES, (n,))


class Training:
    """A student in train mode with its criterion, as a user's loop has them."""

    def __init__(self, **how):
        self.student, self.teacher = make_net().train(), make_net()
        self.criterion = CKTATLoss(self.teacher, tau=5.3, beta=0.7, **how)
        self.autocast = False

    def step(self, x, x_adv, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            clean, adv = self.student(x), self.student(x_adv)
            y = y if self.criterion.adaptive else None
            return self.criterion(clean_logits=clean, adv_logits=adv, x=x, y=y)

    def gradients(self, step, batch):
        """The loss and the student's gradients, its BatchNorm statistics put back."""
        state = {name: value.clone() for name, value in self.student.state_dict().items()}
        loss = step(*batch)
        loss.backward()
        gradients = [p.grad for p in self.student.parameters()]
        self.student.zero_grad()
        self.student.load_state_dict(state)
        return [loss.detach(), *gradients]

    def check(self, compiled, batch, **tolerance):
        actual, expected = self.gradients(compiled, batch), self.gradients(self.step, batch)
        assert all(g is not None and g.abs().sum() > 0 for g in expected)
        torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 1e-4, "atol": 1e-6}))


@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"copy_teacher": False}, RECIPE])
def test_a_step_is_one_graph_with_the_eager_gradients(counter, how):
    training = Training(**how)
    compiled = torch.compile(training.step, backend=counter, fullgraph=True)
    for _ in range(2):
        training.check(compiled, make_batch())
    assert counter.frame_count == 1


def test_the_teacher_is_frozen_in_a_graph_too(counter):
    training = Training()
    training.criterion.teacher.train()
    before = [value.clone() for value in training.criterion.teacher.state_dict().values()]
    compiled = torch.compile(training.step, backend=counter, fullgraph=True)
    training.check(compiled, make_batch())
    assert all(m.training for m in training.criterion.teacher.modules())
    after = [*training.criterion.teacher.state_dict().values()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    training.student.requires_grad_(False)
    assert not compiled(*make_batch()).requires_grad


def test_schedules_recompile_once(counter):
    """Floats become symbols when they first change; after that nothing compiles, whatever the value."""
    training, batch = Training(), make_batch()
    compiled = torch.compile(training.step, backend=counter, fullgraph=True)
    training.check(compiled, batch)
    assert counter.frame_count == 1
    for name, allowed in (("tau", 2), ("beta", 3)):
        for value in (3.1, 1.0, 8, 0.25):
            setattr(training.criterion, name, value)
            training.check(compiled, batch)
            assert counter.frame_count <= allowed, (name, value)
    for tau, beta in ((1.7, 0.0), (2.0, 6.5), (0.5, 1.0)):
        training.criterion.tau, training.criterion.beta = tau, beta
        training.check(compiled, batch)
    assert counter.frame_count <= 3


def test_a_beta_that_starts_from_zero_recompiles_once(counter):
    """The ramp that the README advises."""
    training, batch = Training(), make_batch()
    training.criterion.beta = 0.0
    compiled = torch.compile(training.step, backend=counter, fullgraph=True)
    for step in range(5):
        training.criterion.beta = 6 * step / 4
        training.check(compiled, batch)
    assert counter.frame_count <= 2


def test_a_beta_of_one_call_recompiles_once(counter):
    clean, adv, teacher = (torch.randn(8, CLASSES) for _ in range(3))
    criterion = CKTATLoss(None)

    def loss(beta):
        return criterion(clean, adv, teacher_logits=teacher, beta=beta)

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for beta in (0.5, 1.5, 2.5, 3.5):
        torch.testing.assert_close(compiled(beta), loss(beta))
    assert counter.frame_count <= 2


def test_terms_come_with_the_loss(counter):
    """From the same graph, without gradients: for a log."""
    logits, y = [torch.randn(8, CLASSES) for _ in range(3)], torch.arange(8) % CLASSES
    logits[1].requires_grad_()

    def step(clean, adv, teacher):
        return functional.cktat_loss(clean, adv, teacher, 0.7, 5.3, y=y, return_terms=True)

    loss, terms = torch.compile(step, backend=counter, fullgraph=True)(*logits)
    torch.testing.assert_close((loss, terms), step(*logits))
    assert loss.requires_grad
    assert not any(term.requires_grad for term in terms)
    assert counter.frame_count == 1


def test_a_last_small_batch_recompiles_once(counter):
    training = Training()
    compiled = torch.compile(training.step, backend=counter, fullgraph=True)
    for n in (8, 5, 8, 3, 11):
        training.check(compiled, make_batch(n))
    assert counter.frame_count <= 2


def test_dynamic_shapes_never_recompile(counter):
    training = Training()
    compiled = torch.compile(training.step, backend=counter, fullgraph=True, dynamic=True)
    training.check(compiled, make_batch(8))
    first = counter.frame_count  # may be 2: the compiler starts over where it first took BatchNorm's floats for symbols
    # Older compilers take tau and beta for symbols once each has changed, and dynamic=True does not hurry them.
    first += 0 if TORCH >= (2, 14) else 2
    for n, tau, beta in ((5, 5.3, 0.7), (3, 2.9, 0.7), (11, 1.3, 6.5)):
        training.criterion.tau, training.criterion.beta = tau, beta
        training.check(compiled, make_batch(n))
    assert counter.frame_count <= first


def test_autocast_to_bfloat16(counter):
    training = Training()
    training.autocast = True
    compiled = torch.compile(training.step, backend=counter, fullgraph=True)
    batch = make_batch()
    assert compiled(*batch).dtype == torch.float32
    training.check(compiled, batch, rtol=2e-2, atol=1e-3)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_small_and_large_kl_in_a_graph(counter, reduction):
    """No branch on data is left there, so its numbers are checked apart, against float64."""

    def loss(clean, adv, teacher):
        return functional.cktat_loss(clean, adv, teacher, tau=1.0, beta=2.3, reduction=reduction)

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for scale in (1e-4, 1.0, 100.0):
        clean = torch.randn(8, CLASSES) * 10
        logits = [clean, clean + scale * torch.randn(8, CLASSES), clean + scale * torch.randn(8, CLASSES)]
        expected = loss(*(x.double() for x in logits)).float()
        torch.testing.assert_close(compiled(*logits), expected, rtol=1e-3, atol=1e-12)


@pytest.mark.skipif(TORCH < (2, 14), reason="older aot_eager keeps what could be made of the logits again")
def test_nothing_is_kept_for_the_backward_pass_but_the_logits(counter):
    logits = [torch.randn(8, 50) for _ in range(3)]
    for x in logits[:2]:
        x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = torch.compile(functional.cktat_loss, backend=counter, fullgraph=True)(*logits)
    loss.backward()
    assert {x.data_ptr() for x in kept if x.numel() >= 8 * 50} == {x.data_ptr() for x in logits}


@pytest.mark.skipif(TORCH == (2, 6), reason="torch 2.6 raises if a graph changes the mode of a compiled module")
def test_a_shared_compiled_teacher_in_a_graph(counter):
    training = Training()
    training.criterion = CKTATLoss(torch.compile(training.teacher, backend="eager"), 5.3, 0.7, copy_teacher=False)
    compiled = torch.compile(training.step, backend=counter, fullgraph=True)
    for _ in range(2):
        training.check(compiled, make_batch())
    assert counter.frame_count == 1
    assert all(m.training for m in training.teacher.modules())


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch 2.13's own, inside inductor
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor_gives_the_eager_gradients():
    clean, adv, teacher = (torch.randn(4, CLASSES) for _ in range(3))
    clean.requires_grad_()
    adv.requires_grad_()
    criterion = CKTATLoss(None, tau=0.7, beta=5.3)

    def step():
        return torch.autograd.grad(criterion(clean, adv, teacher_logits=teacher), (clean, adv))

    def loss(clean, adv, teacher):
        return criterion(clean, adv, teacher_logits=teacher)

    compiled = torch.compile(loss, backend="inductor", fullgraph=True)(clean, adv, teacher)
    torch.testing.assert_close(torch.autograd.grad(compiled, (clean, adv)), step())
