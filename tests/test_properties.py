"""Whatever the shape, strides, dtypes, scale, tau, beta and reduction: the truth, and the symmetries it has."""

from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cktat_loss.functional import cktat_loss, cktat_loss_and_grads, cktat_terms
from tests import oracle

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.stack((x, x), 2).flatten(1)[:, ::2],
    "offset": lambda x: torch.cat((x, x), 1)[:, x.shape[1] :],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "negative view": lambda x: torch._neg_view(-x),
}


class Case(NamedTuple):
    clean: Tensor
    adv: Tensor
    teacher: Tensor
    tau: float
    beta: float | Tensor

    @property
    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]

    @property
    def tolerance(self) -> float:
        return oracle.tolerance(*self.logits)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    n = draw(st.integers(1, 9) | st.sampled_from([40, 300]))
    c = draw(st.integers(1, 33) | st.sampled_from([100, 1000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.05, 0.3, 1.0, 4.0, 20.0]))

    def logits() -> Tensor:
        x = (scale * torch.randn(n, c, generator=g, dtype=torch.float64)).to(draw(st.sampled_from(dtypes)))
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)

    a_number = st.floats(0, 10, width=32)
    beta: float | Tensor = draw(a_number)
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(), (n,)]))
        beta = (10 * torch.rand(shape, generator=g)).to(draw(st.sampled_from(DTYPES)))
    return Case(logits(), logits(), logits(), draw(st.floats(0.25, 20)), beta)


def gradients(case: Case, reduction: str = "none", upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    clean, adv = case.clean.detach().requires_grad_(), case.adv.detach().requires_grad_()
    loss = cktat_loss(clean, adv, *case[2:], reduction=reduction)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), *torch.autograd.grad(loss, (clean, adv), upstream)


@given(cases(), st.sampled_from(["mean", "sum", "none"]))
def test_the_truth(case: Case, reduction: str) -> None:
    loss, d_clean, d_adv = gradients(case, reduction)
    true, n = oracle.truth(*case), len(case.adv)
    assert loss.dtype == (torch.float64 if torch.float64 in {x.dtype for x in case.logits} else torch.float32)
    assert (d_clean.dtype, d_adv.dtype) == (case.clean.dtype, case.adv.dtype)
    rows = loss if reduction == "none" else cktat_loss(*case, reduction="none")
    oracle.assert_right(rows, d_clean, d_adv, true, case.tolerance, scale=1 / n if reduction == "mean" else 1)
    if reduction != "none":
        assert oracle.loss_error(loss, getattr(true.rows, reduction)()) <= case.tolerance


@given(cases())
def test_terms_are_the_truth(case: Case) -> None:
    terms = cktat_terms(*case[:4])
    true = oracle.truth(*case)
    assert oracle.loss_error(terms.guidance, true.guidance) <= case.tolerance
    assert oracle.loss_error(terms.consistency, true.consistency) <= case.tolerance
    assert terms.guidance.dtype == terms.consistency.dtype == cktat_loss(*case).dtype


@given(cases(), st.sampled_from(["mean", "sum"]))
def test_three_forms_agree(case: Case, reduction: Any) -> None:
    """The loss, its terms put together, and loss and gradients in one pass."""
    true, n = oracle.truth(*case), len(case.adv)
    scale = 1 / n if reduction == "mean" else 1
    clean, adv = case.clean.detach().requires_grad_(), case.adv.detach().requires_grad_()
    terms = cktat_terms(clean, adv, case.teacher, case.tau)
    rows = terms.guidance + case.beta * terms.consistency
    by_terms = torch.autograd.grad(getattr(rows, reduction)(), (clean, adv))
    loss, *by_autograd = gradients(case, reduction)
    at_once, *in_one_pass = cktat_loss_and_grads(*case, reduction=reduction)
    torch.testing.assert_close(at_once, loss, rtol=1e-6, atol=1e-12)
    assert at_once.dtype == loss.dtype
    for d_clean, d_adv in (by_terms, by_autograd, in_one_pass):
        oracle.assert_right(rows.detach(), d_clean, d_adv, true, case.tolerance, scale)
        assert (d_clean.dtype, d_adv.dtype) == (clean.dtype, adv.dtype)


@given(cases(dtypes=(torch.float64, torch.float32)), st.floats(1e-3, 1e5), st.sampled_from(["mean", "sum"]))
def test_grad_scale(case: Case, scale: float, reduction: Any) -> None:
    """Scales the gradients as a loss scaled by as much would, and leaves the loss alone."""
    loss, *plain = cktat_loss_and_grads(*case, reduction=reduction)
    true, n = oracle.truth(*case), len(case.adv) if reduction == "mean" else 1
    for factor in (scale, torch.tensor(scale, dtype=torch.float64)):
        same, *scaled = cktat_loss_and_grads(*case, reduction=reduction, grad_scale=factor)
        assert torch.equal(same, loss)
        for big, small, unit in zip(scaled, plain, (true.unit_clean, true.unit_adv), strict=True):
            assert oracle.gradient_error(big, scale * oracle.array(small), scale / n * unit) <= 1e-6


@given(cases(dtypes=(torch.float64,)), st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50))
def test_a_shift_of_a_row_changes_nothing(case: Case, by_clean: float, by_adv: float, by_teacher: float) -> None:
    clean, adv, teacher = case.logits
    shifted = Case(clean + by_clean, adv + by_adv, teacher + by_teacher, case.tau, case.beta)
    for after, before in zip(gradients(shifted), gradients(case), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_classes_and_samples_does_not_matter(case: Case, random: Any) -> None:
    n, c = case.adv.shape
    rows, columns = (torch.tensor(random.sample(range(size), size)) for size in (n, c))
    beta = case.beta[rows] if isinstance(case.beta, Tensor) and case.beta.ndim else case.beta
    shuffled = Case(*(x[rows][:, columns] for x in case.logits), case.tau, beta)
    d_clean, d_adv = (x[rows.argsort()][:, columns.argsort()] for x in gradients(shuffled)[1:])
    loss = gradients(shuffled)[0][rows.argsort()]
    oracle.assert_right(loss, d_clean, d_adv, oracle.truth(*case), case.tolerance)


@given(cases(dtypes=(torch.float64,)), st.floats(0, 10), st.floats(0, 10))
def test_linear_in_beta(case: Case, one: float, other: float) -> None:
    def at(beta: float) -> tuple[Tensor, ...]:
        return gradients(case._replace(beta=beta))

    for f_one, f_other, f_sum, f_zero in zip(at(one), at(other), at(one + other), at(0.0), strict=True):
        torch.testing.assert_close(f_one + f_other, f_sum + f_zero, rtol=1e-10, atol=1e-10)


@given(cases(dtypes=(torch.float64, torch.float32)))
def test_gradients_sum_to_zero_over_classes(case: Case) -> None:
    for gradient, unit in zip(gradients(case)[1:], oracle.truth(*case)[-2:], strict=True):
        assert (abs(oracle.array(gradient).sum(1)) <= 2e-5 * unit).all()


@given(cases(), st.integers(0, 2**32))
def test_any_upstream_gradient(case: Case, seed: int) -> None:
    """A weight a row, negative ones and zeros too."""
    true, g = oracle.truth(*case), torch.Generator().manual_seed(seed)
    upstream = torch.randn(len(case.adv), generator=g).relu() - 0.3
    loss, d_clean, d_adv = gradients(case, upstream=upstream.to(cktat_loss(*case).dtype))
    weight = oracle.array(upstream)[:, None]
    size = abs(weight[:, 0])
    assert oracle.gradient_error(d_clean, weight * true.d_clean, size * true.unit_clean) <= case.tolerance
    assert oracle.gradient_error(d_adv, weight * true.d_adv, size * true.unit_adv) <= case.tolerance
    assert oracle.loss_error(loss, true.rows) <= case.tolerance


@given(cases())
def test_inputs_stay_as_they_are(case: Case) -> None:
    before = [x.clone() for x in (*case.logits, torch.as_tensor(case.beta))]
    gradients(case)
    cktat_loss(*case)
    cktat_terms(*case[:4])
    cktat_loss_and_grads(*case)
    for after, copy in zip((*case.logits, torch.as_tensor(case.beta)), before, strict=True):
        assert torch.equal(after, copy)
