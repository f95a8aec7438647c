"""What the compiler makes of the kernels, beside the cost of Eq. 17 in plain PyTorch: kernels.csv and kernels.md.

python -m benchmarks.kernels          (--help explains the options)

Needs Triton, no GPU: everything is compiled ahead of time, read from the machine code, or counted.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import markdown
from benchmarks.ahead_of_time import (
    CALLS,
    CLASSES,
    DTYPES,
    TARGETS,
    Built,
    Machine,
    Variant,
    build_all,
    unknown,
    width_faults,
)
from benchmarks.eager_cost import EXPRESSIONS, Cost, cost
from cktat_loss.kernels import launch

BANDWIDTH = 3.0e12  # bytes a second, of the 3.35e12 on an H100's data sheet
STEPS = ("ours, without a graph", "ours, forward and backward", "ours, upstream gradient not 1")
Eager = dict[tuple[str, str, int], Cost]  # by expression, dtype and classes
MEANING = """\
Compiled ahead of time and read from the machine code, or counted. **Nothing here ran on a GPU.**

- Moves: elements read and written for each of the N x C logit positions. Ours are the recorded launches' arguments; the
  interpreter's traffic test proves how often each is accessed. Eager ones are counted operator by operator. The
  backward launch returns at once for an upstream gradient of 1; of float16 logits it makes all gradients.
- us on an H100: bytes / 3.0e12, a lower bound from memory traffic alone. Small problems wait for launches instead.
- Loads and stores of logits and gradients, counted in the text of one thread: 128 x 12 is twelve of 128 bits. Narrower
  ones beside them are the edges of rows of odd length.
- Instructions are those of the text, so a loop over columns counts once. Spills count loads and stores of local memory
  (AMD: spilled registers); shared memory is in bytes.
"""


class Selection(NamedTuple):
    targets: Sequence[str]
    dtypes: Sequence[str]
    classes: Sequence[int]
    rows: int


def microseconds(traffic: int) -> float:
    return 1e6 * traffic / BANDWIDTH


def widths(accesses: Mapping[int, int]) -> str:
    return " + ".join(f"{bits} x {count}" for bits, count in sorted(accesses.items(), reverse=True)) or "none"


def csv_rows(chosen: Selection, built: Mapping[Variant, Built], eager: Eager) -> Iterator[dict[str, object]]:
    def from_machine(machine: Machine) -> dict[str, object]:
        return {
            "kernel": machine.kernel,
            "warps": machine.warps,
            "registers": machine.registers,
            "spills": machine.spills,
            "local_bytes": machine.local,
            "shared_bytes": machine.shared,
            "loads": widths(machine.loads),
            "stores": widths(machine.stores),
            "instructions": machine.instructions,
        }

    def from_cost(dtype: str, classes: int, of: Cost) -> dict[str, object]:
        return {
            "dtype": dtype,
            "classes": classes,
            "rows": chosen.rows,
            "launches": of.launches,
            "moves": f"{of.elements / (chosen.rows * classes):.3f}",
            "bytes": of.bytes,
            "h100_us": f"{microseconds(of.bytes):.3f}",
        }

    for v, one in built.items():
        head = {"architecture": v.target, "call": v.call}
        yield head | from_cost(v.dtype, v.classes, one.cost) | from_machine(one.machine)
    for (name, dtype, classes), of in eager.items():
        yield {"architecture": "any", "call": name} | from_cost(dtype, classes, of)


def step_cost(name: str, calls: Mapping[str, Built]) -> Cost:
    """What one step takes from the calls."""
    if name == "ours, without a graph":
        return calls["loss"].cost
    backward = calls["backward"]
    returns = backward.done_at_one and name == "ours, forward and backward"
    return calls["training"].cost + (Cost(1, 1, 4) if returns else backward.cost)  # it looks at the upstream gradient


def slashed(cells: Iterable[object]) -> str:
    """Cells in the order of the classes or dtypes, as one; equal ones once."""
    texts = [str(cell) for cell in cells]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def traffic_table(chosen: Selection, built: Mapping[Variant, Built], eager: Eager) -> str:
    costs = dict(eager)
    for name in STEPS:
        for dtype in chosen.dtypes:
            for c in chosen.classes:
                calls = {call: built[Variant(chosen.targets[0], call, dtype, c, rows=chosen.rows)] for call in CALLS}
                costs[name, dtype, c] = step_cost(name, calls)
    lines = []
    for name in [*STEPS, *EXPRESSIONS]:
        here = [(c, costs[name, chosen.dtypes[0], c]) for c in chosen.classes]
        times = [
            [f"{microseconds(costs[name, dtype, c].bytes):.1f}" for c in chosen.classes] for dtype in chosen.dtypes
        ]
        launches = slashed(of.launches for _, of in here)
        moves = slashed(f"{of.elements / (chosen.rows * c):.1f}" for c, of in here)
        lines.append([name, launches, moves, *map(slashed, times)])
    head = ["", "launches", "moves", *(f"us on an H100, {dtype}" for dtype in chosen.dtypes)]
    title = f"### One step: N = {chosen.rows}, C = {' / '.join(map(str, chosen.classes))}\n\n"
    return title + markdown.table(head, lines)


def target_table(chosen: Selection, built: Mapping[Variant, Built], target: str) -> str:
    """Every kernel of one architecture."""
    groups: dict[tuple[int, str], list[Built]] = {}
    for v, one in built.items():
        if v.target == target:
            groups.setdefault((v.classes, v.call), []).append(one)
    head = ["C", "call", "kernel", "warps", "registers", "spills", "shared", "loads", "stores", "instructions"]
    lines = []
    for (classes, call), same in groups.items():
        machines = [one.machine for one in same]
        lines.append([
            classes, call, machines[0].kernel, slashed(m.warps for m in machines),
            slashed(m.registers for m in machines), slashed(m.spills for m in machines),
            slashed(m.shared for m in machines), slashed(widths(m.loads) for m in machines),
            slashed(widths(m.stores) for m in machines), slashed(m.instructions for m in machines),
        ])  # fmt: skip
    return f"### {target} in full: {' / '.join(chosen.dtypes)}\n\n" + markdown.table(head, lines)


def worst_table(built: Mapping[Variant, Built]) -> str:
    groups: dict[tuple[str, int], list[Built]] = {}
    for v, one in built.items():
        groups.setdefault((v.target, v.classes), []).append(one)
    lines = []
    for (target, classes), same in groups.items():
        machines = [one.machine for one in same]
        lines.append([
            target, classes, max(m.registers for m in machines),
            "" if target.startswith("gfx") else min(m.warps_on_sm for m in machines),
            max(m.spills for m in machines), max(m.local for m in machines),
            sum(bool(width_faults(one)) for one in same), max(m.shared for m in machines),
            max(m.instructions for m in machines),
        ])  # fmt: skip
    head = [
        "architecture", "C", "registers", "warps on an SM", "spills", "local bytes", "kernels with narrow access",
        "shared", "instructions",
    ]  # fmt: skip
    return "### Every architecture: the worst of all calls and dtypes\n\n" + markdown.table(head, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, metavar="GPU", help="default: all")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, metavar="DTYPE", help="default: all")
    parser.add_argument("--classes", nargs="+", default=CLASSES, type=int, metavar="C", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help="default: %(default)s")
    args = parser.parse_args(arguments)
    if launch.interprets():
        parser.error("TRITON_INTERPRET is set: the kernels are Python functions then, and cannot be compiled")

    for target in filter(unknown, args.targets):
        print(f"left out: {unknown(target)}")
    targets = [target for target in args.targets if not unknown(target)]
    chosen = Selection(targets, args.dtypes, args.classes, args.rows)
    built = build_all(
        Variant(target, call, dtype, classes, rows=chosen.rows)
        for target in chosen.targets
        for classes in chosen.classes
        for call in CALLS
        for dtype in chosen.dtypes
    )
    eager = {
        (name, dtype, classes): cost(expression, chosen.rows, classes, getattr(torch, dtype))
        for name, expression in EXPRESSIONS.items()
        for dtype in chosen.dtypes
        for classes in chosen.classes
    }
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    report = "\n".join((
        "## What the compiler makes of the kernels\n",
        f"{versions}, {time.strftime('%Y-%m-%d')}. Made by `python -m benchmarks.kernels`; kernels.csv has it all.\n",
        MEANING,
        traffic_table(chosen, built, eager),
        target_table(chosen, built, "sm_90" if "sm_90" in chosen.targets else chosen.targets[0]),
        worst_table(built),
    ))  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernels.md").write_text(report)
    rows = list(csv_rows(chosen, built, eager))
    with (args.out / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(report)


if __name__ == "__main__":
    main()
