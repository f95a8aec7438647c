"""The kernels as compiled for GPUs that are absent, and the traffic of Eq. 17 in plain PyTorch beside theirs.

    python -m benchmarks.kernels          (--help explains the options)

Needs Triton, no GPU: everything is read from the machine code, or counted. Writes kernels.csv, of which report.py makes
the tables of docs/kernels.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine
from benchmarks.speed import Loss, log_target, usual
from tests import compiled
from tests.compiled import CALLS, CLASSES, TARGETS, Built, Launch, Variant

ROWS = 4096
DTYPES = ("float32", "bfloat16", "float16")  # the default is the first two
BANDWIDTH = 3.0e12  # bytes per second, of the 3.35e12 on an H100's data sheet
EAGER: dict[str, Loss] = {"eager, as usually written": usual, "eager, log_target=True": log_target}


class Cost(NamedTuple):
    launches: int = 0
    elements: int = 0  # read and written
    bytes: int = 0

    def plus(self, launches: int, sizes: list[tuple[int, int]]) -> Cost:
        """Return the cost with some launches more, and the traffic of tensors: numbers of elements, and their size."""
        elements, total = sum(n for n, _ in sizes), sum(n * itemsize for n, itemsize in sizes)
        return Cost(self.launches + launches, self.elements + elements, self.bytes + total)


class CountOperators(TorchDispatchMode):
    """Adds up the cost of each operator that PyTorch dispatches, unless it is a view or an allocation.

    An operator counts as one launch that reads each tensor that it is given and writes each that it returns, once. A
    broadcast tensor is read at its own size. A GPU may do otherwise: a reduction may be two launches, for instance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in op._schema.returns)
        if not view and not name.startswith(("empty", "new_empty")):
            read = () if name.endswith("_like") else (args, kwargs)  # ones_like looks at the shape alone
            tensors = [x for x in tree_leaves((read, out)) if isinstance(x, Tensor)]
            self.cost = self.cost.plus(1, [(distinct(x), x.element_size()) for x in tensors])
        return out


def distinct(x: Tensor) -> int:
    """Return the number of elements, without the repetitions of an expanded tensor."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def counted(step: Callable[[], object]) -> Cost:
    with CountOperators() as counting:
        step()
    return counting.cost


def eager_cost(loss: Loss, rows: int, classes: int, dtype: str) -> Cost:
    """Return the cost of an expression and its gradients, counted on meta tensors, which have shapes and no data."""
    clean, adv, teacher = (torch.empty(rows, classes, dtype=getattr(torch, dtype), device="meta") for _ in range(3))
    wanted = clean.requires_grad_(), adv.requires_grad_()
    return counted(lambda: torch.autograd.grad(loss(clean, adv, teacher), wanted))


def launch_cost(one: Launch, cost: Cost = Cost()) -> Cost:  # noqa: B008 - a tuple
    """Return the cost of all loads and stores of a launch. Row values count once, though some programs share them."""
    tensors = [x for x in one.args if isinstance(x, Tensor)]
    logits = [x for x in tensors if x.ndim == 2][:3]
    return cost.plus(1, [(x.numel(), x.element_size()) for x in (*tensors, *logits * (one.readings() - 1))])


def row(architecture: str, call: str, dtype: str, classes: int, cost: Cost) -> dict[str, object]:
    return {
        "architecture": architecture, "call": call, "dtype": dtype, "classes": classes, "rows": ROWS,
        "launches": cost.launches, "moves": f"{cost.elements / (ROWS * classes):.3f}", "bytes": cost.bytes,
        "h100_us": f"{1e6 * cost.bytes / BANDWIDTH:.3f}",
    }  # fmt: skip


def from_machine(built: Built) -> dict[str, object]:
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


def measure(targets: list[str], dtypes: list[str], classes: list[int]) -> Iterator[dict[str, object]]:
    """Yield one row per target, number of classes, call and dtype, and the rows of the eager expressions."""
    variants = [
        Variant(target, call, dtype, c, rows=ROWS)
        for target in targets
        for c in classes
        for call in CALLS
        for dtype in dtypes
    ]
    with compiled.compilers(os.cpu_count() or 1) as pool:
        for built in pool.map(compiled.build, variants):
            one, beside = built.variant, CountOperators()
            cost = launch_cost(compiled.record(one, beside), Cost() if one.call.startswith("backward") else beside.cost)
            yield row(one.target, one.call, one.dtype, one.classes, cost) | from_machine(built)
            print(one, flush=True)
    for name, loss in EAGER.items():
        for dtype in dtypes:
            yield from (row("any", name, dtype, c, eager_cost(loss, ROWS, c, dtype)) for c in classes)


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, metavar="GPU", help="default: all")
    parser.add_argument(
        "--dtypes", nargs="+", default=DTYPES[:2], choices=DTYPES, metavar="DTYPE", help="default: %(default)s"
    )
    parser.add_argument("--classes", nargs="+", default=CLASSES, type=int, metavar="C", help="default: %(default)s")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the kernels are Python functions then, and cannot be compiled")
    for target in filter(compiled.unknown, args.targets):
        print(f"left out: {compiled.unknown(target)}")
    targets = [target for target in args.targets if not compiled.unknown(target)]
    where = machine.environment("cpu")
    path = args.out / "kernels.csv"
    machine.write(path, [one | where for one in measure(targets, args.dtypes, args.classes)])
    print(f"saved {path}")


if __name__ == "__main__":
    main()
