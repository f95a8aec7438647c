"""beta is a number or sample weights of any floating dtype; adaptive_beta makes such weights."""

import math
import re

import pytest
import torch
from torch import Tensor

from cktat_loss import adaptive_beta
from cktat_loss.functional import cktat_loss, cktat_loss_and_grads
from tests import oracle
from tests.forms import FORMS, Form

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(5, 10), (40, 17), (40, 1000)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_sample", [True, False])
def test_weights(per_sample: bool, shape: tuple[int, int], dtype: torch.dtype, form: Form) -> None:
    clean, adv, teacher = 2 * torch.randn(3, *shape)
    beta = (6 * torch.rand(shape[:1] if per_sample else ())).to(dtype)
    if per_sample:
        beta[0] = 0
    true = oracle.truth(clean, adv, teacher, 0.7, beta)
    rows, d_clean, d_adv = form(clean, adv, teacher, 0.7, beta)
    oracle.assert_right(rows, d_clean, d_adv, true, 2e-5)
    assert not per_sample or (d_clean[0] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_weights_leave_the_dtype_of_the_loss(shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    """The loss has the dtype that the logits give it, whatever the weights are."""
    logits, beta = torch.randn(3, 5, 10), torch.rand(shape).to(dtype)
    adv = logits[1].requires_grad_()
    with torch.no_grad():
        assert cktat_loss(*logits, 5.0, beta, reduction=reduction).dtype == torch.float32  # type: ignore[arg-type]
    loss = cktat_loss(logits[0], adv, logits[2], 5.0, beta, reduction=reduction)  # type: ignore[arg-type]
    assert loss.dtype == torch.float32
    if reduction != "none":
        assert cktat_loss_and_grads(*logits, 5.0, beta)[0].dtype == torch.float32
    for_float64 = cktat_loss(*logits.detach().double(), 5.0, beta, reduction=reduction)  # type: ignore[arg-type]
    assert for_float64.dtype == torch.float64


def test_a_weight_per_sample_weighs_its_own_sample() -> None:
    clean, adv, teacher = torch.randn(3, 3, 4, dtype=torch.float64)
    beta = torch.tensor([0.0, 1.0, 10.0])
    rows = cktat_loss(clean, adv, teacher, 1.0, beta, reduction="none")
    for i, b in enumerate(beta.tolist()):
        one = cktat_loss(clean[i : i + 1], adv[i : i + 1], teacher[i : i + 1], 1.0, b)
        torch.testing.assert_close(rows[i], one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [1, 10])
def test_one_weight_per_sample_and_as_many_classes(n: int) -> None:
    """(N,) goes along the samples also where it would fit the classes."""
    logits, beta = torch.randn(3, n, 10), torch.rand(n)
    oracle.assert_right(*FORMS["eager"](*logits, 0.7, beta), oracle.truth(*logits, 0.7, beta), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_beta(dtype: torch.dtype) -> None:
    adv = (3 * torch.randn(6, 10)).to(dtype).requires_grad_()
    y = torch.arange(6)
    w = adaptive_beta(adv, y, beta=5.3)
    expected = []
    for logits, label in zip(adv.tolist(), y.tolist(), strict=True):
        e = [math.exp(x) for x in logits]
        expected.append(5.3 * e[label] / sum(e))
    torch.testing.assert_close(w.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    assert w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert w.shape == (6,)
    assert not w.requires_grad


def test_adaptive_beta_default_and_limits() -> None:
    sure = torch.tensor([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]])
    assert adaptive_beta(sure, torch.tensor([0, 0, 1])).tolist() == [6.0, 0.0, 3.0]
    assert adaptive_beta(sure[:0], torch.tensor([], dtype=torch.long)).shape == (0,)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        assert adaptive_beta(sure, torch.tensor([0, 0, 1], dtype=dtype)).tolist() == [6.0, 0.0, 3.0]


def test_adaptive_beta_serves_as_beta() -> None:
    clean, adv, teacher = torch.randn(3, 5, 10)
    w = adaptive_beta(adv.requires_grad_(), torch.arange(5))
    loss = cktat_loss(clean, adv, teacher, 2.0, w, detach_clean=True)
    true = oracle.truth(clean, adv, teacher, 2.0, w)
    (d_adv,) = torch.autograd.grad(loss, adv)
    assert oracle.loss_error(loss, true.rows.mean()) <= 2e-5
    assert oracle.gradient_error(d_adv, true.d_adv / 5, true.unit_adv / 5) <= 2e-5


ADV, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("adv", "y", "beta", "kind", "says"),
    [
        ([[0.0]], Y, 6.0, TypeError, r"adv_logits .*tensor.*\(N, C\), got \[\[0\.0\]\] \(list\)"),
        (ADV.long(), Y, 6.0, TypeError, r"adv_logits .*float16.*float64, got .*torch\.int64"),
        (ADV[0], Y, 6.0, ValueError, r"adv_logits .*\(N, C\), got .*shape \(3,\)"),
        (ADV[:, :0], Y, 6.0, ValueError, r"adv_logits .*at least one class, got .*shape \(4, 0\)"),
        (ADV, [0] * 4, 6.0, TypeError, r"y .*tensor.*\(N,\), got \[0, 0, 0, 0\] \(list\)"),
        (ADV, Y.float(), 6.0, TypeError, r"y .*integer tensor, got .*torch\.float32"),
        (ADV, Y.bool(), 6.0, TypeError, r"y .*integer tensor, got .*torch\.bool"),
        (ADV, Y[:3], 6.0, ValueError, r"y .*\(4,\).*got .*shape \(3,\)"),
        (ADV, Y[:, None], 6.0, ValueError, r"y .*\(4,\).*got .*shape \(4, 1\)"),
        (ADV, Y.to("meta"), 6.0, ValueError, r"y .*device of adv_logits, cpu, got .*meta"),
        (ADV, Y, -1.0, ValueError, r"beta .*finite and >= 0, got -1\.0"),
        (ADV, Y, math.nan, ValueError, r"beta .*finite and >= 0, got nan"),
        (ADV, Y, math.inf, ValueError, r"beta .*finite and >= 0, got inf"),
        (ADV, Y, True, TypeError, r"beta .*number, got True \(bool\)"),
        (ADV, Y, torch.ones(4), TypeError, r"beta .*number, got a tensor of shape \(4,\)"),
    ],
)
def test_adaptive_beta_refuses(adv: Tensor, y: Tensor, beta: float, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught:
        adaptive_beta(adv, y, beta)
    assert re.search(says, str(caught.value)), str(caught.value)
