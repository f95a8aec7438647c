"""Two processes, each with half of every batch, train the model that one process trains, and resume like one."""

import os
import shlex
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.examples_path import imported

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

WORLD = 2
DATA = shlex.split("--dataset digits --validation 40 --train-samples 72 --batch-size 16")
OPTIONS = [*DATA, *shlex.split("--epochs 2 --eps 0.1 --steps 2 --apgd-check 0 --ema 0.5 --awp 0.05")]
BATCHNORM = ["--arch", "digits", "--method", "trades", "--two-forwards"]  # two train-mode forwards before a backward


def plain_net(arch, classes, **_):
    """Without BatchNorm, whose statistics of half a batch are not those of all of it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))


@contextmanager
def simplified():
    """train.py, with a model and an attack in which nothing depends on which process draws."""
    with imported("train") as modules, pytest.MonkeyPatch.context() as patch:
        train = modules.train
        build, pgd = train.build, train.pgd

        def choose(arch, classes, **facts):
            return plain_net(arch, classes) if arch == "plain" else build(arch, classes, **facts)

        def attack(model, x, y, **options):
            ce = options.get("objective") == "ce"
            return pgd(model, x, y, **{**options, "start": x} if ce else options)

        def plain_teacher(path):
            model = plain_net("plain", 10)
            model.load_state_dict(train.runtime.load(path)["model"])
            return model

        patch.setattr(train, "build", choose)
        patch.setattr(train, "pgd", attack)
        patch.setattr(train, "from_checkpoint", plain_teacher)
        yield train


def cktat(folder):
    return [*OPTIONS, "--arch", "plain", "--teacher", f"{folder}/teacher.pt"]


def on_rank(rank, folder, ports):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost")
    with simplified() as command, pytest.MonkeyPatch.context() as patch:
        load = command.load

        def main(*options):
            os.environ["MASTER_PORT"] = str(ports.pop())
            return command.main(list(options))

        codes = [main(*cktat(folder), "--out", f"{folder}/two")]
        codes.append(main(*OPTIONS, *BATCHNORM, "--out", f"{folder}/whole"))

        update, done = command.update, []

        def counted(state):
            update(state)
            done.append(state.batch)
            if len(done) == 6 and rank == 1:  # of 4 + 4 steps; one process only is told
                signal.raise_signal(signal.SIGTERM)

        with patch.context() as stopping:
            stopping.setattr(command, "update", counted)
            codes.append(main(*OPTIONS, *BATCHNORM, "--out", f"{folder}/stopped"))
        codes.append(main(*OPTIONS, *BATCHNORM, "--out", f"{folder}/stopped", "--resume"))

        fetched, found = Path(folder, "fetched"), []

        def fetch(*arguments, **options):
            if rank == 0:
                time.sleep(0.3)
                fetched.touch()
            found.append(fetched.exists())
            return load(*arguments, **options)

        patch.setattr(command, "load", fetch)
        codes.append(main(*OPTIONS, "--arch", "digits", "--method", "trades", "--batch-size", "17", "--out", folder))
        missing = ["--dataset", "cifar10", "--data", f"{folder}/nothing"]
        codes.append(main(*OPTIONS, *missing, "--method", "trades", "--out", folder))
    torch.save({"codes": codes, "found": found}, f"{folder}/{rank}.pt")


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
    """What two processes left: the runs "two", "whole" and "stopped", and their exit codes."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    facts = {"arch": "plain", "classes": 10, "size": 8, "channels": 1}
    torch.save({"model": plain_net("plain", 10).state_dict(), **facts}, folder / "teacher.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(on_rank, (str(folder), free_ports(6)), nprocs=WORLD)
    return folder


@pytest.fixture
def command():
    with simplified() as train:
        yield train


def load(path):
    return torch.load(path, weights_only=True)


def untimed(state):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in state["history"]]


def test_two_processes_train_the_model_of_one(command, folder, tmp_path):
    assert command.main([*cktat(folder), "--out", str(tmp_path)]) == 0
    one, two = load(tmp_path / "last.pt"), load(folder / "two" / "last.pt")
    before = load(folder / "teacher.pt")["model"]
    assert all((one["model"][name] - value).abs().max() > 1e-3 for name, value in before.items())
    for part in ("model", "ema"):
        torch.testing.assert_close(two[part], one[part], rtol=1e-4, atol=1e-5)
    for row, other in zip(untimed(two), untimed(one), strict=True):
        assert row == pytest.approx(other, rel=1e-3)


def test_stopped_by_a_signal_to_one_of_them_both_resume_to_the_bit(folder):
    whole, stopped = (load(folder / name / "last.pt") for name in ("whole", "stopped"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, whole[part][name]) for name, value in stopped[part].items())
    assert untimed(stopped) == untimed(whole)
    for own, other in zip(stopped["by_rank"], whole["by_rank"], strict=True):
        assert torch.equal(own["rng"]["cpu"], other["rng"]["cpu"])
        assert all(torch.equal(value, other["buffers"][name]) for name, value in own["buffers"].items())


def test_every_process_draws_its_own_attacks_and_keeps_its_own_statistics(folder):
    first, second = load(folder / "whole" / "last.pt")["by_rank"]
    assert not torch.equal(first["rng"]["cpu"], second["rng"]["cpu"])
    mean = "net.0.1.running_mean"
    assert not torch.equal(first["buffers"][mean], second["buffers"][mean])


def test_exit_codes_are_those_of_one_process(folder):
    for rank in range(WORLD):
        # done; done; stopped by SIGTERM; done; 17 images for 2 processes; no data
        assert load(folder / f"{rank}.pt")["codes"] == [0, 0, 143, 0, 2, 2]


def test_the_data_are_fetched_by_the_first_process_and_found_by_the_other(folder):
    assert load(folder / "1.pt")["found"][0]


def test_process_0_alone_writes(folder):
    assert sorted(path.name for path in folder.glob("*/*")) == sorted(
        3 * ["best.pt", "config.json", "last.pt", "log.csv"]
    )
