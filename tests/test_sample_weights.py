"""Each sample has its own weight: a tensor, or beta times the probability of its label, made in the same pass."""

import math
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cktat_loss import CKTATLoss, adaptive_beta
from cktat_loss.functional import cktat_loss, cktat_terms
from tests import oracle
from tests.variants import DTYPES, EACH_UNLABELLED_VARIANT, NOT_ON_KERNELS, Variant, compiled

pytestmark = pytest.mark.kernels

SHAPES = [(5, 10), (40, 17), pytest.param((40, 1000), marks=pytest.mark.not_on("interpreter"))]
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.mark.not_on("gpu")
@EACH_UNLABELLED_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_tensor_of_any_floating_dtype(
    per_sample: bool, shape: tuple[int, int], dtype: torch.dtype, variant: Variant
) -> None:
    clean, adv, teacher = 2 * torch.randn(3, *shape)
    beta = (6 * torch.rand(shape[:1] if per_sample else ())).to(dtype)
    if per_sample:
        beta[0] = 0
    rows, d_clean, d_adv = variant(clean, adv, teacher, 0.7, beta)
    assert rows.dtype == torch.float32
    oracle.assert_right(rows, d_clean, d_adv, variant.truth(clean, adv, teacher, 0.7, beta), 2e-5)
    assert not per_sample or (d_clean[0] == 0).all()


def test_a_tensors_values_are_not_looked_at() -> None:
    """No wait for the device: a weight that is no weight goes into its own row."""
    beta = torch.tensor([1.0, math.nan, -1.0, 1.0])
    rows = cktat_loss(*torch.randn(3, 4, 3), beta=beta, reduction="none")
    assert rows.isnan().tolist() == [False, True, False, False]


# Labels.


@EACH_UNLABELLED_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels(shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> None:
    clean, adv, teacher = (2 * torch.randn(3, *shape)).to(dtype)
    y = torch.randint(shape[1], shape[:1])
    args = clean, adv, teacher, 0.7, 5.3, y
    oracle.assert_right(*variant(*args), oracle.truth(*args), oracle.TOLERANCES[dtype])


@pytest.mark.not_on("gpu")
@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
@EACH_UNLABELLED_VARIANT
def test_labels_of_any_integer_dtype(variant: Variant, dtype: torch.dtype) -> None:
    clean, adv, teacher = 2 * torch.randn(3, 6, 10)
    y = torch.tensor([0, 9, 3, 3, 1, 5])
    oracle.assert_right(
        *variant(clean, adv, teacher, 0.7, 5.3, y.to(dtype)), oracle.truth(clean, adv, teacher, 0.7, 5.3, y), 2e-5
    )


def test_no_gradient_flows_through_the_weights() -> None:
    """It would have a term of its own, beta * consistency * d softmax(adv)[y]."""
    clean, adv, teacher = 2 * torch.randn(3, 5, 10)
    adv.requires_grad_()
    y = torch.arange(5)
    (actual,) = torch.autograd.grad(cktat_loss(clean, adv, teacher, 0.7, 5.3, y=y), adv)
    terms = cktat_terms(clean, adv, teacher, 0.7)
    through = 5.3 * adv.softmax(1)[y, y]
    (detached,) = torch.autograd.grad(
        (terms.guidance + through.detach() * terms.consistency).mean(), adv, retain_graph=True
    )
    (attached,) = torch.autograd.grad((terms.guidance + through * terms.consistency).mean(), adv)
    torch.testing.assert_close(actual, detached, rtol=1e-5, atol=1e-6)
    assert (attached - detached).abs().max() > 1e-2


WRONG = (-100, -1, 10, 2**31 + 3, 2**62)


@NOT_ON_KERNELS
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_label_that_is_no_class_is_refused_on_the_cpu(backend: Any, wrong: int) -> None:
    clean, adv, teacher = torch.randn(3, 5, 10)
    y = torch.tensor([0, 1, wrong, 3, 4])
    for call in (
        lambda: cktat_loss(clean, adv, teacher, y=y, backend=backend),
        lambda: CKTATLoss(None, adaptive=True, backend=backend)(clean, adv, teacher_logits=teacher, y=y),
        lambda: adaptive_beta(adv, y),
    ):
        with pytest.raises(ValueError, match=rf"y must hold labels from 0 to 9, got {wrong}$"):
            call()


def test_a_parameter_of_labels_is_checked_too() -> None:
    y = torch.nn.Parameter(torch.tensor([0, 10]), requires_grad=False)
    with pytest.raises(ValueError, match=r"y must hold labels from 0 to 9, got 10$"):
        adaptive_beta(torch.randn(2, 10), y)


def unseen(run: Callable[..., Any]) -> Callable[..., Any]:
    """Labels out of range as on a GPU, where no label is read."""

    def called(*args: Any) -> Any:
        with patch("cktat_loss._checks.is_traced", lambda: True):
            return run(*args)

    return called


@pytest.mark.parametrize("wrong", WRONG)
@EACH_UNLABELLED_VARIANT
def test_elsewhere_it_gives_nan_for_its_row_alone(variant: Variant, wrong: int) -> None:
    """No other row's memory, and no failed assertion, which would end a process's CUDA."""
    clean, adv, teacher = 2 * torch.randn(3, 7, 10)
    y = torch.tensor([0, 1, wrong, 3, wrong, 5, 6])
    good = torch.tensor([True, True, False, True, False, True, True])
    rows, d_clean, d_adv = unseen(variant)(clean, adv, teacher, 0.7, 5.3, y)
    assert (rows.isnan() == ~good).all()
    assert d_clean[~good].isnan().all()
    assert d_adv[~good].isnan().all()
    args = clean[good], adv[good], teacher[good], 0.7, 5.3, y[good]
    oracle.assert_right(rows[good], d_clean[good], d_adv[good], oracle.truth(*args), 2e-5)


@NOT_ON_KERNELS
def test_elsewhere_it_gives_nan_compiled() -> None:
    y, logits = torch.tensor([0, *WRONG]), torch.randn(3, 6, 10)
    rows = compiled(*logits, 0.7, 5.3, y)[0]
    weights = torch.compile(adaptive_beta, backend="aot_eager", fullgraph=True)(logits[1], y)
    for out in (rows, weights):
        assert out.isnan().tolist() == [False, *[True] * 5]


def test_elsewhere_it_gives_nan_in_adaptive_beta() -> None:
    weights = unseen(adaptive_beta)(torch.randn(6, 10), torch.tensor([0, *WRONG]))
    assert weights.isnan().tolist() == [False, *[True] * 5]


# adaptive_beta: the same weights for a loss of one's own.


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
    assert not w.requires_grad


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_adaptive_beta_default_and_limits(dtype: torch.dtype) -> None:
    sure = torch.tensor([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]])
    assert adaptive_beta(sure, torch.tensor([0, 0, 1], dtype=dtype)).tolist() == [6.0, 0.0, 3.0]
    assert adaptive_beta(sure[:0], torch.tensor([], dtype=dtype)).shape == (0,)


@pytest.mark.parametrize("name", ["clean", "adv", "teacher"])
def test_they_are_the_weights_of_the_loss(name: str) -> None:
    """Also where one of the logits alone is float64."""
    logits = {
        k: 2 * torch.randn(5, 10, dtype=torch.float64 if k == name else None) for k in ("clean", "adv", "teacher")
    }
    y = torch.arange(5)
    loss = cktat_loss(*logits.values(), 2.0, 5.3, y=y)
    expected = cktat_loss(*logits.values(), 2.0, adaptive_beta(logits["adv"], y, 5.3))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


ADV, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@NOT_ON_KERNELS
@pytest.mark.parametrize(
    ("adv", "y", "beta", "kind", "says"),
    [
        ([[0.0]], Y, 6.0, TypeError, r"adv_logits .*tensor.*\(N, C\), got a list"),
        (ADV.long(), Y, 6.0, TypeError, r"adv_logits .*float16.*float64, got .*torch\.int64"),
        (ADV[0], Y, 6.0, ValueError, r"adv_logits .*\(N, C\), got .*shape \(3,\)"),
        (ADV[:, :0], Y, 6.0, ValueError, r"adv_logits .*at least one class, got .*shape \(4, 0\)"),
        (ADV, [0] * 4, 6.0, TypeError, r"y .*tensor.*\(N,\), got a list"),
        (ADV, Y.float(), 6.0, TypeError, r"y .*integer tensor, got .*torch\.float32"),
        (ADV, Y.bool(), 6.0, TypeError, r"y .*integer tensor, got .*torch\.bool"),
        (ADV, Y[:3], 6.0, ValueError, r"y .*\(4,\).*got .*shape \(3,\)"),
        (ADV, Y[:, None], 6.0, ValueError, r"y .*\(4,\).*got .*shape \(4, 1\)"),
        (ADV, Y.to("meta"), 6.0, ValueError, r"y .*device of adv_logits, cpu, got .*meta"),
        (ADV, Y, -1.0, ValueError, r"beta .*finite and >= 0, got -1\.0"),
        (ADV, Y, math.nan, ValueError, r"beta .*finite and >= 0, got nan"),
        (ADV, Y, True, TypeError, r"beta .*number, got True \(bool\)"),
        (ADV, Y, torch.ones(4), TypeError, r"beta .*number.*, got a tensor of shape \(4,\)"),
    ],
)
def test_refused_by_both(adv: Tensor, y: Tensor, beta: float, kind: type[Exception], says: str) -> None:
    """Each label is checked by adaptive_beta and by the loss."""
    clean = adv if isinstance(adv, Tensor) else ADV
    for call in (lambda: adaptive_beta(adv, y, beta), lambda: cktat_loss(clean, adv, clean, 5.0, beta, y=y)):
        with pytest.raises(kind) as caught:
            call()
        assert re.search(says.replace("adv_logits ", "(adv|clean)_logits "), str(caught.value)), str(caught.value)
