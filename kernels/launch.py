"""Which kernel, which tile, how many warps, for which shape; and the launches that _autograd.py asks for.

Logits are (N, C) in half or single precision, with any strides. Nothing here reads device data or allocates by it: no
synchronisation, and every call can be captured in a CUDA graph. Nothing looks at the device either:
``kernels.supports`` has.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cktat_loss._plain import Gradients, Pass, Problem, Upstream, upstream_weights

from .rows import rows_kernel
from .streaming import streaming_kernel

# A thread holds about 6 live float32 a logit position (three logits, three exponentials). 16 positions take up to 132
# registers, and streaming's single pass 165, so 12 warps on an SM or more; 32 take 248. 8 take 64, but then the
# reductions' shuffles and barriers are a third of all instructions (sm_90, C = 1000: 100 a position in place of 81).
# On AMD a warp has 64 lanes, hence half the positions a thread.
POSITIONS_PER_THREAD = 16
# A row of 8192 would be one CTA with all registers of an SM: nothing to hide its loads behind. Up to here two CTAs
# fit, and the single pass takes 5 element moves where streaming takes 8.
ROWS_UP_TO = 4096
# The same 16 positions a thread. A wider chunk wastes more of the last one: 12 % of 21,841 at 4096, 3 % here.
STREAMING_BLOCK = 2048
STREAMING_WARPS = 4
# From 3.3 on, a compiled kernel is launched with its constants behind the other arguments. On ROCm, Triton compiles by
# the size of a tensor's memory too, which no plan knows of.
COMPILED_TAKES_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) and not torch.version.hip

FEW_ROWS = 257  # more than any program has

Kind = tuple[int, torch.dtype] | None  # of an operand: a tensor's stride and dtype, or a number


class Tile(NamedTuple):
    """G strips of W columns for each of M rows."""

    G: int
    M: int
    W: int
    warps: int


def rows_tile(classes: int, itemsize: int, n: int) -> Tile:
    """The rows kernel's tile: about 16 positions a thread, as few threads on a row as that takes.

    A warp's load should still cover whole 32-byte sectors, hence W of an eighth of the row at least, and 4. All of a
    small batch goes to one program, so that there is nothing left to sum up.
    """
    columns = 1 << (classes - 1).bit_length()
    vector = min(16 // itemsize, classes & -classes)  # what a thread loads at once
    threads = max(1, columns // POSITIONS_PER_THREAD)  # on a row
    if threads > 32:
        return Tile(1, 1, columns, min(16, threads // 32))
    width = min(max(threads * vector, columns // 8, 4), 32 * vector, columns)
    lanes = min(32, max(1, width // vector))
    warps = 8 if 4 < n * lanes / 32 <= 8 else 4
    return Tile(columns // width, 32 * warps // lanes, width, warps)


@dataclass(eq=False)
class Plan:
    """A kernel and its constants for one kind of call, and what Triton has compiled of it."""

    kernel: Any
    rows: int  # of a program
    constants: dict[str, Any]
    options: dict[str, Any]
    compiled: Any = None

    def launch(self, programs: int, aligned: bool, *args: Any) -> None:
        """Past Triton's own launcher once there is a compiled kernel: it finds out again what it needs at every call.

        That takes half of the host's time. It is what a plan stands for already, but for the pointers' alignment.
        """
        if self.compiled is not None and aligned:
            self.compiled[programs, 1, 1](*args, *self.constants.values())
            return
        compiled = self.kernel[programs,](*args, **self.constants, **self.options)
        if aligned and COMPILED_TAKES_CONSTANTS:
            self.compiled = compiled


@functools.lru_cache(maxsize=4096)
def plan(
    device: int,
    n: int,
    classes: int,
    dtypes: tuple[torch.dtype, ...],
    strides: tuple[int, ...],
    operands: tuple[Kind, ...],
    reduction: str,
    outputs: tuple[bool, ...],
    done_at_one: bool,
) -> Plan:
    """One for each kind of call: all that Triton would compile another kernel for. ``n`` counts where it is small."""
    beta, _, w_guidance, w_consistency = operands
    constants = {
        "C": classes,
        # Constants, since the compiler takes a run-time stride for a multiple of 16 or for nothing, and 1000 is none.
        "CLEAN_STRIDE": strides[0],
        "ADV_STRIDE": strides[1],
        "TEACHER_STRIDE": strides[2],
        "BETA_STRIDE": beta and beta[0],
        "GUIDANCE_STRIDE": w_guidance and w_guidance[0],
        "CONSISTENCY_STRIDE": w_consistency and w_consistency[0],
        "REDUCTION": reduction,
        "DONE_AT_ONE": done_at_one,
    }
    options = {"enable_fp_fusion": False}
    if classes <= ROWS_UP_TO:
        tile = rows_tile(classes, min(dtype.itemsize for dtype in dtypes), n)
        return Plan(
            rows_kernel,
            tile.M,
            {**constants, "G": tile.G, "M": tile.M, "W": tile.W},
            {**options, "num_warps": tile.warps},
        )
    chunks = -(-classes // STREAMING_BLOCK)
    slots = 1 << (chunks + (classes % 8 != 0) - 1).bit_length()
    tiling = {"BLOCK": STREAMING_BLOCK, "CHUNKS": chunks, "SLOTS": slots}
    return Plan(streaming_kernel, 1, {**constants, **tiling}, {**options, "num_warps": STREAMING_WARPS})


class Inputs:
    """A problem as the kernels take it, and its kind."""

    def __init__(self, problem: Problem) -> None:
        clean, adv, teacher, tau, beta, y, _ = problem
        n, classes = clean.shape
        clean, adv, teacher = readable(clean), readable(adv), readable(teacher)
        beta, beta_kind, pointers = operand(beta)
        y_kind = None
        if y is not None:
            y, y_kind, pointer = operand(y.contiguous())
            pointers |= pointer
        self.n, self.args = n, (clean, adv, teacher, n, tau, beta, y)
        strides = (clean.stride(0), adv.stride(0), teacher.stride(0)) if n > 1 else (classes, classes, classes)
        self.logits = (clean.get_device(), min(n, FEW_ROWS), classes, (clean.dtype, adv.dtype, teacher.dtype), strides)
        self.operands = (beta_kind, y_kind)
        self.pointers = pointers | clean.data_ptr() | adv.data_ptr() | teacher.data_ptr()

    def launch(self, made: Plan, pointers: int, *others: Any) -> None:
        """With the upstream weights, and the outputs to fill: loss, guidance, consistency, d_clean, d_adv."""
        if programs := -(-self.n // made.rows):
            aligned = not (self.pointers | pointers) % 16 and self.n < 1 << 31
            device = self.logits[0]
            if device < 0 or device == torch.cuda.current_device():
                made.launch(programs, aligned, *self.args, *others)
            else:
                with torch.cuda.device(device):
                    made.launch(programs, aligned, *self.args, *others)


def readable(logits: Tensor) -> Tensor:
    """With columns side by side, and not negative in name alone."""
    if logits.is_neg():
        logits = logits.resolve_neg()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def operand(value: Any) -> tuple[Any, Kind, int]:
    """A number or None as it is; a tensor, its stride and dtype, and where it lies."""
    if not isinstance(value, Tensor):
        return value, None, 0
    if value.is_neg():
        value = value.resolve_neg()
    return value, (value.stride(0) if value.ndim else 0, value.dtype), value.data_ptr()


def gradients_like(clean: Tensor, adv: Tensor, needed: tuple[bool, ...]) -> Gradients:
    return clean.new_empty(clean.shape) if needed[0] else None, adv.new_empty(adv.shape) if needed[1] else None


def forward(problem: Problem, return_terms: bool, needed: tuple[bool, ...]) -> Pass:
    """As ``_plain.forward``, with the gradients for an upstream gradient of one.

    3 element moves a logit position and one for each gradient; with gradients of more than 4,096 classes 3 more. One
    launch; where several programs share a mean or a sum, torch adds up what each of them has made of it.

    Gradients are left to ``backward`` where the upstream gradient is never one: of float16, whose GradScaler's
    they need to survive, and of "none" and "terms", where each sample has its own.
    """
    clean, adv, reduction = problem.clean, problem.adv, problem.reduction
    n, is_reduced = clean.shape[0], reduction in ("mean", "sum")
    inputs = Inputs(problem)
    half = (needed[0] and clean.dtype == torch.float16) or (needed[1] and adv.dtype == torch.float16)
    now = needed[:2] if is_reduced and not half else (False, False)
    made = plan(*inputs.logits, (*inputs.operands, None, None), reduction, (return_terms, *now), False)
    programs = -(-n // made.rows)
    loss: Tensor | None = None
    guidance: Tensor | None = None
    consistency: Tensor | None = None
    if return_terms:
        guidance, consistency = clean.new_empty(n, dtype=torch.float32), clean.new_empty(n, dtype=torch.float32)
    if reduction != "terms":
        size = n if reduction == "none" else programs
        loss = clean.new_empty(() if is_reduced and programs == 1 else size, dtype=torch.float32)
    d_clean, d_adv = gradients_like(clean, adv, now)
    inputs.launch(made, 0, 1.0, None, loss, guidance, consistency, d_clean, d_adv)
    if loss is not None and is_reduced and programs != 1:
        loss = loss.sum() if n or reduction == "sum" else loss.mean()  # of nothing: torch's own NaN
    return Pass(loss, guidance, consistency, (d_clean, d_adv))


def backward(problem: Problem, upstream: Upstream, held: Gradients | None, needed: tuple[bool, ...]) -> Gradients:
    """As ``_plain.backward``. One launch.

    It returns at once where the gradients held are right already, for an upstream gradient of one; else it computes
    them anew, scaled before the cast, into the same memory.
    """
    both = upstream_weights(problem, upstream) if problem.reduction == "terms" else (*upstream, None)
    (w_guidance, kind_g, pointer_g), (w_consistency, kind_c, pointer_c) = map(operand, both)
    d_clean, d_adv = held or (None, None)
    are_held = d_clean is not None or d_adv is not None
    if not are_held:
        d_clean, d_adv = gradients_like(problem.clean, problem.adv, needed)
    inputs = Inputs(problem)
    outputs = (d_clean is not None, d_adv is not None)
    made = plan(*inputs.logits, (*inputs.operands, kind_g, kind_c), problem.reduction, outputs, are_held)
    inputs.launch(made, pointer_g | pointer_c, w_guidance, w_consistency, None, None, None, d_clean, d_adv)
    return d_clean, d_adv


def interprets() -> bool:
    """Whether the kernels were defined for Triton's interpreter, which runs them on CPU tensors."""
    return not isinstance(rows_kernel, triton.JITFunction)
