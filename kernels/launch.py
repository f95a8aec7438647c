"""Which kernel, which tile, how many warps, for which shape; and the calls that ops.py makes.

Logits are (N, C) in half or single precision, with any strides; tau is a number or a 0-d float32 tensor.

Nothing here reads device data or allocates by it: no synchronisation, and every call can be captured in a CUDA graph.
Nothing looks at the device either: :func:`cktat_loss.kernels.supports` has.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .row_math import sum_kernel
from .rows import rows_backward_kernel, rows_kernel
from .streaming import streaming_backward_kernel, streaming_kernel

STATE_ROWS = 7  # of float32, (N,) each: see row_math.save_state

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


class Terms(NamedTuple):
    """Both divergences, (N,) float32, and the row statistics for :func:`gradients` if asked for."""

    guidance: Tensor
    consistency: Tensor
    state: Tensor | None


class Loss(NamedTuple):
    """0-d or (N,) float32, and the row statistics for :func:`gradients` if asked for."""

    value: Tensor
    state: Tensor | None


class LossAndGradients(NamedTuple):
    loss: Tensor
    d_clean: Tensor | None
    d_adv: Tensor


class Tile(NamedTuple):
    """G strips of W columns for each of M rows."""

    G: int
    M: int
    W: int
    warps: int


@functools.lru_cache(maxsize=1024)
def rows_tile(classes: int, itemsizes: tuple[int, ...]) -> Tile:
    """The rows kernels' tile: about 16 positions a thread, as few threads on a row as that takes.

    A warp's load should still cover whole 32-byte sectors, hence W of an eighth of the row at least, and 4.
    """
    columns = 1 << (classes - 1).bit_length()
    vector = max(min(16 // size, classes & -classes) for size in itemsizes)  # what a thread loads at once
    threads = max(1, columns // POSITIONS_PER_THREAD)  # on a row
    if threads > 32:
        return Tile(1, 1, columns, min(16, threads // 32))
    width = min(max(threads * vector, columns // 8, 4), 32 * vector, columns)
    lanes = min(32, max(1, width // vector))
    warps = 4
    return Tile(columns // width, 32 * warps // lanes, width, warps)


class Plan:
    """One call's kernels and their common arguments: chosen by shape, dtypes and strides alone."""

    def __init__(self, clean: Tensor, adv: Tensor, teacher: Tensor, tau: float | Tensor) -> None:
        self.n, self.classes = clean.shape
        logits = tuple(x.resolve_neg() for x in (teacher, clean, adv))  # a view may be negative in name alone
        logits = tuple(x if self.classes == 1 or x.stride(1) == 1 else x.contiguous() for x in logits)
        contiguous = self.n <= 1 or all(x.stride(0) == self.classes for x in logits)
        # Known strides are 0 here and C in the kernel: one compiled variant for all contiguous input.
        strides = (0, 0, 0) if contiguous else tuple(x.stride(0) for x in logits)
        self.inputs = (*logits, *strides, self.n, *operand(tau))
        self.like = clean
        self.meta: dict[str, Any] = {"C": self.classes, "CONTIGUOUS": contiguous, "enable_fp_fusion": False}
        self.streams = self.classes > ROWS_UP_TO
        if self.streams:
            self.programs, self.chunks = self.n, -(-self.classes // STREAMING_BLOCK)
            self.meta.update(BLOCK=STREAMING_BLOCK, CHUNKS=self.chunks, num_warps=STREAMING_WARPS)
        else:
            tile = rows_tile(self.classes, tuple(x.element_size() for x in logits))
            self.programs = -(-self.n // tile.M)
            self.meta.update(G=tile.G, M=tile.M, W=tile.W, num_warps=tile.warps)

    def empty(self, *shape: int) -> Tensor:
        return self.like.new_empty(shape, dtype=torch.float32)

    def launch(self, kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
        if programs:
            with torch.cuda.device_of(self.like):  # type: ignore[no-untyped-call]
                kernel[(programs,)](*args, **meta)

    def forward(
        self,
        *,
        guidance: Tensor | None = None,
        consistency: Tensor | None = None,
        loss: Tensor | None = None,
        partial: Tensor | None = None,
        state: Tensor | None = None,
        d_clean: Tensor | None = None,
        d_adv: Tensor | None = None,
        weight: float | Tensor = 1.0,
        beta: float | Tensor = 1.0,
        scale: float = 1.0,
    ) -> None:
        """One launch that fills every output given. The gradients are those of scale * weight * the loss."""
        weights = (*operand(weight), *operand(beta), scale)
        outputs = (guidance, consistency, loss, partial, state, d_clean, d_adv)
        args = (*self.inputs, *weights, *outputs)
        if self.streams:
            edges = self.classes % 8 != 0
            slots = 1 << (self.chunks + edges - 1).bit_length()
            self.launch(streaming_kernel, self.programs, *args, SLOTS=slots, **self.meta)
        else:
            self.launch(rows_kernel, self.programs, *args, **self.meta)

    def backward(
        self,
        state: Tensor,
        d_clean: Tensor | None,
        d_adv: Tensor | None,
        w_guidance: float | Tensor,
        w_consistency: float | Tensor,
        beta: float | Tensor,
        scale: float,
    ) -> None:
        """One launch: gradients from the logits and the forward's row statistics."""
        weights = (*operand(w_guidance), *operand(w_consistency), *operand(beta), scale)
        args = (*self.inputs, *weights, state, d_clean, d_adv)
        if self.streams:
            self.launch(streaming_backward_kernel, self.programs * self.chunks, *args, **self.meta)
        else:
            self.launch(rows_backward_kernel, self.programs, *args, **self.meta)

    def total(self, partial: Tensor, scale: float) -> Tensor:
        """scale times the sum: a launch of one program, so its order is fixed."""
        if self.n == 0:
            return self.like.new_full((), 0.0 * scale, dtype=torch.float32)
        out = self.empty()
        self.launch(sum_kernel, 1, partial, partial.numel(), scale, out, BLOCK=1024, num_warps=4)
        return out


def operand(value: float | Tensor) -> tuple[float | Tensor, int | None]:
    """A number without a stride, or a 0-d or (N,) tensor with its own."""
    if isinstance(value, Tensor):
        return value.resolve_neg(), value.stride(0) if value.dim() else 0
    return float(value), None


def mean_scale(n: int) -> float:
    """What makes a mean of a sum over n samples: nan for none."""
    return 1.0 / n if n else math.nan


def terms(clean: Tensor, adv: Tensor, teacher: Tensor, tau: float | Tensor, *, save_state: bool = False) -> Terms:
    """KL(p_t || p_a) and KL(p_c || p_a) of each row, (N,) float32: one launch, 3 element moves a logit position."""
    plan = Plan(clean, adv, teacher, tau)
    out = Terms(plan.empty(plan.n), plan.empty(plan.n), plan.empty(STATE_ROWS, plan.n) if save_state else None)
    plan.forward(guidance=out.guidance, consistency=out.consistency, state=out.state)
    return out


def loss(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float | Tensor,
    beta: float | Tensor,
    reduction: str,
    *,
    save_state: bool = False,
) -> Loss:
    """guidance + beta consistency, reduced: 3 element moves a logit position.

    One launch, and for "mean" and "sum" one of a single program.
    """
    plan = Plan(clean, adv, teacher, tau)
    state = plan.empty(STATE_ROWS, plan.n) if save_state else None
    if reduction == "none":
        rows = plan.empty(plan.n)
        plan.forward(loss=rows, state=state, beta=beta)
        return Loss(rows, state)
    partial = plan.empty(plan.programs)
    plan.forward(partial=partial, state=state, beta=beta)
    return Loss(plan.total(partial, mean_scale(plan.n) if reduction == "mean" else 1.0), state)


def gradients(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float | Tensor,
    state: Tensor,
    w_guidance: float | Tensor,
    w_consistency: float | Tensor,
    *,
    beta: float | Tensor = 1.0,
    scale: float = 1.0,
    need_clean: bool = True,
    need_adv: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """d/dclean and d/dadv of sum_i scale (w_guidance_i guidance_i + w_consistency_i beta_i consistency_i).

    One launch, 5 element moves a logit position, given the ``state`` that the forward saved. Weights are numbers, 0-d
    or (N,) tensors, multiplied in the kernel: an upstream gradient costs no launch of its own.
    """
    plan = Plan(clean, adv, teacher, tau)
    d_clean = clean.new_empty(clean.shape) if need_clean else None
    d_adv = adv.new_empty(adv.shape) if need_adv else None
    plan.backward(state, d_clean, d_adv, w_guidance, w_consistency, beta, scale)
    return d_clean, d_adv


def loss_and_grads(
    clean: Tensor,
    adv: Tensor,
    teacher: Tensor,
    tau: float | Tensor,
    beta: float | Tensor,
    reduction: str,
    grad_scale: float | Tensor = 1.0,
    *,
    need_clean: bool = True,
) -> LossAndGradients:
    """The "mean" or "sum", and grad_scale times its gradients, in one launch and one of a single program.

    5 element moves a logit position, 8 where the row does not fit into registers.
    """
    plan = Plan(clean, adv, teacher, tau)
    scale = mean_scale(plan.n) if reduction == "mean" else 1.0
    partial = plan.empty(plan.programs)
    d_clean = clean.new_empty(clean.shape) if need_clean else None
    d_adv = adv.new_empty(adv.shape)
    plan.forward(partial=partial, d_clean=d_clean, d_adv=d_adv, weight=grad_scale, beta=beta, scale=scale)
    return LossAndGradients(plan.total(partial, scale), d_clean, d_adv)


def interprets() -> bool:
    """Whether the kernels were defined for Triton's interpreter, which runs them on CPU tensors."""
    return not isinstance(rows_kernel, triton.JITFunction)
