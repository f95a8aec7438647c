"""The commands of examples/README.md for CIFAR-10 run as they stand, but for the data and for their length."""

import re
import shlex
from pathlib import Path

import pytest

from tests.examples_path import imported

pytest.importorskip("matplotlib")
pytest.importorskip("pyautoattack")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")

README = Path(__file__).parents[2] / "examples" / "README.md"
FEW = ["--epochs", "1", "--train-samples", "2", "--validation", "2", "--batch-size", "2", "--workers", "0"]
AUTOATTACK = ["--samples", "1", "--attacks", "autoattack"]
# Appended, so that it has the last word. A CPU takes minutes for a step of WRN-34-10 in bf16.
SHORTER = {
    "train_clean": [*FEW, "--amp", "none"],
    "train_cktat": [*FEW, "--amp", "none", "--steps", "1", "--apgd-check", "0"],
    "evaluate": [*AUTOATTACK, "--apgd-steps", "1", "--apgd-targets", "1", "--fab-steps", "1", "--square-queries", "1"],
    "plot_run": [],
}


def commands() -> list[tuple[str, list[str]]]:
    """The section's commands: how each is started, and its options, with fake data."""
    section = re.search(r"^## Training on CIFAR-10$(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)[1]
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            start, name, options = re.fullmatch(r"(python|torchrun --\S+) examples/(\w+)\.py (.*)", line).groups()
            found.append((start, name, shlex.split(options.replace("--dataset cifar10", "--dataset fake"))))
    return found


@pytest.fixture(scope="module")
def examples():
    with imported(*SHORTER) as modules:
        yield modules


def test_they_run_one_after_the_other(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for start, name, options in commands():
        if start == "python":
            assert getattr(examples, name).main([*options, *SHORTER[name]]) == 0, (name, options)
            ran.append(name)
    assert ran == [*(2 * ["train_clean", "train_cktat", "evaluate", "plot_run"]), "train_cktat"]
    for run, arch in (("r18", "resnet18"), ("wrn", "wrn-34-10")):
        assert {path.name for path in Path("out", run).iterdir()} == {
            *("best.pt", "config.json", "last.pt", "log.csv", "curves.png"),
            *(f"evaluation-linf-0.03137.{kind}" for kind in ("json", "md")),
        }
        assert f'"arch": "{arch}"' in Path("out", run, "config.json").read_text()


def test_those_for_many_processes_have_options_that_exist(examples):
    launched = [(name, options) for start, name, options in commands() if start.startswith("torchrun")]
    assert launched
    for name, options in launched:
        assert getattr(examples, name).parse_args(options).dataset == "fake"
