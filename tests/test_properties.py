"""Whatever the shape, strides, dtypes, scale, tau, beta, labels and form: the truth, and the symmetries it has."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cktat_loss.functional import cktat_loss, cktat_terms
from tests import oracle
from tests.variants import EACH_UNLABELLED_VARIANT, NOT_ON_KERNELS, Variant, compiled

pytestmark = pytest.mark.kernels

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.stack((x, x), 2).flatten(1)[:, ::2],
    "offset": lambda x: torch.cat((x, x), 1)[:, x.shape[1] :],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "negative view": lambda x: torch._neg_view(-x),
}
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])


class Case(NamedTuple):
    clean: Tensor
    adv: Tensor
    teacher: Tensor
    tau: float
    beta: float | Tensor
    y: Tensor | None

    @property
    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]

    @property
    def tolerance(self) -> float:
        return min(oracle.TOLERANCES[x.dtype] for x in self.logits)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss."""
        return torch.float64 if torch.float64 in {x.dtype for x in self.logits} else torch.float32


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    n = draw(st.integers(1, 9) | st.sampled_from([40, 300]))
    c = draw(st.integers(1, 33) | st.sampled_from([100, 1000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.05, 0.3, 1.0, 4.0, 20.0]))

    def logits() -> Tensor:
        x = (scale * torch.randn(n, c, generator=g, dtype=torch.float64)).to(draw(st.sampled_from(dtypes)))
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)

    beta: float | Tensor = draw(st.floats(0, 10, width=32))
    y = None
    weights = draw(st.sampled_from(["a number", "a tensor", "for each sample", "labels"]))
    if weights == "labels":
        y = torch.randint(min(c, 128), (n,), generator=g).to(draw(st.sampled_from(LABELS)))
        y = torch.stack((y, y), 1)[:, 0] if draw(st.booleans()) else y
    elif weights != "a number":
        shape = () if weights == "a tensor" else (n,)
        beta = (10 * torch.rand(shape, generator=g)).to(draw(st.sampled_from(DTYPES)))
    return Case(logits(), logits(), logits(), draw(st.floats(0.25, 20)), beta, y)


def loss_of(case: Case, *logits: Tensor, **options: Any) -> Any:
    clean, adv = logits or case[:2]
    return cktat_loss(clean, adv, *case[2:5], y=case.y, **options)


def gradients(case: Case, reduction: str = "none", upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    clean, adv = case.clean.detach().requires_grad_(), case.adv.detach().requires_grad_()
    loss = loss_of(case, clean, adv, reduction=reduction)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), *torch.autograd.grad(loss, (clean, adv), upstream)


@EACH_UNLABELLED_VARIANT
@given(case=cases())
def test_the_truth_in_every_form(variant: Variant, case: Case) -> None:
    rows, d_clean, d_adv = variant(*case)
    assert (rows.dtype, d_clean.dtype, d_adv.dtype) == (case.dtype, case.clean.dtype, case.adv.dtype)
    oracle.assert_right(rows, d_clean, d_adv, oracle.truth(*case), case.tolerance)


@NOT_ON_KERNELS
@settings(max_examples=6)  # a compilation each
@given(cases())
def test_the_truth_compiled(case: Case) -> None:
    n = min(len(case.adv), 9)
    beta = case.beta[:n] if isinstance(case.beta, Tensor) and case.beta.ndim else case.beta
    few = Case(*(x[:n] for x in case.logits), case.tau, beta, case.y if case.y is None else case.y[:n])
    oracle.assert_right(*compiled(*few), oracle.truth(*few), few.tolerance)


@given(cases(), REDUCTIONS, st.booleans(), st.sampled_from([1.0, 0.25, -3.7]))
def test_the_truth_reduced(case: Case, reduction: Any, detach_clean: bool, upstream: float) -> None:
    """The terms are those of :func:`cktat_terms`, without a gradient. The clean logits may need a gradient or not."""
    clean, adv = case.clean.detach().requires_grad_(), case.adv.detach().requires_grad_()
    true, n = oracle.truth(*case), len(case.adv)
    loss, terms = loss_of(case, clean, adv, reduction=reduction, detach_clean=detach_clean, return_terms=True)
    wanted = true.rows if reduction == "none" else getattr(true.rows, reduction)()
    assert oracle.loss_error(loss, wanted) <= case.tolerance
    for term, apart, expected in zip(terms, cktat_terms(*case[:4]), true[:2], strict=True):
        assert not term.requires_grad
        assert term.dtype == loss.dtype == case.dtype
        assert oracle.loss_error(term, expected) <= case.tolerance
        torch.testing.assert_close(term, apart, rtol=1e-5, atol=1e-8)
    d_clean, d_adv = torch.autograd.grad(upstream * loss.sum(), (clean, adv), allow_unused=True)
    scale = upstream / n if reduction == "mean" else upstream
    assert (d_clean is None) == detach_clean
    if d_clean is not None:
        size = abs(scale) * true.unit_clean
        assert oracle.gradient_error(d_clean, scale * true.d_clean, size) <= case.tolerance
    assert oracle.gradient_error(d_adv, scale * true.d_adv, abs(scale) * true.unit_adv) <= case.tolerance


@given(cases())
def test_any_upstream_gradients_of_the_terms(case: Case) -> None:
    """A weight for each row and each term, negative ones and zeros too."""
    clean, adv = case.clean.detach().requires_grad_(), case.adv.detach().requires_grad_()
    terms = cktat_terms(clean, adv, case.teacher, case.tau)
    upstream = (torch.randn(2, len(adv)).relu() - 0.3).to(case.dtype).unbind()
    d_clean, d_adv = torch.autograd.grad(terms, (clean, adv), upstream)
    w_guidance, w_consistency = map(oracle.array, upstream)
    zero, one = (oracle.truth(*case[:4], beta) for beta in (0.0, 1.0))
    of_adv = w_guidance[:, None] * zero.d_adv + w_consistency[:, None] * (one.d_adv - zero.d_adv)
    size = abs(w_consistency)
    assert oracle.gradient_error(d_clean, w_consistency[:, None] * one.d_clean, size * one.unit_clean) <= case.tolerance
    assert oracle.gradient_error(d_adv, of_adv, size + abs(w_guidance)) <= case.tolerance


@given(cases(), st.integers(0, 2**32))
def test_any_upstream_gradient_of_each_row(case: Case, seed: int) -> None:
    true, g = oracle.truth(*case), torch.Generator().manual_seed(seed)
    upstream = torch.randn(len(case.adv), generator=g).relu() - 0.3
    loss, d_clean, d_adv = gradients(case, upstream=upstream.to(case.dtype))
    weight = oracle.array(upstream)[:, None]
    size = abs(weight[:, 0])
    assert oracle.gradient_error(d_clean, weight * true.d_clean, size * true.unit_clean) <= case.tolerance
    assert oracle.gradient_error(d_adv, weight * true.d_adv, size * true.unit_adv) <= case.tolerance
    assert oracle.loss_error(loss, true.rows) <= case.tolerance


@NOT_ON_KERNELS
@given(cases(dtypes=(torch.float64,)), st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50))
def test_a_shift_of_a_row_changes_nothing(case: Case, by_clean: float, by_adv: float, by_teacher: float) -> None:
    clean, adv, teacher = case.logits
    shifted = case._replace(clean=clean + by_clean, adv=adv + by_adv, teacher=teacher + by_teacher)
    for after, before in zip(gradients(shifted), gradients(case), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_classes_and_samples_does_not_matter(case: Case, random: Any) -> None:
    n, c = case.adv.shape
    rows, columns = (torch.tensor(random.sample(range(size), size)) for size in (n, c))
    beta = case.beta[rows] if isinstance(case.beta, Tensor) and case.beta.ndim else case.beta
    y = None if case.y is None else columns.argsort()[case.y.long()[rows]]
    shuffled = Case(*(x[rows][:, columns] for x in case.logits), case.tau, beta, y)
    loss, *both = gradients(shuffled)
    d_clean, d_adv = (x[rows.argsort()][:, columns.argsort()] for x in both)
    oracle.assert_right(loss[rows.argsort()], d_clean, d_adv, oracle.truth(*case), case.tolerance)


@NOT_ON_KERNELS
@given(cases(dtypes=(torch.float64,)), st.floats(0, 10), st.floats(0, 10))
def test_linear_in_beta(case: Case, one: float, other: float) -> None:
    """Also as the scale of the labels' weights."""

    def at(beta: float) -> tuple[Tensor, ...]:
        return gradients(case._replace(beta=beta))

    for f_one, f_other, f_sum, f_zero in zip(at(one), at(other), at(one + other), at(0.0), strict=True):
        torch.testing.assert_close(f_one + f_other, f_sum + f_zero, rtol=1e-10, atol=1e-10)


@given(cases(dtypes=(torch.float64, torch.float32)))
def test_gradients_sum_to_zero_over_classes(case: Case) -> None:
    for gradient, unit in zip(gradients(case)[1:], oracle.truth(*case)[-2:], strict=True):
        assert (abs(oracle.array(gradient).sum(1)) <= 2e-5 * unit).all()


@given(cases())
def test_inputs_stay_as_they_are(case: Case) -> None:
    inputs = [torch.as_tensor(x) for x in case if x is not None]
    before = [x.clone() for x in inputs]
    gradients(case)
    gradients(case, "mean")
    loss_of(case, return_terms=True)
    cktat_terms(*case[:4])
    for after, copy in zip(inputs, before, strict=True):
        assert torch.equal(after, copy)
