"""Launches of the Triton kernels: which kernel, which tile, and plans that are made once and launched often.

Logits are (N, C) in half or single precision, with any row stride. No value is read from the device, so no call
synchronises, and every call can be captured in a CUDA graph. ``kernels.supports`` has verified the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cktat_loss._backends import CKTATTerms, Forward, Gradients, Needs, Problem, Weighting

from .rows import rows_kernel
from .streaming import streaming_kernel

# A logit position is one row and column of the three logits. A thread keeps about 6 float32 per position alive (three
# logits, three exponentials). With 16 positions the rows kernel uses up to 128 registers and the streaming kernel up to
# 153 (sm_90, Triton 3.8), so that 12 warps or more fit on an SM; 172 and 8 warps with the wide chunk. 32 positions use
# up to 254. 8 positions use up to 64, but then shuffles and barriers of the reductions are a third of all instructions:
# at C = 1000 a position takes 102 instructions instead of 82 (benchmarks/results/by_hand.md). On AMD a warp has 64
# lanes, so that each thread has half the positions.
POSITIONS_PER_THREAD = 16
# The rows kernel holds a whole row in registers. A row of 8,192 would be one CTA with all registers of an SM, and
# nothing would hide its loads. Two CTAs of 4,096 fit. Above the limit, streaming moves 8 elements instead of 5.
ROWS_UP_TO = 4096
# Columns per chunk and warps of the streaming kernel: 16 positions per thread too. On an H200 the narrow chunk is
# 1.3 to 1.4 times as fast for thousands of rows of 32,000 classes or more. The wide one is 1.13 times as fast for 64 or
# 128 rows, which have an SM each (benchmarks/results/nvidia-h200-probe/probe.txt).
STREAMING_BLOCK, STREAMING_WARPS = 2048, 4
FEW_ROWS = 128
FEW_ROWS_BLOCK, FEW_ROWS_WARPS = 4096, 8
# From Triton 3.3 on, a compiled kernel can be launched directly, with its constants after the other arguments. On ROCm
# Triton also specialises by the size of a tensor's memory, which is not part of a plan's key.
DIRECT_LAUNCH = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3) and not torch.version.hip
# Triton has had this since 3.4. Without it, Plan.launch assumes that launch hooks are set.
RUNTIME = getattr(getattr(triton, "knobs", None), "runtime", None)
# A tile has at most 256 rows, so that all larger N share one plan.
MAX_ROWS_IN_KEY = 257

# The weighting of a launch that computes terms and no loss.
UNWEIGHTED = Weighting(1.0, None, "none")

# The stride and dtype of a tensor argument, which Triton compiles for. None for a number or a missing argument.
Layout = tuple[int, torch.dtype] | None


class Tile(NamedTuple):
    """The shape of a program's tile: for each of ``rows`` rows, ``strips`` strips of ``width`` columns."""

    strips: int
    rows: int
    width: int
    warps: int


def rows_tile(classes: int, itemsize: int, n: int) -> Tile:
    """Return the tile of the rows kernel.

    A thread has at most 16 positions, and few threads share a row, because a reduction within a thread needs no
    shuffle. But a strip is at least 4 columns wide (if there are as many) and at most one load of a warp, so that the
    loads of a warp lie together. Within these limits there are at most 8 strips. (Odd numbers of classes above 256 load
    one element at a time, and have 16.) A small batch is one program, so that there are no partial sums to add up.
    """
    columns = 1 << (classes - 1).bit_length()
    vector = min(16 // itemsize, classes & -classes)  # elements per load of a thread
    least_threads = max(1, columns // POSITIONS_PER_THREAD)
    if least_threads > 32:
        return Tile(1, 1, columns, least_threads // 32)
    width = min(max(least_threads * vector, columns // 8, 4), 32 * vector, columns)
    lanes = min(32, max(1, width // vector))  # threads that share a row
    if 128 < n * lanes <= 256:
        # 4 warps cannot hold the batch, and 8 can. On an H200 16 warps are 1.15 times as fast as 8 (128 x 10). If a row
        # has several strips, two warps then share them.
        return Tile(columns // width, 256 // lanes, width, 16)
    return Tile(columns // width, 128 // lanes, width, 4)


@dataclass(eq=False)
class Plan:
    """A kernel with its constants, for all calls that Triton would compile alike."""

    kernel: Any
    rows: int  # rows per program
    constants: dict[str, Any]  # in the order of the kernel's signature: a direct launch passes them by position
    options: dict[str, Any]
    compiled: Any = None  # what Triton compiled, after the first aligned launch

    def launch(self, programs: int, aligned: bool, device: int, *args: Any) -> None:
        """Launch the kernel, bypassing Triton's launcher once it is compiled.

        The launcher finds out at every call for which kind of arguments to compile, which takes most of its time. A
        Plan fixes all of that except two things: that every pointer is a multiple of 16, and that n fits into 32 bits.
        ``aligned`` says so. It is about the inputs, because outputs are new allocations and always aligned.
        """
        compiled = self.compiled
        if compiled is None or not aligned:
            compiled = self.kernel[programs,](*args, **self.constants, **self.options)
            if aligned and DIRECT_LAUNCH:
                self.compiled = compiled
        elif _has_launch_hooks():
            compiled[programs, 1, 1](*args, *self.constants.values())
        else:  # leave out the hooks, because calling empty ones takes time too
            stream = triton.runtime.driver.active.get_current_stream(device)
            hooks = (None, None, None)  # the launch's metadata, and the hooks on entry and exit
            kernel = (compiled.function, compiled.packed_metadata)
            compiled.run(programs, 1, 1, stream, *kernel, *hooks, *args, *self.constants.values())


def _has_launch_hooks() -> bool:
    """True if a profiler listens to launches, or if this version of Triton does not say."""
    if RUNTIME is None:
        return True
    enter, leave = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.lru_cache(maxsize=1000)
def find_plan(
    device: int,
    n: int,
    classes: int,
    dtypes: tuple[torch.dtype, ...],
    strides: tuple[int, ...],
    layouts: tuple[Layout, ...],
    reduction: str,
    outputs: tuple[bool, ...],
    precomputed: bool,
) -> Plan:
    """Return the plan of a call. The arguments are its key: all that Triton would compile another kernel for.

    Args:
        device: the device's index.
        n: the number of rows, up to ``MAX_ROWS_IN_KEY``.
        classes: the number of columns.
        dtypes: those of the clean, adversarial and teacher logits.
        strides: their row strides.
        layouts: those of beta, y and the weights of guidance and consistency in the gradients.
        reduction: "mean", "sum" or "none".
        outputs: True for each of loss, terms, d_clean and d_adv that the call stores.
        precomputed: True if the kernel returns at once for a grad_output of one.
    """
    beta, _, w_guidance, w_consistency = layouts
    constants = {
        "C": classes,
        # Strides are constexprs: all that Triton knows of a run-time stride is whether 16 divides it, and 1000 would
        # lose its wide loads.
        "CLEAN_STRIDE": strides[0],
        "ADV_STRIDE": strides[1],
        "TEACHER_STRIDE": strides[2],
        "BETA_STRIDE": _stride(beta),
        "GUIDANCE_STRIDE": _stride(w_guidance),
        "CONSISTENCY_STRIDE": _stride(w_consistency),
        "REDUCTION": reduction,
        "PRECOMPUTED": precomputed,
    }
    options = {"enable_fp_fusion": False}
    if classes <= ROWS_UP_TO:
        tile = rows_tile(classes, min(dtype.itemsize for dtype in dtypes), n)
        constants |= {"STRIPS": tile.strips, "ROWS": tile.rows, "WIDTH": tile.width}
        return Plan(rows_kernel, tile.rows, constants, {**options, "num_warps": tile.warps})
    block, warps = (FEW_ROWS_BLOCK, FEW_ROWS_WARPS) if n <= FEW_ROWS else (STREAMING_BLOCK, STREAMING_WARPS)
    chunks = -(-classes // block)
    has_edges = classes % 8 != 0  # see streaming.py
    slots = 1 << (chunks + has_edges - 1).bit_length()
    constants |= {"BLOCK": block, "CHUNKS": chunks, "SLOTS": slots}
    return Plan(streaming_kernel, 1, constants, {**options, "num_warps": warps})


class Arguments:
    """The input arguments of one launch, in the order of the kernels' signatures, and their part of a plan's key."""

    def __init__(
        self,
        problem: Problem,
        weighting: Weighting,
        w_guidance: float | Tensor = 1.0,
        w_consistency: Tensor | None = None,
    ) -> None:
        n, classes = problem.clean.shape
        clean, adv, teacher = _readable(problem.clean), _readable(problem.adv), _readable(problem.teacher)
        y = weighting.y if weighting.y is None else weighting.y.contiguous()
        beta, beta_layout, beta_address = _argument(weighting.beta)
        y, y_layout, y_address = _argument(y)
        w_guidance, guidance_layout, guidance_address = _argument(w_guidance)
        w_consistency, consistency_layout, consistency_address = _argument(w_consistency)

        self.n = n
        self.device: int = clean.get_device()  # -1 on a CPU, in the interpreter
        self.values = (clean, adv, teacher, n, problem.tau, beta, y, w_guidance, w_consistency)
        # A single row is always contiguous, whatever its stride says.
        strides = (clean.stride(0), adv.stride(0), teacher.stride(0)) if n > 1 else (classes, classes, classes)
        self.key = (
            self.device,
            min(n, MAX_ROWS_IN_KEY),
            classes,
            (clean.dtype, adv.dtype, teacher.dtype),
            strides,
            (beta_layout, y_layout, guidance_layout, consistency_layout),
            weighting.reduction,
        )
        addresses = clean.data_ptr() | adv.data_ptr() | teacher.data_ptr() | beta_address | y_address
        self.aligned = not (addresses | guidance_address | consistency_address) % 16 and n < 1 << 31

    def launch(
        self,
        plan: Plan,
        loss: Tensor | None,
        guidance: Tensor | None,
        consistency: Tensor | None,
        d_clean: Tensor | None,
        d_adv: Tensor | None,
    ) -> None:
        """Launch the plan's kernel, which fills the outputs that are given. Outputs are contiguous."""
        programs = -(-self.n // plan.rows)
        if programs == 0:
            return
        outputs = (loss, guidance, consistency, d_clean, d_adv)
        if self.device < 0 or self.device == torch.cuda.current_device():
            plan.launch(programs, self.aligned, self.device, *self.values, *outputs)
        else:
            with torch.cuda.device(self.device):
                plan.launch(programs, self.aligned, self.device, *self.values, *outputs)


def _readable(logits: Tensor) -> Tensor:
    """Return the logits with unit column stride and the negative bit resolved."""
    if logits.is_neg():
        logits = logits.resolve_neg()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _argument(value: Any) -> tuple[Any, Layout, int]:
    """Return a kernel argument, its layout and its address. A number or None is passed as it is, with address 0."""
    if not isinstance(value, Tensor):
        return value, None, 0
    if value.is_neg():
        value = value.resolve_neg()
    return value, (value.stride(0) if value.ndim else 0, value.dtype), value.data_ptr()


def _stride(layout: Layout) -> int | None:
    return None if layout is None else layout[0]


def _empty_gradients(problem: Problem, needs: Needs) -> Gradients:
    """Allocate the gradients that are needed: contiguous, each in its logits' dtype."""
    clean, adv = problem.clean, problem.adv
    d_clean = clean.new_empty(clean.shape) if needs.clean else None
    d_adv = adv.new_empty(adv.shape) if needs.adv else None
    return d_clean, d_adv


def loss_forward(problem: Problem, weighting: Weighting, needs: Needs, return_terms: bool) -> Forward:
    """Compute the loss and, unless they have to wait, the gradients for a grad_output of one. One launch.

    It reads 3 elements per logit position and writes one per gradient. Beyond ``ROWS_UP_TO`` classes the gradients take
    a second reading. If several programs share a mean or a sum, torch adds up their partial sums.

    float16 gradients wait for the backward pass, because a GradScaler's factor must be applied before the cast. So do
    those of reduction "none", where each sample has a grad_output of its own.
    """
    clean, adv, reduction = problem.clean, problem.adv, weighting.reduction
    n, is_reduced = clean.shape[0], reduction != "none"
    has_float16 = (needs.clean and clean.dtype == torch.float16) or (needs.adv and adv.dtype == torch.float16)
    if has_float16 or not is_reduced:
        needs = Needs(clean=False, adv=False)
    arguments = Arguments(problem, weighting)
    plan = find_plan(*arguments.key, (True, return_terms, *needs), False)
    programs = -(-n // plan.rows)

    if reduction == "none":
        loss = clean.new_empty(n, dtype=torch.float32)
    elif programs == 1:
        loss = clean.new_empty((), dtype=torch.float32)
    else:
        loss = clean.new_empty(programs, dtype=torch.float32)
    guidance = clean.new_empty(n, dtype=torch.float32) if return_terms else None
    consistency = clean.new_empty(n, dtype=torch.float32) if return_terms else None
    d_clean, d_adv = _empty_gradients(problem, needs)
    arguments.launch(plan, loss, guidance, consistency, d_clean, d_adv)

    if is_reduced and programs != 1:
        # The mean of an empty batch is torch's own NaN.
        loss = loss.mean() if n == 0 and reduction == "mean" else loss.sum()
    terms = None if guidance is None or consistency is None else CKTATTerms(guidance, consistency)
    return Forward(loss, terms, (d_clean, d_adv))


def loss_backward(
    problem: Problem, weighting: Weighting, grad_output: Tensor, precomputed: Gradients | None, needs: Needs
) -> Gradients:
    """Return the gradients for ``grad_output``. One launch.

    If the gradients are precomputed, the kernel reads ``grad_output`` on the device and returns at once if it is one.
    Otherwise it computes the gradients again, scaled before the cast, into the same memory.
    """
    d_clean, d_adv = precomputed or (None, None)
    is_precomputed = d_clean is not None or d_adv is not None
    if not is_precomputed:
        d_clean, d_adv = _empty_gradients(problem, needs)
    arguments = Arguments(problem, weighting, grad_output)
    outputs = (False, False, d_clean is not None, d_adv is not None)
    plan = find_plan(*arguments.key, outputs, is_precomputed)
    arguments.launch(plan, None, None, None, d_clean, d_adv)
    return d_clean, d_adv


def terms_forward(problem: Problem) -> CKTATTerms:
    """Compute both terms. One launch."""
    n = problem.clean.shape[0]
    terms = CKTATTerms(*(problem.clean.new_empty(n, dtype=torch.float32) for _ in range(2)))
    arguments = Arguments(problem, UNWEIGHTED)
    plan = find_plan(*arguments.key, (False, True, False, False), False)
    arguments.launch(plan, None, terms.guidance, terms.consistency, None, None)
    return terms


def terms_backward(problem: Problem, grad_guidance: Tensor, grad_consistency: Tensor, needs: Needs) -> Gradients:
    """Return the logits' gradients, given the gradients of the two terms. One launch."""
    d_clean, d_adv = _empty_gradients(problem, needs)
    arguments = Arguments(problem, UNWEIGHTED, grad_guidance, grad_consistency)
    plan = find_plan(*arguments.key, (False, False, *needs), False)
    arguments.launch(plan, None, None, None, d_clean, d_adv)
    return d_clean, d_adv


def interprets() -> bool:
    """True if the kernels were defined for Triton's interpreter, which runs them on CPU tensors."""
    return not isinstance(rows_kernel, triton.JITFunction)
