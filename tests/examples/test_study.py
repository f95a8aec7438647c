"""examples/study.py: each run once, a killed one goes on, a failed one stops no other, and records are what was run."""

import json
import math
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, fields, replace

import pytest
import torch
import torch.nn.functional as F

from cktat_loss import CKTATLoss
from tests.examples_path import EXAMPLES, imported

pytest.importorskip("matplotlib")
pytest.importorskip("pyautoattack")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")

TINY = "--train-samples 64 --epochs 1 --validation 12"


@pytest.fixture(scope="module")
def lab():
    names = ["claims", "runs", "variants", "measure", "one_run", "records", "pool"]
    with imported("study", "data", *(f"lab.{name}" for name in names)) as modules:
        parts = {name: getattr(modules, name) for name in names}
        yield Namespace(study=modules.study, data=modules.data, **parts)


# What is run.


def test_every_run_is_in_the_grid_once_and_the_quick_one_is_a_part_of_the_full_one(lab):
    quick, full = (list(lab.runs.grid(profile, "digits", None, 2)) for profile in ("quick", "full"))
    assert len(set(full)) == len(full)
    assert set(quick) < set(full)
    assert len({run.name for run in full}) == len(full)


def test_every_table_of_the_study_is_in_the_full_grid(lab):
    r = lab.runs
    full = set(r.grid("full", "digits", None, 1))
    for eps in r.SETTINGS["digits"].eps:
        assert {r.Run("digits", "digits", method, eps, 0) for method in r.MAIN} <= full
    for method in (*r.CONTROLS, *r.SEARCH, *r.ABLATION, *r.TAU_SWEEP, *r.BETA_SWEEP):
        assert r.Run("digits", "digits", method, 0.2, 0) in full
    for width in r.WIDTHS:
        # Students begin with a teacher, and are shown the images that fool PGD-AT's network.
        assert {r.Run("digits", width, method, 0.2, 0) for method in (*r.CAPACITY, "clean", "pgd-at")} <= full


def test_the_options_of_every_method_are_those_of_the_training_command(lab, tmp_path):
    teacher = lab.one_run.arguments(lab.runs.Run("digits", "digits", "clean", 0.2, 3), tmp_path, "")
    assert (teacher.seed, teacher.epochs, teacher.split_seed) == (3, 25, lab.runs.SPLIT_SEED)
    for method in lab.runs.METHODS.keys() - {"clean"}:
        args = lab.one_run.arguments(lab.runs.Run("digits", "digits", method, 0.2, 3), tmp_path, "")
        epochs = 30 if method.endswith("longer") else 15
        assert (args.eps, args.seed, args.epochs, args.split_seed) == (0.2, 3, epochs, lab.runs.SPLIT_SEED)
    sweep = [
        lab.one_run.arguments(lab.runs.Run("digits", "digits", m, 0.2, 0), tmp_path, "") for m in lab.runs.TAU_SWEEP
    ]
    assert [args.tau for args in sweep] == [1, 2, 3, 4, 5, 6]
    sweep = [
        lab.one_run.arguments(lab.runs.Run("digits", "digits", m, 0.2, 0), tmp_path, "") for m in lab.runs.BETA_SWEEP
    ]
    assert [args.beta for args in sweep] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert all(args.detach_clean and args.beta_ramp == 0.4 for args in sweep)


# Controls and remedies, in float64 with loops over samples.


@pytest.fixture
def batch():
    logits = {name: 3 * torch.randn(7, 5) for name in ("clean_logits", "adv_logits", "teacher_logits")}
    return {**logits, "y": torch.randint(5, (7,))}


def kl(p, q):
    return (p * (p.log() - q.log())).nan_to_num(0).sum()


def parts(batch, tau):
    c, a, t = (batch[f"{name}_logits"].double() for name in ("clean", "adv", "teacher"))
    return c.softmax(1), a.softmax(1), (t / tau).softmax(1), batch["y"]


def test_one_hot_labels_take_the_teachers_place(lab, batch):
    method = lab.variants.ChangedCKTAT(CKTATLoss(None, tau=2.5), adaptive=False, one_hot=True)
    c, a, _, y = parts(batch, 1)
    wanted = sum(F.one_hot(y[i], 5).double().dot(-a[i].log()) + 5.3 * kl(c[i], a[i]) for i in range(7)) / 7
    assert method(**batch, beta=5.3).loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_normalized_divides_each_sample_by_the_sum_of_its_weights(lab, batch, adaptive):
    method = lab.variants.ChangedCKTAT(CKTATLoss(None, tau=2.5), adaptive=adaptive, normalized=True)
    c, a, t, y = parts(batch, 2.5)
    total = 0.0
    for i in range(7):
        weight = 5.3 * a[i, y[i]] if adaptive else 5.3
        total += (kl(t[i], a[i]) + weight * kl(c[i], a[i])) / (1 + weight) / 7
    assert method(**batch, beta=5.3).loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_remedies_add_their_terms(lab, batch):
    change = {"clean_guidance": 0.7, "label": 0.3, "logit_penalty": 0.01}
    method = lab.variants.ChangedCKTAT(CKTATLoss(None, tau=2.5), adaptive=False, **change)
    c, a, t, y = parts(batch, 2.5)
    total = 0.0
    for i in range(7):
        total += kl(t[i], a[i]) + 5.3 * kl(c[i], a[i]) + 0.7 * kl(t[i], c[i]) - 0.3 * a[i, y[i]].log()
        total += 0.01 * batch["adv_logits"][i].double().square().mean()
    assert method(**batch, beta=5.3).loss.item() == pytest.approx(total.item() / 7, rel=1e-5)


@pytest.mark.parametrize(("mean_1", "of_batch"), [(False, False), (True, False), (False, True)])
def test_without_mixing_the_weights_are_all_that_is_left(lab, batch, mean_1, of_batch):
    change = {"one_hot": True, "mixing": False, "mean_1": mean_1, "of_batch": of_batch}
    method = lab.variants.ChangedCKTAT(CKTATLoss(None, tau=2.5), adaptive=True, **change)
    _, a, _, y = parts(batch, 1)
    weights = torch.stack([1 + 5.3 * a[i, y[i]] for i in range(7)])
    weights = weights.mean().expand(7) if of_batch else weights
    total = sum(-weights[i] * a[i, y[i]].log() for i in range(7)) / 7
    wanted = total / weights.mean() if mean_1 else total
    assert not method.clean_forward  # as in PGD-AT: BatchNorm sees adversarial images alone
    for clean_logits in (None, batch["clean_logits"]):
        loss = method(**{**batch, "clean_logits": clean_logits}, beta=5.3).loss
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert lab.variants.ChangedCKTAT(CKTATLoss(None), adaptive=True, mixing=False, shared=True).clean_forward
    assert lab.variants.ChangedCKTAT(CKTATLoss(None), adaptive=True, one_hot=True).clean_forward


def test_five_times_pgd_at_is_that(lab, batch, tmp_path):
    run = lab.runs.Run("digits", "digits", "pgd-at-times-5", 0.2, 0)
    args, method = lab.one_run.arguments(run, tmp_path, ""), lab.runs.METHODS[run.method]
    batch["clean_logits"] = None
    loss = lab.variants.changed(method.change)(args, torch.nn.Linear(5, 5))(**batch, beta=args.beta).loss
    torch.testing.assert_close(loss, 5 * F.cross_entropy(batch["adv_logits"], batch["y"]))


def test_trades_with_the_recipe_moves_the_adversarial_prediction_only(lab, batch):
    method = lab.variants.ChangedTRADES(detach_clean=True, objective="ce")
    batch["clean_logits"].requires_grad_()
    batch["adv_logits"].requires_grad_()
    terms = method(**batch, beta=5.3)
    c, a, _, y = parts(batch, 1)
    wanted = sum(-c[i, y[i]].log() + 5.3 * kl(c[i], a[i]) for i in range(7)) / 7
    assert terms.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    terms.loss.backward()
    own = torch.autograd.grad(F.cross_entropy(batch["clean_logits"], batch["y"]), batch["clean_logits"])[0]
    torch.testing.assert_close(batch["clean_logits"].grad, own)
    assert method.objective == "ce"
    assert method.attack_start(torch.zeros(2)) is None
    assert lab.variants.ChangedTRADES().attack_start(torch.zeros(2)).abs().max() > 0


# Measures.


class Threshold(torch.nn.Module):
    """Class 1 above a brightness of one half, else class 0; of five. An image withstands eps if it is further away."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.tensor(0.5 + shift))

    def forward(self, x):
        side = 8 * (x.flatten(1).mean(1, keepdim=True) - self.threshold)
        return torch.cat([-side, side, side.new_full((len(x), 3), -9.0)], 1)


@pytest.fixture
def images(lab):
    """Ten images of one brightness each: three are 0.1 from one half, seven are 0.4 from it; one is mislabelled."""
    brightness = torch.tensor([0.4, 0.6, 0.6, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    pixels = (255 * brightness).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    labels = [0, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    return lab.data.Images(pixels, labels, lambda image: image)


def test_accuracies_of_a_network_whose_every_margin_is_known(lab, images):
    found = lab.measure.on_validation(Threshold().eval(), images, 0.2, Threshold(shift=0.6).eval())
    assert found["natural"] == pytest.approx(0.9)
    for attack in ("pgd20", "cw30", "apgd_ce", "apgd"):
        assert found[attack] == pytest.approx(0.6), attack
    assert found["zero_gradients"] == 0
    # To another network, all images are dark ones to be made brighter: three of them cross the true threshold or stay.
    assert found["pgd20"] <= found["transfer"] <= found["natural"]


def test_a_flat_network_is_found_out(lab, images):
    class Saturated(Threshold):
        def forward(self, x):
            return 1e4 * super().forward(x)

    assert lab.measure.on_validation(Saturated().eval(), images, 0.2, None)["zero_gradients"] == pytest.approx(0.9)


def test_nonlinearity_is_that_of_the_loss_on_the_attacks_way(lab):
    x = torch.full((1, 1, 4, 4), 0.6)
    _, _, found, _ = lab.measure._on_batch(Threshold().eval(), x, torch.tensor([1]), 0.2, None)

    def loss(brightness):
        return math.log(1 + math.exp(-16 * (brightness - 0.5)))  # but for three classes at e^-9

    slope = -16 * (1 - 1 / (1 + math.exp(-16 * 0.1)))
    assert found.item() == pytest.approx(abs(loss(0.4) - loss(0.6) + 0.2 * slope) / loss(0.4), rel=0.02)


def test_the_final_read_attacks_the_first_images_with_autoattack(lab, images, monkeypatch):
    monkeypatch.setattr(lab.measure, "STANDARD", lab.measure.Budget(5, 1, 5, 20))
    found = lab.measure.on_test(Threshold().eval(), images, 0.2, 3)
    assert found["test_natural"] == pytest.approx(0.9)
    assert found["test_apgd"] == found["test_pgd20"] == pytest.approx(0.6)
    assert found["test_autoattack"] == 0  # the first three are within 0.2 of the threshold
    assert found["test_autoattack_images"] == 3


# What is left to do.


def made_up(lab, run, **values):
    told = lab.one_run.told(run, "")
    numbers = {f.name: 0.5 for f in fields(lab.records.Record) if f.type in ("float", float)}
    texts = dict.fromkeys(("device", "python", "torch", "cktat_loss", "date"), "here")
    unread = {f.name: None for f in fields(lab.records.Record) if f.name.startswith("test_")}
    return lab.records.Record(**{**numbers, **unread, "transfer": 0.5, **texts, **asdict(run), **told, **values})


@pytest.fixture
def stages(lab, monkeypatch):
    """What `study.main` would do: each of its stages."""
    seen = []
    monkeypatch.setattr(lab.study, "side_by_side", lambda work, stages, label, args: seen.append(stages) or {})
    return seen


def known(lab, folder, *lines):
    folder.mkdir()
    lab.records.write(folder / "runs.csv", lines, lab.records.Record)
    lab.records.write(folder / "curves.csv", [], lab.records.Epoch)
    return ["--known", str(folder)]


def test_teachers_come_first_then_pgd_at_then_what_needs_them(lab, tmp_path, stages):
    lab.study.main(["--out", str(tmp_path), "--seeds", "2", "--methods", "ramp,adaptive"])
    (teachers, first, rest), *_ = stages
    assert [(run.method, run.seed) for run in teachers] == [("clean", 0), ("clean", 1)]
    assert [(run.method, run.seed) for run in first] == [("pgd-at", 0), ("pgd-at", 1)]
    assert sorted((run.method, run.seed) for run in rest) == [
        ("adaptive", 0),
        ("adaptive", 1),
        ("ramp", 0),
        ("ramp", 1),
    ]


def test_what_is_known_is_trained_again_only_where_its_network_is_needed(lab, tmp_path, stages, monkeypatch):
    runs = [lab.runs.Run("digits", "digits", method, 0.2, 0) for method in ("clean", "pgd-at", "adaptive", "ramp")]
    option = known(lab, tmp_path / "known", *(made_up(lab, run) for run in runs))
    argv = ["--out", str(tmp_path / "out"), "--seeds", "1", *option, "--methods"]
    lab.study.main([*argv, "adaptive,ramp"])
    assert stages == [[[], [], []]]
    monkeypatch.setattr(lab.study, "CLAIMS", claims(lab))
    lab.study.main([*argv, "adaptive,ramp", "--final"])
    assert [[run.method for run in stage] for stage in stages[1]] == [["clean"], ["pgd-at"], ["adaptive"]]
    # Nor for the test images, where their line has those.
    read = {"test_natural": 0.5, "test_autoattack_images": 200}
    option = known(lab, tmp_path / "read", *(made_up(lab, run, **read) for run in runs))
    stages.clear()
    lab.study.main(["--out", str(tmp_path / "b"), "--seeds", "1", *option, "--methods", "adaptive", "--final"])
    assert stages == [[[], [], []], [[]]]


def test_a_report_of_fewer_runs_is_refused_and_loses_none(lab, tmp_path, monkeypatch, capsys):
    runs = [lab.runs.Run("digits", "digits", method, 0.2, 0) for method in ("pgd-at", "ramp")]
    known(lab, tmp_path / "page", *(made_up(lab, run) for run in runs))
    known(lab, tmp_path / "new", made_up(lab, runs[0]))
    monkeypatch.setattr(lab.study, "RESULTS", tmp_path / "page")
    before = (tmp_path / "page/runs.csv").read_bytes()
    assert lab.study.main(["--report", str(tmp_path / "new")]) == 2
    assert "lacks 1 runs of" in (message := capsys.readouterr().err)
    assert "digits/digits/ramp-eps0.2-seed0 for one: take them in first" in message
    assert (tmp_path / "page/runs.csv").read_bytes() == before


def claims(lab):
    return (lab.claims.Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack", 1),)


def test_only_what_a_claim_is_about_is_read_and_each_once(lab, tmp_path, stages, monkeypatch):
    monkeypatch.setattr(lab.study, "CLAIMS", claims(lab))
    read = {"test_natural": 0.5, "test_autoattack_images": 200}
    for method in ("clean", "pgd-at", "adaptive", "ramp"):
        for seed in (0, 1):
            run = lab.runs.Run("digits", "digits", method, 0.2, seed)
            folder = tmp_path / run.name
            folder.mkdir(parents=True)
            line = made_up(lab, run, **(read if (method, seed) == ("adaptive", 0) else {}))
            (folder / "record.json").write_text(json.dumps(asdict(line)))
    argv = ["--out", str(tmp_path), "--seeds", "2", "--methods", "adaptive,ramp", "--final"]
    args = lab.study.parse_args(argv)
    runs = lab.study.chosen("digits", args)
    wider = replace(runs[0], arch="digits-32", method="adaptive")  # claims are about the data set's own network
    lab.study.final([*runs, wider], args)
    assert [(run.method, run.seed) for run in stages[0][0]] == [("pgd-at", 0), ("pgd-at", 1), ("adaptive", 1)]
    args.autoattack_images = 100
    with pytest.raises(lab.study.UserError, match=r"--autoattack-images must be 200, .*; got 100"):
        lab.study.final(runs, args)
    assert len(stages) == 1


def test_missing_images_are_told_once_and_before_anything_is_run(lab, tmp_path, stages, capsys):
    out = tmp_path / "out"
    argv = ["--dataset", "cifar10", "--seeds", "1", "--out", str(out), f"--options=--data {tmp_path}"]
    assert lab.study.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: CIFAR10 is missing or damaged in {tmp_path}: add --download")
    assert not stages
    assert not out.exists()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_with_other_options_is_not_taken_for_this_one(lab, tmp_path, stages, capsys, elsewhere):
    run = lab.runs.Run("digits", "digits", "ramp", 0.2, 0)
    other = made_up(lab, run, epochs=3)
    option = known(lab, tmp_path / "known", other) if elsewhere else []
    if not elsewhere:
        (tmp_path / "out" / run.name).mkdir(parents=True)
        (tmp_path / "out" / run.name / "record.json").write_text(json.dumps(asdict(other)))
    assert lab.study.main(["--out", str(tmp_path / "out"), "--seeds", "1", "--methods", "ramp", *option]) == 2
    assert "with epochs 3 and not 15: give the options that it was made with" in capsys.readouterr().err
    assert not stages


def test_nothing_begins_with_a_network_that_is_half_trained(lab, tmp_path):
    run = lab.runs.Run("digits", "digits", "clean", 0.2, 0)
    path = tmp_path / "digits/digits/teacher-seed0/last.pt"
    with pytest.raises(lab.one_run.Failed, match=r"clean-eps0\.2-seed0 is not trained to the end"):
        lab.one_run.trained(run, tmp_path)
    path.parent.mkdir(parents=True)
    torch.save({"epoch": 1, "config": {"epochs": 2}}, path)
    with pytest.raises(lab.one_run.Failed, match=r"clean-eps0\.2-seed0 is not trained to the end"):
        lab.one_run.trained(run, tmp_path)


def test_a_process_that_dies_takes_no_other_run_along(lab, tmp_path):
    dies, lives = "import os; os._exit(1)", f"open({str(tmp_path / 'done')!r}, 'w').close()"
    done = []
    failed = lab.pool.run_all(exec, [[dies, lives], ["pass"]], jobs=1, label="", done=lambda: done.append(1))
    assert list(failed) == [dies]
    assert "BrokenProcessPool" in failed[dies]
    assert (tmp_path / "done").exists()
    assert len(done) == 3


# The whole command, in processes of its own.


def study(folder, *more, options=TINY):
    command = [sys.executable, EXAMPLES / "study.py", "--out", folder, "--jobs", "2", "--seeds", "1", *more]
    return [str(part) for part in (*command, "--options", options)]


def test_a_study_leaves_a_line_a_run_and_is_never_done_twice(lab, tmp_path, monkeypatch):
    first = subprocess.run(study(tmp_path, "--methods", "adaptive"), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    runs = lab.records.read_runs(tmp_path / "runs.csv")
    assert {run.method for run in runs} == {"clean", "pgd-at", "adaptive"}
    adaptive = next(run for run in runs if run.method == "adaptive")
    assert (adaptive.eps, adaptive.seed, adaptive.epochs, adaptive.split_seed) == (0.2, 0, 1, lab.runs.SPLIT_SEED)
    assert adaptive.options == f"--recipe ours {TINY}"
    assert adaptive.transfer is not None
    assert adaptive.test_natural is None
    curves = lab.records.read_curves(tmp_path / "curves.csv")
    assert [(epoch.method, epoch.epoch) for epoch in curves] == [("adaptive", 1), ("pgd-at", 1)]
    assert "adaptive" in first.stdout

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    again = subprocess.run(study(tmp_path, "--methods", "adaptive"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert lab.records.read_runs(tmp_path / "runs.csv") == runs

    # The final read is of the test images, and adds to the record.
    seen = []

    def on_test(model, images, eps, autoattack_images):
        seen.append((len(images), eps, autoattack_images))
        return {"test_natural": 0.5, "test_autoattack": 0.25, "test_autoattack_images": autoattack_images}

    with monkeypatch.context() as patched:
        patched.setattr(lab.measure, "on_test", on_test)
        lab.one_run.read_test(lab.one_run.run_of(adaptive), tmp_path, TINY, autoattack_images=3)
    assert seen == [(500, 0.2, 3)]
    read = lab.one_run.record_of(lab.one_run.run_of(adaptive), tmp_path)
    assert (read.test_natural, read.test_autoattack, read.test_autoattack_images) == (0.5, 0.25, 3)
    assert read.apgd == pytest.approx(adaptive.apgd, abs=1e-6)
    lab.study.write(Namespace(out=tmp_path, known=None))
    runs = lab.records.read_runs(tmp_path / "runs.csv")
    adaptive = next(run for run in runs if run.method == "adaptive")

    # Elsewhere, its lines count as done; what another method needs of them is trained again.
    elsewhere = study(tmp_path / "elsewhere", "--methods", "adaptive", "--known", tmp_path)
    assert subprocess.run(elsewhere, capture_output=True).returncode == 0
    assert lab.records.read_runs(tmp_path / "elsewhere/runs.csv") == runs
    assert lab.records.read_curves(tmp_path / "elsewhere/curves.csv") == curves
    assert not list((tmp_path / "elsewhere").rglob("last.pt"))
    more = study(tmp_path / "elsewhere", "--methods", "adaptive,ramp", "--known", tmp_path)
    assert subprocess.run(more, capture_output=True).returncode == 0
    merged = lab.records.read_runs(tmp_path / "elsewhere/runs.csv")
    assert sorted(run.method for run in merged) == ["adaptive", "clean", "pgd-at", "ramp"]
    assert [run for run in merged if run.method == "adaptive"] == [adaptive]
    assert not (tmp_path / "elsewhere/digits/digits/adaptive-eps0.2-seed0").exists()


def test_a_stopped_study_goes_on_and_ends_as_if_it_had_not_been(lab, tmp_path):
    options = TINY.replace("--epochs 1", "--epochs 30")
    command = study(tmp_path / "stopped", "--methods", "pgd-at", options=options)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log = tmp_path / "stopped/digits/digits/pgd-at-eps0.2-seed0/log.csv"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    record = lab.runs.Run("digits", "digits", "pgd-at", 0.2, 0)
    assert lab.one_run.record_of(record, tmp_path / "stopped") is None
    assert torch.load(log.with_name("last.pt"))["epoch"] < 30, "stopped too late to show anything"
    for folder in ("stopped", "whole"):
        whole = study(tmp_path / folder, "--methods", "pgd-at", options=options)
        assert subprocess.run(whole, capture_output=True).returncode == 0
    ours, theirs = (lab.records.read_runs(tmp_path / folder / "runs.csv") for folder in ("stopped", "whole"))
    when = {"train_seconds": 0, "measure_seconds": 0, "date": ""}
    assert [replace(run, **when) for run in ours] == [replace(run, **when) for run in theirs]
    assert lab.records.read_curves(tmp_path / "stopped/curves.csv") == lab.records.read_curves(
        tmp_path / "whole/curves.csv"
    )


def test_a_failed_run_is_named_and_stops_no_other(lab, tmp_path):
    blocked = tmp_path / "digits/digits/adaptive-eps0.2-seed0"
    blocked.mkdir(parents=True)
    (blocked / "last.pt").write_text("not a checkpoint")
    done = subprocess.run(study(tmp_path, "--methods", "adaptive,ramp"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "failed: digits/digits/adaptive-eps0.2-seed0" in done.stderr
    assert "--resume" in (blocked / "output.txt").read_text()
    assert {run.method for run in lab.records.read_runs(tmp_path / "runs.csv")} == {"clean", "pgd-at", "ramp"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "ramp,nothing"], "got 'nothing', wanted some of clean,pgd-at"),
        (["--jobs", "0"], "wanted a whole number in [1, 1024]"),
        (["--options=--lr x"], "--lr: got 'x'"),
        (["--options=--steps 7"], "unrecognized arguments: --steps 7"),  # of train_cktat.py, but not of a teacher's
        (["--known", "nowhere"], "argument --known: nowhere must have runs.csv and curves.csv"),
        (["--report", "nowhere"], "argument --report: nowhere must have runs.csv and curves.csv"),
        (["--final"], "lab/claims.py has no claims about these runs"),
        (["--methods", "ramp-tau2"], "ramp-tau2 must come with --full"),
        (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_run(lab, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(lab.study, "CLAIMS", ())
    with pytest.raises(SystemExit) as stopped:
        lab.study.main(["--out", str(tmp_path / "none"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
