"""A bad argument raises an error that names it, what came and what was wanted; and nothing has changed."""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from cktat_loss import kernels
from cktat_loss.functional import cktat_loss, cktat_loss_and_grads, cktat_terms

GOOD: dict[str, Any] = {
    "clean_logits": torch.zeros(4, 3),
    "adv_logits": torch.ones(4, 3),
    "teacher_logits": torch.zeros(4, 3),
}
X = torch.zeros(4, 3)
ALL = (cktat_loss, cktat_terms, cktat_loss_and_grads)
WITH_BETA = (cktat_loss, cktat_loss_and_grads)

# Where it goes, what goes there, the error, and a pattern for what was wanted and then what came.
LOGITS = [
    ([[0.0]], TypeError, r"tensor of logits \(N, C\), got \[\[0\.0\]\] \(list\)"),
    (None, TypeError, r"tensor of logits \(N, C\), got None \(NoneType\)"),
    (np.zeros((4, 3)), TypeError, r"tensor of logits \(N, C\), got .*\(ndarray\)"),
    (X.long(), TypeError, r"float16, bfloat16, float32 or float64, got .*\(4, 3\), torch\.int64"),
    (X.bool(), TypeError, r"float16, bfloat16, float32 or float64, got .*torch\.bool"),
    (X.to(torch.complex64), TypeError, r"float16, bfloat16, float32 or float64, got .*torch\.complex64"),
    (X.to(torch.float8_e4m3fn), TypeError, r"float16, bfloat16, float32 or float64, got .*float8_e4m3fn"),
    (X.to_sparse(), TypeError, r"dense tensor, got .*torch\.sparse_coo"),
    (torch.zeros(3), ValueError, r"\(N, C\), got .*shape \(3,\)"),
    (torch.zeros(()), ValueError, r"\(N, C\), got .*shape \(\)"),
    (torch.zeros(4, 3, 2), ValueError, r"\(N, C\), got .*shape \(4, 3, 2\)"),
    (torch.zeros(4, 0), ValueError, r"at least one class, got .*shape \(4, 0\)"),
]
NOT_THE_SAME = [
    (torch.zeros(4, 2), ValueError, r"shape of clean_logits, \(4, 3\), got .*shape \(4, 2\)"),
    (torch.zeros(1, 3), ValueError, r"shape of clean_logits, \(4, 3\), got .*shape \(1, 3\)"),
    (X.to("meta"), ValueError, r"device of clean_logits, cpu, got .*meta"),
]
TAU = [
    (0, ValueError, r"finite, > 0 .*float32, got 0\.0"),
    (-5.0, ValueError, r"finite, > 0 .*float32, got -5\.0"),
    (math.nan, ValueError, r"finite, > 0 .*float32, got nan"),
    (math.inf, ValueError, r"finite, > 0 .*float32, got inf"),
    (1e-50, ValueError, r"not 0 in float32, got 1e-50"),
    (10**400, ValueError, r"finite, > 0 .*float32, got "),
    (True, TypeError, r"number, got True \(bool\)"),
    ("5", TypeError, r"number, got '5' \(str\)"),
    (None, TypeError, r"number, got None \(NoneType\)"),
    (5j, TypeError, r"number, got 5j \(complex\)"),
    (torch.tensor(5.0), TypeError, r"number, got a tensor of shape \(\), torch\.float32"),
]
BETA = [
    (-1, ValueError, r"finite and >= 0, got -1\.0"),
    (math.nan, ValueError, r"finite and >= 0, got nan"),
    (math.inf, ValueError, r"finite and >= 0, got inf"),
    (10**400, ValueError, r"finite and >= 0, got "),
    (False, TypeError, r"number.*, got False \(bool\)"),
    ("6", TypeError, r"number.*, got '6' \(str\)"),
    ([6.0] * 4, TypeError, r"number.*, got \[6\.0, 6\.0, 6\.0, 6\.0\] \(list\)"),
    (torch.ones(4, dtype=torch.long), TypeError, r"floating tensor, got .*\(4,\), torch\.int64"),
    (torch.ones(4, dtype=torch.bool), TypeError, r"floating tensor, got .*torch\.bool"),
    (torch.ones(3), ValueError, r"\(\) or \(4,\), one weight a sample, got .*shape \(3,\)"),
    (torch.ones(1), ValueError, r"\(\) or \(4,\), one weight a sample, got .*shape \(1,\)"),
    (torch.ones(4, 1), ValueError, r"\(\) or \(4,\), one weight a sample, got .*shape \(4, 1\)"),
    (torch.ones(4, device="meta"), ValueError, r"device of the logits, cpu, got .*meta"),
    (torch.ones(4, requires_grad=True), ValueError, r"must not require grad.*beta\.detach\(\)"),
]
GRAD_SCALE = [
    (math.nan, ValueError, r"finite, got nan"),
    (-math.inf, ValueError, r"finite, got -inf"),
    (10**400, ValueError, r"finite, got "),
    (True, TypeError, r"number, got True \(bool\)"),
    ("1", TypeError, r"number, got '1' \(str\)"),
    (torch.ones(4), ValueError, r"number or a 0-d tensor, got .*shape \(4,\)"),
    (torch.tensor(1), TypeError, r"number or a floating tensor, got .*torch\.int64"),
    (torch.ones((), device="meta"), ValueError, r"device of the logits, cpu, got .*meta"),
]
REDUCTION = [
    ("batchmean", ValueError, r"one of 'mean', 'sum', 'none', got 'batchmean'"),
    (None, ValueError, r"one of 'mean', 'sum', 'none', got None"),
    (["mean"], ValueError, r"one of 'mean', 'sum', 'none', got \['mean'\]"),
]
REDUCTION_TO_A_SCALAR = [
    ("none", ValueError, r"one of 'mean', 'sum', got 'none'"),
    ("batchmean", ValueError, r"one of 'mean', 'sum', got 'batchmean'"),
]
BACKEND = [
    ("cuda", ValueError, r"one of 'auto', 'triton', 'torch', got 'cuda'"),
    (None, ValueError, r"one of 'auto', 'triton', 'torch', got None"),
]
TABLE = [
    *((f, name, *row) for f in ALL for name in GOOD for row in LOGITS),
    *((f, name, *row) for f in ALL for name in ("adv_logits", "teacher_logits") for row in NOT_THE_SAME),
    *((f, "tau", *row) for f in ALL for row in TAU),
    *((f, "beta", *row) for f in WITH_BETA for row in BETA),
    *((cktat_loss_and_grads, "grad_scale", *row) for row in GRAD_SCALE),
    *((cktat_loss, "reduction", *row) for row in REDUCTION),
    *((cktat_loss_and_grads, "reduction", *row) for row in REDUCTION_TO_A_SCALAR),
    *((f, "backend", *row) for f in ALL for row in BACKEND),
]


def label(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value).split("\n")[0][:40]


@pytest.mark.parametrize(("f", "name", "value", "kind", "says"), TABLE, ids=label)
def test_refused(f: Callable[..., Any], name: str, value: Any, kind: type[Exception], says: str) -> None:
    arguments = {k: v.clone().requires_grad_() for k, v in GOOD.items()} | {name: value}
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    before = [(x._version, x.requires_grad, x.shape, x.dtype) for x in tensors]
    with pytest.raises(kind) as caught:
        f(**arguments)
    assert type(caught.value) is kind
    assert re.search(rf"\b{name}\b.*{says}", str(caught.value), re.DOTALL), str(caught.value)
    assert [(x._version, x.requires_grad, x.shape, x.dtype) for x in tensors] == before
    assert all(x.grad is None for x in tensors if x.is_leaf)


@pytest.mark.parametrize("f", ALL)
def test_triton_insisted_on_where_it_cannot_run(f: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' .*not available.*'auto' or 'torch'"):
        f(**GOOD, backend="triton")


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int64(2), Fraction(2)], ids=type)
def test_any_real_number_is_a_number(number: Any, f: Callable[..., Any]) -> None:
    named = {cktat_loss: ["tau", "beta"], cktat_terms: ["tau"], cktat_loss_and_grads: ["tau", "beta", "grad_scale"]}[f]
    got, expected = (f(**GOOD, **dict.fromkeys(named, x)) for x in (number, 2.0))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tau", [2.0**-149, 1e-40, 3.4e38])
def test_the_limits_of_tau_are_fine(tau: float) -> None:
    assert cktat_loss(**GOOD, tau=tau).isfinite()


def test_values_of_tensors_are_not_looked_at() -> None:
    """No wait for the device: a weight that is no weight goes into its own row."""
    rows = cktat_loss(**GOOD, beta=torch.tensor([1.0, math.nan, -1.0, 1.0]), reduction="none")
    assert rows.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_good_arguments_pass(backend: str, f: Callable[..., Any]) -> None:
    f(**GOOD, backend=backend)
