"""Gradients reach whom they should, once, at the scale they should have, in each input's own dtype."""

import pytest
import torch
from torch import Tensor

from cktat_loss.functional import cktat_loss, cktat_loss_and_grads, cktat_terms
from tests import oracle

TAU, BETA = 0.7, 5.3
SHAPES = [(5, 10), (40, 17), (40, 1000)]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = (3 * torch.randn(3, *shape)).to(dtype)
    return clean.requires_grad_(), adv.requires_grad_(), teacher


def summed(clean: Tensor, adv: Tensor, teacher: Tensor, **options: bool) -> Tensor:
    return cktat_loss(clean, adv, teacher, TAU, BETA, reduction="sum", **options)  # type: ignore[arg-type]


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
    loss, d_clean, d_adv = cktat_loss_and_grads(clean, adv, teacher, TAU, BETA, reduction="sum", detach_clean=True)
    assert d_clean is None
    assert_gradient(d_adv, true, "adv")
    assert oracle.loss_error(loss, true.rows.sum()) <= 2e-5


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
    assert not any(x.requires_grad for x in cktat_loss_and_grads(clean, adv, teacher) if x is not None)


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


@ALL_SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_backward_twice(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A retained graph gives the same gradients again, and under another upstream gradient as many times them."""
    clean, adv, teacher = logits(*shape, dtype=dtype)
    loss = summed(clean, adv, teacher)
    first = torch.autograd.grad(loss, (clean, adv), retain_graph=True)
    kept = [d.clone() for d in first]
    second = torch.autograd.grad(loss, (clean, adv), retain_graph=True)
    doubled = torch.autograd.grad(2 * loss, (clean, adv))
    for once, copy, again, twice in zip(first, kept, second, doubled, strict=True):
        assert torch.equal(once, copy)  # and the second pass wrote nothing into the first one's results
        assert torch.equal(once, again)
        torch.testing.assert_close(twice, 2 * once, rtol=2e-3, atol=1e-6)


def test_backward_twice_adds_up() -> None:
    clean, adv, teacher = logits(40, 17)
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    loss = summed(clean, adv, teacher)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_gradient(clean.grad, true, "clean", scale=2)
    assert_gradient(adv.grad, true, "adv", scale=2)


def test_changing_logits_in_place_before_backward_is_noticed() -> None:
    clean, adv, teacher = logits(5, 10)
    changed = 1 * adv
    loss = summed(clean, changed, teacher)
    changed += 1
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@ALL_SHAPES
def test_upstream_gradient(shape: tuple[int, int]) -> None:
    clean, adv, teacher = logits(*shape)
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    (-3.7 * cktat_loss(clean, adv, teacher, TAU, BETA)).backward()
    assert_gradient(clean.grad / (-3.7 / shape[0]), true, "clean")
    assert_gradient(adv.grad / (-3.7 / shape[0]), true, "adv")


@pytest.mark.parametrize("form", ["loss", "terms", "at once"])
def test_float16_gradients_survive_loss_scaling(form: str) -> None:
    """Late in training, cast after the scaling: cast before it, most of them would be zero."""
    n, scale = 256, 65536.0
    base = 2 * torch.randn(n, 1000)
    clean, adv, teacher = ((base + 0.003 * torch.randn(n, 1000)) for _ in range(3))
    clean, adv, teacher = clean.half().requires_grad_(), adv.half().requires_grad_(), (5 * teacher).half()
    true = oracle.truth(clean, adv, teacher, 5.0, 6.0)
    if form == "loss":
        (scale * cktat_loss(clean, adv, teacher)).backward()
        gradients = clean.grad, adv.grad
    elif form == "terms":
        terms = cktat_terms(clean, adv, teacher)
        (scale * (terms.guidance + 6.0 * terms.consistency).mean()).backward()
        gradients = clean.grad, adv.grad
    else:
        _, *gradients = cktat_loss_and_grads(clean, adv, teacher, grad_scale=torch.tensor(scale))
    for actual, expected, unit in zip(gradients, true[3:5], true[5:], strict=True):
        cast_first = torch.from_numpy(expected / n).half()
        assert (cast_first == 0).double().mean() > 0.5, "the case is too easy to tell"
        assert (actual == 0).double().mean() < 0.02
        assert oracle.gradient_error(actual, scale / n * expected, scale / n * unit) <= 2e-5


def test_each_gradient_has_its_own_dtype() -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for of_clean in dtypes:
        for of_adv in dtypes:
            for shape in SHAPES[:2]:
                clean, adv, teacher = logits(*shape)
                clean = clean.detach().to(of_clean).requires_grad_()
                adv = adv.detach().to(of_adv).requires_grad_()
                d_clean, d_adv = torch.autograd.grad(summed(clean, adv, teacher), (clean, adv))
                _, one_clean, one_adv = cktat_loss_and_grads(clean, adv, teacher)
                assert one_clean is not None
                assert d_clean.dtype == one_clean.dtype == of_clean
                assert d_adv.dtype == one_adv.dtype == of_adv


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


def test_gradients_in_one_pass_feed_autograd() -> None:
    weight, x, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(2, 5, 4), torch.randn(5, 10)
    clean, adv = x[0] @ weight, x[1] @ weight
    (expected,) = torch.autograd.grad(cktat_loss(clean, adv, teacher), weight, retain_graph=True)
    _, d_clean, d_adv = cktat_loss_and_grads(clean, adv, teacher)
    torch.autograd.backward([clean, adv], [d_clean, d_adv])
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-6)
