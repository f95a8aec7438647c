"""The commands of README.md and examples/README.md run as they stand, but for the data and their length."""

import re
import shlex
from pathlib import Path

import evaluate
import images
import pyautoattack
import pytest
import torch
import train
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train": train, "evaluate": evaluate}

# Appended, so that it has the last word. A CPU takes minutes for an epoch in bf16.
SHORTER = {
    "train": ["--epochs", "1", "--batch", "2", "--workers", "0", "--amp", "none", "--steps", "1", "--device", "cpu"],
    "evaluate": ["--samples", "1", "--device", "cpu"],
}


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's bash blocks, each as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def noise(name, root="data", *, download=False):
    """Return a few images of noise, of the data set's shape."""
    channels, size, *_ = images.SETS[name]
    parts = (TensorDataset(torch.rand(n, channels, size, size), torch.arange(n) % 10) for n in (2, 2, 2))
    return images.Data(*parts, 10)


@pytest.fixture
def shorter(monkeypatch):
    """Give the scripts images of noise and attacks of few steps."""
    genuine, pgd = pyautoattack.AutoAttack, evaluate.pgd

    def quick(*arguments, **options):
        auto = genuine(*arguments, **options)
        auto.apgd.n_iter = auto.apgd_targeted.n_iter = auto.fab.n_iter = auto.square.n_queries = 1
        return auto

    monkeypatch.setattr(images, "load", noise)
    monkeypatch.setattr(train, "load", noise)
    monkeypatch.setattr(pyautoattack, "AutoAttack", quick)
    monkeypatch.setattr(evaluate, "pgd", lambda *a, **how: pgd(*a, **{**how, "steps": 1}))


@pytest.mark.usefixtures("shorter")
def test_the_commands_of_examples_readme_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for start, *words in commands(ROOT / "examples" / "README.md"):
        words = words[1:] if start == "torchrun" else words
        name = Path(words[0]).stem
        assert words[0] == f"examples/{name}.py"
        SCRIPTS[name].main([*words[1:], *SHORTER[name]])
        ran.append(name)
    assert ran == [*("train", "train", "evaluate"), *(4 * ["train"]), *("train", "train", "evaluate")]
    assert {path.name for path in Path("out/student").iterdir()} == {
        *("best.pt", "last.pt", "log.csv", "evaluation-linf-0.03137.json")
    }
    assert Path("out/digits/evaluation-linf-0.2.json").exists()


def test_the_usage_lines_of_the_scripts_are_read_by_them():
    """The first words of each docstring are commands too."""
    for name, script in SCRIPTS.items():
        lines = re.findall(
            rf"^    (?:python|torchrun \S+) examples/{name}\.py (.*?)(?:   .*)?$", script.__doc__, re.MULTILINE
        )
        assert len(lines) >= 3
        if name == "train":
            for line in lines:
                assert line == "..." or train.parse(shlex.split(line))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/getting_started.md", "docs/migrate_from_trades.md", "docs/recipes.md"]
)
def test_examples_that_pages_name_exist(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"examples/[\w/]+\.(?:py|md)", text))
    assert named or page == "docs/recipes.md"
    assert not [name for name in named if not (ROOT / name).exists()]
