"""The criterion computes what functional computes, in every form of call, and refuses what makes no sense."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import cktat_loss
from cktat_loss import CKTATLoss, CKTATTerms, adaptive_beta, functional

TAU, BETA = 0.7, 5.3


@pytest.fixture
def teacher():
    return nn.Linear(4, 3)


@pytest.fixture
def criterion(teacher):
    return CKTATLoss(teacher, tau=TAU, beta=BETA)


@pytest.fixture
def logits():
    """Clean and adversarial ones, leaves that want gradients."""
    return torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)


@pytest.fixture
def x():
    return torch.randn(6, 4)


def gradients(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Forms of call.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_it_equals_functional(teacher, logits, x, reduction, backend):
    how = {"reduction": reduction, "backend": backend}
    expected = functional.cktat_loss(*logits, teacher(x), TAU, BETA, **how)
    criterion = CKTATLoss(teacher, TAU, BETA, **how)
    for loss in (
        criterion(*logits, x),
        criterion(clean_logits=logits[0], adv_logits=logits[1], x=x),
        criterion(*logits, teacher_logits=teacher(x)),
        CKTATLoss(None, TAU, BETA, **how)(*logits, teacher_logits=teacher(x)),
    ):
        assert_same(loss, expected)
        assert_same(gradients(loss, logits), gradients(expected, logits))


def test_defaults_are_those_of_functional_and_the_paper(teacher, logits, x):
    criterion = CKTATLoss(teacher)
    assert (criterion.tau, criterion.beta, criterion.reduction) == (5.0, 6.0, "mean")
    assert (criterion.adaptive, criterion.detach_clean, criterion.backend) == (False, False, "auto")
    assert_same(criterion(*logits, x), functional.cktat_loss(*logits, teacher(x)))


def test_no_gradient_flows_to_teacher_logits(criterion, logits):
    t = torch.randn(6, 3, requires_grad=True)
    criterion(*logits, teacher_logits=t).backward()
    criterion.terms(*logits, teacher_logits=t).guidance.sum().backward()
    assert t.grad is None


@pytest.mark.parametrize("call", [CKTATLoss.__call__, CKTATLoss.terms])
def test_exactly_one_source_of_teacher_logits(criterion, logits, x, call):
    with pytest.raises(ValueError, match="exactly one of x and teacher_logits must be given, got both"):
        call(criterion, *logits, x, teacher_logits=logits[0])
    with pytest.raises(ValueError, match="exactly one of x and teacher_logits must be given, got neither"):
        call(criterion, *logits)
    with pytest.raises(ValueError, match="x was given, but the criterion has no teacher"):
        call(CKTATLoss(None), *logits, x)


def test_what_the_teacher_returns_is_checked(logits, x):
    for teacher, match in [
        (nn.Linear(4, 2), r"teacher_logits must have the shape of clean_logits, \(6, 3\), got .*\(6, 2\)"),
        (nn.Unflatten(1, (2, 2)), r"teacher_logits must have shape \(N, C\), got .*\(6, 2, 2\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            CKTATLoss(teacher)(*logits, x)


# Both terms.


@pytest.mark.parametrize("from_x", [True, False])
def test_terms_are_the_two_summands(teacher, criterion, logits, x, from_x):
    terms = criterion.terms(*logits, x) if from_x else criterion.terms(*logits, teacher_logits=teacher(x))
    assert type(terms) is CKTATTerms
    assert terms.guidance.shape == terms.consistency.shape == (6,)
    assert_same(terms, functional.cktat_terms(*logits, teacher(x), TAU))
    loss = criterion(*logits, x)
    together = (terms.guidance + BETA * terms.consistency).mean()
    torch.testing.assert_close(together, loss)
    torch.testing.assert_close(gradients(together, logits), gradients(loss, logits))


# detach_clean.


def test_detach_clean_stops_the_clean_gradient_and_nothing_else(teacher, logits, x):
    attached, detached = CKTATLoss(teacher), CKTATLoss(teacher, detach_clean=True)
    loss, expected = detached(*logits, x), attached(*logits, x)
    assert_same(loss, expected)
    for other in (loss, detached.terms(*logits, x).consistency):
        assert torch.autograd.grad(other.sum(), logits[0], allow_unused=True, retain_graph=True) == (None,)
    assert_same(gradients(loss, logits[1]), gradients(expected, logits[1]))


# Beta, call by call.


def test_a_beta_of_one_call(teacher, criterion, logits, x):
    assert_same(criterion(*logits, x, beta=2), functional.cktat_loss(*logits, teacher(x), TAU, 2.0))
    torch.testing.assert_close(criterion(*logits, x, beta=0.0), criterion.terms(*logits, x).guidance.mean())
    assert_same(criterion(*logits, x), functional.cktat_loss(*logits, teacher(x), TAU, BETA))
    assert criterion.beta == BETA


# Labels.


@pytest.fixture
def recipe(teacher):
    return CKTATLoss(teacher, tau=TAU, beta=BETA, adaptive=True, detach_clean=True)


@pytest.fixture
def y():
    return torch.tensor([0, 1, 2, 2, 1, 0])


def test_labels_weigh_the_samples(teacher, recipe, logits, x, y):
    expected = functional.cktat_loss(*logits, teacher(x), TAU, BETA, y=y, detach_clean=True)
    for loss in (recipe(*logits, x, y=y), recipe(*logits, teacher_logits=teacher(x), y=y)):
        assert_same(loss, expected)
    weights = adaptive_beta(logits[1], y, BETA)
    torch.testing.assert_close(expected, functional.cktat_loss(*logits, teacher(x), TAU, weights, detach_clean=True))


def test_labels_follow_the_criterions_beta_and_a_calls_is_its_scale(teacher, recipe, logits, x, y):
    recipe.beta = 1.3
    assert_same(recipe(*logits, x, y=y), functional.cktat_loss(*logits, teacher(x), TAU, 1.3, y=y))
    assert_same(recipe(*logits, x, y=y, beta=2), functional.cktat_loss(*logits, teacher(x), TAU, 2.0, y=y))
    assert_same(recipe(*logits, x, y=y), functional.cktat_loss(*logits, teacher(x), TAU, 1.3, y=y))


def test_labels_where_they_are_due_and_only_there(criterion, recipe, logits, x, y):
    with pytest.raises(ValueError, match=r"y must be given in every call of a criterion with adaptive=True, got None"):
        recipe(*logits, x)
    with pytest.raises(ValueError, match=r"y must be None unless the criterion has adaptive=True, got a tensor"):
        criterion(*logits, x, y=y)
    with pytest.raises(
        TypeError, match=r"beta must be a number where y gives the weights of the samples, got a tensor"
    ):
        recipe(*logits, x, y=y, beta=torch.rand(6))
    with pytest.raises(ValueError, match=r"y must hold labels from 0 to 2, got 3"):
        recipe(*logits, x, y=y + 1)


def test_terms_take_no_labels(criterion, recipe, logits, x, y):
    assert_same(recipe.terms(*logits, x), criterion.terms(*logits, x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        recipe.terms(*logits, x, y=y)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_returned_with_the_loss(teacher, logits, x, y, reduction, adaptive):
    criterion = CKTATLoss(teacher, TAU, BETA, adaptive=adaptive, reduction=reduction)
    y = y if adaptive else None
    loss, terms = criterion(*logits, x, y=y, return_terms=True)
    expected = criterion(*logits, x, y=y)
    assert type(terms) is CKTATTerms
    torch.testing.assert_close(terms, criterion.terms(*logits, x))
    assert not any(term.requires_grad for term in terms)
    assert_same(loss, expected)
    assert_same(gradients(loss, logits), gradients(expected, logits))


def test_all_comes_from_one_run_of_the_teacher(logits, x, y):
    class Counting(nn.Linear):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return super().forward(x)

    criterion = CKTATLoss(Counting(4, 3), adaptive=True)
    criterion(*logits, x, y=y, return_terms=True)
    assert criterion.teacher.runs == 1


# Schedules.


def test_tau_and_beta_can_be_assigned(teacher, criterion, logits, x):
    for tau, beta in [(5, 6), (0.3, 0), (Fraction(7, 2), Fraction(1, 3))]:
        criterion.tau, criterion.beta = tau, beta
        assert_same((criterion.tau, criterion.beta), (float(tau), float(beta)))
        assert type(criterion.tau) is type(criterion.beta) is float
        assert_same(criterion(*logits, x), functional.cktat_loss(*logits, teacher(x), float(tau), float(beta)))
        assert_same(criterion.terms(*logits, x), functional.cktat_terms(*logits, teacher(x), float(tau)))


# A bad value: the exception, and the message that names what it is about, what came and what was wanted.
BAD_TAU = [
    (0, ValueError, r"tau must be finite, > 0 .*, got 0\.0"),
    (-1.0, ValueError, r"tau must be finite, > 0 .*, got -1\.0"),
    (1e-46, ValueError, r"tau must be .*not 0 in float32, got 1e-46"),
    (math.inf, ValueError, r"tau must be finite.*got inf"),
    (math.nan, ValueError, r"tau must be finite.*got nan"),
    (True, TypeError, r"tau must be a number, got True \(bool\)"),
    ("5", TypeError, r"tau must be a number, got '5' \(str\)"),
    (None, TypeError, r"tau must be a number, got None"),
    (torch.tensor(5.0), TypeError, r"tau must be a number, got a tensor of shape \(\)"),
]
BAD_BETA = [
    (-0.5, ValueError, r"beta must be finite and >= 0, got -0\.5"),
    (math.inf, ValueError, r"beta must be finite and >= 0, got inf"),
    (math.nan, ValueError, r"beta must be finite and >= 0, got nan"),
    (False, TypeError, r"beta must be a number, got False \(bool\)"),
    ("6", TypeError, r"beta must be a number, got '6' \(str\)"),
    ([6.0], TypeError, r"beta must be a number, got a list"),
]
BAD_ANYWHERE = [("tau", *case) for case in BAD_TAU] + [("beta", *case) for case in BAD_BETA]
BAD_HERE = [  # in the constructor and as an attribute, where no batch is known
    ("beta", torch.tensor(6.0), TypeError, r"beta must be a number, got a tensor of shape \(\)"),
    ("beta", None, TypeError, r"beta must be a number, got None"),
    # What nn.Module would take for a child to train.
    *(
        (name, value, TypeError, rf"{name} must be a number, got a {got}")
        for name in ("tau", "beta")
        for value, got in ((nn.Parameter(torch.tensor(5.0)), r"tensor of shape \(\)"), (nn.Linear(1, 1), "Linear$"))
    ),
]


@pytest.mark.parametrize(("name", "value", "kind", "match"), BAD_ANYWHERE + BAD_HERE)
def test_bad_schedules_are_refused(criterion, name, value, kind, match):
    with pytest.raises(kind, match=match):
        setattr(criterion, name, value)
    assert (criterion.tau, criterion.beta) == (TAU, BETA)
    assert [*criterion.parameters(), *criterion.children()] == []
    with pytest.raises(kind, match=match):
        CKTATLoss(None, **{name: value})


@pytest.mark.parametrize(
    ("value", "kind", "match"),
    [
        *BAD_BETA,
        (torch.ones(5), ValueError, r"beta must be a number or have shape \(\) or \(6,\), .*got .*\(5,\)"),
        (torch.ones(6, 1), ValueError, r"beta must be a number or have shape \(\) or \(6,\), .*got .*\(6, 1\)"),
        (torch.ones(1), ValueError, r"beta must be a number or have shape \(\) or \(6,\), .*got .*\(1,\)"),
        (torch.ones(6, dtype=torch.int64), TypeError, r"beta must be .*floating tensor, got .*torch\.int64"),
        (torch.ones(6, device="meta"), ValueError, r"beta must be on the device of the logits, cpu, got .*meta"),
        (torch.ones(6, requires_grad=True), ValueError, r"beta must not require grad.*beta\.detach\(\)"),
    ],
)
def test_bad_betas_of_a_call_are_refused(criterion, logits, x, value, kind, match):
    with pytest.raises(kind, match=match):
        criterion(*logits, x, beta=value)


@pytest.mark.parametrize(
    ("name", "value", "kind", "match"),
    [
        ("reduction", "batchmean", ValueError, r"reduction must be 'mean', which is torch's 'batchmean'"),
        ("reduction", np.array(["mean"]), ValueError, r"reduction must be one of 'mean', 'sum', 'none', got a ndarray"),
        ("backend", np.array(["auto"]), ValueError, r"backend must be one of 'auto', 'triton', 'torch', got a ndarray"),
        ("adaptive", None, TypeError, r"adaptive must be True or False, got None"),
        ("reduction", None, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got None"),
        ("backend", "cuda", ValueError, r"backend must be one of 'auto', 'triton', 'torch', got 'cuda'"),
        ("detach_clean", 1, TypeError, r"detach_clean must be True or False, got 1 \(int\)"),
        ("copy_teacher", "no", TypeError, r"copy_teacher must be True or False, got 'no' \(str\)"),
        (
            "teacher",
            torch.nn.functional.relu,
            TypeError,
            r"teacher must be a torch\.nn\.Module or None, got a function",
        ),
        ("teacher", nn.Linear, TypeError, r"teacher must be a torch\.nn\.Module or None, got a type"),
        (
            "teacher",
            {"weight": torch.ones(3, 4)},
            TypeError,
            r"teacher must be a torch\.nn\.Module or None, got a dict",
        ),
    ],
)
def test_bad_constructor_arguments_are_refused(name, value, kind, match):
    with pytest.raises(kind, match=match):
        CKTATLoss(**{"teacher": None, name: value})


def test_options_are_by_keyword_only(teacher):
    with pytest.raises(TypeError):
        CKTATLoss(teacher, 5.0, 6.0, "mean")


# Small comforts.


def test_repr_names_what_was_chosen(teacher):
    criterion = CKTATLoss(teacher, 2, 3, adaptive=True, reduction="sum", detach_clean=True, backend="torch")
    assert repr(criterion) == (
        "CKTATLoss(teacher=Linear, tau=2.0, beta=3.0, adaptive=True, reduction='sum', "
        "detach_clean=True, backend='torch')"
    )
    criterion.beta = 0.5
    assert "beta=0.5" in repr(criterion)
    assert "teacher=None" in repr(CKTATLoss(None))


def test_it_touches_neither_the_student_nor_its_graph(criterion, x):
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    student[1].eval()
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    modes = [m.training for m in student.modules()]
    clean, adv = student(x), student(x + 0.1)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    loss = criterion(clean, adv, x)
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in student.parameters())
    assert_same(dict(student.state_dict()), state)
    loss.backward()
    assert all(not torch.equal(p.grad, torch.ones_like(p)) for p in student[0].parameters() if p.ndim == 2)


def test_the_class_is_exported():
    assert cktat_loss.CKTATLoss is CKTATLoss
