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

from cktat_loss import warm_start
from cktat_loss._state_dicts import ENTRIES


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def assert_reads(teacher: Any, weights: dict[str, Any]) -> None:
    student = net()
    assert warm_start(student, teacher).copied == tuple(weights)
    torch.testing.assert_close(student.state_dict(), weights, rtol=0, atol=0)


def assert_refused(teacher: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        warm_start(net(), teacher)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_checkpoint_with_weights_under_any_usual_name(entry: str) -> None:
    weights = net().state_dict()
    assert_reads({"epoch": 3, entry: weights, "optimizer": {"state": {}, "param_groups": []}}, weights)
    assert f"``{entry}``" in str(warm_start.__doc__)


def test_kinds_of_mapping_and_of_entry() -> None:
    teacher = net()
    weights = teacher.state_dict()
    assert_reads(MappingProxyType(OrderedDict(weights)), weights)
    assert_reads({"model": teacher, "loss": torch.ones(())}, weights)
    assert_reads({"state_dict": {"model": weights, "step": 1}}, weights)
    assert_reads({"state_dict": DataParallel(teacher).state_dict()}, weights)
    assert_reads({"model": "resnet18", "ema": None, "net": weights}, weights)


SETTINGS = [{"width": 3}, {}, {"blocks": [{"width": 3}], "optimizer": {"lr": 0.1}}, {"state": {}, "param_groups": []}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_dict_without_tensors_is_no_second_set_of_weights(settings: Any) -> None:
    weights = net().state_dict()
    assert_reads({"state_dict": weights, "model": settings, "ema": {"decay": 0.9, "updates": 3}}, weights)
    assert_refused(
        {"model": settings, "epoch": 3}, ValueError, r"must hold only tensors, .*, got model \(dict\), epoch"
    )
    for second in ({"ema": {"decay": 0.9, "shadow": weights}}, {"ema": net()}, {"ema": {"net": net()}}):
        assert_refused({"model": weights, **second}, ValueError, "must hold one set of weights, got model, ema")


def test_a_checkpoint_of_lightnings() -> None:
    weights = net().state_dict()
    rest = {"hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {0: torch.ones(2)}}], "callbacks": {}}
    assert_reads({"state_dict": weights, "pytorch-lightning_version": "2.6", **rest}, weights)


def test_only_what_is_no_tensor_is_listed() -> None:
    with pytest.raises(ValueError, match=r"got epoch \(int\), bias \(NoneType\)$"):
        warm_start(net(), {**net().state_dict(), "epoch": 3, "bias": None})


def test_a_child_called_like_an_entry_is_a_child() -> None:
    student, teacher = nn.ModuleDict({"model": net()}), nn.ModuleDict({"model": net()})
    assert len(warm_start(student, teacher.state_dict()).copied) == 7


def test_several_sets_of_weights_are_never_guessed_between() -> None:
    checkpoint = {"model": net().state_dict(), "ema": net().state_dict(), "epoch": 3}
    assert_refused(checkpoint, ValueError, "teacher must hold one set of weights, got model, ema: pass the one")


def test_weights_beside_a_set_of_weights_are_refused() -> None:
    checkpoint = {**net().state_dict(), "ema": net().state_dict()}
    assert_refused(checkpoint, ValueError, "teacher must hold one set of weights, got ema, 0.weight: pass the one")


def test_other_tensors_beside_a_set_of_weights_are_left_alone() -> None:
    weights = net().state_dict()
    assert_reads({"model": weights, "rng_state": torch.get_rng_state(), "best": torch.tensor(0.5)}, weights)


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module.eval(), torch.ones(2, 3))])
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript(make: Any) -> None:
    teacher = make(net())
    assert_reads(teacher, dict(teacher.state_dict()))


@pytest.mark.parametrize("teacher", [{"epoch": 3}, {0: torch.ones(1)}, {**net().state_dict(), "epoch": 3}])
def test_a_mapping_without_weights(teacher: Any) -> None:
    assert_refused(teacher, ValueError, "teacher must hold only tensors, or weights under one of .*, got .*(epoch|0)")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".PT", ".safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files(tmp_path: Path, suffix: str, kind: type) -> None:
    from safetensors.torch import save_file

    teacher, path = net(), tmp_path / f"teacher{suffix}"
    weights = teacher.state_dict()
    (save_file if suffix == ".safetensors" else torch.save)(DataParallel(teacher).state_dict(), path)
    assert_reads(kind(path), weights)
    if suffix != ".safetensors":
        torch.save({"state_dict": weights, "epoch": 3}, path)
        assert_reads(kind(path), weights)


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "teacher.safetensors"
    path.touch()
    for package in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
    assert_refused(path, ImportError, r"^pip install safetensors to read teacher '.*teacher\.safetensors'$")


class Runs:
    """Unpickled, it would run code."""

    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize("extra", [Runs(), argparse.Namespace(lr=0.1)], ids=["a call", "a class"])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], extra: Any) -> None:
    torch.save({"state_dict": net().state_dict(), "args": extra}, tmp_path / "teacher.pt")
    match = r"with weights_only=True\), got '.*teacher\.pt': load it yourself and pass the dict"
    assert_refused(tmp_path / "teacher.pt", ValueError, match)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 cut short", bytes(range(256))])
def test_files_that_are_something_else(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"teacher{suffix}"
    path.write_bytes(content)
    assert_refused(path, ValueError, rf"teacher must be a .*, got '.*teacher\{suffix}'")


@pytest.mark.parametrize("name", ["teacher.pth.tar", "teacher.ckpt", "teacher"])
def test_files_of_another_kind_are_to_be_loaded_by_hand(tmp_path: Path, name: str) -> None:
    torch.save(net().state_dict(), tmp_path / name)
    match = rf"must be a \.pt, \.pth or \.safetensors file, got '.*{name}': load it yourself and pass the dict"
    assert_refused(tmp_path / name, ValueError, match)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    assert_refused("resnet18", FileNotFoundError, "teacher must be a file, but there is none at 'resnet18'")
    assert_refused(tmp_path, FileNotFoundError, "teacher must be a file")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    assert_refused(tmp_path / "tensor.pt", TypeError, "teacher must be an nn.Module, .*, got Tensor")
