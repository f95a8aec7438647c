"""torch.func and vectorised autograd see ordinary tensor ops, and get what plain autograd gets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from cktat_loss import reference
from cktat_loss.functional import cktat_loss, cktat_terms
from tests import oracle
from tests.variants import FLOAT64

# torch's own, when it first loads its forward mode.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.script")

TAU, BETA = 0.7, 5.3


def logits(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    clean, adv, teacher = 2 * torch.randn(3, *shape, dtype=torch.float64)
    return clean, adv, teacher


def loss(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    return cktat_loss(clean, adv, teacher, TAU, BETA)


def rows(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    return cktat_loss(clean, adv, teacher, TAU, BETA, reduction="none")


def of_terms(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    guidance, consistency = cktat_terms(clean, adv, teacher, TAU)
    return (guidance + BETA * consistency).mean()


def of_reference(clean: Tensor, adv: Tensor, teacher: Tensor) -> Tensor:
    return reference.cktat_loss(clean, adv, teacher, TAU, BETA)


def assert_close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


EITHER = pytest.mark.parametrize("f", [loss, of_terms])


@EITHER
def test_grad(f: Callable[..., Tensor]) -> None:
    args = logits(5, 10)
    true = oracle.truth(*args, TAU, BETA)
    d_clean, d_adv, d_teacher = grad(f, argnums=(0, 1, 2))(*args)
    assert oracle.gradient_error(d_clean, true.d_clean / 5, true.unit_clean / 5) <= 1e-11
    assert oracle.gradient_error(d_adv, true.d_adv / 5, true.unit_adv / 5) <= 1e-11
    assert (d_teacher == 0).all()


@EITHER
def test_vmap_of_grad(f: Callable[..., Tensor]) -> None:
    args = logits(6, 5, 10)
    d_clean, d_adv = vmap(grad(f, argnums=(0, 1)))(*args)
    for i, one in enumerate(zip(*args, strict=True)):
        true = oracle.truth(*one, TAU, BETA)
        assert oracle.gradient_error(d_clean[i], true.d_clean / 5, true.unit_clean / 5) <= 1e-11
        assert oracle.gradient_error(d_adv[i], true.d_adv / 5, true.unit_adv / 5) <= 1e-11


def test_vmap_over_beta_and_without_gradients() -> None:
    args = logits(5, 10)
    betas = torch.rand(4, 5, dtype=torch.float64)
    actual = vmap(lambda beta: cktat_loss(*args, TAU, beta, reduction="none"))(betas)
    for i in range(4):
        assert oracle.loss_error(actual[i], oracle.truth(*args, TAU, betas[i]).rows) <= 1e-11


def test_vmap_over_labels_and_with_terms() -> None:
    args = logits(5, 10)
    many = torch.arange(20).view(4, 5) % 10
    actual, terms = vmap(lambda y: cktat_loss(*args, TAU, BETA, y=y, reduction="none", return_terms=True))(many)
    for i in range(4):
        true = oracle.truth(*args, TAU, BETA, many[i])
        assert oracle.loss_error(actual[i], true.rows) <= 1e-11
        assert oracle.loss_error(terms.guidance[i], true.guidance) <= 1e-11
        assert oracle.loss_error(terms.consistency[i], true.consistency) <= 1e-11


def test_no_gradient_flows_through_the_labels_weights_or_the_terms() -> None:
    args, y = logits(5, 10), torch.arange(5)
    true = oracle.truth(*args, TAU, BETA, y)
    d_adv = grad(lambda a: cktat_loss(args[0], a, args[2], TAU, BETA, y=y))(args[1])
    assert oracle.gradient_error(d_adv, true.d_adv / 5, true.unit_adv / 5) <= 1e-11
    of_a_term = grad(lambda a: cktat_loss(args[0], a, args[2], TAU, BETA, return_terms=True)[1].guidance.sum())
    assert (of_a_term(args[1]) == 0).all()
    slope = jvp(lambda a: cktat_loss(args[0], a, args[2], TAU, BETA, y=y), (args[1],), (torch.ones_like(args[1]),))[1]
    assert_close(slope, torch.from_numpy(true.d_adv).sum() / 5)


def test_per_sample_gradients_by_jacrev() -> None:
    args = logits(5, 10)
    true = oracle.truth(*args, TAU, BETA)
    for argnum, expected in ((0, true.d_clean), (1, true.d_adv)):
        jacobian = jacrev(rows, argnums=argnum)(*args)
        assert_close(jacobian, torch.diag_embed(torch.from_numpy(expected).t()).permute(1, 2, 0))


@pytest.mark.parametrize("argnum", [0, 1])
@EITHER
def test_hessian(f: Callable[..., Tensor], argnum: int) -> None:
    args = logits(3, 4)
    expected = torch.autograd.functional.hessian(
        lambda x: of_reference(*args[:argnum], x, *args[argnum + 1 :]), args[argnum]
    )
    assert_close(hessian(f, argnums=argnum)(*args), expected)
    assert_close(jacrev(jacrev(f, argnums=argnum), argnums=argnum)(*args), expected)


@EITHER
def test_forward_mode(f: Callable[..., Tensor]) -> None:
    clean, adv, teacher = logits(5, 10)
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    tangents = torch.randn(2, 5, 10, dtype=torch.float64).unbind()
    value, slope = jvp(lambda c, a: f(c, a, teacher), (clean, adv), tangents)
    expected = (torch.from_numpy(true.d_clean) * tangents[0] + torch.from_numpy(true.d_adv) * tangents[1]).sum() / 5
    assert oracle.loss_error(value, true.rows.mean()) <= 1e-11
    assert_close(slope, expected)
    assert_close(jacfwd(f, argnums=1)(clean, adv, teacher), torch.from_numpy(true.d_adv) / 5)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.float16], ids=str)
def test_many_upstream_gradients_at_once(dtype: torch.dtype) -> None:
    clean, adv, teacher = (x.to(dtype) for x in logits(5, 10))
    true = oracle.truth(clean, adv, teacher, TAU, BETA)
    clean.requires_grad_()
    adv.requires_grad_()
    out = rows(clean, adv, teacher)
    d_clean, d_adv = torch.autograd.grad(
        out, (clean, adv), torch.eye(5, dtype=out.dtype), is_grads_batched=True, retain_graph=True
    )
    assert (d_clean.dtype, d_adv.dtype) == (dtype, dtype)
    tolerance = oracle.TOLERANCES[dtype]
    for i in range(5):
        others = torch.arange(5) != i
        assert (d_clean[i][others] == 0).all()
        assert (d_adv[i][others] == 0).all()
    assert oracle.gradient_error(d_clean.sum(0), true.d_clean, true.unit_clean) <= tolerance
    assert oracle.gradient_error(d_adv.sum(0), true.d_adv, true.unit_adv) <= tolerance


def test_vectorised_jacobian() -> None:
    clean, adv, teacher = logits(5, 10)
    for function in (rows, lambda c, a, t: cktat_terms(c, a, t, TAU)):
        plain, vectorised = (
            torch.autograd.functional.jacobian(lambda c, a: function(c, a, teacher), (clean, adv), vectorize=vectorize)  # noqa: B023
            for vectorize in (False, True)
        )
        assert_close(vectorised, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dual_numbers_without_a_graph(dtype: torch.dtype) -> None:
    clean, adv, teacher = (x.to(dtype) for x in logits(5, 10))
    true, tangent = oracle.truth(clean, adv, teacher, TAU, BETA), torch.randn_like(adv)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(adv, tangent)
        slopes = [torch.autograd.forward_ad.unpack_dual(f(clean, dual, teacher)).tangent for f in (loss, of_terms)]
    expected = (torch.from_numpy(true.d_adv) * tangent.double()).sum() / 5
    for slope in slopes:
        torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-4)


def test_dual_numbers_with_a_graph() -> None:
    """Forward mode outside torch.func, over what is differentiated backward too."""
    clean, adv, teacher = logits(5, 10)
    adv.requires_grad_()
    true, tangent = oracle.truth(clean, adv, teacher, TAU, BETA), torch.randn_like(adv)
    with torch.autograd.forward_ad.dual_level():
        value = loss(clean, torch.autograd.forward_ad.make_dual(adv, tangent), teacher)
        slope = torch.autograd.forward_ad.unpack_dual(value).tangent
    assert_close(slope, (torch.from_numpy(true.d_adv) * tangent).sum() / 5)
    (d_adv,) = torch.autograd.grad(value, adv)
    assert_close(d_adv, torch.from_numpy(true.d_adv) / 5)
