"""One process or many: `torchrun --nproc-per-node=K` starts K of them, each with its share of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and the device it works on."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among the processes of this machine

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process. On the CPU, through gloo: no wait for a GPU."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in process 0; an empty list in the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """Process 0 goes first, then the first of each other machine, then the rest: what one fetches, others find."""
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self._wait_for_all()
        try:
            yield
        finally:  # also when it fails: the others wait
            for _ in range(turn, 2):
                self._wait_for_all()

    def _wait_for_all(self) -> None:
        self.any(False)


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, this is the only one.

    Args:
        device: as asked for; with CUDA and torchrun each process gets the GPU of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Two backends: flags and checkpoints travel between CPUs, gradients between GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(device, dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()
