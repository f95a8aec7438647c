"""What the Triton kernels load and store, counted in the interpreter: each logit once, each gradient once, no more.

Element moves a logit position: 3 without gradients, 3 + 5 with a graph, 5 for loss and gradients in one pass, or 8
where a row is streamed. Launches: one for the terms, two for the loss (the second, of one program, adds it up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cktat_loss import kernels

pytest.importorskip("triton", reason="needs Triton")
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("true_tiles")]

SHAPES = [(5, 10), (130, 10), (3, 100), (2, 1000), (3, 257), (2, 4096), (1, 5003), (2, 21841)]
DTYPES = [torch.float32, torch.bfloat16]


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

    def bytes_outside(self) -> int:
        """How many addresses are no element of any tensor given."""
        given = {int(a) for tensors in self.launches for x in tensors for a in addresses(x)}
        return sum(int(a) not in given for one in (*self.loads, *self.stores) for a in one)


def addresses(x: Tensor) -> NDArray[np.uint64]:
    """Where the elements of x are, in their order."""
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


def logits(n: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(n, classes).to(dtype) for _ in range(3)]


def state_of(*inputs: Tensor) -> Tensor:
    state = kernels.terms(*inputs, 5.3, save_state=True).state
    assert state is not None
    return state


def no_gradients(found: Any) -> list[Tensor]:
    return []


# name: the call, its gradients, how often it reads the logits in rows and in chunks, launches
CALLS: dict[str, tuple[Callable[..., Any], Callable[[Any], list[Tensor]], int, int, int]] = {
    "terms": (lambda *x, state: kernels.terms(*x, 5.3), no_gradients, 1, 1, 1),
    "loss": (lambda *x, state: kernels.loss(*x, 5.3, torch.rand(len(x[0])), "mean"), no_gradients, 1, 1, 2),
    "rows of the loss": (lambda *x, state: kernels.loss(*x, 5.3, 5.7, "none"), no_gradients, 1, 1, 1),
    "forward of a graph": (
        lambda *x, state: kernels.loss(*x, 5.3, 5.7, "mean", save_state=True), no_gradients, 1, 1, 2,
    ),
    "its backward": (
        lambda *x, state: kernels.gradients(*x, 5.3, state, torch.ones(()), torch.ones(()), beta=5.7), list, 1, 1, 1,
    ),
    "one pass": (
        lambda *x, state: kernels.loss_and_grads(*x, 5.3, 5.7, "mean"), lambda found: list(found[1:]), 1, 2, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_each_element_once(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    call, gradients_of, in_rows, in_chunks, launches = CALLS[name]
    inputs = logits(*shape, dtype)
    state = state_of(*inputs)
    with counting() as traffic:
        gradients = gradients_of(call(*inputs, state=state))
    readings = in_rows if shape[1] <= 4096 else in_chunks
    for x in inputs:
        assert (traffic.loaded(x) == readings).all()
        assert (traffic.stored(x) == 0).all()
    for d in gradients:
        assert (traffic.stored(d) == 1).all()
        assert (traffic.loaded(d) == 0).all()
    assert len(traffic.launches) == launches
    assert traffic.bytes_outside() == 0


@pytest.mark.parametrize("classes", [10, 1000, 5003])
def test_strides_are_read_where_they_lie(classes: int) -> None:
    """A slice of wider logits is neither copied nor read beyond its edges."""
    inputs = [torch.randn(3, classes + 5)[:, 2:-3] for _ in range(3)]
    with counting() as traffic:
        kernels.loss_and_grads(*inputs, 5.3, 5.7, "mean")
    for x in inputs:
        assert (traffic.loaded(x) == (1 if classes <= 4096 else 2)).all()
    assert traffic.bytes_outside() == 0


@pytest.mark.parametrize("shape", [(5, 10), (2, 5003)], ids=str)
def test_a_gradient_that_nobody_wants_is_not_made(shape: tuple[int, int]) -> None:
    inputs = logits(*shape, torch.float32)
    state = state_of(*inputs)
    for need_clean in (True, False):
        with counting() as traffic:
            kernels.gradients(*inputs, 5.3, state, 1.0, 1.0, need_clean=need_clean, need_adv=not need_clean)
        assert sum(map(len, traffic.stores)) == inputs[0].numel()


def test_the_counter_sees_what_it_should() -> None:
    """A store outside its tensor, and one too many."""
    import triton
    import triton.language as tl

    @triton.jit
    def twice(x, n: tl.constexpr):  # type: ignore[no-untyped-def]
        for _ in range(2):
            tl.store(x + tl.arange(0, n), 1.0)

    room = torch.zeros(16)
    with counting() as traffic:
        twice[(1,)](room[:8], n=16)
    assert (traffic.stored(room[:8]) == 2).all()
    assert traffic.bytes_outside() == 16
