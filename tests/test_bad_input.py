"""A bad argument raises an error that names it, what came and what was wanted; and nothing has changed."""

import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from cktat_loss import kernels
from cktat_loss.functional import cktat_loss, cktat_terms

GOOD: dict[str, Any] = {
    "clean_logits": torch.zeros(4, 3),
    "adv_logits": torch.ones(4, 3),
    "teacher_logits": torch.zeros(4, 3),
}
X = torch.zeros(4, 3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they are a prototype
    NESTED = [torch.nested.nested_tensor([X[0], X[1, :2]], layout=layout) for layout in (torch.strided, torch.jagged)]
BOTH = (cktat_loss, cktat_terms)


class HuggingFace(dict):
    """The output object of a model, which prints every tensor."""

    logits = X


# Where it goes, what goes there, the error, and a pattern for what was wanted and then what came.
LOGITS = [
    ([[0.0]], TypeError, r"tensor of logits \(N, C\), got a list"),
    (None, TypeError, r"tensor of logits \(N, C\), got None \(NoneType\)"),
    (np.zeros((4, 3)), TypeError, r"tensor of logits \(N, C\), got a ndarray$"),
    (HuggingFace(logits=X), TypeError, r"tensor of logits \(N, C\), got a HuggingFace: pass its \.logits$"),
    ((X, X), TypeError, r"tensor of logits \(N, C\), got a tuple$"),
    (X.long(), TypeError, r"float16, bfloat16, float32 or float64, got .*\(4, 3\), torch\.int64"),
    (X.bool(), TypeError, r"float16, bfloat16, float32 or float64, got .*torch\.bool"),
    (X.to(torch.complex64), TypeError, r"float16, bfloat16, float32 or float64, got .*torch\.complex64"),
    (X.to(torch.float8_e4m3fn), TypeError, r"float16, bfloat16, float32 or float64, got .*float8_e4m3fn"),
    (X.to_sparse(), TypeError, r"dense tensor \(N, C\), got .*torch\.sparse_coo"),
    (NESTED[0], TypeError, r"dense tensor \(N, C\), got a nested tensor, torch\.float32, on cpu"),
    (NESTED[1], TypeError, r"dense tensor \(N, C\), got a nested tensor, torch\.float32, on cpu"),
    (torch.zeros(3), ValueError, r"\(N, C\), got .*shape \(3,\)"),
    (torch.zeros(()), ValueError, r"\(N, C\), got .*shape \(\)"),
    (
        torch.zeros(4, 3, 2),
        ValueError,
        r"\(N, C\), got .*shape \(4, 3, 2\).*: pass logits\.movedim\(1, -1\)\.flatten\(0, -2\)$",
    ),
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
    (5j, TypeError, r"number, got a complex$"),
    (torch.tensor(5.0), TypeError, r"number, got a tensor of shape \(\), torch\.float32"),
]
BETA = [
    (-1, ValueError, r"finite and >= 0, got -1\.0"),
    (math.nan, ValueError, r"finite and >= 0, got nan"),
    (math.inf, ValueError, r"finite and >= 0, got inf"),
    (10**400, ValueError, r"finite and >= 0, got "),
    (False, TypeError, r"number.*, got False \(bool\)"),
    ("6", TypeError, r"number.*, got '6' \(str\)"),
    ([6.0] * 4, TypeError, r"number.*, got a list"),
    (torch.ones(4, dtype=torch.long), TypeError, r"floating tensor, got .*\(4,\), torch\.int64"),
    (torch.ones(4, dtype=torch.bool), TypeError, r"floating tensor, got .*torch\.bool"),
    (torch.ones(3), ValueError, r"\(\) or \(4,\), a weight for each sample, got .*shape \(3,\)"),
    (torch.ones(1), ValueError, r"\(\) or \(4,\), a weight for each sample, got .*shape \(1,\)"),
    (torch.ones(4, 1), ValueError, r"\(\) or \(4,\), a weight for each sample, got .*shape \(4, 1\)"),
    (torch.ones(4, device="meta"), ValueError, r"device of the logits, cpu, got .*meta"),
    (torch.ones(4, requires_grad=True), ValueError, r"must not require grad.*beta\.detach\(\)"),
]
REDUCTION = [
    ("batchmean", ValueError, r"'mean', which is torch's 'batchmean'"),
    ("median", ValueError, r"one of 'mean', 'sum', 'none', got 'median'"),
    (np.array(["mean", "sum"]), ValueError, r"one of 'mean', 'sum', 'none', got a ndarray$"),
    (None, ValueError, r"one of 'mean', 'sum', 'none', got None"),
    (["mean"], ValueError, r"one of 'mean', 'sum', 'none', got a list$"),
]
BACKEND = [
    ("cuda", ValueError, r"one of 'auto', 'triton', 'torch', got 'cuda'"),
    (None, ValueError, r"one of 'auto', 'triton', 'torch', got None"),
    (np.array(["auto", "torch"]), ValueError, r"one of 'auto', 'triton', 'torch', got a ndarray$"),
]
Y = [
    ([0, 0, 0, 0], TypeError, r"tensor of labels \(N,\), got a list"),
    (0, TypeError, r"tensor of labels \(N,\), got 0 \(int\)"),
    (np.zeros(4, dtype=int), TypeError, r"tensor of labels \(N,\), got a ndarray"),
    (torch.zeros(4), TypeError, r"integer tensor, got .*torch\.float32"),
    (torch.zeros(4).bool(), TypeError, r"integer tensor, got .*torch\.bool"),
    (torch.zeros(3).long(), ValueError, r"\(4,\), a label for each sample, got .*shape \(3,\)"),
    (torch.zeros(()).long(), ValueError, r"\(4,\), a label for each sample, got .*shape \(\)"),
    (torch.zeros(4, 3).long(), ValueError, r"\(4,\), a label for each sample, got .*shape \(4, 3\)"),
    (torch.zeros(4, device="meta").long(), ValueError, r"device of adv_logits, cpu, got .*meta"),
    (torch.tensor([0, 1, 2, 3]), ValueError, r"labels from 0 to 2, got 3"),
    (torch.tensor([0, 1, -100, 2]), ValueError, r"labels from 0 to 2, got -100"),
]
FLAG = [
    (1, TypeError, r"True or False, got 1 \(int\)"),
    (None, TypeError, r"True or False, got None"),
    (torch.tensor(True), TypeError, r"True or False, got a tensor"),
]
TABLE = [
    *((f, name, *row) for f in BOTH for name in GOOD for row in LOGITS),
    *((f, name, *row) for f in BOTH for name in ("adv_logits", "teacher_logits") for row in NOT_THE_SAME),
    *((f, "tau", *row) for f in BOTH for row in TAU),
    *((cktat_loss, "beta", *row) for row in BETA),
    *((cktat_loss, "y", *row) for row in Y),
    *((cktat_loss, "reduction", *row) for row in REDUCTION),
    *((cktat_loss, "return_terms", *row) for row in FLAG),
    *((f, "detach_clean", *row) for f in BOTH for row in FLAG),
    *((f, "backend", *row) for f in BOTH for row in BACKEND),
]


def label(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value).split("\n")[0][:40]


def state(x: torch.Tensor) -> tuple[Any, ...]:
    return x._version, x.requires_grad, x.dtype, None if x.is_nested else x.shape


@pytest.mark.parametrize(("f", "name", "value", "kind", "says"), TABLE, ids=label)
def test_refused(f: Callable[..., Any], name: str, value: Any, kind: type[Exception], says: str) -> None:
    arguments = {k: v.clone().requires_grad_() for k, v in GOOD.items()} | {name: value}
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    before = [state(x) for x in tensors]
    with pytest.raises(kind) as caught:
        f(**arguments)
    assert type(caught.value) is kind
    assert re.search(rf"\b{name}\b.*{says}", str(caught.value), re.DOTALL), str(caught.value)
    assert [state(x) for x in tensors] == before
    assert all(x.grad is None for x in tensors if x.is_leaf)


@pytest.mark.parametrize("f", BOTH)
def test_triton_insisted_on_where_it_cannot_run(f: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "supports", lambda tensor: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' .*not available.*'auto' or 'torch'"):
        f(**GOOD, backend="triton")


@pytest.mark.parametrize("f", BOTH)
@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int64(2), Fraction(2)], ids=type)
def test_any_real_number_is_a_number(number: Any, f: Callable[..., Any]) -> None:
    named = {cktat_loss: ["tau", "beta"], cktat_terms: ["tau"]}[f]
    got, expected = (f(**GOOD, **dict.fromkeys(named, x)) for x in (number, 2.0))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tau", [2.0**-149, 1e-40, 3.4e38])
def test_the_limits_of_tau_are_fine(tau: float) -> None:
    assert cktat_loss(**GOOD, tau=tau).isfinite()


def test_movedim_as_the_message_says() -> None:
    """Logits of a segmentation network, where each pixel is a sample."""
    logits = torch.randn(3, 2, 5, 4, 4)  # three of (N, C, H, W)
    flat = [x.movedim(1, -1).flatten(0, -2) for x in logits]
    rows = cktat_loss(*flat, reduction="none").view(2, 4, 4)
    one = cktat_loss(*(x[1, :, 2, 3][None] for x in logits))
    torch.testing.assert_close(rows[1, 2, 3], one)


@pytest.mark.parametrize("f", BOTH)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_good_arguments_pass(backend: str, f: Callable[..., Any]) -> None:
    f(**GOOD, backend=backend)


def test_labels_and_a_tensor_of_weights_are_too_much() -> None:
    for beta in (torch.ones(4), torch.tensor(6.0)):
        with pytest.raises(TypeError, match=r"beta must be a number where y gives the weights.*got a tensor"):
            cktat_loss(**GOOD, beta=beta, y=torch.zeros(4).long())


class Metres(torch.Tensor):
    pass


class Feet(torch.Tensor):
    pass


class Inches(Feet):
    pass


@pytest.mark.parametrize(
    "mixed",
    [
        {"adv_logits": GOOD["adv_logits"].as_subclass(Metres), "teacher_logits": X.as_subclass(Feet)},
        {"clean_logits": X.as_subclass(Feet), "adv_logits": GOOD["adv_logits"].as_subclass(Metres)},
        {"adv_logits": GOOD["adv_logits"].as_subclass(Metres), "y": torch.zeros(4).long().as_subclass(Feet)},
        {"adv_logits": GOOD["adv_logits"].as_subclass(Metres), "beta": torch.ones(4).as_subclass(Feet)},
    ],
    ids=lambda mixed: " and ".join(mixed),
)
def test_unrelated_tensor_subclasses(mixed: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"unrelated tensor subclasses (Feet and Metres|Metres and Feet)"):
        cktat_loss(**GOOD | mixed)


def test_related_tensor_subclasses_and_parameters() -> None:
    mixed = {"adv_logits": GOOD["adv_logits"].as_subclass(Feet), "teacher_logits": torch.nn.Parameter(X)}
    y = torch.zeros(4).long()
    loss = cktat_loss(X.as_subclass(Inches), **mixed, y=y.as_subclass(Inches))
    assert float(loss) == float(cktat_loss(**GOOD, y=y))


def test_a_flag_of_numpy_is_named_in_full() -> None:
    with pytest.raises(TypeError, match=r"detach_clean must be True or False, got a (numpy\.bool|bool_)$"):
        cktat_loss(**GOOD, detach_clean=np.bool_(True))
