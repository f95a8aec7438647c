"""warm_start reads a teacher from checkpoints and files, and says what is wrong with those it can't read."""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from cktat_loss.warm_start import _ENTRIES, warm_start


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def assert_reads(teacher: Any, weights: dict[str, Any]) -> None:
    student = net()
    assert warm_start(student, teacher).copied == tuple(weights)
    torch.testing.assert_close(student.state_dict(), weights, rtol=0, atol=0)


def assert_refused(teacher: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        warm_start(net(), teacher)


@pytest.mark.parametrize("entry", _ENTRIES)
def test_a_checkpoint_with_weights_under_any_usual_name(entry: str) -> None:
    weights = net().state_dict()
    assert_reads({"epoch": 3, entry: weights, "optimizer": {"state": {}, "param_groups": []}}, weights)
    assert entry in str(warm_start.__doc__)


def test_kinds_of_mapping_and_of_entry() -> None:
    teacher = net()
    weights = teacher.state_dict()
    assert_reads(MappingProxyType(OrderedDict(weights)), weights)
    assert_reads({"model": teacher, "epoch": 3}, weights)
    assert_reads({"state_dict": {"model": weights, "step": 1}}, weights)
    assert_reads({"state_dict": DataParallel(teacher).state_dict()}, weights)


def test_what_holds_no_weights_is_no_candidate() -> None:
    weights = net().state_dict()
    assert_reads({"model": "resnet18", "ema": None, "net": weights}, weights)


def test_a_child_called_like_an_entry_is_a_child() -> None:
    student, teacher = nn.ModuleDict({"model": net()}), nn.ModuleDict({"model": net()})
    assert len(warm_start(student, teacher.state_dict()).copied) == 7


def test_several_sets_of_weights_are_never_guessed_between() -> None:
    checkpoint = {"model": net().state_dict(), "ema": net().state_dict(), "epoch": 3}
    assert_refused(checkpoint, ValueError, "teacher must hold one set of weights, got model, ema: pass the one")
    assert_reads(checkpoint["ema"], checkpoint["ema"])


@pytest.mark.parametrize("teacher", [{"epoch": 3}, {0: torch.ones(1)}, {**net().state_dict(), "epoch": 3}])
def test_a_mapping_without_weights(teacher: Any) -> None:
    assert_refused(teacher, ValueError, "teacher must hold only tensors, or weights under one of .*, got .*(epoch|0)")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".PT"])
@pytest.mark.parametrize("kind", [str, Path])
def test_torch_files(tmp_path: Path, suffix: str, kind: type) -> None:
    weights, path = net().state_dict(), tmp_path / f"teacher{suffix}"
    torch.save(weights, path)
    assert_reads(kind(path), weights)
    torch.save({"state_dict": weights, "epoch": 3}, path)
    assert_reads(kind(path), weights)


def test_a_tied_name_that_a_file_lacks(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.embed.weight

    student, teacher = Tied(), Tied()
    save_model(teacher, str(tmp_path / "tied.safetensors"))
    assert warm_start(student, tmp_path / "tied.safetensors").missing == ()
    assert torch.equal(student.out.weight, teacher.out.weight)


@pytest.mark.parametrize("kind", [str, Path])
def test_safetensors_files(tmp_path: Path, kind: type) -> None:
    from safetensors.torch import save_file

    teacher, path = net(), tmp_path / "teacher.safetensors"
    save_file(DataParallel(teacher).state_dict(), path)
    assert_reads(kind(path), teacher.state_dict())


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "teacher.safetensors"
    path.touch()
    for package in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
    assert_refused(path, ImportError, r'pip install "cktat-loss\[safetensors\]"')


class Runs:
    """Unpickled, it would run code."""

    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in (Runs(), argparse.Namespace(lr=0.1)):
        torch.save({"state_dict": net().state_dict(), "args": extra}, tmp_path / "teacher.pt")
        assert_refused(tmp_path / "teacher.pt", ValueError, r"with weights_only=True.* got '.*teacher\.pt'")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 cut short", bytes(range(256))])
def test_files_that_are_something_else(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(content)
    assert_refused(path, ValueError, rf"teacher must be a .*, got '.*teacher\{suffix}'")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    assert_refused("resnet18", FileNotFoundError, "teacher must be a file, but there is none at 'resnet18'")
    assert_refused(tmp_path / "absent.pt", FileNotFoundError, r"none at '.*absent\.pt'")
    assert_refused(tmp_path, FileNotFoundError, "teacher must be a file")
    (tmp_path / "teacher.onnx").touch()
    assert_refused(tmp_path / "teacher.onnx", ValueError, r"must be a \.pt, \.pth or \.safetensors file, got .*onnx")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    assert_refused(tmp_path / "tensor.pt", TypeError, "teacher must be an nn.Module, .*, got Tensor")
