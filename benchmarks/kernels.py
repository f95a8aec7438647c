"""The kernels as compiled for GPUs that are absent, and the traffic of Eq. 17 in plain PyTorch beside theirs.

    python -m benchmarks.kernels

Needs Triton, no GPU: everything is read from the machine code, or counted. Writes kernels.csv, of which report.py makes
the tables of docs/kernels.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine
from benchmarks.machine import Row
from benchmarks.speed import BETA, TAU, Loss, log_target, usual
from tests import compiled
from tests.compiled import CALLS, CLASSES, TARGETS, Built, Launch, Variant

ROWS = 4096
DTYPES = ("float32", "bfloat16")
BANDWIDTH = 3.0e12  # bytes per second, of the 3.35e12 on an H100's data sheet
EAGER: dict[str, Loss] = {"eager, as usually written": usual, "eager, log_target=True": log_target}
Traffic = list[tuple[int, int]]  # of one launch: elements and bytes per element of each tensor that it reads or writes


class CountOperators(TorchDispatchMode):
    """A record of the traffic of each operator that PyTorch dispatches, but for views and allocations.

    An operator counts as one launch that reads each tensor that it is given and writes each that it returns, once. A
    broadcast tensor is read at its own size. A GPU may do otherwise: a reduction may be two launches, for instance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Traffic] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in op._schema.returns)
        if not view and not name.startswith(("empty", "new_empty")):
            read = () if name.endswith("_like") else (args, kwargs)  # ones_like looks at the shape alone
            tensors = [x for x in tree_leaves((read, out)) if isinstance(x, Tensor)]
            self.launches.append([(distinct(x), x.element_size()) for x in tensors])
        return out


def distinct(x: Tensor) -> int:
    """Return the number of elements, without the repetitions of an expanded tensor."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def eager_traffic(loss: Loss, classes: int, dtype: str) -> list[Traffic]:
    """Count an expression and its gradients on meta tensors, which have shapes and no data."""
    clean, adv, teacher = (torch.empty(ROWS, classes, dtype=getattr(torch, dtype), device="meta") for _ in range(3))
    wanted = clean.requires_grad_(), adv.requires_grad_()
    with CountOperators() as counted:
        torch.autograd.grad(loss(clean, adv, teacher, TAU, BETA, "batchmean"), wanted)
    return counted.launches


def kernel_traffic(one: Launch) -> Traffic:
    """Return all loads and stores of a kernel. Row values count once, though some programs share them."""
    tensors = [x for x in one.args if isinstance(x, Tensor)]
    logits = [x for x in tensors if x.ndim == 2][:3]
    return [(x.numel(), x.element_size()) for x in (*tensors, *logits * (one.readings() - 1))]


def row(architecture: str, call: str, dtype: str, classes: int, launches: list[Traffic]) -> Row:
    moved = [tensor for one in launches for tensor in one]
    total = sum(elements * size for elements, size in moved)
    return {
        "architecture": architecture, "call": call, "dtype": dtype, "classes": classes, "rows": ROWS,
        "launches": len(launches), "moves": f"{sum(elements for elements, _ in moved) / (ROWS * classes):.3f}",
        "bytes": total, "h100_us": f"{1e6 * total / BANDWIDTH:.3f}",
    }  # fmt: skip


def from_machine(built: Built) -> Row:
    code = built.machine
    return {
        "kernel": code.kernel, "warps": code.warps, "registers": code.registers, "spills": code.spills,
        "local_bytes": code.local, "shared_bytes": code.shared, "loads": widths(code.loads),
        "stores": widths(code.stores), "instructions": code.instructions,
        "warps_on_sm": "" if built.variant.target.startswith("gfx") else code.warps_on_sm,
        "narrow_accesses": len(built.width_faults()),
    }  # fmt: skip


def widths(accesses: Mapping[int, int]) -> str:
    return " + ".join(f"{bits} x {count}" for bits, count in sorted(accesses.items(), reverse=True)) or "none"


def measure(variants: list[Variant], pool: Executor) -> Iterator[Row]:
    """Yield one row per variant, and the rows of the eager expressions."""
    for built in pool.map(compiled.build, variants):
        one, beside = built.variant, CountOperators()
        kernel = kernel_traffic(compiled.record(one, beside))
        others = [] if one.call.startswith("backward") else beside.launches
        yield row(one.target, one.call, one.dtype, one.classes, [*others, kernel]) | from_machine(built)
        print(one, flush=True)
    settings = dict.fromkeys((one.dtype, one.classes) for one in variants)
    for (name, loss), (dtype, classes) in product(EAGER.items(), settings):
        yield row("any", name, dtype, classes, eager_traffic(loss, classes, dtype))


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__)
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the kernels are Python functions then, and cannot be compiled")
    for target in filter(compiled.unknown, TARGETS):
        print(f"left out: {compiled.unknown(target)}")
    targets = [target for target in TARGETS if not compiled.unknown(target)]
    every = product(targets, CLASSES, CALLS, DTYPES)
    variants = [Variant(target, call, dtype, c, rows=ROWS) for target, c, call, dtype in every]
    with compiled.compilers(os.cpu_count() or 1) as pool:
        machine.write(args.out / "kernels.csv", [*measure(variants, pool)], "cpu")
    print(f"saved {args.out / 'kernels.csv'}")


if __name__ == "__main__":
    main()
