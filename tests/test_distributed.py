"""Two DistributedDataParallel processes, each with its half of a batch, get the gradients of a single process."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cktat_loss import CKTATLoss, adaptive_beta, functional, warm_start

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

WORLD = 2
STEPS = 2


class Net(nn.Module):
    """Ghost BatchNorm: each rank's half is normalised apart, on one process too, so that both can be compared."""

    def __init__(self, halves: int) -> None:
        super().__init__()
        self.halves = halves
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        parts = [self.norm(self.first(part)) for part in x.chunk(self.halves)]
        return self.last(torch.cat(parts).relu())


def make_batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8 * WORLD, 4, generator=generator)
        yield x, x + 0.1 * torch.randn(x.shape, generator=generator)


def train(student, criterion, batches):
    """The gradients of each step. Two train-mode forwards before one backward, as CKTAT has them."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    gradients = []
    for x, x_adv in batches:
        optimizer.zero_grad()
        clean, adv = student(x), student(x_adv)
        criterion(clean_logits=clean, adv_logits=adv, x=x).backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
        optimizer.step()
    return gradients


def make_teacher():
    torch.manual_seed(0)
    teacher = Net(halves=1)
    teacher.norm.running_mean.normal_()
    teacher.norm.running_var.uniform_(0.5, 2)
    return teacher


def run_ranks(function, folder):
    """Run ``function(rank, folder)`` in two processes, forked from one that has imported everything once."""
    mp.set_forkserver_preload([__name__, "torch.distributed.tensor"])
    mp.start_processes(function, (folder,), nprocs=WORLD, start_method="forkserver")


def join(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )


def on_rank(rank, folder):
    join(rank, folder)
    teacher = make_teacher()
    torch.manual_seed(100 + rank)
    student = DistributedDataParallel(Net(halves=1), broadcast_buffers=False)
    before = [p.clone() for p in student.parameters()]
    report = warm_start(student, DistributedDataParallel(teacher))
    assert len(report.copied) == len(teacher.state_dict())
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True) if p.ndim == 2)
    criterion = CKTATLoss(DistributedDataParallel(teacher), tau=2.5, beta=1.5)
    assert type(criterion.teacher) is Net
    halves = [(x.chunk(WORLD)[rank], x_adv.chunk(WORLD)[rank]) for x, x_adv in make_batches()]
    gradients = train(student.train(), criterion, halves)
    torch.save({"gradients": gradients, "teacher": criterion.teacher.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_ranks(on_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]

    teacher, student = make_teacher(), Net(halves=WORLD)
    warm_start(student, teacher)
    expected = train(student.train(), CKTATLoss(teacher, tau=2.5, beta=1.5), make_batches())
    assert all(g.abs().max() > 1e-4 for g in (expected[0][0], expected[-1][0]))
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rank["teacher"], copy.deepcopy(teacher).state_dict(), rtol=0, atol=0)


def on_mesh(rank, folder):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    join(rank, folder)
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    logits, y = [torch.randn(8, 6) for _ in range(3)], torch.randint(6, (8,))
    for placement in (Shard(0), Shard(1), Replicate()):
        clean, adv, teacher = (distribute_tensor(x, mesh, [placement]).requires_grad_() for x in logits)
        labels = distribute_tensor(y, mesh, [placement if placement == Shard(0) else Replicate()])
        if torch.__version__.startswith("2.6."):
            with pytest.raises(NotImplementedError, match="amax"):
                functional.cktat_loss(clean, adv, teacher)
            continue
        check(functional.cktat_loss(clean, adv, teacher), functional.cktat_loss(*logits))
        assert isinstance(adv, DTensor)
        if placement == Shard(1):
            with pytest.raises(TypeError, match="y cannot be used with adv_logits that are sharded over classes"):
                functional.cktat_loss(clean, adv, teacher, y=labels)
            with pytest.raises(TypeError, match="y cannot be used with adv_logits that are sharded over classes"):
                adaptive_beta(adv, labels)
        else:
            check(functional.cktat_loss(clean, adv, teacher, y=labels), functional.cktat_loss(*logits, y=y))
            check(adaptive_beta(adv, labels), adaptive_beta(logits[1], y))
    dist.destroy_process_group()


def check(actual, expected):
    torch.testing.assert_close(actual.full_tensor(), expected)


def test_dtensor_logits_are_right_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_ranks(on_mesh, tmp_path)
