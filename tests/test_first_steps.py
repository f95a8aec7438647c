"""A newcomer's first steps work, and the steps after them: clone, import, make, activate."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def without_links(tmp_path: Path, link: str) -> Path:
    """Copy the packages as a system without symbolic links does."""
    for package in ("cktat_loss", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "cktat_loss" / "kernels"
    path.unlink()
    if link == "a text file":
        path.write_text("../kernels")
    elif link == "a dangling link":
        path.symlink_to("../elsewhere")
    return tmp_path


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder that has the packages. Nothing that is installed serves in their place."""
    command = [sys.executable, "-S", "-W", "error", "-c", f"import sys; sys.path[1:1] = {sys.path!r}; {program}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("link", ["a text file", "nothing", "a dangling link"])
def test_a_copy_without_symbolic_links_says_what_is_wrong(tmp_path: Path, link: str) -> None:
    done = python("import cktat_loss", without_links(tmp_path, link))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / 'cktat_loss'} has no package kernels"), done.stderr
    assert "pip install -e ." in last
    assert "circular import" not in done.stderr


def test_an_installed_copy_needs_no_symbolic_link(tmp_path: Path) -> None:
    """An editable install maps both packages, whatever the folder in which it is used."""
    folder = without_links(tmp_path, "a text file")
    finder = (
        "from importlib.util import spec_from_file_location as spec; "
        "Finder = type('Finder', (), {'find_spec': staticmethod(lambda name, path=None, target=None: "
        f"spec(name, {str(folder / 'kernels' / '__init__.py')!r}) if name == 'cktat_loss.kernels' else None)}}); "
        "sys.meta_path.append(Finder); import cktat_loss; print(cktat_loss.kernels.__file__)"
    )
    done = python(finder, folder)
    assert done.stdout.strip() == str(folder / "kernels" / "__init__.py"), done.stderr


def test_what_torch_deprecates_within_itself_fails_no_test() -> None:
    """torch 2.11 warns so in torch.compiler.reset(), which twelve tests for GPUs call."""
    text = "`torch.jit.script_method` is deprecated. Please switch to `torch.compile` or `torch.export`."
    warnings.warn(text, DeprecationWarning, stacklevel=1)


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("bash") is None, reason="needs make and bash")
def test_after_make_demo_the_environment_can_be_activated(tmp_path: Path) -> None:
    """After any target, `source .venv/bin/activate` gives the interpreter with everything installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "quickstart.py").write_text("import sys; print('quickstart in', sys.prefix)")
    pip = tmp_path / "index" / "pip"  # a pip that installs nothing, since the network may be away
    pip.mkdir(parents=True)
    (pip / "__main__.py").touch()
    of_make = ("MAKE", "VIRTUAL_ENV", "VENV", "PIN")  # options of the make that runs this test
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_make)}
    environment |= {"PYTHONPATH": str(pip.parent)}

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    interpreter = tmp_path / "python3"  # makes environments without pip, which takes longest to install
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --without-pip\n')
    interpreter.chmod(0o755)
    make = f"make PYTHON={interpreter} demo"
    venv = str(tmp_path / ".venv")
    for _ in range(2):
        assert f"quickstart in {venv}" in run(make)
        activated = "source .venv/bin/activate; python -c 'import sys; print(sys.prefix)'"
        assert run(activated).strip() == venv
    assert "-m venv" not in run(make)  # nothing is made again
