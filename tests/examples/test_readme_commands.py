"""The commands of README.md and examples/README.md run as they stand, but for the data and their length."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.examples_path import EXAMPLES, imported

pytest.importorskip("pyautoattack")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")

# Appended, so that it has the last word. A CPU takes minutes for an epoch in bf16.
SHORTER = {
    "train": ["--epochs", "1", "--batch", "2", "--workers", "0", "--amp", "none", "--steps", "1", "--device", "cpu"],
    "evaluate": ["--samples", "1", "--device", "cpu"],
}


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's bash blocks, each as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def made_up(images):
    """Return a function that makes a few images of noise, of the data set's shape."""

    def load(name, root="data", *, download=False):
        channels, size, *_ = images.SETS[name]
        parts = (TensorDataset(torch.rand(n, channels, size, size), torch.arange(n) % 10) for n in (2, 2, 2))
        return images.Data(*parts, 10)

    return load


@pytest.fixture
def examples(monkeypatch):
    """The scripts, with made-up images and attacks of few steps."""
    with imported("images", "networks", "evaluate", "train") as modules:
        load = made_up(modules.images)
        monkeypatch.setattr(modules.images, "load", load)
        monkeypatch.setattr(modules.train, "load", load)
        pyautoattack = pytest.importorskip("pyautoattack")
        genuine = pyautoattack.AutoAttack

        def quick(*arguments, **options):
            auto = genuine(*arguments, **options)
            auto.apgd.n_iter = auto.apgd_targeted.n_iter = auto.fab.n_iter = auto.square.n_queries = 1
            return auto

        monkeypatch.setattr(pyautoattack, "AutoAttack", quick)
        pgd = modules.evaluate.pgd
        monkeypatch.setattr(modules.evaluate, "pgd", lambda *a, **how: pgd(*a, **{**how, "steps": 1}))
        yield modules


def test_the_commands_of_examples_readme_run_one_after_the_other(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for start, *words in commands(EXAMPLES / "README.md"):
        words = words[1:] if start == "torchrun" else words
        name = Path(words[0]).stem
        assert words[0] == f"examples/{name}.py"
        getattr(examples, name).main([*words[1:], *SHORTER[name]])
        ran.append(name)
    assert ran == [*("train", "train", "evaluate"), *(4 * ["train"]), *("train", "train", "evaluate")]
    assert {path.name for path in Path("out/student").iterdir()} == {
        *("best.pt", "last.pt", "log.csv", "evaluation-linf-0.03137.json")
    }
    assert Path("out/digits/evaluation-linf-0.2.json").exists()


def test_the_usage_lines_of_the_scripts_are_read_by_them(examples):
    """The first words of each docstring are commands too."""
    for name in ("train", "evaluate"):
        text = getattr(examples, name).__doc__
        lines = re.findall(rf"^    (?:python|torchrun \S+) examples/{name}\.py (.*?)(?:   .*)?$", text, re.MULTILINE)
        assert len(lines) >= 3
        if name == "train":
            for line in lines:
                assert line == "..." or examples.train.parse(shlex.split(line))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/getting_started.md", "docs/migrate_from_trades.md", "docs/recipes.md"]
)
def test_examples_that_pages_name_exist(page):
    text = (EXAMPLES.parent / page).read_text()
    named = set(re.findall(r"examples/[\w/]+\.(?:py|md)", text))
    assert named or page == "docs/recipes.md"
    assert not [name for name in named if not (EXAMPLES.parent / name).exists()]
