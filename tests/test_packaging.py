"""The installed package is cktat_loss alone, and it asks for nothing but torch."""

import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from torch import nn

import cktat_loss
from cktat_loss import CKTATLoss, CKTATTerms, WarmStartReport, functional

ROOT = Path(__file__).parents[1]
# Whatever a checkout gathers that is not the project.
LEFT_OUT = ("*.egg-info", "__pycache__", "build", "dist", "out", ".*")


def python(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# What an import does.


def test_importing_is_modest(tmp_path):
    """No name taken from others, no optional or slow package, no process, no thread, no message."""
    code = """
import subprocess, sys, threading
import torch
before = set(sys.modules)
subprocess.Popen = subprocess.run = None
import cktat_loss
heavy = {"triton", "safetensors", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp"}
got = {name for name in set(sys.modules) - before}
assert "kernels" not in sys.modules
assert not heavy & got, heavy & got
assert threading.active_count() == 1
foreign = {name.partition(".")[0] for name in got} - {"cktat_loss", "torch"} - sys.stdlib_module_names
assert not foreign, foreign
assert cktat_loss.functional.cktat_loss.__module__ == "cktat_loss.functional"
"""
    assert python("-c", code, cwd=tmp_path) == ""


# What is built.


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, from a copy of the tree: setuptools leaves things behind."""
    copy, out = tmp_path_factory.mktemp("build") / "tree", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    code = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, timeout=120)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_one_package(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        top_level = next(name for name in names if name.endswith(".dist-info/top_level.txt"))
        assert wheel.read(top_level).decode().split() == ["cktat_loss"]
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cktat_loss"}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cktat_loss").rglob("*.py")}
    kernels = {f"cktat_loss/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {"cktat_loss/kernels/__init__.py", "cktat_loss/py.typed"} <= {*names}
    assert here | kernels <= {*names}


def test_the_wheel_has_the_version_of_the_package_and_asks_for_torch_alone(built):
    version = cktat_loss.__version__
    assert built[0].name.startswith(f"cktat_loss-{version}-py3-none-any")
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert f"\nVersion: {version}\n" in metadata
    assert re.findall(r"^Requires-Dist: ((?:(?!extra).)*)$", metadata, re.M) == ["torch>=2.6"]


def test_the_installed_wheel_works_alone_and_without_triton(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(tmp_path)!r})
import torch
import cktat_loss.kernels
from cktat_loss import CKTATLoss, functional
assert cktat_loss.__file__.startswith({str(tmp_path)!r})
assert cktat_loss.kernels.__file__.startswith({str(tmp_path)!r})
assert "kernels" not in sys.modules
logits = torch.zeros(2, 3, requires_grad=True)
teacher = torch.eye(3)[:2] * 5
loss = functional.cktat_loss(logits, logits, teacher)
loss.backward()
assert CKTATLoss(torch.nn.Identity())(logits, logits, teacher) == loss > 0
assert logits.grad.abs().sum() > 0
try:
    functional.cktat_loss(logits, logits, teacher, backend="triton")
except RuntimeError as error:
    assert "backend='triton'" in str(error), error
else:
    raise AssertionError("backend='triton' was taken for granted")
assert "triton" not in sys.modules
"""
    python("-c", code, cwd=tmp_path)


def test_the_sdist_holds_the_whole_house(built):
    with tarfile.open(built[1]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    for folder in ("kernels", "tests", "examples", "docs"):
        tracked = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md")}
        assert tracked, folder
        assert tracked <= names
    assert {"pyproject.toml", "LICENSE", "Makefile", "CHANGELOG.md", "cktat_loss/py.typed"} <= names
    csvs = {name for name in names if name.endswith(".csv")}
    assert "benchmarks/study/methods.csv" in csvs
    assert not [name for name in csvs if name.startswith("docs/study/")]  # the study's data stays in the repository


# What is public: names, orders and defaults, to the letter.

SIGNATURES = {
    CKTATLoss: "(teacher, tau=5.0, beta=6.0, *, adaptive=False, reduction='mean', detach_clean=False,"
    " copy_teacher=True, backend='auto')",
    CKTATLoss.forward: "(self, clean_logits, adv_logits, x=None, *, teacher_logits=None, y=None, beta=None,"
    " return_terms=False)",
    CKTATLoss.terms: "(self, clean_logits, adv_logits, x=None, *, teacher_logits=None)",
    functional.cktat_loss: "(clean_logits, adv_logits, teacher_logits, tau=5.0, beta=6.0, *, y=None,"
    " reduction='mean', detach_clean=False, return_terms=False, backend='auto')",
    functional.cktat_terms: "(clean_logits, adv_logits, teacher_logits, tau=5.0, *, detach_clean=False,"
    " backend='auto')",
    cktat_loss.adaptive_beta: "(adv_logits, y, beta=6.0)",
    cktat_loss.warm_start: "(student, teacher, *, strict=True)",
}


@pytest.mark.parametrize(("function", "expected"), SIGNATURES.items(), ids=lambda v: getattr(v, "__qualname__", ""))
def test_signatures(function, expected):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == expected


def test_names():
    assert sorted(cktat_loss.__all__) == sorted(
        ["CKTATLoss", "CKTATTerms", "WarmStartReport", "__version__", "adaptive_beta", "functional", "warm_start"]
    )
    assert all(hasattr(cktat_loss, name) for name in cktat_loss.__all__)
    assert CKTATTerms._fields == ("guidance", "consistency")
    assert [*inspect.signature(WarmStartReport).parameters] == ["copied", "missing", "unexpected", "mismatched"]
    assert issubclass(CKTATLoss, nn.Module)
    assert functional.__all__ == ["CKTATTerms", "adaptive_beta", "cktat_loss", "cktat_terms"]
