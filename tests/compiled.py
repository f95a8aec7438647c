"""The kernels as compiled for GPUs that are absent, and what their machine code says.

The public loss runs on meta tensors, and what it would launch is recorded. Triton's own launcher then specialises and
compiles the record for a target, and stops before it would need a GPU. The result is read with the disassembler in
Triton's wheel (NVIDIA), or is text already (AMD).

Machine code knows its source lines. So an access of a logit or a gradient can be told from an access of a row value (a
loss, a label, a weight), whatever their widths.

All private names of the library that this file knows stand in `record` and `ROW_VALUES`.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from cktat_loss import functional, kernels
from cktat_loss.kernels import launch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The forward pass without gradients, and with them; its backward pass; a backward pass with an upstream gradient and a
# beta for each row; and our recipe: labels, both terms, no gradient to the clean logits.
CALLS = ("loss", "training", "backward", "backward by rows", "recipe")
CLASSES = (10, 100, 1000, 21841)
TAU, BETA = 5.3, 5.7
KNOWS_BLACKWELL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
# Functions of the kernels that access one number per row. All other accesses are of logits and gradients.
ROW_VALUES = {"per_row", "load_labels", "rates", "store_losses", "rows_kernel", "streaming_kernel"}
FUNCTIONS = {
    path.name: [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    for path in Path(launch.__file__).parent.glob("*.py")
}
if unknown_names := ROW_VALUES - {function.name for found in FUNCTIONS.values() for function in found}:
    raise ImportError(f"ROW_VALUES names functions that kernels/ has not: {', '.join(sorted(unknown_names))}")


class Variant(NamedTuple):
    """A call of the loss, for a GPU."""

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


def unknown(target: str) -> str:
    """Return why this Triton cannot compile for a target, or nothing."""
    return f"Triton {triton.__version__} knows no {target}" if target == "sm_100" and not KNOWS_BLACKWELL else ""


class Launch(NamedTuple):
    """A launch that did not happen. Its tensors of two dimensions are three logits, then gradients."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def streams(self) -> bool:
        return bool(self.kernel.__name__ == "streaming_kernel")

    def gradients(self) -> int:
        return sum(isinstance(x, Tensor) and x.ndim == 2 for x in self.args) - 3

    def readings(self) -> int:
        """Return how often a logit is loaded. The interpreter's traffic test counts it on real runs."""
        return 2 if self.streams() and self.gradients() else 1


def record(variant: Variant, around: AbstractContextManager[Any] | None = None) -> Launch:
    """Return the launch of a call, which does not happen. What torch does beside it happens in the given context."""
    n, classes, call = variant.rows, variant.classes, variant.call
    by_rows = call == "backward by rows"
    dtypes = ("float32", "bfloat16", "float16") if variant.dtype == "mixed" else [variant.dtype] * 3

    def meta(*shape: int, dtype: str = "float32") -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    logits = [meta(n, variant.row_stride or classes, dtype=dtype)[:, :classes] for dtype in dtypes]
    wanted = [x.requires_grad_(call != "loss") for x in logits[:2]]
    options: dict[str, Any] = {"backend": "triton", "reduction": "none" if by_rows else "mean"}
    if call == "recipe":
        options |= {"y": meta(n, dtype="int64"), "detach_clean": True, "return_terms": True}
    beta = meta(n) if variant.tensors or by_rows else BETA
    seen: list[Launch] = []

    def instead(plan: Any, programs: int, *args: Any) -> None:
        count = len(plan.kernel.arg_names) - len(plan.constants)  # the kernel's own arguments come last
        seen.append(Launch(plan.kernel, programs, args[-count:], plan.constants, plan.options))

    with patch.object(launch.Plan, "launch", instead), patch.object(kernels, "supports", lambda _: True):
        with around or nullcontext():
            loss = functional.cktat_loss(*logits, TAU, beta, **options)
        if call.startswith("backward"):
            torch.autograd.grad(loss, wanted, meta(n) if by_rows else meta())
    return seen[-1]


class AbsentGPU:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: str) -> None:
        name, number = target.split("_") if "_" in target else ("hip", target)
        self.target = GPUTarget("cuda", int(number), 32) if name == "sm" else GPUTarget("hip", number, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # a key of Triton's cache of compiled kernels: one device per target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@dataclass
class Machine:
    """The machine code of one kernel. Accesses are counted by their bits, in the text: those of a loop count once."""

    kernel: str
    warps: int
    shared: int  # bytes
    registers: int = 0  # per thread
    spills: int = 0  # NVIDIA: loads and stores of local memory; AMD: spilled registers
    local: int = 0  # bytes per thread
    instructions: int = 0  # in the text, without NOPs
    loads: Counter[int] = field(default_factory=Counter)  # of logits
    stores: Counter[int] = field(default_factory=Counter)  # of gradients

    @property
    def warps_on_sm(self) -> int:
        """The number of warps whose registers fit on an NVIDIA SM, in whole programs."""
        programs = 65536 // (32 * self.warps * -(-self.registers // 8) * 8)
        return min(64, programs * self.warps)


@dataclass
class Built:
    """A call as compiled."""

    variant: Variant
    machine: Machine
    streams: bool
    readings: int
    gradients: int

    def widest(self, *strides: int) -> int:
        """Return the bits of the widest access for tensors of these row strides, given 16-byte aligned storage."""
        itemsize = getattr(torch, self.variant.dtype).itemsize
        aligned = gcd(16 // itemsize, *strides)  # elements
        # Streaming peels off what is not aligned, if it knows the stride.
        return 128 if self.streams and not self.variant.row_stride else int(8 * itemsize * aligned)

    def width_faults(self) -> list[str]:
        """Return the accesses of logits and gradients that are narrower than their alignment allows.

        Streaming may load and store the edges of an odd row by the element, each tensor's once per reading.
        """
        variant, faults = self.variant, []
        edges = self.streams and variant.classes % 8 != 0
        load_width = self.widest(variant.row_stride or variant.classes, variant.classes)
        for what, seen, widest, at_edges, expected in (
            ("loads", self.machine.loads, load_width, 3 * self.readings, True),
            ("stores", self.machine.stores, self.widest(variant.classes), self.gradients, self.gradients > 0),
        ):
            if expected and not seen[widest]:
                faults.append(f"no {what} of {widest} bits: {dict(seen)}")
            if sum(n for bits, n in seen.items() if bits < widest) > (at_edges if edges else 0):
                faults.append(f"{what} narrower than {widest} bits: {dict(seen)}")
        return faults


def build(variant: Variant) -> Built:
    """Compile a call, in a process that does not launch anything else: its Triton has no other driver afterwards."""
    one = record(variant)
    triton.runtime.driver.set_active(AbsentGPU(variant.target))
    machine = read(one.kernel.warmup(*one.args, grid=(one.programs,), **one.constants, **one.options))
    return Built(variant, machine, one.streams(), one.readings(), one.gradients())


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
    """Return the kernels' function that holds this line, or is the last before it.

    The line of a load in inline assembly drifts, by one per instruction: by up to three, which is less than what
    separates two functions.
    """
    return next((f.name for f in reversed(FUNCTIONS.get(file, [])) if f.lineno <= line), "")


@contextmanager
def compilers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool for `build`, whose Triton cache is empty and goes with it."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, spawn, set_cache, (folder,)) as pool:
        yield pool


def set_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
