"""The loads and stores of the Triton kernels, counted in the interpreter: each logit once, each gradient once, no more.

Element moves a logit position, with row values: 5.1 for a training step whose upstream gradient is one, 3.1 without
gradients. A row of more than ``ROWS_UP_TO`` classes is streamed, and read once more if it has gradients: 8.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cktat_loss.functional import cktat_loss, cktat_terms

launch = pytest.importorskip("cktat_loss.kernels.launch", reason="needs Triton")
pytestmark = [pytest.mark.kernels, pytest.mark.not_on("torch", "gpu")]

SHAPES = [(130, 10), (20, 100), (3, 1000), (2, launch.ROWS_UP_TO), (2, 5003), (1, 21841)]
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Traffic:
    """Every address loaded from and stored to, and the tensors that the launches were given."""

    def __init__(self) -> None:
        self.loads: list[NDArray[np.uint64]] = []
        self.stores: list[NDArray[np.uint64]] = []
        self.launches: list[list[Tensor]] = []

    def loaded(self, x: Tensor) -> NDArray[np.int64]:
        return times(self.loads, x)

    def stored(self, x: Tensor) -> NDArray[np.int64]:
        return times(self.stores, x)

    def moves(self) -> int:
        return sum(map(len, (*self.loads, *self.stores)))

    def bytes_outside(self) -> int:
        """How many addresses are no element of any tensor given."""
        given = {int(a) for tensors in self.launches for x in tensors for a in addresses(x)}
        return sum(int(a) not in given for one in (*self.loads, *self.stores) for a in one)


def addresses(x: Tensor) -> NDArray[np.uint64]:
    """The addresses of the elements of x, in their order."""
    offsets = torch.arange(x.untyped_storage().nbytes() // x.element_size()).as_strided(
        x.shape, x.stride(), x.storage_offset()
    )
    return (x.untyped_storage().data_ptr() + x.element_size() * offsets.numpy()).astype(np.uint64).ravel()


def times(where: list[NDArray[np.uint64]], x: Tensor) -> NDArray[np.int64]:
    seen, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *where]), return_counts=True)
    tally = dict(zip(seen.tolist(), counts.tolist(), strict=True))
    return np.array([tally.get(a, 0) for a in addresses(x).tolist()])


@contextmanager
def counting() -> Iterator[Traffic]:
    from triton.runtime import interpreter

    traffic = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def where(pointers: Any, mask: Any) -> NDArray[np.uint64]:
        return np.asarray(pointers.data)[np.broadcast_to(mask.data, np.shape(pointers.data))].astype(np.uint64).ravel()

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        traffic.loads.append(where(pointers, mask))
        return load(self, pointers, mask, *args)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        traffic.stores.append(where(pointers, mask))
        return store(self, pointers, value, mask, *args)

    def counted_run(self: Any, *args: Any, **options: Any) -> Any:
        traffic.launches.append([x for x in args if isinstance(x, Tensor)])
        return run(self, *args, **options)

    with (
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
        patch.object(executor, "__call__", counted_run),
    ):
        yield traffic


class Step(NamedTuple):
    """A call of the loss, and the moves per position that it may take: with rows in registers, with streamed rows."""

    rows: float
    chunks: float
    dtype: torch.dtype = torch.float32
    needed: str = "clean adv"
    upstream: float = 1.0
    terms_alone: bool = False
    detach_clean: bool = False
    reduction: str = "mean"


STEPS = {
    "training": Step(5.1, 8.1),
    "training, bfloat16": Step(5.1, 8.1, torch.bfloat16),
    "detach_clean": Step(4.1, 7.1, detach_clean=True),
    "no gradient for clean": Step(4.1, 7.1, needed="adv"),
    "no gradient for adv": Step(4.1, 7.1, needed="clean"),
    "another upstream": Step(10.2, 16.2, upstream=0.25),
    "no grad": Step(3.1, 3.1, needed=""),
    "float16": Step(8.2, 11.2, torch.float16, upstream=1024.0),
    "none": Step(8.2, 11.2, reduction="none"),
    "terms": Step(8.4, 11.4, terms_alone=True),
}
EACH_STEP = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


class Done(NamedTuple):
    traffic: Traffic
    logits: list[Tensor]
    gradients: tuple[Tensor, ...]


def run(step: Step, shape: tuple[int, int], cut: slice = slice(None), **options: Any) -> Done:
    n, classes = shape
    margin = 0 if cut == slice(None) else 5
    logits = [torch.randn(n, classes + margin).to(step.dtype)[:, cut] for _ in range(3)]
    for x, name in zip(logits, ("clean", "adv"), strict=False):
        x.requires_grad_(name in step.needed)
    wanted = [x for x in logits if x.requires_grad and not (x is logits[0] and step.detach_clean)]
    with counting() as traffic:
        if step.terms_alone:
            out = sum(cktat_terms(*logits, 0.7, backend="triton"))
        else:
            asked: dict[str, Any] = {"reduction": step.reduction, "detach_clean": step.detach_clean, **options}
            out = cktat_loss(*logits, 0.7, 5.3, backend="triton", **asked)
            out = out[0] if isinstance(out, tuple) else out
        gradients = torch.autograd.grad(out, wanted, torch.full_like(out, step.upstream)) if wanted else ()
    return Done(traffic, logits, gradients)


@EACH_STEP
@EACH_SHAPE
def test_moves(shape: tuple[int, int], step: Step) -> None:
    traffic, logits, gradients = run(step, shape)
    streamed = shape[1] > launch.ROWS_UP_TO
    assert traffic.moves() / logits[0].numel() <= (step.chunks if streamed else step.rows)
    stored = [2 if step is STEPS["another upstream"] else 1] * len(gradients)
    for d, times_stored in zip(gradients, stored, strict=True):
        assert (traffic.stored(d) == times_stored).all()
        assert (traffic.loaded(d) == 0).all()
    readings = (int(step.chunks if streamed else step.rows) - sum(stored)) // 3
    for x in logits:
        assert (traffic.loaded(x) == readings).all()
        assert (traffic.stored(x) == 0).all()
    assert traffic.bytes_outside() == 0


@EACH_SHAPE
def test_labels_and_terms_cost_three_values_a_row(shape: tuple[int, int]) -> None:
    """A label, two terms; streaming reads the label's logit once more, which costs less than a search."""
    n, classes = shape
    streamed = classes > launch.ROWS_UP_TO
    alone = run(STEPS["training"], shape).traffic.moves()
    y = 7 * torch.arange(n) % classes
    both = run(STEPS["training"], shape, y=y, return_terms=True)
    assert both.traffic.moves() - alone == (4 if streamed else 3) * n
    assert (both.traffic.loaded(y) == 1).all()
    labels = torch.zeros(shape, dtype=torch.bool).scatter(1, y[:, None], True).flatten().numpy()
    _, adv, _ = both.logits
    assert (both.traffic.loaded(adv)[~labels] == (2 if streamed else 1)).all()
    assert run(STEPS["training"], shape, y=y).traffic.moves() - alone == (2 if streamed else 1) * n
    assert run(STEPS["training"], shape, return_terms=True).traffic.moves() - alone == 2 * n
    assert both.traffic.bytes_outside() == 0


@pytest.mark.parametrize(
    ("classes", "wrong"), [(c, wrong) for c in (10, 5003) for wrong in (-100, -1, c, 2**31 + 3, 2**62)]
)
def test_a_label_that_is_no_class_reads_nobody_elses_memory(
    classes: int, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cktat_loss._checks.is_traced", lambda: True)  # as on a GPU, where no label is looked at
    done = run(STEPS["training"], (3, classes), y=torch.tensor([0, wrong, classes - 1]))
    assert done.traffic.bytes_outside() == 0
    loaded = done.traffic.loaded(done.logits[1])
    readings = 1 if classes <= launch.ROWS_UP_TO else 2
    labels = [0, 3 * classes - 1] if classes > launch.ROWS_UP_TO else []
    assert (np.flatnonzero(loaded != readings) == labels).all()


@pytest.mark.parametrize("classes", [10, 1000, 5003])
def test_strides_are_read_where_they_lie(classes: int) -> None:
    """A slice of wider logits is neither copied nor read beyond its edges."""
    traffic, logits, _ = run(STEPS["training"], (3, classes), slice(2, -3))
    for x in logits:
        assert (traffic.loaded(x) == (1 if classes <= launch.ROWS_UP_TO else 2)).all()
    assert traffic.bytes_outside() == 0


def test_the_counter_sees_what_it_should() -> None:
    """A store outside its tensor, and one too many."""
    import triton
    import triton.language as tl

    @triton.jit
    def twice(x, n: tl.constexpr):
        for _ in range(2):
            tl.store(x + tl.arange(0, n), 1.0)

    room = torch.zeros(16)
    with counting() as traffic:
        twice[(1,)](room[:8], n=16)
    assert (traffic.stored(room[:8]) == 2).all()
    assert traffic.bytes_outside() == 16
