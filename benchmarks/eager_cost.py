"""What Eq. 17 in plain PyTorch costs a GPU, counted without one: launches and bytes, forward and backward.

The expression runs on meta tensors, which have shapes and no data, under a mode that sees every operator that PyTorch
dispatches, those of the backward pass too. An operator counts as one launch, unless it is a view or an allocation. It
reads each tensor that it is given and writes each that it returns, once; what is broadcast (a scalar, an expanded sum)
is read at its own size.

A GPU may do otherwise: a reduction may be two launches, a softmax over a long row reads it two or three times, and
what fits into the L2 cache (50 MB on an H100) doesn't go to memory between two operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contenders import Loss, log_targets, one_log_softmax, usual

EXPRESSIONS: dict[str, Loss] = {
    "eager, as usually written": usual,
    "eager, one log_softmax for both terms": one_log_softmax,
    "eager, log_target=True": log_targets,
}


@dataclass(frozen=True)
class Cost:
    launches: int
    elements: int  # read and written
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.launches + other.launches, self.elements + other.elements, self.bytes + other.bytes)


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost(0, 0, 0)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in op._schema.returns)
        if not view and not name.startswith(("empty", "new_empty")):
            read = () if name.endswith("_like") else (args, kwargs)  # ones_like looks at the shape alone
            tensors = [x for x in tree_leaves((read, out)) if isinstance(x, Tensor)]
            self.cost += Cost(
                1, sum(distinct(x) for x in tensors), sum(distinct(x) * x.element_size() for x in tensors)
            )
        return out


def distinct(x: Tensor) -> int:
    """Elements, without the repetitions of an expanded tensor."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def counted(step: Callable[[], object]) -> Cost:
    """Of whatever a call dispatches, on any device."""
    counting = CountOperators()
    with counting:
        step()
    return counting.cost


def cost(expression: Loss, rows: int, classes: int, dtype: torch.dtype) -> Cost:
    """Of the expression and its gradients with respect to clean and adversarial logits."""
    clean, adv, teacher = (torch.empty(rows, classes, dtype=dtype, device="meta") for _ in range(3))
    clean.requires_grad_()
    adv.requires_grad_()
    return counted(lambda: torch.autograd.grad(expression(clean, adv, teacher), (clean, adv)))
