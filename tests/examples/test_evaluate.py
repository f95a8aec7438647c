"""evaluate.py attacks what it says with what it says, and warns of the right models only."""

import json
import re
import runpy
import sys

import evaluate
import pyautoattack
import pytest
import torch
from images import load
from networks import build
from torch import nn

ATTACKS = ("clean", "PGD-20", "CW-30", "APGD-CE", "APGD-T", "FAB-T", "Square")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Shorten the attacks."""
    genuine = pyautoattack.AutoAttack

    def quick(*arguments, **options):
        auto = genuine(*arguments, **options)
        for apgd in (auto.apgd, auto.apgd_targeted):
            apgd.n_iter = 5
            apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = 1, 1, 1
        auto.fab.n_iter, auto.square.n_queries = 3, 60
        return auto

    monkeypatch.setattr(pyautoattack, "AutoAttack", quick)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A net that has seen a few clean digits, as train.py saves one."""
    torch.manual_seed(0)
    train = load("digits").train
    model = build("digits", "digits", 10)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for x, y in torch.utils.data.DataLoader(train, 64, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("run") / "best.pt"
    facts = {"arch": "digits", "dataset": "digits", "classes": 10, "norm": "linf", "eps": 0.05}
    torch.save({**facts, "model": model.state_dict()}, path)
    return path


class Linear(nn.Module):
    """Logits of scale `scale`, through `f`, that do not depend on brightness, so that all classes are predicted."""

    def __init__(self, classes=10, scale=1.0, f=lambda logits: logits):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
        with torch.no_grad():
            self.net[1].weight -= self.net[1].weight.mean(1, keepdim=True)
            self.net[1].bias.zero_()
        self.scale, self.f = scale, f

    def forward(self, x):
        return self.f(self.scale * self.net(x))


def batch(model, n=60):
    """Return images away from 0 and 1, so that these limits do not matter, and the model's own predictions."""
    x = 0.3 + 0.4 * torch.rand(n, 1, 8, 8)
    with torch.no_grad():
        return x, model.eval()(x).argmax(1)


def test_a_run_is_evaluated_at_its_own_eps(checkpoint, capsys):
    evaluate.main([str(checkpoint.parent), "--samples", "30", "--batch", "20"])
    report = json.loads((checkpoint.parent / "evaluation-linf-0.05.json").read_text())
    assert list(report["accuracy"]) == [*ATTACKS, "AutoAttack"]
    assert (report["norm"], report["eps"], report["images"], report["dataset"]) == ("linf", 0.05, 30, "digits")
    printed = capsys.readouterr().out
    assert f"{checkpoint.parent} on 30 test images of digits, linf, eps 0.05\n" in printed
    table = dict(re.findall(r"^([\w-]+) +([\d.]+) ± [\d.]+ % +\d+ s$", printed, re.MULTILINE))
    assert {name: f"{100 * share:.1f}" for name, share in report["accuracy"].items() if name != "AutoAttack"} == table
    chain = [report["accuracy"][name] for name in ("clean", "APGD-CE", "APGD-T", "FAB-T", "Square", "AutoAttack")]
    assert chain == sorted(chain, reverse=True)
    assert chain[0] > 0.6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--eps", "0.1"], "linf, eps 0.1, but trained with linf, eps 0.05"),
        (["--norm", "l2"], "l2, eps 0.502, but trained with linf, eps 0.05"),
    ],
)
def test_another_eps_than_the_trainings_is_told(checkpoint, capsys, tmp_path, options, told):
    evaluate.main([str(checkpoint), *options, "--samples", "4", "--out", str(tmp_path / "report.json")])
    assert f"4 test images of digits, {told}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["eps"] == pytest.approx(
        float(told.split()[2][:-1]), rel=1e-3
    )


def test_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef load(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    evaluate.main(["mine:load", "--dataset", "digits", "--samples", "4"])
    assert "mine:load on 4 test images of digits, linf, eps 0.03137\n" in capsys.readouterr().out
    assert (tmp_path / "evaluation-linf-0.03137.json").exists()


@pytest.mark.parametrize(("norm", "order", "eps"), [("linf", 1, 0.005), ("l2", 2, 0.04)])
def test_on_a_linear_model_the_attacks_find_what_can_be_broken(norm, order, eps):
    model = Linear()
    x, y = batch(model, 40)
    weight = model.net[1].weight.detach()
    gaps = (model(x).gather(1, y[:, None]) - model(x)).detach()
    reach = eps * (weight[y][:, None] - weight[None]).norm(order, dim=2)  # the largest change of each gap
    robust = ((gaps > reach) | (torch.arange(10) == y[:, None])).all(1).double().mean().item()
    assert 0.2 < robust < 0.8
    accuracy, warnings = evaluate.evaluate(model, x, y, eps=eps, norm=norm, batch=16)
    assert accuracy["AutoAttack"] == accuracy["APGD-T"] == pytest.approx(robust)
    assert robust <= accuracy["CW-30"] <= robust + 0.05
    assert warnings == []


def test_the_cw_margin_is_the_best_wrong_logit_minus_the_labels():
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 1])
    assert evaluate.margin(logits, y).tolist() == [2.0 - 3.0, 3.0 - 1.0]


def test_few_classes_and_no_images_left_are_no_trouble():
    model = Linear(classes=3)
    accuracy, warnings = evaluate.evaluate(model, *batch(model, 5), eps=0.3)
    assert list(accuracy) == ["clean", "PGD-20", "CW-30", "APGD-CE", "FAB-T", "Square", "AutoAttack"]
    assert accuracy["AutoAttack"] == 0
    assert [text for text in warnings if "without APGD-T" in text]


class Noisy(Linear):
    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x))


class Quantised(Linear):
    """Gradients of zero, yet steps that Square finds."""

    def forward(self, x):
        return super().forward((20 * x).round() / 20)


MODELS = {
    "plain": (Linear, None),
    "log-probabilities": (lambda: Linear(f=lambda logits: logits.log_softmax(1)), None),
    "probabilities": (lambda: Linear(f=lambda logits: logits.softmax(1)), "look like probabilities"),
    "noisy": (Noisy, "Two forwards of the same images differ"),
    "quantised": (Quantised, "100% of the images have a gradient of 0 or NaN"),
    "saturated": (lambda: Linear(scale=1e5), "of the images have a gradient of 0 or NaN"),
}


@pytest.mark.parametrize("name", MODELS)
def test_signs_of_masked_gradients(name):
    make, sign = MODELS[name]
    found = evaluate.inspect(make(), torch.rand(100, 1, 8, 8), torch.arange(100) % 10)
    assert len(found) == (sign is not None)
    assert sign is None or sign in found[0]


def test_square_and_pgd_tell_of_masked_gradients():
    model = Quantised()
    x, y = batch(model)
    accuracy, warnings = evaluate.evaluate(model, x, y, eps=0.03)
    assert accuracy["Square"] < accuracy["FAB-T"] - 0.01
    assert [text for text in warnings if "Square, which sees no gradients, broke" in text]


def test_pgd_far_above_autoattack_is_warned_of(monkeypatch):
    monkeypatch.setattr(evaluate, "pgd", lambda model, x, y, **_: x)
    model = Linear()
    warnings = evaluate.evaluate(model, *batch(model), eps=0.05)[1]
    assert [text for text in warnings if "points above AutoAttack: it overstates the robustness" in text]


@pytest.mark.parametrize("f", [lambda logits: logits.detach(), lambda logits: logits * torch.nan])
def test_models_that_cannot_be_attacked_are_refused(f):
    with pytest.raises(ValueError, match="must give finite logits that have a gradient"):
        evaluate.inspect(Linear(f=f), torch.rand(9, 1, 8, 8), torch.arange(9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "nothing"),
        (["no.such:load", "--dataset", "digits"], r"no\.such:load cannot be called"),
        (["json:nothing", "--dataset", "digits"], "json:nothing cannot be called"),
        (["RUN", "--out", "/proc"], "--out /proc cannot be written"),
        (["RUN", "--dataset", "cifar10"], "cifar10 cannot be read from data"),
    ],
)
def test_mistakes_are_sentences(checkpoint, monkeypatch, options, message):
    argv = [str(checkpoint) if option == "RUN" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        runpy.run_path(evaluate.__file__, run_name="__main__")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eps", "8"], "so write 8/255"),
        (["--samples", "0"], "must be at least 1"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_options_that_make_no_sense_are_refused(checkpoint, capsys, options, message):
    with pytest.raises(SystemExit):
        evaluate.main([str(checkpoint), *options])
    assert message in capsys.readouterr().err
