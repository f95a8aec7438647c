"""benchmarks/study: each run once, a killed one goes on, a failed one stops no other, and records are what was run."""

# ruff: noqa: E402 (what is tested needs packages that may be missing)

import importlib
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cktat_loss import CKTATLoss
from tests.examples_path import imported

for package in ("matplotlib", "pandas", "pyautoattack", "scipy", "sklearn", "torchvision", "tqdm", "tyro"):
    pytest.importorskip(package)

from benchmarks.study import grid, pool, records, report
from benchmarks.study.claims import Claim
from benchmarks.study.grid import METHODS, SETTINGS, Run

TINY = "--train-samples 64 --epochs 1 --validation 12"
RUN = Run("digits", "digits", "adaptive", 0.2, 0)


@pytest.fixture(scope="module")
def study():
    """The modules that import examples, which are gone again afterwards."""
    names = ("variants", "measure", "one_run", "__main__")
    with imported("data", "runtime") as examples:
        modules = {name: importlib.import_module(f"benchmarks.study.{name}") for name in names}
        yield SimpleNamespace(main=modules.pop("__main__"), data=examples.data, runtime=examples.runtime, **modules)
        for name in names:
            del sys.modules[f"benchmarks.study.{name}"]


# What is run.


def test_every_run_is_in_the_grid_once_and_the_quick_one_is_a_part_of_the_full_one() -> None:
    quick, full = (grid.grid("digits", None, range(2), full=full) for full in (False, True))
    assert len({run.name for run in full}) == len({*full}) == len(full)
    assert {*quick} < {*full}


def test_every_table_of_the_study_is_in_the_full_grid() -> None:
    full = {(run.arch, run.method, run.eps) for run in grid.grid("digits", None, range(1), full=True)}
    assert {("digits", method, eps) for method in grid.MAIN for eps in SETTINGS["digits"].eps} <= full
    more = (*grid.CONTROLS, *grid.SEARCH, *grid.ABLATION, *grid.TAU_SWEEP, *grid.BETA_SWEEP)
    assert {("digits", method, 0.2) for method in more} <= full
    # Students begin with a teacher, and are shown the images that fool PGD-AT's network.
    widths = (*grid.CAPACITY, *grid.NEEDED)
    assert {(width, method, 0.2) for method in widths for width in grid.WIDTHS} <= full
    assert {grid.base_of(method) for method in grid.SEARCH} == {
        "adaptive", "adaptive-cold", "pgd-at", "pgd-at-warm", "pgd-at-weighted", "trades",
    }  # fmt: skip


def test_the_options_of_every_method_are_those_of_the_training_command(study, tmp_path) -> None:
    def config(method: str):
        return study.one_run.Folder(tmp_path, "").config_of(Run("digits", "digits", method, 0.2, 3))

    teacher = config("clean")
    assert (teacher.seed, teacher.epochs, teacher.split_seed) == (3, 25, grid.SPLIT_SEED)
    for method in METHODS.keys() - {"clean"}:
        found, epochs = config(method), 30 if method.endswith("longer") else 15
        assert (found.eps, found.seed, found.epochs, found.split_seed) == (0.2, 3, epochs, grid.SPLIT_SEED)
    for name, sweep in (("tau", grid.TAU_SWEEP), ("beta", grid.BETA_SWEEP)):
        for method, value in sweep.items():
            found = config(method)
            assert getattr(found, name) == value
            assert found.detach_clean
            assert found.beta_ramp == 0.4


# Controls and remedies, in float64 with loops over samples.


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    logits = {name: 3 * torch.randn(7, 5) for name in ("clean_logits", "adv_logits", "teacher_logits")}
    return {**logits, "y": torch.randint(5, (7,))}


def kl(p, q):
    return (p * (p.log() - q.log())).nan_to_num(0).sum()


def parts(batch, tau):
    c, a, t = (batch[f"{name}_logits"].double() for name in ("clean", "adv", "teacher"))
    return c.softmax(1), a.softmax(1), (t / tau).softmax(1), batch["y"]


def changed(study, adaptive: bool = False, **change):
    return study.variants.ChangedCKTAT(CKTATLoss(None, tau=2.5, adaptive=adaptive), **change)


def test_one_hot_labels_take_the_teachers_place(study, batch) -> None:
    c, a, _, y = parts(batch, 1)
    wanted = sum(-a[i, y[i]].log() + 5.3 * kl(c[i], a[i]) for i in range(7)) / 7
    assert changed(study, one_hot=True)(**batch, beta=5.3).loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_normalized_divides_each_sample_by_the_sum_of_its_weights(study, batch, adaptive) -> None:
    c, a, t, y = parts(batch, 2.5)
    weights = [5.3 * a[i, y[i]] if adaptive else 5.3 for i in range(7)]
    wanted = sum((kl(t[i], a[i]) + weights[i] * kl(c[i], a[i])) / (1 + weights[i]) for i in range(7)) / 7
    loss = changed(study, adaptive, normalized=True)(**batch, beta=5.3).loss
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_remedies_add_their_terms(study, batch) -> None:
    change = {"clean_guidance": 0.7, "clean_label": 0.4, "label": 0.3, "logit_penalty": 0.01}
    c, a, t, y = parts(batch, 2.5)
    wanted = sum(
        kl(t[i], a[i]) + 5.3 * kl(c[i], a[i]) + 0.7 * kl(t[i], c[i]) - 0.4 * c[i, y[i]].log() - 0.3 * a[i, y[i]].log()
        + 0.01 * batch["adv_logits"][i].double().square().mean()
        for i in range(7)
    )  # fmt: skip
    loss = changed(study, **change)(**batch, beta=5.3).loss
    assert loss.item() == pytest.approx(wanted.item() / 7, rel=1e-5)


@pytest.mark.parametrize(("mean_1", "of_batch"), [(False, False), (True, False), (False, True)])
def test_without_mixing_the_weights_are_all_that_is_left(study, batch, mean_1, of_batch) -> None:
    method = changed(study, adaptive=True, one_hot=True, mixing=False, mean_1=mean_1, of_batch=of_batch)
    _, a, _, y = parts(batch, 1)
    weights = torch.stack([1 + 5.3 * a[i, y[i]] for i in range(7)])
    each = weights.mean().expand(7) if of_batch else weights
    wanted = sum(-each[i] * a[i, y[i]].log() for i in range(7)) / 7 / (weights.mean() if mean_1 else 1)
    for clean_logits in (None, batch["clean_logits"]):
        loss = method(**{**batch, "clean_logits": clean_logits}, beta=5.3).loss
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_clean_images_are_run_where_the_loss_or_batchnorm_is_to_see_them(study) -> None:
    alone = {"one_hot": True, "mixing": False}  # as in PGD-AT: BatchNorm sees adversarial images alone
    assert not changed(study, **alone).clean_forward
    for more in ({"mixing": True}, {"shared": True}, {"clean_guidance": 1.0}, {"clean_label": 1.0}):
        assert changed(study, **{**alone, **more}).clean_forward


def test_five_times_pgd_at_is_that(study, batch, tmp_path) -> None:
    run = replace(RUN, method="pgd-at-times-5")
    config = study.one_run.Folder(tmp_path, "").config_of(run)
    method = study.one_run.method_of(run, config, torch.nn.Linear(5, 5))
    loss = method(**{**batch, "clean_logits": None}, beta=config.beta).loss
    torch.testing.assert_close(loss, 5 * F.cross_entropy(batch["adv_logits"], batch["y"]))


def test_trades_with_the_recipe_moves_the_adversarial_prediction_only(study, batch) -> None:
    method = study.variants.ChangedTRADES(detach_clean=True, objective="ce")
    batch["clean_logits"].requires_grad_()
    loss = method(**batch, beta=5.3).loss
    c, a, _, y = parts(batch, 1)
    wanted = sum(-c[i, y[i]].log() + 5.3 * kl(c[i], a[i]) for i in range(7)) / 7
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    (found,) = torch.autograd.grad(loss, batch["clean_logits"])
    (own,) = torch.autograd.grad(F.cross_entropy(batch["clean_logits"], batch["y"]), batch["clean_logits"])
    torch.testing.assert_close(found, own)
    assert method.objective == "ce"
    assert method.attack_start(torch.zeros(2)) is None
    assert study.variants.ChangedTRADES().attack_start(torch.zeros(2)).abs().max() > 0


# Measures.


class Threshold(torch.nn.Module):
    """Class 1 above a brightness of one half, else class 0; of five. An image withstands eps if it is further away."""

    def __init__(self, shift: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.threshold, self.scale = torch.nn.Parameter(torch.tensor(0.5 + shift)), scale

    def forward(self, x):
        side = 8 * (x.flatten(1).mean(1, keepdim=True) - self.threshold)
        return self.scale * torch.cat([-side, side, side.new_full((len(x), 3), -9.0)], 1)


@pytest.fixture
def images(study):
    """Ten images of one brightness each: three are 0.1 from one half, seven are 0.4 from it; one is mislabelled."""
    brightness = torch.tensor([0.4, 0.6, 0.6, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    pixels = (255 * brightness).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return study.data.Images(pixels, [0, 1, 1, 0, 0, 0, 1, 1, 1, 0], lambda image: image)


def test_accuracies_of_a_network_whose_every_margin_is_known(study, images) -> None:
    found = study.measure.on_validation(Threshold().eval(), images, 0.2, Threshold(shift=0.6).eval())
    assert found["natural"] == pytest.approx(0.9)
    assert [found[attack] for attack in ("pgd20", "cw30", "apgd_ce", "apgd")] == pytest.approx([0.6] * 4)
    assert found["zero_gradients"] == 0
    # To another network, all images are dark ones to be made brighter: three of them cross the true threshold or stay.
    assert found["pgd20"] <= found["transfer"] <= found["natural"]


def test_a_flat_network_is_found_out(study, images) -> None:
    found = study.measure.on_validation(Threshold(scale=1e4).eval(), images, 0.2, None)
    assert found["zero_gradients"] == pytest.approx(0.9)


def test_nonlinearity_is_that_of_the_loss_on_the_attacks_way(study) -> None:
    x = torch.full((1, 1, 4, 4), 0.6)
    _, _, found, _ = study.measure._on_batch(Threshold().eval(), x, torch.tensor([1]), 0.2, None)

    def loss(brightness):
        return math.log(1 + math.exp(-16 * (brightness - 0.5)))  # but for three classes at e^-9

    slope = -16 * (1 - 1 / (1 + math.exp(-16 * 0.1)))
    assert found.item() == pytest.approx(abs(loss(0.4) - loss(0.6) + 0.2 * slope) / loss(0.4), rel=0.02)


def test_the_final_read_attacks_the_first_images_with_autoattack(study, images, monkeypatch) -> None:
    monkeypatch.setattr(study.measure, "STANDARD", study.measure.Budget(5, 1, 5, 20))
    found = study.measure.on_test(Threshold().eval(), images, 0.2, 3)
    assert found == pytest.approx(
        # The first three are within 0.2 of the threshold.
        {"test_natural": 0.9, "test_pgd20": 0.6, "test_apgd": 0.6, "test_autoattack": 0, "test_autoattack_images": 3}
    )


# What is left to do.


def leave(study, root: Path, run: Run, **values) -> None:
    """The record of a run that is done."""
    path = root / run.name / "record.json"
    path.parent.mkdir(parents=True)
    numbers = dict.fromkeys([*records.RUN][8:17], 0.5)
    path.write_text(json.dumps({**asdict(run), **study.one_run.told(run.dataset, run.method, ""), **numbers, **values}))
    (path.parent / "log.csv").write_text(",".join(study.runtime.COLUMNS) + "\n")


@pytest.fixture
def stages(study, monkeypatch) -> list:
    """What `main` would do: each of its stages."""
    seen: list = []
    monkeypatch.setattr(pool, "run_all", lambda work, stages, **_: seen.append(stages) or {})
    return seen


def test_teachers_come_first_then_pgd_at_then_what_needs_them_and_nothing_twice(study, tmp_path, stages) -> None:
    command = ["--out", str(tmp_path), "--seeds", "2", "--first-seed", "5", "--methods", "ramp", "adaptive"]
    assert study.main.main(command) == 0
    (planned,) = stages
    assert [[(run.method, run.seed) for run in stage] for stage in planned] == [
        [("clean", 5), ("clean", 6)],
        [("pgd-at", 5), ("pgd-at", 6)],
        [("ramp", 5), ("adaptive", 5), ("ramp", 6), ("adaptive", 6)],
    ]
    for run in (run for stage in planned for run in stage if run.seed == 5):
        leave(study, tmp_path, run)
    stages.clear()
    assert study.main.main(command) == 0
    assert {run.seed for stage in stages[0] for run in stage} == {6}


def test_only_what_a_claim_is_about_is_read_and_each_once(study, tmp_path, stages, monkeypatch, capsys) -> None:
    claim = Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack", range(2))
    monkeypatch.setattr("benchmarks.study.claims.CLAIMS", (claim,))
    for method in ("clean", "pgd-at", "adaptive", "ramp"):
        for seed in (0, 1, 2):
            read = {"test_natural": 0.5, "test_autoattack_images": 200} if (method, seed) == ("adaptive", 0) else {}
            leave(study, tmp_path, Run("digits", "digits", method, 0.2, seed), **read)
    command = ["--out", str(tmp_path), "--seeds", "3", "--methods", "adaptive", "ramp", "--final"]
    assert study.main.main(command) == 0
    assert [[(run.method, run.seed) for run in stage] for stage in stages[-1]] == [
        [("pgd-at", 0), ("pgd-at", 1), ("adaptive", 1)]
    ]
    stages.clear()
    assert study.main.main([*command, "--autoattack-images", "100"]) == 2
    assert "--autoattack-images: must be 200, as for the runs that have been read" in capsys.readouterr().err
    assert study.main.main(["--out", str(tmp_path), "--methods", "ramp", "--first-seed", "7", "--final"]) == 2
    assert "claims nothing about these runs" in capsys.readouterr().err
    assert not stages


def test_a_run_with_other_options_is_not_taken_for_this_one(study, tmp_path, stages, capsys) -> None:
    leave(study, tmp_path, replace(RUN, method="ramp"), epochs=3)
    assert study.main.main(["--out", str(tmp_path), "--seeds", "1", "--methods", "ramp"]) == 2
    assert "with epochs 3 and not 15: give the options that it was made with" in capsys.readouterr().err
    assert not stages


def test_missing_images_are_told_once_and_before_anything_is_run(study, tmp_path, stages, capsys) -> None:
    command = ["--dataset", "cifar10", "--seeds", "1", "--out", str(tmp_path / "out")]
    assert study.main.main([*command, f"--options=--data {tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: CIFAR10 is missing or damaged in {tmp_path}: add --download")
    assert not stages
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "ramp", "nothing"], "--methods: got nothing, wanted some of clean, pgd-at"),
        (["--jobs", "0"], "got '0', wanted a whole number in [1, 1024]"),
        (["--options=--lr x"], "got 'x', wanted a number in (0, 100]"),
        (["--options=--eps 9"], "--eps"),
        (["--take-in", "nowhere"], "nowhere/runs.csv"),
        (["--dataset", "imagenet"], "imagenet"),
    ],
)
def test_bad_options_are_refused_before_anything_is_run(study, tmp_path, capsys, stages, options, message) -> None:
    try:
        code = study.main.main(["--out", str(tmp_path / "none"), *options])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    told = capsys.readouterr()
    assert message in " ".join((told.err + told.out).replace("│", " ").split())
    assert not stages
    assert not (tmp_path / "none").exists()


def test_nothing_begins_with_a_network_that_is_half_trained(study, tmp_path) -> None:
    path = tmp_path / "digits/digits/teacher-seed0/last.pt"
    for epochs in (None, 1):
        if epochs:
            path.parent.mkdir(parents=True)
            torch.save({"epoch": epochs, "config": {"epochs": 2}}, path)
        with pytest.raises(study.runtime.UserError, match=r"clean-eps0\.2-seed0 is not trained to the end"):
            study.one_run.Folder(tmp_path, "").trained(replace(RUN, method="clean"))


def test_taking_in_runs_loses_none(study, tmp_path) -> None:
    page, out = tmp_path / "page", tmp_path / "out"
    runs = [Run("digits", "digits", method, 0.2, 0) for method in ("pgd-at", "ramp", "trades")]
    for folder, suffix, kept in ((page, report.LATER, runs[:2]), (out, "", runs[1:])):
        folder.mkdir()
        rows = [{**asdict(run), "split_seed": 1, "epochs": 2, "natural": len(suffix)} for run in kept]
        records.write(folder / f"runs{suffix}.csv", records.frame(rows, records.RUN))
        records.write(folder / f"curves{suffix}.csv", records.frame([], records.EPOCH))
    report.take_in(out, page)
    found = records.read(page / f"runs{report.LATER}.csv", records.RUN)
    assert dict(zip(found["method"], found["natural"], strict=True)) == {"pgd-at": 4, "ramp": 0, "trades": 0}


def test_a_process_that_dies_takes_no_other_run_along(tmp_path) -> None:
    dies, lives = "import os; os._exit(3)", f"open({str(tmp_path / 'done')!r}, 'w').close()"
    fails, done = "raise ValueError('because')", []
    logs = {work: tmp_path / "logs" / f"{i}.txt" for i, work in enumerate((dies, lives, fails, "pass"))}
    failed = pool.run_all(
        exec, [[dies, lives, fails], ["pass"]], logs=logs, jobs=1, label="",
        done=lambda: done.append(1),
    )  # fmt: skip
    assert failed.keys() == {dies, fails}
    assert "exit code 3" in failed[dies]
    assert failed[fails].startswith("ValueError: because (exit code 1")
    assert (tmp_path / "done").exists()
    assert len(done) == 4


# The whole command, in processes of its own.


def command(folder: Path, *more: str, options: str = TINY) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.study", "--out", folder, "--jobs", "2", "--seeds", "1", *more]
    return [*map(str, words), f"--options={options}"]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, cwd=report.ROOT)


def test_a_study_leaves_a_line_a_run_is_never_done_twice_and_names_what_failed(study, tmp_path, monkeypatch) -> None:
    blocked = tmp_path / "digits/digits/ramp-eps0.2-seed0"
    blocked.mkdir(parents=True)
    (blocked / "last.pt").write_text("not a checkpoint")
    first = call(*command(tmp_path, "--methods", "adaptive", "ramp"))
    assert first.returncode == 1, first.stderr
    assert "failed: digits/digits/ramp-eps0.2-seed0: " in first.stderr
    assert "--resume" in (blocked / "output.txt").read_text()
    assert "adaptive" in first.stdout
    runs = records.read(tmp_path / "runs.csv", records.RUN)
    assert [*runs["method"]] == ["adaptive", "clean", "pgd-at"]
    adaptive = runs.iloc[0]
    told = ["eps", "seed", "epochs", "split_seed", "options"]
    assert [*adaptive[told]] == [0.2, 0, 1, grid.SPLIT_SEED, f"--recipe adaptive {TINY}"]
    assert not math.isnan(adaptive["transfer"])
    assert math.isnan(adaptive["test_natural"])
    curves = records.read(tmp_path / "curves.csv", records.EPOCH)
    assert [*zip(curves["method"], curves["epoch"], strict=True)] == [("adaptive", 1), ("pgd-at", 1)]

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    again = call(*command(tmp_path, "--methods", "adaptive"))
    assert again.returncode == 0, again.stderr
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}

    # The final read is of the test images, and adds to the record.
    seen = []

    def on_test(model, images, eps, autoattack_images):
        seen.append((len(images), eps, autoattack_images))
        return {"test_natural": 0.5, "test_autoattack": 0.25, "test_autoattack_images": autoattack_images}

    monkeypatch.setattr(study.measure, "on_test", on_test)
    folder = study.one_run.Folder(tmp_path, TINY)
    folder.read_test(RUN, autoattack_images=3)
    assert seen == [(500, 0.2, 3)]
    read = folder.finished()["runs"].iloc[0]
    assert [*read[["test_natural", "test_autoattack", "test_autoattack_images"]]] == [0.5, 0.25, 3]
    assert read["apgd"] == pytest.approx(adaptive["apgd"], abs=1e-6)


def test_a_stopped_study_goes_on_and_ends_as_if_it_had_not_been(study, tmp_path) -> None:
    options = TINY.replace("--epochs 1", "--epochs 30")
    words = command(tmp_path / "stopped", "--methods", "pgd-at", options=options)
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=report.ROOT)
    log = tmp_path / "stopped/digits/digits/pgd-at-eps0.2-seed0/log.csv"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert study.one_run.Folder(tmp_path / "stopped", options).record_of(replace(RUN, method="pgd-at")) is None
    assert torch.load(log.with_name("last.pt"))["epoch"] < 30, "stopped too late to show anything"
    for folder in ("stopped", "whole"):
        assert call(*command(tmp_path / folder, "--methods", "pgd-at", options=options)).returncode == 0
    for name, columns in report.CSVS.items():
        ours, theirs = (records.read(tmp_path / folder / f"{name}.csv", columns) for folder in ("stopped", "whole"))
        same = [column for column in columns if column not in ("train_seconds", "measure_seconds", "date")]
        assert ours[same].equals(theirs[same])
