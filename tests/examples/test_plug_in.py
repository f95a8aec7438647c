"""The scripts of plug_in/ run as they stand, and docs/migrate_from_trades.md runs and is right."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "plug_in"
MIGRATION = ROOT / "docs" / "migrate_from_trades.md"
NEEDS = {"accelerate": "accelerate", "art": "art", "fabric": "lightning", "lightning": "lightning"}
NEEDS |= {"torchattacks": "torchattacks", "trades": "torch"}


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("ignore")  # of the libraries, about one another
def test_each_script_runs_and_makes_its_student_robust(name, monkeypatch, capsys):
    pytest.importorskip(NEEDS[name])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "yours", raising=False)  # each script trains a teacher and a student of its own
    yours = importlib.import_module("yours")
    yours.report(yours.student.train())
    yours.report(yours.teacher.train())
    runpy.run_path(str(SCRIPTS / f"with_{name}.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "yours")
    numbers = re.findall(r"^clean ([\d.]+)%, under PGD ([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    _, (_, teacher), (clean, student) = [tuple(map(float, pair)) for pair in numbers]
    assert clean > 60
    assert student > teacher + 15


def test_every_script_is_tested():
    assert {path.stem.removeprefix("with_") for path in SCRIPTS.glob("with_*.py")} == set(NEEDS)


@pytest.fixture(scope="module")
def migrated():
    """The names that the page's Python defines, run from top to bottom."""
    torch.manual_seed(0)
    text = MIGRATION.read_text()
    blocks = [*re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    assert len(blocks) == 3
    namespace = {"__name__": "migrate_from_trades"}
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that an error names the page's own line
        exec(compile("\n" * above + block[1], MIGRATION, "exec"), namespace)
    return namespace


def test_the_loops_of_the_migration_page_train(migrated):
    assert migrated["loss"].isfinite()
    assert all(parameter.grad.abs().max() > 0 for parameter in migrated["model"].parameters())
    assert migrated["model"].training


def test_the_teacher_of_the_migration_page_has_learned_its_images(migrated):
    x, y = (torch.cat(part) for part in zip(*migrated["loader"], strict=True))
    with torch.no_grad():
        fresh, trained = (F.cross_entropy(model.eval()(x), y) for model in (migrated["net"](), migrated["teacher"]))
    assert trained < 0.7 * fresh
    weights = migrated["criterion"].teacher.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in migrated["teacher"].state_dict().items())


def test_the_attack_of_the_migration_page_wakes_no_frozen_module(migrated):
    model, (x, y) = migrated["model"], migrated["loader"][0]
    model[2].eval()
    migrated["attack"](model, x, y)
    assert [module.training for module in model] == [True, True, False, True, True]
    model.train()


def test_beta_weighs_the_same_consistency_term_as_in_trades(migrated):
    model, criterion, (x, _) = migrated["model"].eval(), migrated["criterion"], migrated["loader"][0]
    x_adv = x.flip(2)  # far away: the term is not small
    clean, adv = model(x), model(x_adv)
    trades = F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="batchmean")
    assert trades > 1e-4
    consistency = criterion.terms(clean_logits=clean, adv_logits=adv, x=x).consistency.mean()
    assert consistency.item() == pytest.approx(trades.item(), rel=1e-4)


def test_the_migration_page_says_of_every_numbered_line_what_becomes_of_it():
    text = MIGRATION.read_text()
    before, rest = text.split("## After")
    table = rest.split("## Line by line")[1]
    numbers = set(re.findall(r"# (\d)$", before, re.MULTILINE))
    assert numbers == set(re.findall(r"\((\d)\) \|", table)) | set(re.findall(r"\((\d)\)", table))
    assert numbers == set("12345")
