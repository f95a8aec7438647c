"""`make demo` does what it says, from its options to its picture."""

import re
import sys

import images
import pytest
import quickstart
import torch


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """600 training, 40 validation and 100 test images: every digit is among them."""
    parts = images.load("digits")
    few = [torch.utils.data.Subset(parts[i], range(n)) for i, n in ((0, 600), (1, 40), (2, 100))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "load", lambda name: few)
        patch.setattr(quickstart, "TEACHER_EPOCHS", 5)
        yield


def table(output):
    return re.findall(r"^(teacher|student)((?: +[\d.]+ ± [\d.]+){3})$", output, re.MULTILINE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run: its folder and its output."""
    folder, printed = tmp_path_factory.mktemp("finished"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        quickstart.main(["--epochs", "4", "--out", str(folder / "new" / "a.png")])
    return folder, "\n".join(printed)


def test_training_helps_against_the_attack(finished):
    (_, teacher), (_, student) = table(finished[1])
    clean, _, apgd = (
        [float(cell) for cell in re.findall(r"([\d.]+) ±", cells)] for cells in (teacher, student, student)
    )
    assert clean[0] > 90
    assert apgd[2] > clean[2] + 5


def test_each_epoch_shows_both_loss_terms(finished):
    assert re.search(r"^teacher: epoch 5/5: loss \d", finished[1], re.MULTILINE)
    rows = r"^student: epoch \d/4: guidance \d.*, consistency \d.*, clean \d.*%, PGD \d.*%$"
    assert len(re.findall(rows, finished[1], re.MULTILINE)) == 4


def test_the_picture_is_a_png_and_the_only_file(finished):
    (picture,) = (path for path in finished[0].rglob("*") if path.is_file())
    assert picture == finished[0] / "new" / "a.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_student_starts_as_its_teacher_and_the_teacher_stays():
    teacher, student = quickstart.digit_net(), quickstart.digit_net()
    quickstart.warm_start(student, teacher)
    criterion = quickstart.CKTATLoss(teacher, **quickstart.RECIPES["adaptive"])
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    guidance, consistency, *_ = quickstart.validate(student, criterion, x, y, 0.1)
    assert guidance > 0
    assert consistency > 0
    args = type("Args", (), {"eps": 0.1, "epochs": 1, "recipe": "adaptive"})
    before = {name: value.clone() for name, value in criterion.teacher.state_dict().items()}
    curves = quickstart.train_student(student, criterion, [x, y], [x, y], args)
    assert len(curves) == 2
    assert not torch.equal(student[0].weight, teacher[0].weight)
    assert all(torch.equal(value, before[name]) for name, value in criterion.teacher.state_dict().items())


def test_a_collapse_is_warned_of(monkeypatch, tmp_path, capsys):
    shares = iter([[98.0, 0.0, 0.0], [10.0, 10.0, 10.0]])
    monkeypatch.setattr(quickstart, "attacked", lambda *_: next(shares))
    monkeypatch.setattr(quickstart, "fit", lambda *_: iter([(1, 0.0)]))
    quickstart.main(["--recipe", "literal", "--out", str(tmp_path / "a.png")])
    printed = capsys.readouterr().out
    assert "recipe literal: {'tau': 5.0, 'beta': 6.0}" in printed
    assert "warning: the student collapsed towards a constant prediction" in printed


@pytest.mark.parametrize(
    "options", [["--eps", "8"], ["--eps", "0"], ["--epochs", "0"], ["--out", "a.jpg"], ["--recipe", "x"]]
)
def test_options_that_make_no_sense_are_refused(capsys, options):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(options)
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("pyautoattack", "pyautoattack"), ("matplotlib", "matplotlib")])
def test_a_missing_package_is_named(monkeypatch, module, package):
    for loaded in [*sys.modules]:
        if loaded.partition(".")[0] == module:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    calls = {"pyautoattack": lambda: quickstart.attacked(None, None, None, None)}
    calls["matplotlib"] = lambda: quickstart.draw("", [], [], None, None, 0.1)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        calls[module]()
