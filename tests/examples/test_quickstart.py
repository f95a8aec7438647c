"""`make demo` does what it says, from its options to its picture, and its pgd() is safe to copy."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.examples_path import EXAMPLES, imported

pytest.importorskip("matplotlib")
pytest.importorskip("pyautoattack")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

COMMAND = [sys.executable, "-W", "error", str(EXAMPLES / "quickstart.py")]
TINY = ["--epochs", "1", "--teacher-epochs", "1", "--apgd-steps", "2", "--test-images", "20", "--batch-size", "256"]


@pytest.fixture(scope="module")
def quickstart():
    with imported("quickstart") as modules:
        yield modules.quickstart


@pytest.fixture
def model(quickstart):
    """A network in train mode with one module in eval mode, and with gradients that somebody still needs."""
    torch.manual_seed(0)
    model = quickstart.DigitNet(width=4)
    model[0][1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two tiny runs with the same seed, side by side."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    runs = [
        subprocess.Popen(
            [*COMMAND, *TINY, "--out", str(folder / "new" / "a.png")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    return [(folder, run, *run.communicate(timeout=120)) for folder, run in zip(folders, runs, strict=True)]


def table(output):
    return re.findall(r"^(teacher|student)((?: +[\d.]+ ± [\d.]+){3})$", output, re.MULTILINE)


def test_a_run_prints_the_table_the_budget_and_why(finished):
    _, run, output, errors = finished[0]
    assert run.returncode == 0, errors
    assert [name for name, _ in table(output)] == ["teacher", "student"]
    assert "recipe adaptive: tau = 2" in output
    assert "did not collapse" in output
    assert "APGD-CE, 2 steps" in output
    assert "3 targets x 2 steps" in output
    assert "warning: 2 APGD steps are too few" in output
    assert "20 test images" in output


def test_progress_bars_show_both_loss_terms(finished):
    assert re.search(r"student: 100%.*guidance \d.*consistency \d", finished[0][3])
    assert re.search(r"teacher: 100%", finished[0][3])


def test_the_picture_is_a_png_and_the_only_file(finished):
    for folder, *_ in finished:
        (picture,) = (path for path in folder.rglob("*") if path.is_file())
        assert picture == folder / "new" / "a.png"
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_the_same_seed_gives_the_same_table(finished):
    assert table(finished[0][2]) == table(finished[1][2])


def test_ctrl_c_in_training_leaves_no_file(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "--teacher-epochs", "1", "--epochs", "1000", "--out", str(tmp_path / "a.png")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    ) as run:
        errors = b""
        while b"student:" not in errors:
            errors += (read := run.stderr.read1())
            assert read, errors.decode()
        run.send_signal(signal.SIGINT)
        errors += run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert errors.decode().splitlines()[-1] == "interrupted: no picture written"
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def attacked(quickstart):
    """A function that makes results with so many hits of 20."""

    def make(name, clean=20, pgd=20, apgd=20, zero_gradients=False):
        labels = torch.arange(20) % 10
        hits = [torch.arange(20) < count for count in (clean, pgd, apgd)]
        images = torch.rand(20, 1, 8, 8)
        return quickstart.Attacked(name, zero_gradients, labels, labels, *hits, images, images, labels)

    return make


def test_ctrl_c_while_saving_keeps_the_old_picture(quickstart, attacked, tmp_path, monkeypatch):
    def half(figure, path, **_):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    out = tmp_path / "a.png"
    out.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    curves = quickstart.Curves([1.0], [1.0], [1.0], [1.0])
    with pytest.raises(KeyboardInterrupt):
        quickstart.save_figure(out, curves, attacked("teacher"), attacked("student"), eps=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert out.read_bytes() == b"old"


def test_a_gap_between_pgd_and_apgd_and_a_collapse_are_warned_of(quickstart, attacked, tmp_path, capsys):
    args = quickstart.parse_args(["--out", str(tmp_path / "a.png")])
    quickstart.report(attacked("teacher"), attacked("student"), args)
    assert "warning" not in capsys.readouterr().out
    quickstart.report(attacked("teacher"), attacked("student", 15, 15, 12, zero_gradients=True), args)
    printed = capsys.readouterr().out
    assert "warning: student: PGD-20 is 15.0 points above APGD" in printed
    assert "warning: student: APGD-T met gradients of exactly zero" in printed
    assert "warning: the student is 25.0 points below the teacher" in printed


def test_help_explains_every_option(quickstart, capsys):
    with pytest.raises(SystemExit) as exit_:
        quickstart.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    options = re.findall(r"(--[a-z-]+)", text.split("options:")[0])
    assert len(options) == 14
    for option in options:
        assert re.search(rf"{option} \S.*?default: ", text.split("options:")[1]), option


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--eps", "0", "got '0', wanted a number in (0, 1]"),
        ("--eps", "1.5", "got '1.5', wanted a number in (0, 1]"),
        ("--eps", "nan", "got 'nan', wanted a number in (0, 1]"),
        ("--epochs", "0", "got '0', wanted a whole number in [1, 1000]"),
        ("--epochs", "1.5", "got '1.5', wanted a whole number in [1, 1000]"),
        ("--teacher-epochs", "x", "got 'x', wanted a whole number in [1, 1000]"),
        ("--tau", "0", "got '0', wanted a number in [0.01, 100]"),
        ("--beta", "-1", "got '-1', wanted a number in [0, 100]"),
        ("--lr", "inf", "got 'inf', wanted a number in (0, 10]"),
        ("--batch-size", "1", "got '1', wanted a whole number in [2, 1000]"),
        ("--apgd-steps", "0", "got '0', wanted a whole number in [1, 1000]"),
        ("--seed", "-1", "got '-1', wanted a whole number in [0, 4294967295]"),
        ("--recipe", "magic", "invalid choice: 'magic'"),
        ("--device", "abacus", "got 'abacus', wanted auto, or a device that works"),
        ("--device", "meta", "got 'meta', wanted auto, or a device that works"),
        ("--out", "a.jpg", "got 'a.jpg', wanted a file whose name ends in .png"),
        ("--out", "/dev/null/a.png", "got '/dev/null/a.png', wanted a folder that can be written to"),
    ],
)
def test_a_wrong_option_is_named_with_what_came_and_what_was_wanted(quickstart, capsys, option, value, wanted):
    with pytest.raises(SystemExit) as exit_:
        quickstart.parse_args([option, value, "--epochs", "1"] if option != "--epochs" else [option, value])
    assert exit_.value.code == 2
    assert f"argument {option}: {wanted}" in capsys.readouterr().err


def test_tau_and_beta_are_the_recipes_unless_given(quickstart, tmp_path):
    out = ["--out", str(tmp_path / "a.png")]
    for name, recipe in quickstart.RECIPES.items():
        args = quickstart.parse_args(["--recipe", name, *out])
        assert (args.tau, args.beta) == (recipe.tau, recipe.beta)
    args = quickstart.parse_args(["--recipe", "literal", "--tau", "3", "--beta", "0", *out])
    assert (args.tau, args.beta) == (3, 0)


def test_the_device_is_the_one_that_is_named(quickstart, tmp_path):
    out = ["--out", str(tmp_path / "a.png")]
    assert quickstart.parse_args(["--device", "cpu", *out]).device == torch.device("cpu")
    assert isinstance(quickstart.parse_args(out).device, torch.device)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_pgd_stays_within_bounds_and_raises_the_loss(quickstart, model, grad_mode):
    x, y = torch.rand(32, 1, 8, 8).round(decimals=1), torch.arange(32) % 10
    with grad_mode():
        x_adv = quickstart.pgd(model, x, y, eps=0.2, steps=5, step_size=0.05)
    assert not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= 0.2 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    with quickstart.eval_mode(model), torch.no_grad():
        noisy = (x + 0.2 * torch.randn_like(x).sign()).clamp(0, 1)
        clean, noise, attack = (nn.functional.cross_entropy(model(images), y) for images in (x, noisy, x_adv))
    assert attack > max(clean, noise) + 0.03


def test_pgd_leaves_modes_gradients_and_statistics_alone(quickstart, model):
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quickstart.pgd(model, torch.rand(4, 1, 8, 8), torch.arange(4), eps=0.2, steps=2, step_size=0.05)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert all((parameter.grad == 3).all() and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_are_restored_when_the_model_raises(quickstart, model):
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError):
        quickstart.pgd(model, torch.rand(4, 3, 8, 8), torch.arange(4), eps=0.2, steps=2, step_size=0.05)
    assert {name: module.training for name, module in model.named_modules()} == modes


class Stubborn(nn.Module):
    """Always says 0, with gradients that lead nowhere; counts the forward passes."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 1e-3 * x.flatten(1)[:, :10] + torch.tensor([9.0, *range(9)]) / 3


def test_apgd_takes_the_steps_that_are_printed(quickstart, tmp_path):
    args = quickstart.parse_args(["--apgd-steps", "7", "--test-images", "10", "--out", str(tmp_path / "a.png")])
    model, n, targets = Stubborn(), 7, quickstart.APGD_TARGETS
    x, y = torch.rand(10, 1, 8, 8), torch.zeros(10, dtype=torch.int64)
    result = quickstart.attack("model", model, (x, y), args)
    assert result.apgd.all()
    # A run of APGD evaluates its start and each step; around it, one pass for the predictions (of each target).
    apgd = (1 + 1 + n) + 1 + targets * (1 + 1 + n)
    pgd, own = 20, 5
    assert model.calls == apgd + pgd + own
