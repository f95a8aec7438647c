"""The commands of examples/README.md run as they stand, but for the data and for their length."""

import re
import shlex
from pathlib import Path

import pytest

from tests.examples_path import EXAMPLES, imported

pytest.importorskip("matplotlib")
pytest.importorskip("pyautoattack")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

FEW = ["--epochs", "1", "--train-samples", "2", "--validation", "2", "--batch-size", "2", "--workers", "0"]
AUTOATTACK = ["--samples", "1", "--attacks", "autoattack"]
# Appended, so that it has the last word. A CPU takes minutes for a step of WRN-34-10 in bf16.
SHORTER = {
    "train": [*FEW, "--amp", "none", "--steps", "1", "--apgd-check", "0"],
    "evaluate": [*AUTOATTACK, "--apgd-steps", "1", "--apgd-targets", "1", "--fab-steps", "1", "--square-queries", "1"],
    "plot_run": [],
}


def commands(file: Path) -> list[tuple[str, str, list[str]]]:
    """Its commands that train, evaluate or plot: how each is started, its name and its options, with fake data."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", file.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if command := re.fullmatch(r"(python|torchrun --\S+) examples/(train|evaluate|plot_run)\.py (.*)", line):
                start, name, options = command.groups()
                found.append((start, name, shlex.split(options.replace("--dataset cifar10", "--dataset fake"))))
    return found


@pytest.fixture(scope="module")
def examples():
    with imported(*SHORTER) as modules:
        yield modules


def test_they_run_one_after_the_other(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for start, name, options in commands(EXAMPLES / "README.md"):
        if start == "python":
            assert getattr(examples, name).main([*options, *SHORTER[name]]) == 0, (name, options)
            ran.append(name)
        else:
            assert examples.train.parse(options).dataset == "fake"
    assert ran == [*(2 * ["train", "train", "evaluate", "plot_run"]), *(3 * ["train"])]
    for run, arch in (("r18", "resnet18"), ("wrn", "wrn-34-10")):
        assert {path.name for path in Path("out", run).iterdir()} == {
            *("best.pt", "config.json", "last.pt", "log.csv", "curves.png"),
            *(f"evaluation-linf-0.03137.{kind}" for kind in ("json", "md")),
        }
        assert f'"arch": "{arch}"' in Path("out", run, "config.json").read_text()
