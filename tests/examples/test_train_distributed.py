"""Two processes, each with half of every batch, train the model that one process trains, and resume like one."""

import os
import shlex
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import networks
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import train
from torch import nn

from tests.examples.test_train import equal, few

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

WORLD = 2
OPTIONS = shlex.split("--dataset digits --batch 32 --workers 0 --steps 2 --eps 0.1 --epochs 2 --device cpu --ema 0.5")
AWP = ["--awp", "0.05"]
TRADES = [*OPTIONS, "--method", "trades"]


def plain_net():
    """Without BatchNorm, whose statistics of half a batch are not those of all of it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@contextmanager
def simplified():
    """train.py with few images; for cktat with a network and an attack in which nothing depends on the process."""
    pgd, build = train.pgd, train.build
    with pytest.MonkeyPatch.context() as patch:
        plain = lambda arch, *rest: plain_net() if arch == "plain" else build(arch, *rest)  # noqa: E731
        for module in (train, networks):
            patch.setattr(module, "build", plain)
        patch.setattr(train, "pgd", lambda model, x, y, **how: pgd(model, x, y, **{"start": x, **how}))
        patch.setattr(train, "load", few(train.load))
        yield


def cktat(folder):
    return [*OPTIONS, *AWP, "--teacher", f"{folder}/teacher.pt"]


def on_rank(rank, folder, ports):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost")
    with simplified(), pytest.MonkeyPatch.context() as patch:

        def main(*options):
            os.environ["MASTER_PORT"] = str(ports.pop())
            train.main(list(options))
            return torch.initial_seed()

        fetched, found, load = Path(folder, "fetched"), [], train.load

        def fetch(*arguments, **options):
            if rank == 0:
                time.sleep(0.3)
                fetched.touch()
            found.append(fetched.exists())
            return load(*arguments, **options)

        with patch.context() as slow:
            slow.setattr(train, "load", fetch)
            main(*cktat(folder), "--out", f"{folder}/two")
        seed = main(*TRADES, *AWP, "--out", f"{folder}/whole")

        loss_of, calls = train.loss_of, []

        def stopping(*arguments):
            calls.append(1)
            if len(calls) == 9:  # in the second epoch: three steps per epoch, with two losses each
                raise KeyboardInterrupt
            return loss_of(*arguments)

        with patch.context() as broken, suppress(KeyboardInterrupt):
            broken.setattr(train, "loss_of", stopping)
            main(*TRADES, *AWP, "--out", f"{folder}/broken")
        dist.destroy_process_group()
        main(*TRADES, *AWP, "--out", f"{folder}/broken", "--resume")

        messages = []
        with suppress(train.UserError):
            messages.append("17")
            main(*TRADES, "--batch", "17", "--out", f"{folder}/none")
            messages.append("not refused")
    torch.save({"found": found, "seed": seed, "messages": messages}, f"{folder}/{rank}.pt")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs "two", "whole" and "broken" of two processes."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    facts = {"arch": "plain", "dataset": "digits", "classes": 10, "norm": "linf", "eps": 0.1}
    torch.save({"model": plain_net().state_dict(), **facts}, folder / "teacher.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(on_rank, (str(folder), free_ports(5)), nprocs=WORLD)
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def test_two_processes_train_the_model_of_one(folder, tmp_path):
    """AWP included: its gradients are averaged too."""
    with simplified():
        train.main([*cktat(folder), "--out", str(tmp_path)])
    one, two = load(tmp_path / "last.pt"), load(folder / "two" / "last.pt")
    before = load(folder / "teacher.pt")["model"]
    assert all((one["model"][name] - value).abs().max() > 1e-3 for name, value in before.items())
    for part in ("model", "ema"):
        torch.testing.assert_close(two[part], one[part], rtol=1e-4, atol=1e-5)
    for row, other in zip(two["rows"], one["rows"], strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-3)


def test_a_broken_run_of_both_resumes_to_the_bit(folder):
    whole, broken = (load(folder / name / "last.pt") for name in ("whole", "broken"))
    assert len(whole["rows"]) == len(broken["rows"]) == 2
    assert all(equal(whole[part], broken[part]) for part in ("model", "ema", "optimizer", "rows", "best"))
    assert equal(load(folder / "whole" / "best.pt"), load(folder / "broken" / "best.pt"))


def test_every_process_draws_its_own_attacks(folder):
    assert load(folder / "1.pt")["seed"] == 1_000 * 1 + 1  # of epoch 1 and rank 1


def test_the_data_are_fetched_by_the_first_process_and_found_by_the_other(folder):
    assert load(folder / "1.pt")["found"] == [True]


def test_a_batch_that_does_not_divide_is_refused(folder):
    assert load(folder / "1.pt")["messages"] == load(folder / "0.pt")["messages"] == ["17"]


def test_process_0_alone_writes(folder):
    names = ["best.pt", "last.pt", "log.csv"]
    written = {path.name: sorted(p.name for p in path.iterdir()) for path in folder.iterdir() if path.is_dir()}
    assert written == dict.fromkeys(("two", "whole", "broken"), names)
