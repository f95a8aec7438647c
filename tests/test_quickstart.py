"""`make demo` does what it says, from its options to its picture."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples_path import EXAMPLES, imported

pytest.importorskip("matplotlib")
pytest.importorskip("pyautoattack")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

COMMAND = [sys.executable, "-W", "error", str(EXAMPLES / "quickstart.py"), "--device", "cpu"]
TINY = ["--epochs", "1", "--teacher-epochs", "1", "--apgd-steps", "2", "--test-images", "20", "--batch-size", "256"]


@pytest.fixture(scope="module")
def quickstart():
    with imported("quickstart") as modules:
        yield modules.quickstart


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of the command: its folder, its output, its errors."""
    folder = tmp_path_factory.mktemp("finished")
    command = [*COMMAND, *TINY, "--out", str(folder / "new" / "a.png")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout, run.stderr


def table(output):
    return re.findall(r"^(teacher|student)((?: +[\d.]+ ± [\d.]+){3})$", output, re.MULTILINE)


def test_a_run_prints_the_table_the_budget_and_why(finished):
    _, output, _ = finished
    assert [name for name, _ in table(output)] == ["teacher", "student"]
    assert "recipe adaptive: tau = 2" in output
    assert "did not collapse" in output
    assert "APGD-CE, 2 steps" in output
    assert "3 targets x 2 steps" in output
    assert "warning: 2 APGD steps are too few" in output
    assert "20 test images" in output


def test_the_table_is_what_the_attacks_left_right(finished):
    _, output, errors = finished
    attacks = re.findall(r"^(?:clean|PGD-20|APGD-T): ([\d.]+ ± [\d.]+) % right", errors, re.MULTILINE)
    assert [number for _, numbers in table(output) for number in re.findall(r"[\d.]+ ± [\d.]+", numbers)] == attacks


def test_each_epoch_shows_both_loss_terms_and_nothing_redraws_into_a_pipe(finished):
    _, output, errors = finished
    assert re.search(r"^teacher: epoch 1/1: loss \d", output, re.MULTILINE)
    assert re.search(r"^student: epoch 1/1: guidance \d.*, consistency \d.*, clean \d.*PGD \d", output, re.MULTILINE)
    assert "%|" not in output + errors  # a progress bar


def test_the_picture_is_a_png_and_the_only_file(finished):
    folder, _, _ = finished
    (picture,) = (path for path in folder.rglob("*") if path.is_file())
    assert picture == folder / "new" / "a.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(("seed", "same"), [("0", True), ("1", False)])
def test_a_seed_stands_for_its_table(quickstart, finished, tmp_path, capsys, seed, same):
    out = ["--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert quickstart.main([*TINY, "--seed", seed, *out]) == 0
    assert (table(capsys.readouterr().out) == table(finished[1])) is same


def test_ctrl_c_in_training_leaves_no_file(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "--teacher-epochs", "1", "--epochs", "1000", "--out", str(tmp_path / "a.png")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    ) as run:
        printed = b""
        while b"student: epoch" not in printed:
            printed += (read := run.stdout.read1())
            assert read, run.stderr.read().decode()
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 130
    assert errors.decode().splitlines()[-1] == "interrupted: no picture written"
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_saving_keeps_the_old_picture(quickstart, tmp_path, monkeypatch):
    def half(figure, file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    out = tmp_path / "a.png"
    out.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    assert quickstart.main([*TINY, "--recipe", "literal", "--device", "cpu", "--out", str(out)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert out.read_bytes() == b"old"


def test_an_epoch_of_adversarial_training_helps_against_the_attack(quickstart):
    options = quickstart.Options(teacher_epochs=3, epochs=1, device="cpu", tau=2.0)
    data = quickstart.load("digits", Path(), download=False, seed=0, validation=200)
    train, validation = (quickstart.default_collate([*images]) for images in (data.train, data.validation))
    teacher = quickstart.train_teacher(train, options)
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    _, (before, after) = quickstart.train_student(teacher, train, validation, options)
    assert before.clean > 0.9
    assert after.robust > before.robust + 0.05
    assert after.guidance < before.guidance
    assert after.consistency < before.consistency
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


@pytest.fixture
def rows(quickstart):
    """A function that makes the three rows of a model's table."""
    return lambda *accuracies: [quickstart.Row("", accuracy, 1.0, 20, 1.0, {}) for accuracy in accuracies]


def test_a_collapse_and_what_the_attacks_find_suspicious_are_warned_of(quickstart, rows, capsys):
    teacher, student = (rows(100, 50, 45), {}), (rows(81, 75, 60), {})
    quickstart.report({"teacher": teacher, "student": student}, quickstart.Options())
    assert "warning" not in capsys.readouterr().out
    student = rows(75, 75, 60), {"pgd-gap": "PGD-20 is far above."}
    quickstart.report({"teacher": teacher, "student": student}, quickstart.Options())
    printed = capsys.readouterr().out
    assert "warning: student: PGD-20 is far above." in printed
    assert "warning: the student is 25.0 points below the teacher" in printed


def test_apgd_has_the_steps_and_targets_that_are_printed(quickstart, monkeypatch):
    test = torch.rand(10, 1, 8, 8), torch.arange(10)
    budgets = []
    monkeypatch.setattr(
        quickstart.Evaluation, "run", lambda self, attacks, budget: budgets.append((attacks, budget)) or {}
    )
    quickstart.attack({"model": quickstart.DigitNet()}, test, quickstart.Options(apgd_steps=7, device="cpu"))
    assert budgets == [(("pgd20", "apgd"), quickstart.Budget(apgd_steps=7, targets=3))]


def test_help_explains_every_option(quickstart, capsys):
    with pytest.raises(SystemExit) as exit_:
        quickstart.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert exit_.value.code == 0
    options = re.findall(r"(--[a-z-]+) \S", text.split("--help show this help")[1])
    assert len(options) == 14
    for option in options:
        assert re.search(rf"{option} \S.*?\(default: ", text), option


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--eps", "0", "--eps: got '0', wanted a number in (0, 255]"),
        ("--eps", "nan", "--eps: got 'nan', wanted a number in (0, 255]"),
        ("--epochs", "0", "--epochs: got '0', wanted a whole number in [1, 1000]"),
        ("--epochs", "1.5", "--epochs: got '1.5', wanted a whole number in [1, 1000]"),
        ("--teacher-epochs", "x", "--teacher-epochs: got 'x', wanted a whole number in [1, 1000]"),
        ("--tau", "0", "--tau: got '0', wanted a number in [0.01, 100]"),
        ("--beta", "-1", "--beta: got '-1', wanted a number in [0, 100]"),
        ("--lr", "inf", "--lr: got 'inf', wanted a number in (0, 10]"),
        ("--batch-size", "1", "--batch-size: got '1', wanted a whole number in [2, 1000]"),
        ("--apgd-steps", "0", "--apgd-steps: got '0', wanted a whole number in [1, 1000]"),
        ("--seed", "-1", "--seed: got '-1', wanted a whole number in [0, 4294967295]"),
        ("--recipe", "magic", "invalid choice 'magic' for argument '--recipe'"),
        ("--eps", "8", "error: --eps must be in [0, 1] for norm linf, got 8: pixels are in [0, 1], so write 8/255"),
        ("--device", "abacus", "error: --device: got 'abacus', wanted auto, or a device that works"),
        ("--device", "meta", "error: --device: got 'meta', wanted auto, or a device that works"),
        ("--out", "a.jpg", "error: --out must name a .png file, got a.jpg"),
        ("--out", "/dev/null/a.png", "error: --out: the folder /dev/null cannot be written to: "),
    ],
)
def test_a_wrong_option_is_named_with_what_came_and_what_was_wanted(quickstart, capsys, option, value, wanted):
    try:
        code = quickstart.main([option, value])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert wanted in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(("given", "tau"), [([], 5), (["--tau", "3"], 3)])
def test_tau_is_the_recipes_unless_given(quickstart, tmp_path, monkeypatch, given, tau):
    seen = []

    def stop(train, options):
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "train_teacher", stop)
    options = ["--recipe", "literal", *given, "--beta", "0", "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert quickstart.main(options) == 130
    assert [(options.tau, options.beta, options.device) for options in seen] == [(tau, 0, "cpu")]
