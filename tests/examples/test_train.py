"""train.py does what its options say, on a few images."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.examples_path import EXAMPLES, imported

pytest.importorskip("pyautoattack")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

DIGITS = shlex.split("--dataset digits --validation 40 --train-samples 96 --batch-size 32")
CLEAN = ["--method", "clean", *DIGITS]
SHORT = ["--epochs", "1", "--steps", "1", "--eps", "0.1", "--apgd-check", "0"]
FULL = {"epoch", "lr", "loss", "clean_accuracy", "most_predicted_share", "train_seconds", "validation_seconds"}


@pytest.fixture(scope="module")
def examples():
    """The example modules by name, imported as `python examples/...` would."""
    with imported("data", "methods", "models", "runtime", "train") as modules:
        yield modules


@pytest.fixture(scope="module")
def teacher(examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    assert examples.train.main([*CLEAN, "--train-samples", "640", "--epochs", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """So that no line of a message is broken."""
    monkeypatch.setenv("COLUMNS", "400")


def parse(examples, *options):
    return examples.train.parse(options)


@pytest.fixture
def train(examples, teacher, tmp_path):
    """Runs train.py in this process; returns its checkpoint and its log."""

    def run(*options, with_teacher=True):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        given = ["--teacher", str(teacher)] if with_teacher else []
        assert examples.train.main([*DIGITS, *SHORT, *given, "--out", str(out), *options]) == 0
        return examples.runtime.load(out / "last.pt"), examples.runtime.read_log(out / "log.csv")

    return run


@pytest.fixture
def attacks(examples, monkeypatch):
    """What each attack was given and returned, in training and validation: x, x', and how."""
    seen = []
    pgd = examples.train.pgd

    def recorded(model, x, y, **how):
        trained = any(parameter.requires_grad for parameter in model.parameters())
        x_adv = pgd(model, x, y, **how)
        seen.append((x, x_adv, {**how, "trained": trained}))
        return x_adv

    monkeypatch.setattr(examples.train, "pgd", recorded)
    return seen


def refused(examples, capsys, *options):
    """What is said of options that are refused: one sentence, or tyro's box."""
    try:
        code = examples.train.main(list(options))
    except SystemExit as exit_:
        code = exit_.code
    errors = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in errors
    assert "For full helptext" in errors or errors.count("\n") == 1, errors
    return errors


def weights(state):
    return {
        name: value for name, value in state["model"].items() if value.is_floating_point() and "running" not in name
    }


def same(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items())


# What a run leaves.


def test_a_run_leaves_a_config_a_log_and_two_checkpoints(train, tmp_path):
    train()
    assert sorted(path.name for path in (tmp_path / "run0").iterdir()) == [
        "best.pt",
        "config.json",
        "last.pt",
        "log.csv",
    ]


def test_the_log_times_every_phase_and_the_teacher_with_cktat_only(examples, train, teacher):
    phases = ("attack_seconds", "teacher_seconds", "student_seconds")
    (row,) = train()[1]
    assert all(value is not None for value in row.values())
    assert 0 < sum(row[phase] for phase in phases) <= row["train_seconds"]
    (row,) = train("--method", "trades")[1]
    assert [row[phase] is None for phase in phases] == [False, True, False]
    clean = examples.runtime.read_log(teacher / "log.csv")[0]
    assert {name for name, value in clean.items() if value is not None} == {*FULL, "student_seconds"}


def test_the_log_has_percentiles_of_the_labels_probability_under_attack(examples, train):
    state, rows = train("--split-seed", "7", "--method", "pgd-at", with_teacher=False)
    assert state["split_seed"] == 7
    images = examples.data.load("digits", Path(), download=False, seed=7, validation=40).validation
    x, y = torch.utils.data.default_collate([images[i] for i in range(40)])
    model = examples.models.build("digits", 10, size=8, channels=1, mean=state["mean"], std=state["std"]).eval()
    model.load_state_dict(state["model"])
    found = []
    with examples.runtime.own_randomness(torch.device("cpu"), seed=0):
        for some, labels in zip(x.split(32), y.split(32), strict=True):
            x_adv = examples.train.pgd(model, some, labels, eps=0.1, step=0.025, steps=1)
            found += model(x_adv).softmax(1)[range(len(labels)), labels].tolist()
    wanted = np.percentile(found, [5, 25, 50, 75, 95])
    logged = [rows[0][name] for name in examples.runtime.LABEL_PROBABILITY]
    assert logged == pytest.approx(wanted.tolist(), rel=1e-3)


def test_a_teacher_of_another_split_is_refused(examples, teacher, tmp_path, capsys):
    given = ["--teacher", str(teacher), "--split-seed", "7", "--out", str(tmp_path)]
    assert examples.train.main([*DIGITS, *SHORT, *given]) == 2
    assert "best.pt has 0, got 7: it has seen images held out here" in capsys.readouterr().err


def test_fake_data_and_a_wide_resnet_go_through_both_phases(examples, tmp_path):
    small = shlex.split("--dataset fake --arch wrn-10-1 --train-samples 16 --batch-size 8 --epochs 1 --validation 8")
    assert examples.train.main(["--method", "clean", *small, "--out", str(tmp_path / "t")]) == 0
    student = [*small, "--out", str(tmp_path / "s"), "--steps", "1", "--apgd-check", "4"]
    assert examples.train.main([*student, "--teacher", str(tmp_path / "t")]) == 0
    model = examples.models.from_checkpoint(tmp_path / "s" / "best.pt")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_best_is_the_first_epoch_of_the_highest_accuracy_under_pgd(examples, train, tmp_path):
    _, rows = train("--epochs", "4", "--lr", "0.2", "--eps", "0.2")
    best = examples.runtime.load(tmp_path / "run0" / "best.pt")
    assert best["epoch"] == max(rows, key=lambda row: row["pgd_accuracy"])["epoch"]
    assert len({row["pgd_accuracy"] for row in rows}) > 1


@pytest.fixture(scope="module")
def validation_images(examples):
    data = examples.data.load("digits", Path(), download=False, seed=0, validation=40)
    x, y = zip(*data.validation, strict=True)
    return torch.stack(x), torch.tensor(y)


def accuracy(model, images):
    x, y = images
    return (model(x).argmax(1) == y).double().mean().item()


def test_best_of_the_teacher_is_by_clean_accuracy_and_reproduces_it(examples, teacher, validation_images):
    best = accuracy(examples.models.from_checkpoint(teacher / "best.pt"), validation_images)
    assert best == pytest.approx(max(row["clean_accuracy"] for row in examples.runtime.read_log(teacher / "log.csv")))
    assert best > 0.3


def test_the_moving_average_is_what_is_validated(examples, train, tmp_path, validation_images):
    _, (row,) = train("--ema", "0.99", "--lr", "1")
    last, average = (
        accuracy(examples.models.from_checkpoint(tmp_path / "run0" / "best.pt", ema=ema), validation_images)
        for ema in (False, True)
    )
    assert row["clean_accuracy"] == pytest.approx(average)
    assert average != last


def test_validation_draws_the_same_attacks_each_time_and_none_from_training(examples, teacher, validation_images):
    x, y = validation_images
    noise = []

    def attack(model, x, y):
        noise.append(torch.rand(3))
        return x

    model = examples.models.from_checkpoint(teacher / "best.pt")
    before = torch.get_rng_state()
    for _ in range(2):
        examples.train.validate(model, [(x, y)], attack, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        before = torch.get_rng_state()
    assert torch.equal(*noise)


def test_it_needs_six_files_beside_it_and_nothing_else_of_examples(tmp_path):
    for name in ("train", "awp", "data", "methods", "models", "pgd", "runtime"):
        shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    command = [sys.executable, "-W", "error", str(tmp_path / "train.py"), *CLEAN, "--epochs", "1", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "teacher" / "best.pt").exists()


# What the options do.


def test_cktat_logs_a_loss_of_guidance_and_beta_times_consistency(train):
    (row,) = train("--recipe", "literal")[1]
    assert row["loss"] == pytest.approx(row["guidance"] + 6 * row["consistency"], rel=1e-4)
    assert row["beta"] == 6


def test_ablations_leave_their_term_out_of_the_loss_and_in_the_log(train):
    (row,) = train("--recipe", "literal", "--no-guidance")[1]
    assert row["loss"] == pytest.approx(6 * row["consistency"], rel=1e-4)
    assert row["guidance"] > 0
    (row,) = train("--recipe", "literal", "--no-consistency")[1]
    assert row["loss"] == pytest.approx(row["guidance"], rel=1e-4)
    assert row["consistency"] > 0


def test_adaptive_beta_weighs_less_than_beta(train):
    (row,) = train("--beta", "6")[1]
    assert row["guidance"] < row["loss"] < row["guidance"] + 6 * row["consistency"]


def test_a_warm_start_begins_with_the_teachers_weights_and_no_warm_start_does_not(examples, train, teacher):
    before = weights(examples.runtime.load(teacher / "best.pt"))
    still = ["--lr", "1e-30"]  # too small a step to change a float32
    assert same(weights(train(*still)[0]), before)
    assert same(weights(train(*still, "--method", "trades")[0]), before)
    assert not same(weights(train(*still, "--no-warm-start")[0]), before)


def test_trades_and_pgd_at_need_no_teacher(train):
    for method in ("trades", "pgd-at"):
        (row,) = train("--method", method, with_teacher=False)[1]
        assert row["loss"] > 0


def test_two_forwards_are_two_and_otherwise_there_is_one(train):
    one, two = (train("--no-warm-start", *options)[0] for options in ([], ["--two-forwards"]))
    name = "net.0.1.num_batches_tracked"
    assert two["model"][name] == 2 * one["model"][name] == 6


@pytest.mark.parametrize("method", ["cktat", "trades", "pgd-at"])
def test_awp_raises_the_loss_and_leaves_weights_averages_and_statistics_as_they_would_be(train, method):
    still = ["--method", method, "--lr", "1e-30", "--ema", "0.5"]
    (plain, (usual,)), (state, (row,)) = train(*still), train(*still, "--awp", "0.02")
    assert row["loss"] > usual["loss"]
    for part in ("model", "ema"):
        for name, value in plain[part].items():
            if "running" not in name:  # these have seen the perturbed network, but no more often
                assert torch.equal(value, state[part][name]), name


def test_ramps_raise_eps_and_beta_from_almost_nothing(attacks, train):
    _, rows = train("--epochs", "4", "--eps-ramp", "0.5", "--beta-ramp", "0.5")
    progress = [(epoch + 2 / 3) / 4 for epoch in range(4)]  # at the last of an epoch's three steps
    assert [row["eps"] for row in rows] == pytest.approx([0.1 * min(1, 2 * p) for p in progress], rel=1e-4)
    assert [row["beta"] for row in rows] == pytest.approx([6 * min(1, 2 * p) for p in progress], rel=1e-4)
    first_epoch = [(how["eps"], how["step"]) for _, _, how in attacks[:5]]  # three steps, two batches to validate
    expected = [0.001, 0.2 / 12, 0.4 / 12, 0.1, 0.1]
    assert first_epoch == [pytest.approx((eps, eps / 4)) for eps in expected]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [0.1, 0.1, 0.1, 0.001]),
        (["--lr-drops", "1,3"], [0.1, 0.01, 0.01, 0.001]),
        (["--schedule", "cosine"], [0.05 * (1 + math.cos(math.pi * (3 * e + 2) / 12)) for e in range(4)]),
        (["--lr-warmup", "0.5"], [0.05, 0.1, 0.1, 0.001]),
    ],
)
def test_learning_rates_follow_the_schedule(examples, tmp_path, options, expected):
    command = [*CLEAN, "--epochs", "4", "--out", str(tmp_path / "run"), *options]
    assert examples.train.main(command) == 0
    rates = [row["lr"] for row in examples.runtime.read_log(tmp_path / "run" / "log.csv")]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_the_usual_drops_are_in_proportion_to_the_epochs(examples):
    assert parse(examples, "--method", "pgd-at", "--epochs", "55").lr_drops == pytest.approx((50, 52.5))
    assert parse(examples, "--method", "clean").lr_drops == pytest.approx((75, 90))


def test_the_moving_average_follows_its_recurrence(examples, train, monkeypatch):
    seen = []
    update = examples.train.update

    def recorded(state):
        update(state)
        seen.append(state.model.net[4].weight.detach().double())

    monkeypatch.setattr(examples.train, "update", recorded)
    state, _ = train("--ema", "0.7")
    average = seen[0]
    for value in seen[1:]:
        average = 0.7 * average + 0.3 * value
    assert len(seen) == 3
    torch.testing.assert_close(state["ema"]["net.4.weight"].double(), average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("amp", "dtype"), [("none", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_amp_sets_the_precision_of_forwards_not_of_weights(examples, train, monkeypatch, amp, dtype):
    seen = set()
    call = examples.methods.CKTAT.__call__

    def recorded(self, **logits):
        seen.update(str(logits[name].dtype) for name in ("clean_logits", "adv_logits", "teacher_logits"))
        return call(self, **logits)

    monkeypatch.setattr(examples.methods.CKTAT, "__call__", recorded)
    state, (row,) = train("--amp", amp)
    assert seen == {f"torch.{dtype}"}
    assert all(value.dtype == torch.float32 for value in weights(state).values())
    assert ("scale" in state["scaler"]) == (amp == "fp16")
    assert math.isfinite(row["loss"])


def test_channels_last_lays_the_weights_out_so(train):
    for options, last in ([], False), (["--channels-last"], True):
        weight = train(*options)[0]["model"]["net.1.conv1.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last) == last


def test_l2_bounds_the_length_of_the_change(attacks, train):
    train("--norm", "l2", "--eps", "0.5", "--step-size", "0.5")
    lengths = [(x_adv - x).flatten(1).norm(dim=1).max().item() for x, x_adv, _ in attacks]
    assert all(0.4 < length < 0.5001 for length in lengths)


def test_compile_changes_no_weight(attacks, train, monkeypatch):
    compiled = []

    def eagerly(model):
        compiled.append(model)
        model._compiled_call_impl = torch.compile(model._call_impl, backend="eager")

    plain = train()[0]
    assert attacks[0][2]["trained"]
    attacks.clear()
    monkeypatch.setattr(nn.Module, "compile", eagerly)
    torch.testing.assert_close(train("--compile")[0]["model"], plain["model"], rtol=1e-4, atol=1e-5)
    assert len(compiled) == 2  # student and teacher
    assert not attacks[0][2]["trained"]  # no gradients of parameters, which a compiled backward would compute in vain
    assert all(parameter.requires_grad for parameter in compiled[0].parameters())


def test_no_augmentation_trains_on_the_images_as_they_are(examples):
    ranks = examples.runtime.Ranks(torch.device("cpu"))
    for options, equal in ([], False), (["--no-augmentation"], True):
        config = parse(examples, "--method", "clean", "--dataset", "fake", *options)
        data = examples.train.open_data(config, ranks)
        assert all(torch.equal(data.train[i][0], data.train.images[i] / 255) for i in range(20)) == equal


def test_recipes_set_what_is_not_given(examples):
    def loss(*options):
        config = parse(examples, "--teacher", "t", *options)
        return config.tau, config.beta, config.detach_clean, config.adaptive_beta

    assert loss() == loss("--recipe", "adaptive") == (2, 6, True, True)
    assert loss("--recipe", "literal") == (5, 6, False, False)
    assert loss("--recipe", "literal", "--tau", "3", "--detach-clean") == (3, 6, True, False)
    assert loss("--no-adaptive-beta", "--beta", "0") == (2, 0, True, False)


def test_the_attack_and_the_model_follow_from_what_is_given(examples):
    def attack(*options):
        config = parse(examples, "--method", "pgd-at", *options)
        return config.eps, config.step_size

    assert attack() == attack("--eps", "8/255") == pytest.approx((8 / 255, 2 / 255))
    assert attack("--eps", "0.2") == pytest.approx((0.2, 0.05))
    assert attack("--norm", "l2") == pytest.approx((128 / 255, 32 / 255))
    assert attack("--norm", "l2", "--eps", "8") == (8, 2)


def test_options_come_from_a_file_too_and_those_given_beside_it_come_first(examples, train, tmp_path):
    train("--recipe", "literal", "--lr-drops", "1,2.5", "--no-guidance")
    file = tmp_path / "run0" / "config.json"
    written = json.loads(file.read_text())
    again = parse(examples, "--config", str(file))
    for name, value in vars(again).items():
        plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        assert name in ("config", "resume") or plain == written[name], name
    changed = parse(examples, "--config", str(file), "--tau", "3", "--detach-clean")
    assert (changed.tau, changed.detach_clean, changed.no_guidance) == (3, True, True)


def test_options_can_be_given_in_python(examples, train, teacher, tmp_path):
    _, rows = train("--tau", "3")
    given = {"dataset": "digits", "validation": 40, "train_samples": 96, "batch_size": 32, "teacher": teacher}
    given |= {"epochs": 1, "steps": 1, "eps": 0.1, "apgd_check": 0, "tau": 3.0, "out": tmp_path / "python"}
    assert examples.train.launch(examples.train.Config(**given)) == 0
    untimed = [
        {name: value for name, value in row.items() if "seconds" not in name}
        for row in (rows[0], examples.runtime.read_log(tmp_path / "python" / "log.csv")[0])
    ]
    assert untimed[0] == untimed[1]


def test_a_method_of_ones_own_can_take_the_place_of_method(examples, train, teacher, tmp_path):
    class Doubled(examples.methods.CKTAT):
        def __call__(self, **logits):
            terms = super().__call__(**logits)
            return terms._replace(loss=2 * terms.loss)

    def new_method(config, teacher):
        return Doubled(examples.train.method_of(config, teacher).criterion)

    still = ["--lr", "1e-30"]
    _, (usual,) = train(*still)
    config = parse(examples, *DIGITS, *SHORT, *still, "--teacher", str(teacher), "--out", str(tmp_path / "own"))
    assert examples.train.launch(config, new_method) == 0
    (row,) = examples.runtime.read_log(tmp_path / "own" / "log.csv")
    assert row["loss"] == pytest.approx(2 * usual["loss"], rel=1e-5)


def test_a_state_dict_is_a_teacher_too_when_arch_names_its_architecture(examples, teacher, train, tmp_path):
    bare = tmp_path / "weights.pt"
    torch.save(examples.runtime.load(teacher / "best.pt")["model"], bare)
    state, _ = train("--teacher", str(bare), "--arch", "digits", "--lr", "1e-30", with_teacher=False)
    assert same(weights(state), weights(examples.runtime.load(teacher / "best.pt")))


# What is said meanwhile.


def test_a_terminal_shows_both_terms_and_each_epoch_gets_a_line(train, capsys, monkeypatch):
    train()
    assert capsys.readouterr().err == ""  # no bar is drawn into a file
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train()
    printed = capsys.readouterr()
    assert re.search(r"epoch 1/1: 100%.*guidance=\d.*consistency=\d", printed.err)
    line = r"epoch 1/1: loss \d.*guidance \d.*consistency \d.*clean [\d.]+%, PGD [\d.]+%; .*teacher \d"
    assert re.search(line, printed.out)
    assert re.search(r"teacher: clean \d", printed.out)


def test_a_collapse_is_warned_of(train, capsys):
    train("--lr", "1e-30")
    assert "warning" not in capsys.readouterr().out
    train("--eps", "1", "--method", "pgd-at", "--epochs", "2", "--lr", "1")
    assert "warning: epoch 2" in capsys.readouterr().out


def test_what_counts_as_a_collapse(examples):
    def says(clean, most_predicted, teacher=0.9):
        scores = {"clean_accuracy": clean, "most_predicted_share": most_predicted}
        return examples.train.collapse(scores, [*range(10)], teacher)

    assert says(0.5, 0.5) is None
    assert says(0.1, 0.3, teacher=None) is None
    assert says(0.1, 0.3, teacher=0.15) is None
    assert "56% of the validation images are given the same class" in says(0.5, 0.56)
    assert "clean accuracy is 17.0%, near chance, and the teacher's is 90.0%" in says(0.17, 0.3)


def test_apgd_below_pgd_by_more_than_10_points_is_warned_of(examples, teacher, validation_images):
    model = examples.models.from_checkpoint(teacher / "best.pt")
    x, y = validation_images[0], model(validation_images[0]).argmax(1)
    useless = examples.train.compare_with_apgd(model, x, y, eps=0.3, norm="linf", attack=lambda model, x, y: x)
    assert "40 validation images: PGD 100.0%, APGD-CE (50 steps) " in useless
    assert "gradient masking is likely" in useless
    honest = examples.train.compare_with_apgd(model, x, y, eps=1e-6, norm="linf", attack=lambda model, x, y: x)
    assert "warning" not in honest


def test_a_loss_that_is_not_finite_ends_the_run(examples, train, monkeypatch, capsys):
    monkeypatch.setattr(
        examples.methods.PGDAT,
        "__call__",
        lambda _, adv_logits, **__: examples.methods.Terms(adv_logits.sum() * math.nan),
    )
    with pytest.raises(AssertionError):
        train("--method", "pgd-at")
    assert "error: the loss is not a finite number in epoch 1" in capsys.readouterr().err


def test_a_teacher_whose_logits_are_not_finite_is_looked_at_first(examples, train, teacher, tmp_path, capsys):
    state = examples.runtime.load(teacher / "best.pt")
    state["model"]["net.4.weight"].fill_(3e38)  # finite, unlike what it makes of any image
    examples.runtime.save(tmp_path / "best.pt", state)
    with pytest.raises(AssertionError):
        train("--teacher", str(tmp_path))
    assert "error: the loss is not a finite number in epoch 1: the teacher's logits" in capsys.readouterr().err


def test_tensorboard_gets_what_the_csv_gets(examples, train, monkeypatch):
    written = {}
    writer = types.SimpleNamespace(
        add_scalar=lambda name, value, epoch: written.update({(name, epoch): value}), flush=lambda: None
    )
    fake = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(examples.train.importlib.util, "find_spec", lambda name: name)
    _, (row,) = train("--tensorboard")
    assert {(name, 1): pytest.approx(value, rel=1e-4) for name, value in row.items()} == written


def test_tensorboard_that_is_not_installed_is_said_before_the_run(examples, monkeypatch, capsys):
    monkeypatch.setattr(examples.train.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'cktat-loss[tensorboard]'" in refused(examples, capsys, "--method", "clean", "--tensorboard")


# Help and mistakes.


def test_help_explains_every_option_with_its_default(examples, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # wider, its parts would stand side by side
    with pytest.raises(SystemExit) as exit_:
        examples.train.main(["--help"])
    text = capsys.readouterr().out
    entries = re.split(r"\n\W{0,3}(?=--\w)", text)[1:]
    assert exit_.value.code == 0
    assert len(entries) == len(vars(examples.train.Config()))
    for entry in entries:
        assert re.search(r"\(default: .*\)", entry, re.DOTALL), entry
        assert len(entry.split()) > 6, entry
    for words in ("not the paper's", "--no-detach-clean", "--eps (0, 100]", "{clean,cktat,trades,pgd-at}"):
        assert words in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--teacher: is needed by --method cktat"),
        (["--teacher", "nowhere"], "--teacher: there is no file nowhere; --method clean makes one"),
        (["--method", "trades", "--dataset", "cifar10", "--data", "nowhere"], "--download"),
        (["--method", "trades", "--arch", "resnet9000"], "--arch does not fit"),
        (["--method", "trades", "--tau", "2"], "--tau: is not for --method trades"),
        (["--method", "pgd-at", "--two-forwards"], "--two-forwards: is not for --method pgd-at"),
        (["--teacher", "t", "--no-guidance", "--no-consistency"], "leaves no loss"),
        (["--teacher", "t", "--no-consistency", "--beta", "3"], "--beta: weighs what --no-consistency leaves out"),
        (["--teacher", "t", "--no-consistency", "--beta-ramp", "0.5"], "--beta-ramp: weighs what --no-consistency"),
        (["--method", "clean"], "--eps: is not for --method clean"),
        (["--method", "trades", "--no-warm-start"], "--no-warm-start: needs --teacher"),
        (["--method", "pgd-at", "--schedule", "cosine", "--lr-drops", "1"], "--lr-drops: is for --schedule piecewise"),
        (["--method", "pgd-at", "--eps", "8"], "got 8: pixels are in [0, 1], so write 8/255"),
        (["--method", "pgd-at", "--step-size", "2"], "--step-size: step_size must be in [0, 1] for norm linf, got 2"),
        (["--method", "pgd-at", "--eps", "1e400"], "Error parsing --eps: got '1e400', wanted a number in (0, 100]"),
        (["--config", "nowhere.json"], "--config: nowhere.json is not a JSON file of options"),
        (
            ["--method", "pgd-at", "--train-samples", "20"],
            "--batch-size must be at most the 20 training images, got 32",
        ),
        (["--method", "pgd-at", "--validation", "2000"], "--validation does not fit"),
        (["--method", "pgd-at", "--eps", "8/0"], "Error parsing --eps: got '8/0', wanted a number in (0, 100]"),
        (["--method", "pgd-at", "--eps", "nan"], "Error parsing --eps: got 'nan', wanted a number in (0, 100]"),
        (["--method", "pgd-at", "--steps", "0"], "Error parsing --steps: got '0', wanted a whole number in [1, 1000]"),
        (["--method", "pgd-at", "--lr-drops", "3,x"], "Error parsing --lr-drops: got 'x', wanted a number"),
        (["--method", "pgd-at", "--device", "abacus"], "--device: got 'abacus', wanted auto, or a device"),
        (["--method", "pgd-at", "--nesterov", "--momentum", "0"], "--nesterov: needs --momentum above 0"),
        (["--method", "mart"], "invalid choice 'mart' for argument '--method'"),
        (["--metho", "trades"], "Unrecognized options: --metho"),
    ],
)
def test_a_mistake_gets_one_sentence_and_code_2(examples, capsys, tmp_path, options, sentence):
    out = ["--out", str(tmp_path / "run")]
    assert sentence in refused(examples, capsys, *DIGITS, *SHORT, *out, *options)


def test_a_teacher_that_does_not_fit_gets_one_sentence(examples, capsys, teacher, tmp_path):
    def says(path, *options):
        own = ["--teacher", str(path), "--out", str(tmp_path / "run")]
        return refused(examples, capsys, *DIGITS, *own, *options)

    broken, bare = tmp_path / "broken.pt", tmp_path / "bare.pt"
    broken.write_bytes((teacher / "best.pt").read_bytes()[:1000])
    assert "cannot be read as a checkpoint" in says(broken)
    torch.save({"weight": torch.zeros(1)}, bare)
    assert "so --arch must" in says(bare)
    assert "teacher doesn't fit student" in says(bare, "--arch", "digits")
    assert "has size 8, but fake has 32" in says(teacher, "--dataset", "fake")
    assert "--arch wrn-10-1 cannot take over the weights" in says(teacher, "--arch", "wrn-10-1")


def test_a_teacher_whose_weights_are_not_finite_is_looked_at_first(examples, capsys, teacher, tmp_path):
    state = examples.runtime.load(teacher / "best.pt")
    state["model"]["net.4.weight"][0] = math.nan
    examples.runtime.save(tmp_path / "best.pt", state)
    given = ["--teacher", str(tmp_path), "--out", str(tmp_path / "run")]
    assert "best.pt has weights that are not finite numbers" in refused(examples, capsys, *DIGITS, *SHORT, *given)


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_that_cannot_be_made_gets_one_sentence(examples, capsys, tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("")
    out = file / "run" if inside else file
    assert f"--out: {out} cannot be made" in refused(examples, capsys, *CLEAN, "--out", str(out))


def test_a_folder_that_cannot_be_written_to_gets_one_sentence(examples, capsys):
    assert "cannot be made" in refused(examples, capsys, *CLEAN, "--out", "/proc/run")
    assert "/proc/config.json cannot be written" in refused(examples, capsys, *CLEAN, "--out", "/proc")
