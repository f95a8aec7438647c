"""evaluate.py attacks what it says with what it says, and raises its flags for the right models only."""

import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.examples_path import EXAMPLES, imported

pytest.importorskip("pyautoattack")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

QUICK = ["--apgd-steps", "3", "--apgd-targets", "2", "--fab-steps", "2", "--square-queries", "5"]


@pytest.fixture(scope="module")
def evaluate():
    with imported("evaluate") as modules:
        yield modules.evaluate


@pytest.fixture(scope="module")
def diagnostics(evaluate):
    return importlib.import_module("diagnostics")


@pytest.fixture(scope="module")
def checkpoint(evaluate, tmp_path_factory):
    """A net that has seen a few clean digits, as train.py saves one."""
    torch.manual_seed(0)
    data = importlib.import_module("data")
    digits = data.load("digits", Path(), download=False, seed=0, validation=0)
    model = importlib.import_module("models").build("digits", 10, size=8, channels=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for x, y in data.loader(digits.train, batch=64, seed=0, epoch=0, workers=0, train=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("run") / "best.pt"
    kind = {"arch": "digits", "dataset": "digits", "classes": 10, "size": 8, "channels": 1, "mean": [0.0], "std": [1.0]}
    blank = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save({"model": blank, "ema": model.state_dict(), **kind}, path)
    return path


@pytest.fixture(scope="module")
def report(evaluate, checkpoint, tmp_path_factory):
    """What one run of the command printed and wrote."""
    out = tmp_path_factory.mktemp("report") / "new"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        argv = [str(checkpoint), "--samples", "30", "--eps", "32/255", "--device", "cpu", "--out", str(out), *QUICK]
        assert evaluate.main(argv) == 0
    (json_path,), (md_path,) = out.glob("*.json"), out.glob("*.md")
    assert len([*out.iterdir()]) == 2
    return json.loads(json_path.read_text()), md_path.read_text(), "\n".join(printed)


def images(n, channels=1, size=8):
    """Away from 0 and 1, so that the pixels' limits do not matter."""
    return 0.3 + 0.4 * torch.rand(n, channels, size, size)


class Linear(nn.Module):
    """Logits of scale `scale`, through `f`; a brighter image has the same, so that all classes are predicted."""

    def __init__(self, classes=10, scale=1.0, f=lambda logits: logits):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
        with torch.no_grad():
            self.net[1].weight -= self.net[1].weight.mean(1, keepdim=True)
            self.net[1].bias.zero_()
        self.scale, self.f = scale, f

    def forward(self, x):
        return self.f(self.scale * self.net(x))


def evaluation(evaluate, model, n=60, eps=0.005, **options):
    """Of images whose labels are the model's own predictions."""
    x = images(n)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return evaluate.Evaluation(model, TensorDataset(x, y), eps=eps, **options)


def test_the_report_has_a_row_an_attack_with_budget_error_and_time(report):
    content, _, _ = report
    names = ["clean", "PGD-20", "PGD-100", "CW-30", "APGD-CE", "APGD-T", "FAB-T", "Square", "AutoAttack"]
    assert [row["attack"] for row in content["rows"]] == names
    budgets = {row["attack"]: row["budget"] for row in content["rows"]}
    assert budgets["PGD-100"]["steps"] == 100
    assert budgets["APGD-CE"] == {"steps": 3, "restarts": 1}
    assert budgets["APGD-T"] == {"steps": 3, "restarts": 1, "targets": 2}
    assert budgets["FAB-T"] == {"steps": 2, "restarts": 1, "targets": 2}
    assert budgets["Square"] == {"queries": 5, "restarts": 1}
    for row in content["rows"]:
        p = row["accuracy"] / 100
        assert row["standard_error"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 30))
        assert row["seconds"] > 0
    assert content["rows"][0]["accuracy"] > 60  # of the averaged weights: the others are all zero
    assert (content["eps"], content["norm"], content["seed"], content["images"]) == (32 / 255, "linf", 0, 30)
    assert {"Python", "torch", "pyautoattack", "cktat-loss"} == set(content["versions"])


def test_each_autoattack_stage_gets_what_the_last_one_left(report):
    rows = {row["attack"]: row for row in report[0]["rows"]}
    for before, after in itertools.pairwise(["clean", "APGD-CE", "APGD-T", "FAB-T", "Square"]):
        assert rows[after]["attacked"] == round(rows[before]["accuracy"] * 0.3)
        assert rows[after]["accuracy"] <= rows[before]["accuracy"]
    assert rows["AutoAttack"]["accuracy"] == rows["Square"]["accuracy"]


def test_apgd_is_autoattack_without_its_last_two(evaluate):
    budget = evaluate.Budget(apgd_steps=5, targets=2, fab_steps=2, square_queries=5)
    model, x = Linear(), images(40)
    dataset = TensorDataset(x, torch.arange(40) % 10)
    short, whole = (evaluate.Evaluation(model, dataset, eps=0.05) for _ in range(2))
    short.run(("apgd",), budget)
    whole.run(("autoattack",), budget)
    assert list(short.hits) == ["clean", "APGD-CE", "APGD-T"]
    assert all(torch.equal(hits, whole.hits[name]) for name, hits in short.hits.items())


def test_the_test_images_are_those_of_the_checkpoints_split(evaluate, checkpoint, tmp_path):
    path = tmp_path / "other.pt"
    torch.save({**torch.load(checkpoint), "split_seed": 5}, path)
    own, other = (evaluate.load_model(str(name), ema=True) for name in (checkpoint, path))
    assert own[1:] == ("digits", 0)
    assert other[1:] == ("digits", 5)


def test_markdown_and_json_say_the_same_and_are_printed(report):
    content, text, printed = report
    cells = re.findall(r"^\| \**([\w-]+)\** \| ([\d.]+) ± ([\d.]+) \| (\d+) \|", text, re.MULTILINE)
    rows = [
        (r["attack"], f"{r['accuracy']:.1f}", f"{r['standard_error']:.1f}", str(r["attacked"])) for r in content["rows"]
    ]
    assert cells == rows
    assert content["findings"]["not-standard"].endswith(importlib.import_module("diagnostics").ADVICE["not-standard"])
    assert all(f"- **warning: {name}.** {finding}\n" in text for name, finding in content["findings"].items())
    assert text in printed


@pytest.mark.parametrize(("norm", "order", "eps"), [("linf", 1, 0.005), ("l2", 2, 0.04)])
def test_on_a_linear_model_autoattack_finds_exactly_what_can_be_broken(evaluate, norm, order, eps):
    model = Linear()
    run = evaluation(evaluate, model, n=100, eps=eps, norm=norm)
    run.run(["cw", "autoattack"], evaluate.Budget(apgd_steps=30, fab_steps=5, square_queries=5))
    x, y = run.dataset.tensors
    weight = model.net[1].weight
    gaps = model(x).gather(1, y[:, None]) - model(x)
    reach = eps * (weight[y][:, None] - weight[None]).norm(order, dim=2)  # what eps can change of each gap at most
    robust = ((gaps > reach) | (torch.arange(10) == y[:, None])).all(1)
    assert 0.2 < robust.float().mean() < 0.8
    assert torch.equal(run.hits["Square"], robust)
    assert (run.hits["CW-30"] >= robust).all()
    assert run.hits["CW-30"].sum() <= robust.sum() + 5


def test_the_cw_margin_is_the_best_wrong_logit_less_that_of_the_label(evaluate):
    attacks = importlib.import_module("attacks")
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1])
    assert attacks.margin(logits, y).tolist() == [2.0 - 3.0, 3.0 - 1.0]


class Stubborn(Linear):
    """Cannot be moved, with a gradient that is not zero; counts its forwards."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return 1e-3 * super().forward(x) + torch.tensor([9.0, *range(9)]) / 3


def test_the_attacks_spend_the_budget_that_is_printed(evaluate):
    attacks = importlib.import_module("attacks")
    model, x, y = Stubborn(), images(4), torch.zeros(4, dtype=torch.int64)
    budget = evaluate.Budget(apgd_steps=7, targets=3, fab_steps=5, square_queries=11)
    spent = {}
    for attack in attacks.autoattack(model, norm="linf", eps=0.01, classes=10, budget=budget, seed=0):
        model.calls = 0
        with torch.no_grad():
            attack.perturb(x, y)
        spent[attack.name] = model.calls
    # APGD: its start and each step, and before that the prediction (for each target). FAB: in each step one for the
    # gradient and one for the outcome, and three more for each target. Square: its start, and the outcome.
    assert spent == {
        "APGD-CE": 1 + (1 + 7),
        "APGD-T": 1 + 3 * (1 + 1 + 7),
        "FAB-T": 1 + 3 * (2 * 5 + 3),
        "Square": 1 + 1 + 11 + 1,
    }


def test_an_attack_draws_the_same_whichever_others_are_run(evaluate, monkeypatch):
    drawn = []

    def fake(model, *, steps, **_):
        return evaluate.Attack(f"PGD-{steps}", {}, lambda x, y: (drawn.append((steps, torch.rand(1).item())), x)[1])

    monkeypatch.setattr(evaluate, "pgd_attack", fake)
    run = evaluation(evaluate, Linear(), n=5, seed=3)
    run.run(["pgd100"])
    run.run(["pgd20", "pgd100"])
    run.seed = 4
    run.run(["pgd100"])
    draws = [value for steps, value in drawn if steps == 100]
    assert draws[0] == draws[1] != draws[2]


def test_few_classes_and_images_left_are_no_trouble(evaluate):
    run = evaluation(evaluate, Linear(classes=3), n=5, eps=0.3, batch=1)
    findings = run.run(["autoattack"], evaluate.Budget(4, 9, 2, 5))
    assert [row.attack for row in run.rows] == ["clean", "APGD-CE", "FAB-T", "Square", "AutoAttack"]
    assert run.rows[2].budget["targets"] == 2
    assert run.rows[3].attacked == 0
    assert set(findings) == {"not-standard"}
    assert "no APGD-T, whose loss needs 4 classes" in findings["not-standard"]
    assert "targets" not in findings["not-standard"]


def test_parameters_get_no_gradients_and_modes_are_eval(evaluate):
    run = evaluation(evaluate, nn.Sequential(Linear(), nn.BatchNorm1d(10)), n=10)
    run.model.train()
    run = evaluate.Evaluation(run.model, run.dataset, eps=0.005)
    run.run(budget=evaluate.Budget(2, 2, 2, 2))
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert not any(module.training for module in run.model.modules())
    assert torch.equal(run.model[1].running_mean, torch.zeros(10))


def test_images_outside_the_ball_do_not_count_as_broken(evaluate, monkeypatch):
    run = evaluation(evaluate, Linear(), n=20)
    far = evaluate.Attack("PGD-20", {}, lambda x, y: x.flip(2))
    nan = evaluate.Attack("CW-30", {}, lambda x, y: x * torch.nan)
    monkeypatch.setattr(evaluate, "pgd_attack", lambda *_, name="PGD", **__: nan if name == "CW" else far)
    findings = run.run(["pgd20", "cw"])
    assert run.hits["PGD-20"].all()
    assert run.hits["CW-30"].all()
    assert run.outside == {"PGD-20": 20, "CW-30": 20}
    assert set(findings) == {"outside"}
    assert "PGD-20 (20), CW-30 (20)" in findings["outside"]


class Reversed(torch.autograd.Function):
    """The identity, with a gradient that points the wrong way."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Noisy(Linear):
    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x))


class Quantised(Linear):
    """Gradients of zero, yet steps that Square finds."""

    def forward(self, x):
        return super().forward((20 * x).round() / 20)


MODELS = {
    "plain": Linear,
    "probabilities": lambda: Linear(f=lambda logits: logits.softmax(1)),
    "log-probabilities": lambda: Linear(f=lambda logits: logits.log_softmax(1)),
    "positive": lambda: Linear(f=lambda logits: logits.softmax(1) * 3),
    "sums to one": lambda: Linear(f=lambda logits: logits - logits.mean(1, keepdim=True) + 0.1),
    "noisy": Noisy,
    "dropout": lambda: nn.Sequential(Linear(), nn.Dropout(0.5)),
    "quantised": Quantised,
    "saturated": lambda: Linear(scale=1e5),
    "constant": lambda: Linear(f=lambda logits: logits + 9 * torch.eye(10)[0]),
}
MODEL_FINDINGS = {
    "probabilities": {"probabilities"},
    "noisy": {"random"},
    "quantised": {"zero-gradients"},
    "saturated": {"zero-gradients"},
    "constant": {"one-class"},
}


@pytest.mark.parametrize("name", MODELS)
def test_flags_of_a_model(diagnostics, name):
    model, x = MODELS[name](), torch.rand(100, 1, 8, 8)
    findings = diagnostics.inspect_model(model, x, torch.arange(100) % 10)
    assert set(findings) == MODEL_FINDINGS.get(name, set())


def test_one_class_is_no_flag_where_the_labels_are_of_one(diagnostics):
    assert diagnostics.inspect_model(MODELS["constant"](), images(50), torch.zeros(50, dtype=torch.int64)) == {}


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        (lambda logits: logits.detach(), "model must be differentiable"),
        (lambda logits: logits * torch.nan, "model must give finite logits"),
        (lambda logits: logits / 0, "model must give finite logits"),
    ],
)
def test_models_that_cannot_be_attacked_are_refused(diagnostics, f, wanted):
    with pytest.raises(ValueError, match=wanted):
        diagnostics.inspect_model(Linear(f=f), images(9), torch.arange(9))


def test_normalised_images_are_refused(diagnostics):
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\], got values in \[-0.*, .*\]: normalise inside"):
        diagnostics.inspect_model(Linear(), images(9) - 0.5, torch.arange(9))


def run_findings(run, evaluate, attacks):
    return set(run.run(attacks, evaluate.Budget(apgd_steps=20, fab_steps=5, square_queries=300)))


def test_square_beats_gradients_where_they_are_masked(evaluate):
    masked = run_findings(evaluation(evaluate, Quantised(), n=40, eps=0.03), evaluate, ["autoattack"])
    plain = run_findings(evaluation(evaluate, Linear(), n=40, eps=0.03), evaluate, ["autoattack"])
    assert "square-beats-gradients" in masked
    assert plain == {"not-standard"}


@pytest.mark.parametrize("attack", ["autoattack", "apgd"])
def test_a_gap_between_pgd_and_autoattack_is_flagged(evaluate, attack):
    # The cross-entropy's gradient underflows at this scale; the loss of APGD-T does not know scales.
    saturated = run_findings(evaluation(evaluate, Linear(scale=1e5), n=40), evaluate, ["pgd20", attack])
    plain = run_findings(evaluation(evaluate, Linear(), n=40), evaluate, ["pgd20", attack])
    assert "pgd-gap" in saturated
    assert plain == ({"not-standard"} if attack == "autoattack" else set())


def test_an_attack_that_helps_is_flagged(evaluate):
    x = images(60)
    found = {}
    for name, f in (("reversed", Reversed.apply), ("plain", lambda logits: logits)):
        model = Linear(f=f)
        y = model(x).topk(2).indices[torch.arange(60), torch.arange(60) % 2]  # half the labels are the runner-up
        found[name] = run_findings(evaluate.Evaluation(model, TensorDataset(x, y), eps=0.005), evaluate, ["pgd20"])
    assert "attack-helps" in found["reversed"]
    assert found["plain"] == set()


@pytest.mark.parametrize(("fewer", "flag"), [({}, False), ({"targets": 8}, True), ({"square_queries": 4999}, True)])
def test_less_than_the_standard_budget_is_flagged(evaluate, diagnostics, fewer, flag):
    findings = diagnostics.inspect_budget(evaluate.Budget(**fewer), classes=10)
    assert set(findings) == ({"not-standard"} if flag else set())


def test_all_of_few_classes_are_a_standard_budget(evaluate, diagnostics):
    assert diagnostics.inspect_budget(evaluate.Budget(targets=4), classes=5) == {}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Somebody's folder, in which the command is given. What it imports there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {**sys.modules}
    yield tmp_path
    for name in {**sys.modules}:
        if before.get(name) is not sys.modules[name]:
            del sys.modules[name]
    sys.modules.update(before)


def test_a_model_of_ones_own_is_given_as_module_and_function(evaluate, elsewhere, capsys):
    (elsewhere / "mine.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    argv = ["mine:net", "--dataset", "digits", "--samples", "5", "--attacks", "pgd20", "--device", "cpu"]
    assert evaluate.main(argv) == 0
    assert "PGD-20" in capsys.readouterr().out
    assert {path.name for path in (elsewhere / "out").iterdir()} == {
        "evaluation-linf-0.03137.json",
        "evaluation-linf-0.03137.md",
    }


def test_modules_of_theirs_may_have_the_names_of_ours(tmp_path):
    """A checkout like TRADES', with modules named as ours, which are imported when the model runs, too."""
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert {"attacks", "data", "evaluate", "models", "pgd"} <= {*names}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("from . import net\n")
        (tmp_path / name / "net.py").write_text("SIZE = 64\n")
        (tmp_path / name / "late.py").write_text("SIZE = 64\n")
    (tmp_path / "mine.py").write_text(
        f"import {', '.join(names)}\n"
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        from data.late import SIZE\n"
        "        return super().forward(x.reshape(-1, SIZE))\n"
        f"def load(): return Net(sum(module.net.SIZE for module in [{', '.join(names)}]) // {len(names)}, 10)\n"
    )
    command = [sys.executable, str(EXAMPLES / "evaluate.py"), "mine:load", "--dataset", "digits", "--samples", "5"]
    ran = subprocess.run([*command, "--attacks", "pgd20"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "| PGD-20 |" in ran.stdout


MINE = """
import sys
from torch import nn

def needs_an_argument(path): pass
def raises(): return {}["key"]
def leaves(): sys.exit("usage: mine")
def text(): return "a model"
def pair():
    class Net(nn.Linear):
        def forward(self, x): return x, x
    return Net(1, 1)
def three(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("needs_an_argument", "missing 1 required positional argument: 'path'"),
        ("raises", "KeyError in {mine}, line 6: 'key'"),
        ("leaves", "SystemExit in {mine}, line 7: usage: mine"),
        ("text", "must return a torch.nn.Module, got str"),
        ("pair", "the model must return logits (N, classes), got tuple"),
        ("three", "--dataset digits has 10 classes, but the model's logits only 3"),
        ("nothing", "module 'mine' has no attribute 'nothing'"),
    ],
)
def test_what_is_wrong_with_a_model_of_ones_own_is_said_in_one_sentence(evaluate, elsewhere, capsys, function, message):
    (elsewhere / "mine.py").write_text(MINE)
    assert evaluate.main([f"mine:{function}", "--dataset", "digits", "--device", "cpu"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message.format(mine=elsewhere / "mine.py") in error


def test_the_images_are_drawn_by_the_seed(evaluate, checkpoint, tmp_path):
    accuracies = []
    for seed in ("1", "1", "2"):
        argv = [str(checkpoint), "--samples", "100", "--attacks", "clean", "--seed", seed, "--out", str(tmp_path)]
        assert evaluate.main(argv) == 0
        accuracies.append(json.loads(next(tmp_path.glob("*.json")).read_text())["rows"][0]["accuracy"])
    assert accuracies[0] == accuracies[1] != accuracies[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing.pt"], "CHECKPOINT must be a file, or module:function, got 'nothing.pt', which is neither"),
        (["no_such_module:f"], "No module named 'no_such_module'"),
        (["json:load"], "load() of json does not return a model (TypeError"),
        (["CHECKPOINT", "--dataset", "cifar10"], "--download"),
        (
            ["CHECKPOINT", "--dataset", "fake"],
            "--dataset fake has images of 3 x 32 x 32, which the model does not take",
        ),
        (
            ["CHECKPOINT", "--eps", "8"],
            "--eps must be in [0, 1] for norm linf, got 8: pixels are in [0, 1], so write 8/255",
        ),
        (["CHECKPOINT", "--norm", "l2", "--eps", "200"], "--eps must be in [0, 100] for norm l2, got 200"),
        (
            ["CHECKPOINT", "--attacks", "fgsm"],
            "--attacks must be some of clean,pgd20,pgd100,cw,autoattack,apgd, got 'fgsm'",
        ),
        (["CHECKPOINT", "--device", "abacus"], "--device: got 'abacus', wanted auto, or a device that works"),
        (["CHECKPOINT", "--out", "a/file"], "--out: the folder a/file cannot be written to: File exists"),
        (["CHECKPOINT", "--out", "a/file/b"], "--out: the folder a/file/b cannot be written to: Not a directory"),
        (["CHECKPOINT", "--out", "/proc"], "--out: the folder /proc cannot be written to"),
        (["a/file"], "a/file cannot be read as a checkpoint"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(evaluate, checkpoint, elsewhere, capsys, options, message):
    Path("a").mkdir()
    Path("a/file").touch()
    options = [str(checkpoint) if option == "CHECKPOINT" else option for option in options]
    assert evaluate.main(options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error


def test_a_full_disk_is_named_and_the_table_printed(evaluate, checkpoint, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert evaluate.main([str(checkpoint), "--samples", "5", "--attacks", "clean", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "| clean |" in printed.out
    assert printed.err.splitlines()[-1].startswith(f"error: {tmp_path}/evaluation-linf-0.03137.json cannot be written")
    assert "No space left on device" in printed.err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eps", "8/0"], "--eps: got '8/0', wanted a number in (0, 255]"),
        (["--eps", "1e400"], "--eps: got '1e400', wanted a number in (0, 255]"),
        (["--apgd-steps", "0"], "--apgd-steps: got '0', wanted a whole number"),
        (["--norm", "l3"], "invalid choice 'l3' for argument '--norm'"),
    ],
)
def test_a_wrong_option_is_named(evaluate, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["a.pt", *options])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(("norm", "name"), [("linf", "linf-0.03137"), ("l2", "l2-0.502")])
def test_eps_is_the_usual_one_of_the_norm(evaluate, checkpoint, tmp_path, norm, name):
    options = ["--norm", norm, "--samples", "5", "--attacks", "clean", "--out", str(tmp_path)]
    assert evaluate.main([str(checkpoint), *options]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"evaluation-{name}.json", f"evaluation-{name}.md"}
