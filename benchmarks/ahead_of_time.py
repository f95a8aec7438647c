"""Compiles what the kernels would launch, for GPUs that aren't here, and asks the machine code about it.

A call on meta tensors is recorded instead of launched: kernel, arguments, options. Triton's own launcher then
specialises and compiles the record for a target, and stops before it would need a GPU. What it would have loaded there
is read with the disassembler in Triton's wheel (NVIDIA), or is text already (AMD).

Machine code knows its source lines. So an access of a logit or a gradient can be told from one of a row value (a loss,
a statistic, a weight), whatever their widths.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.eager_cost import Cost, counted
from cktat_loss._plain import Problem
from cktat_loss.kernels import launch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Forward without gradients, and with them; its backward; a backward with an upstream gradient and a beta for each row;
# and our recipe: labels, both terms, and no gradient to the clean logits.
CALLS = ("loss", "training", "backward", "backward by rows", "recipe")
DTYPES = ("float32", "bfloat16", "float16")
CLASSES = (10, 100, 1000, 21841)
TAU, BETA = 5.3, 5.7
KNOWS_BLACKWELL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Functions of the kernels that access a number a row. All other accesses are of logits and gradients.
ROW_VALUES = {"per_row", "load_labels", "rates", "store_losses", "rows_kernel", "streaming_kernel"}
FUNCTIONS = {
    path.name: [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    for path in Path(launch.__file__).parent.glob("*.py")
}


class Variant(NamedTuple):
    """A call of launch.py, for a GPU."""

    target: str
    call: str
    dtype: str  # or "mixed": clean float32, adversarial bfloat16, teacher float16
    classes: int
    row_stride: int = 0  # of the logits, in elements; 0 means contiguous
    tensors: bool = False  # beta is a tensor of weights, not a number
    rows: int = 4096

    def __str__(self) -> str:
        text = f"{self.target} {self.call} {self.dtype} C={self.classes}"
        text += f" row stride {self.row_stride}" if self.row_stride else ""
        text += " weights" if self.tensors else ""
        return text + (f" N={self.rows}" if self.rows != Variant._field_defaults["rows"] else "")

    @property
    def streams(self) -> bool:
        return self.classes > launch.ROWS_UP_TO

    def widest(self, *strides: int) -> int:
        """Bits of the widest access for tensors of these row strides, given 16-byte aligned storage."""
        itemsize = getattr(torch, self.dtype).itemsize
        aligned = gcd(16 // itemsize, *strides)  # elements
        # Streaming peels off what is not aligned, where it knows the stride.
        return 128 if self.streams and not self.row_stride else 8 * itemsize * aligned


def unknown(target: str) -> str:
    """Why this Triton cannot compile for a target; or nothing."""
    return f"Triton {triton.__version__} knows no {target}" if target == "sm_100" and not KNOWS_BLACKWELL else ""


class Launch(NamedTuple):
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        named = zip(self.kernel.arg_names, self.args, strict=False)  # the constants are the rest
        return {name: x for name, x in named if isinstance(x, Tensor)}

    def readings(self) -> int:
        """How often a logit is loaded. The interpreter's traffic test counts it on real runs."""
        return 2 if self.kernel.__name__ == "streaming_kernel" and self.gradients() else 1

    def gradients(self) -> int:
        return sum(name in ("d_clean_ptr", "d_adv_ptr") for name in self.tensors())

    def cost(self) -> Cost:
        """Of all that it loads and stores. Row values count once, though some programs share them."""
        total = Cost(1, 0, 0)
        for name, x in self.tensors().items():
            times = self.readings() if name in ("clean_ptr", "adv_ptr", "teacher_ptr") else 1
            total += Cost(0, times * x.numel(), times * x.numel() * x.element_size())
        return total


def record(variant: Variant) -> tuple[Launch, Cost]:
    """The launch of a call, which does not happen, and the cost of what torch does beside it."""
    n, width, call = variant.rows, variant.row_stride or variant.classes, variant.call
    dtypes = ("float32", "bfloat16", "float16") if variant.dtype == "mixed" else [variant.dtype] * 3

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    clean, adv, teacher = (meta(n, width, dtype=getattr(torch, dtype))[:, : variant.classes] for dtype in dtypes)
    y = meta(n, dtype=torch.int64) if call == "recipe" else None
    beta = meta(n) if variant.tensors or call == "backward by rows" else BETA
    problem = Problem(clean, adv, teacher, TAU, beta, y, "none" if call == "backward by rows" else "mean")
    seen: list[Launch] = []

    def instead(plan: launch.Plan, programs: int, aligned: bool, *args: Any) -> None:
        seen.append(Launch(plan.kernel, programs, args, plan.constants, plan.options))

    def make() -> None:
        if call == "backward by rows":
            launch.backward(problem, (meta(n),), None, (True, True))
            return
        needed = {"loss": (False, False), "recipe": (False, True)}.get(call, (True, True))
        held = launch.forward(problem, call == "recipe", needed).held
        if call == "backward":
            launch.backward(problem, (meta(),), held, needed)

    with patch.object(launch.Plan, "launch", instead):
        if call not in CALLS:
            raise ValueError(f"no such call: {call}")
        beside = counted(make)
    return seen[-1], Cost(0, 0, 0) if call.startswith("backward") else beside


class AbsentGPU:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: str) -> None:
        name, number = target.split("_") if "_" in target else ("hip", target)
        self.target = GPUTarget("cuda", int(number), 32) if name == "sm" else GPUTarget("hip", number, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # a key of Triton's cache of compiled kernels: one device a target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@dataclass
class Machine:
    """What the machine code of one kernel says. Accesses are counted by their bits, in the text: a loop's once."""

    kernel: str
    warps: int
    shared: int  # bytes
    registers: int = 0  # of a thread
    spills: int = 0  # NVIDIA: loads and stores of local memory; AMD: spilled registers
    local: int = 0  # bytes a thread
    instructions: int = 0  # in the text, without NOPs
    loads: Counter[int] = field(default_factory=Counter)  # of logits
    stores: Counter[int] = field(default_factory=Counter)  # of gradients

    @property
    def warps_on_sm(self) -> int:
        """How many warps' registers fit on an NVIDIA SM, in whole programs."""
        programs = 65536 // (32 * self.warps * -(-self.registers // 8) * 8)
        return min(64, programs * self.warps)


def compile_for(target: str, one: Launch) -> Machine:
    triton.runtime.driver.set_active(AbsentGPU(target))
    return read(one.kernel.warmup(*one.args, grid=(one.programs,), **one.constants, **one.options))


@cache  # Triton returns the same object for the same kernel, and the disassembler takes as long as compiling
def read(compiled: Any) -> Machine:
    machine = Machine(compiled.metadata.name, compiled.metadata.num_warps, compiled.metadata.shared)
    if "cubin" in compiled.asm:
        read_nvidia(machine, compiled.asm["cubin"])
    else:
        read_amd(machine, compiled.asm["amdgcn"])
    return machine


def read_nvidia(machine: Machine, cubin: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("nvdisasm", "-c", "-g", "-ndf", file.name)  # -ndf: no dataflow analysis, which takes half the time
    machine.registers, machine.local = number(r"REG:(\d+)", usage), number(r"STACK:(\d+)", usage)
    machine.local += number(r"LOCAL:(\d+)", usage)
    function = ""
    for line in sass.splitlines():
        if source := re.search(r'//## File ".*?([^/"]+)", line (\d+)', line):
            function = function_at(source[1], int(source[2]))
        # /*0220*/  @!P0 LDG.E.128 R0, desc[UR8][R8.64] ;
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if not instruction or instruction[1] == "NOP":
            continue
        machine.instructions += 1
        name, *suffixes = instruction[1].split(".")
        machine.spills += name in ("LDL", "STL")
        if name in ("LD", "LDG", "ST", "STG") and function not in ROW_VALUES:
            digits = [re.fullmatch(r"[US]?(8|16|64|128|256)", suffix) for suffix in suffixes]
            bits = next((int(found[1]) for found in digits if found), 32)
            (machine.loads if name.startswith("LD") else machine.stores)[bits] += 1


AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def read_amd(machine: Machine, text: str) -> None:
    machine.registers = number(r"\.vgpr_count:\s+(\d+)", text)
    machine.spills = number(r"\.vgpr_spill_count:\s+(\d+)", text) + number(r"\.sgpr_spill_count:\s+(\d+)", text)
    machine.local = number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    function = ""
    for line in text[: text.rindex("s_endpgm")].splitlines():
        # .loc  2 47 12  ; row_math.py:47:12 @[ rows.py:42:9 ]
        if source := re.match(r"\s+\.loc\s.*?;\s*(\S+?):(\d+):", line):
            function = function_at(source[1], int(source[2]))
        instruction = re.match(r"\t([a-z]\w+)", line)
        if not instruction or instruction[1] == "s_nop":
            continue
        machine.instructions += 1
        access = re.fullmatch(
            r"(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword\w*?)(?:_d16\w*)?", instruction[1]
        )
        if access and function not in ROW_VALUES:
            (machine.loads if access[1] == "load" else machine.stores)[AMD_BITS[access[2]]] += 1


def tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return int(found[1])


def function_at(file: str, line: int) -> str:
    """The kernels' function that holds this line, or is the last before it.

    The line of a load in inline assembly drifts, by one an instruction: by up to three, which is less than what
    separates two functions.
    """
    return next((f.name for f in reversed(FUNCTIONS.get(file, [])) if f.lineno <= line), "")


@dataclass
class Built:
    """A call as compiled."""

    variant: Variant
    machine: Machine
    readings: int
    gradients: int
    cost: Cost
    done_at_one: bool  # returns at once for an upstream gradient of one


def build(variant: Variant) -> Built:
    one, beside = record(variant)
    machine = compile_for(variant.target, one)
    return Built(variant, machine, one.readings(), one.gradients(), one.cost() + beside, one.constants["DONE_AT_ONE"])


def build_all(variants: Iterable[Variant]) -> dict[Variant, Built]:
    """In as many processes as there are cores, with an empty Triton cache."""
    variants = list(variants)
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(os.cpu_count(), spawn, initializer=set_cache, initargs=(folder,)) as pool,
    ):
        return dict(zip(variants, pool.map(build, variants), strict=True))


def set_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def width_faults(built: Built) -> list[str]:
    """Accesses of logits and gradients that are narrower than their alignment allows; none is good.

    Streaming may load and store the edges of an odd row by the element, each tensor's once a reading.
    """
    variant, machine, faults = built.variant, built.machine, []
    edges = variant.streams and variant.classes % 8 != 0
    load_width = variant.widest(variant.row_stride or variant.classes, variant.classes)
    for what, seen, widest, at_edges, expected in (
        ("loads", machine.loads, load_width, 3 * built.readings, True),
        ("stores", machine.stores, variant.widest(variant.classes), built.gradients, built.gradients > 0),
    ):
        if expected and not seen[widest]:
            faults.append(f"no {what} of {widest} bits: {dict(seen)}")
        if sum(n for bits, n in seen.items() if bits < widest) > (at_edges if edges else 0):
            faults.append(f"{what} narrower than {widest} bits: {dict(seen)}")
    return faults
