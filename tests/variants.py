"""Variants of the computation. Each takes (clean, adv, teacher, tau, beta, y or nothing).

Each returns the loss per row, (N,), and the gradients of the rows' sum for clean and adv.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cktat_loss import _autograd, _plain, adaptive_beta, functional
from tests import oracle

Result = tuple[Tensor, Tensor, Tensor]


class Variant(NamedTuple):
    run: Callable[..., Result]
    labelled: bool = False  # adds labels to the arguments

    def __call__(self, *args: Any) -> Result:
        return self.run(*args, labels(args[1])) if self.labelled else self.run(*args)

    def truth(self, *args: Any) -> oracle.Truth:
        """Compute with the oracle what the variant computes."""
        return oracle.truth(*args, labels(args[1])) if self.labelled else oracle.truth(*args)


def labels(adv: Tensor) -> Tensor:
    return torch.arange(adv.shape[0]) % adv.shape[1]


def _loss(clean, adv, teacher, tau, beta, y=None, reduction="none") -> Tensor:
    return functional.cktat_loss(clean, adv, teacher, tau, beta, y=y, reduction=reduction)


def _sum_of_terms(clean, adv, teacher, tau, beta, y=None) -> Tensor:
    guidance, consistency = functional.cktat_terms(clean, adv, teacher, tau)
    if y is not None:  # cast, because weights of float32 logits are float32 even if other logits are float64
        beta = adaptive_beta(adv.to(guidance.dtype), y, beta)
    return guidance + (beta.to(guidance.dtype) if isinstance(beta, Tensor) else beta) * consistency


def _differentiate(loss: Callable[..., Tensor], clean: Tensor, adv: Tensor, *others: Any) -> Result:
    clean, adv = clean.detach().requires_grad_(), adv.detach().requires_grad_()
    out = loss(clean, adv, *others)
    return out.detach(), *torch.autograd.grad(out.sum(), (clean, adv))


_rows = partial(_differentiate, _loss)
_plain_ops = patch.object(_autograd, "choose", lambda *_: _plain)(_rows)


def _total(*args: Any) -> Result:
    """Take the gradients from a sum, as in training. The rows come from a call without gradients."""
    rows = _loss(args[0].detach(), args[1].detach(), *args[2:])
    total, *gradients = _differentiate(partial(_loss, reduction="sum"), *args)
    torch.testing.assert_close(total, rows.sum(), rtol=1e-5, atol=1e-9, equal_nan=True)
    return rows, *gradients


def _transformed(clean: Tensor, adv: Tensor, *others: Any) -> Result:
    rows, vjp = torch.func.vjp(lambda c, a: _loss(c, a, *others), clean.detach(), adv.detach())
    return rows, *vjp(torch.ones_like(rows))


def _compiled(*args: Any) -> Result:
    torch.compiler.reset()  # every shape and dtype is compiled, and their number is limited
    return _differentiate(torch.compile(_loss, backend="aot_eager", fullgraph=True), *args)


@contextmanager
def in_chunks(classes: int) -> Iterator[None]:
    """Stream rows that would fit into registers, in chunks that are small unless they would be many."""
    from cktat_loss.kernels import launch

    block = 32 if classes <= 330 else launch.STREAMING_BLOCK
    find_plan = launch.find_plan.__wrapped__  # the plans of other sizes are cached
    with patch.multiple(launch, STREAMING_BLOCK=block, FEW_ROWS=0, ROWS_UP_TO=0, find_plan=find_plan):
        yield


def _streaming(*args: Any) -> Result:
    """Stream four rows, two per row and two as a sum. The others are not, because the interpreter is slow."""
    parts = []
    for some, run in ((slice(0, 2), _rows), (slice(2, 4), _total), (slice(4, None), _rows)):
        with in_chunks(args[0].shape[1]) if some.stop else nullcontext():
            parts.append(run(*(x[some] if isinstance(x, Tensor) and x.ndim else x for x in args)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


NOT_ON_KERNELS, ON_KERNELS = pytest.mark.not_on("interpreter", "gpu"), pytest.mark.not_on("torch")
FLOAT64 = pytest.param(torch.float64, marks=NOT_ON_KERNELS)  # which the kernels do not support
DTYPES = (FLOAT64, torch.float32, torch.float16, torch.bfloat16)

rows, labelled, compiled = Variant(_rows), Variant(_total, labelled=True), Variant(_compiled)
_UNLABELLED = [
    pytest.param(rows, id="rows"),
    pytest.param(Variant(_plain_ops), id="plain", marks=NOT_ON_KERNELS),
    pytest.param(Variant(_transformed), id="transformed", marks=NOT_ON_KERNELS),
    pytest.param(Variant(partial(_differentiate, _sum_of_terms)), id="terms", marks=NOT_ON_KERNELS),
    pytest.param(Variant(_streaming), id="streaming", marks=ON_KERNELS),
]
EACH_UNLABELLED_VARIANT = pytest.mark.parametrize("variant", _UNLABELLED)
EACH_VARIANT = pytest.mark.parametrize("variant", [pytest.param(labelled, id="labels"), *_UNLABELLED])
