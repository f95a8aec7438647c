"""Gradients reach whom they should, in each input's own dtype."""

import pytest
import torch
from torch import Tensor

from cktat_loss.functional import cktat_loss, cktat_terms
from tests import oracle

pytestmark = pytest.mark.kernels

TAU, BETA = 0.7, 5.3
SHAPES = [(5, 10), (40, 17), pytest.param((40, 1000), marks=pytest.mark.not_on("interpreter"))]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = (3 * torch.randn(3, *shape)).to(dtype)
    return clean.requires_grad_(), adv.requires_grad_(), teacher


def summed(clean: Tensor, adv: Tensor, teacher: Tensor, **options: bool) -> Tensor:
    return cktat_loss(clean, adv, teacher, TAU, BETA, reduction="sum", **options)


def assert_gradient(actual: Tensor, true: oracle.Truth, of: str, scale: float = 1.0) -> None:
    expected, unit = (true.d_clean, true.unit_clean) if of == "clean" else (true.d_adv, true.unit_adv)
    assert oracle.gradient_error(actual, scale * expected, scale * unit) <= oracle.TOLERANCES[actual.dtype]


@ALL_SHAPES
def test_detach_clean(shape: tuple[int, int]) -> None:
    clean, adv, teacher = logits(*shape)
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    summed(clean, adv, teacher, detach_clean=True).backward()
    assert clean.grad is None
    assert_gradient(adv.grad, true, "adv")
    sum(cktat_terms(clean, adv, teacher, TAU, detach_clean=True)).sum().backward()
    assert clean.grad is None


@ALL_SHAPES
@pytest.mark.parametrize("without", ["clean", "adv"])
def test_one_side_without_gradient(without: str, shape: tuple[int, int]) -> None:
    clean, adv, teacher = logits(*shape)
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    frozen, other = (clean, adv) if without == "clean" else (adv, clean)
    frozen.requires_grad_(False)
    summed(clean, adv, teacher).backward()
    assert frozen.grad is None
    assert_gradient(other.grad, true, "adv" if without == "clean" else "clean")
    terms = cktat_terms(clean, adv, teacher, TAU)
    other.grad = None
    (terms.guidance + BETA * terms.consistency).sum().backward()
    assert frozen.grad is None
    assert_gradient(other.grad, true, "adv" if without == "clean" else "clean")


def test_no_graph_where_none_is_asked_for() -> None:
    clean, adv, teacher = logits(5, 10)
    with torch.no_grad():
        assert not summed(clean, adv, teacher).requires_grad
        assert not cktat_terms(clean, adv, teacher).guidance.requires_grad
    assert not summed(clean.detach(), adv.detach(), teacher).requires_grad


@pytest.mark.parametrize("depends", [False, True])
def test_teacher_gets_none(depends: bool) -> None:
    clean, adv, teacher = logits(5, 10)
    teacher.requires_grad_()
    through = 2 * teacher if depends else teacher
    terms = cktat_terms(clean, adv, through, TAU)
    (summed(clean, adv, through) + terms.guidance.sum() + terms.consistency.sum()).backward()
    assert teacher.grad is None
    assert clean.grad is not None
    assert adv.grad is not None


def test_the_teachers_own_graph_is_left_alone() -> None:
    """Two losses may share its logits, and what computes nothing else with them carries no gradient."""
    clean, adv, leaf = logits(5, 10)
    teacher = leaf.requires_grad_().exp().log()  # a graph that is freed by the first backward pass that walks it
    summed(clean, adv, teacher).backward()
    summed(clean, adv, teacher).backward()
    assert leaf.grad is None
    loss, terms = cktat_loss(clean.detach(), adv.detach(), teacher, TAU, BETA, return_terms=True)
    terms += cktat_terms(clean.detach(), adv.detach(), teacher, TAU)
    assert not any(x.requires_grad for x in (loss, *terms))


def test_saved_tensor_hooks_are_asked() -> None:
    """Whoever keeps copies of what is saved may change the logits before the backward pass."""
    clean, leaf, teacher = logits(5, 10)
    true = oracle.truth(clean, leaf, teacher, TAU, BETA)
    adv = 1 * leaf
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        loss = summed(clean, adv, teacher)
    with torch.no_grad():
        adv.zero_()
    (0.5 * loss).backward()
    assert_gradient(leaf.grad, true, "adv", scale=0.5)


def test_an_undefined_upstream_gradient() -> None:
    class Ignores(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *_: Tensor) -> None:
            return None

    clean, adv, teacher = logits(5, 10)
    for reduction in ("mean", "none"):
        Ignores.apply(cktat_loss(clean, adv, teacher, TAU, BETA, reduction=reduction)).sum().backward()
        assert adv.grad is None or (adv.grad == 0).all()


def test_negative_views() -> None:
    """Numbers that are negative in name alone, wherever they come in."""
    clean, adv, teacher = logits(5, 10)
    beta, upstream, y = torch.rand(5), torch.rand(5), torch.arange(5)

    def gradients(view: bool, **options: Tensor) -> tuple[Tensor, ...]:
        options = {name: torch._neg_view(-x) if view else x for name, x in options.items()}
        rows = cktat_loss(clean, adv, teacher, TAU, reduction="none", **options)
        return torch.autograd.grad(rows, (clean, adv), torch._neg_view(-upstream) if view else upstream)

    for options in ({"beta": beta}, {"y": y}):
        for one, other in zip(gradients(True, **options), gradients(False, **options), strict=True):
            torch.testing.assert_close(one, other)


def test_guidance_has_no_gradient_for_clean() -> None:
    clean, adv, teacher = logits(5, 10)
    guidance, _ = cktat_terms(clean, adv, teacher, TAU)
    guidance.sum().backward()
    assert clean.grad is None or (clean.grad == 0).all()
    assert_gradient(adv.grad, oracle.truth(clean, adv, teacher, TAU, 0.0), "adv")


@ALL_SHAPES
def test_noncontiguous_inputs_and_upstream_gradients(shape: tuple[int, int]) -> None:
    clean, adv, teacher = (3 * torch.randn(3, *shape[::-1])).unbind()
    clean, adv, teacher = clean.requires_grad_(), adv.requires_grad_(), teacher
    true = oracle.truth(clean.t(), adv.t(), teacher.t(), TAU, BETA)
    rows = cktat_loss(clean.t(), adv.t(), teacher.t(), TAU, BETA, reduction="none")
    for upstream in (torch.ones(()).expand(shape[0]), torch.ones(2 * shape[0])[::2]):
        d_clean, d_adv = torch.autograd.grad(rows, (clean, adv), upstream, retain_graph=True)
        assert_gradient(d_clean.t(), true, "clean")
        assert_gradient(d_adv.t(), true, "adv")


INPUTS = pytest.mark.parametrize("which", ["clean", "adv", "teacher", "beta", "y"])


def all_inputs() -> dict[str, Tensor]:
    clean, adv, teacher = logits(5, 10)
    return {"clean": 1 * clean, "adv": 1 * adv, "teacher": teacher, "beta": torch.rand(5), "y": torch.arange(5)}


def loss_of(clean: Tensor, adv: Tensor, teacher: Tensor, beta: Tensor, y: Tensor) -> Tensor:
    """The loss with sample weights of both kinds."""
    return cktat_loss(clean, adv, teacher, TAU, beta) + cktat_loss(clean, adv, teacher, TAU, BETA, y=y)


@INPUTS
def test_a_change_in_place_before_backward_is_noticed(which: str) -> None:
    """Also of what the backward pass may have no more use for."""
    inputs = all_inputs()
    loss = loss_of(**inputs)
    with torch.no_grad():
        inputs[which].zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("which", ["clean", "teacher", "beta", "y", "clean teacher beta y"])
def test_inference_tensors_simply_work(which: str) -> None:
    """Such as a teacher's logits, cached under inference_mode; and the other inputs are guarded all the same."""
    inputs = all_inputs()
    adv = inputs["adv"]
    expected = torch.autograd.grad(loss_of(**inputs), adv)
    with torch.inference_mode():
        inputs.update({name: inputs[name].clone() for name in which.split()})
    loss = loss_of(**inputs)
    torch.testing.assert_close(torch.autograd.grad(loss, adv, retain_graph=True), expected)
    terms = cktat_terms(inputs["clean"], adv, inputs["teacher"], TAU)
    assert torch.autograd.grad(sum(terms).sum(), adv)[0].abs().sum() > 0
    with torch.no_grad():
        adv.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@ALL_SHAPES
def test_the_same_tensor_as_both(shape: tuple[int, int]) -> None:
    _, both, teacher = logits(*shape)
    true = oracle.truth(both, both, teacher, TAU, BETA)
    for retain_graph in (False, True):
        for create_graph in (False, True):
            (gradient,) = torch.autograd.grad(
                summed(both, both, teacher), both, retain_graph=retain_graph or create_graph, create_graph=create_graph
            )
            assert_gradient(gradient, true, "adv")  # the consistency has none


@ALL_SHAPES
@pytest.mark.parametrize("create_graph", [False, True])
def test_adversarial_logits_that_depend_on_clean_ones(create_graph: bool, shape: tuple[int, int]) -> None:
    clean, noise, teacher = (3 * torch.randn(3, *shape, dtype=torch.float64)).unbind()
    clean.requires_grad_()
    adv = 0.5 * clean + noise
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    (gradient,) = torch.autograd.grad(summed(clean, adv, teacher), clean, create_graph=create_graph)
    expected = torch.from_numpy(true.d_clean + 0.5 * true.d_adv)
    torch.testing.assert_close(gradient.detach(), expected, rtol=0, atol=1e-10)
