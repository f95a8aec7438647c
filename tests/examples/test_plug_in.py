"""The criterion trains with other libraries' attacks and loops, and docs/migrate_from_trades.md runs and is right."""

import builtins
import re
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from cktat_loss import CKTATLoss, warm_start
from tests.examples_path import imported

MIGRATION = Path(__file__).parents[2] / "docs" / "migrate_from_trades.md"


@pytest.fixture(scope="module")
def plug_in():
    with imported("plug_in") as modules:
        yield modules.plug_in


def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


class Setting:
    """Images of four classes, a teacher that knows them, and a student that starts as the teacher."""

    shape, classes, eps = (1, 8, 8), 4, 0.1

    def __init__(self):
        self.x = torch.rand(96, *self.shape) / 2
        self.y = torch.arange(96) % 4
        for k in range(4):
            self.x[self.y == k, :, 2 * k : 2 * k + 2] += 0.4
        self.batches = [*zip(self.x.split(16), self.y.split(16), strict=True)]
        teacher = net()
        optimizer = torch.optim.Adam(teacher.parameters(), 0.02)
        for _ in range(10):
            for x, y in self.batches:
                optimizer.zero_grad()
                F.cross_entropy(teacher(x), y).backward()
                optimizer.step()
        assert (teacher.eval()(self.x).argmax(1) == self.y).all()
        self.student = net()
        warm_start(self.student, teacher)
        self.teacher = teacher
        self.criterion = CKTATLoss(teacher, tau=2.0, adaptive=True, detach_clean=True)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05)

    def attack(self, plug_in, name):
        extra = {"shape": self.shape, "classes": self.classes} if name == "art" else {}
        return getattr(plug_in, f"{name}_pgd")(self.student, eps=self.eps, **extra)

    def train(self, plug_in, name):
        """Two passes, with the attack or with the loop of this name: the losses."""
        attack = self.attack(plug_in, name if name in ATTACKS else "own")
        if name == "lightning":
            loader = DataLoader([*zip(self.x, self.y, strict=True)] * 2, batch_size=16)
            return plug_in.train_with_lightning(self.student, self.teacher, loader, attack)
        loop = plug_in.train_with_fabric if name == "fabric" else plug_in.train
        return loop(self.student, self.criterion, self.optimizer, 2 * self.batches, attack)


@pytest.fixture
def setting():
    return Setting()


def require(name):
    """Skip where the optional library is missing."""
    pytest.importorskip("lightning" if name == "fabric" else name)


ATTACKS, LOOPS = ["torchattacks", "art"], ["lightning", "fabric"]
# Lightning 2.6 asks torch 2.14's pytrees in a way that torch deprecates.
quiet = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
# It recommends workers for any loader without, and asks whether a teacher in eval mode is meant: it is.
no_advice = pytest.mark.filterwarnings("ignore:.*(does not have many workers|in eval mode at the start of training)")


@quiet
@no_advice
@pytest.mark.parametrize("name", [*ATTACKS, *LOOPS])
def test_the_loss_falls_and_the_teacher_stays(plug_in, setting, name):
    require(name)
    student = {key: value.clone() for key, value in setting.student.state_dict().items()}
    teacher = {key: value.clone() for key, value in setting.criterion.teacher.state_dict().items()}
    losses = setting.train(plug_in, name)
    assert len(losses) == 12
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert all(not torch.equal(value, student[key]) for key, value in setting.student.state_dict().items())
    assert all(torch.equal(value, teacher[key]) for key, value in setting.criterion.teacher.state_dict().items())


@pytest.mark.parametrize("name", ["torchattacks", "art", "fabric"])
def test_a_frozen_batchnorm_stays_frozen(plug_in, setting, name):
    require(name)
    setting.student[1].eval()
    before = setting.student[1].running_mean.clone()
    setting.train(plug_in, name)
    assert [module.training for module in setting.student] == [True, False, True, True, True]
    assert torch.equal(setting.student[1].running_mean, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_is_as_strong_as_ours(plug_in, setting, name):
    require(name)
    for module in setting.student:
        module.eval()
    attack, x, y = setting.attack(plug_in, name), setting.x, setting.y
    x_adv, ours = attack(x, y), setting.attack(plug_in, "own")(x, y)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    with torch.no_grad():
        clean, theirs, own = (F.cross_entropy(setting.student(images), y) for images in (x, x_adv, ours))
    assert own > 1.5 * clean
    assert theirs == pytest.approx(own.item(), rel=0.3)  # ART's start is drawn from NumPy's generator, unseeded here


@quiet
@no_advice
def test_a_resumed_lightning_run_has_the_teacher_of_its_checkpoint(plug_in, setting, tmp_path, monkeypatch):
    require("lightning")
    criteria = []

    def kept(student, criterion, *batch):
        criteria.append(criterion)
        return loss_of(student, criterion, *batch)

    loss_of = plug_in.loss_of
    monkeypatch.setattr(plug_in, "loss_of", kept)
    loader = DataLoader([*zip(setting.x, setting.y, strict=True)], batch_size=16)
    attack, checkpoint = setting.attack(plug_in, "own"), tmp_path / "run.ckpt"
    trained = setting.teacher.state_dict()
    plug_in.train_with_lightning(setting.student, setting.teacher, loader, attack, epochs=1, checkpoint=checkpoint)
    # A new process knows none of the weights: all of them come from the checkpoint.
    plug_in.train_with_lightning(net(), net(), loader, attack, epochs=2, checkpoint=checkpoint)
    assert len(criteria) == 12
    for criterion in criteria:
        assert all(torch.equal(value, trained[key]) for key, value in criterion.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("name", "package", "pip"),
    [
        ("torchattacks", "torchattacks", "torchattacks"),
        ("art", "art", "adversarial-robustness-toolbox"),
        ("lightning", "lightning", "lightning"),
        ("fabric", "lightning", "lightning"),
    ],
)
def test_a_missing_library_is_named_with_how_to_get_it(plug_in, setting, monkeypatch, name, package, pip):
    genuine = builtins.__import__

    def without(module, *rest):
        if module.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return genuine(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError) as error:
        setting.train(plug_in, name)
    shown = "".join(traceback.format_exception(error.value))
    assert f"No module named '{package}'" in shown
    assert f"# pip install {pip}\n" in shown


@pytest.fixture(scope="module")
def migrated():
    """What the page's Python leaves behind, from top to bottom."""
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
