"""warm_start finds damage in a file, names the file, and changes nothing by it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cktat_loss import warm_start

KINDS = ["zip.pt", "old.pth", "teacher.safetensors"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(60, 40), nn.BatchNorm1d(40))


def save(teacher: nn.Module, path: Path) -> bytes:
    """Save the teacher in the format that the name asks for. Return the file's content."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(teacher.state_dict(), path, metadata={"format": "pt"})
    else:
        checkpoint = {"state_dict": teacher.state_dict(), "epoch": 3}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=path.name != "old.pth")
    return path.read_bytes()


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def outcome(student: nn.Module, path: Path) -> str:
    """Return what warm_start raised, or an empty string."""
    try:
        warm_start(student, path)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", KINDS)
def test_every_cut_is_a_value_error_with_the_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = save(net(), path)
    student = net()
    before = [tensor.clone() for tensor in student.state_dict().values()]
    lengths = {round(len(content) * k / 1000) for k in range(0, 1000, 3)} | set(range(len(content) - 40, len(content)))
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        message = outcome(student, path)
        assert message.startswith("teacher must be a "), length
        assert repr(str(path)) in message, length
    assert all(map(torch.equal, before, student.state_dict().values()))
    path.write_bytes(content)
    assert outcome(student, path) == ""


def test_a_flipped_byte_in_a_zip_is_found(tmp_path: Path) -> None:
    """Each byte in turn: the file is refused, or the byte was padding and every weight is right."""
    path, teacher = tmp_path / "teacher.pt", net()
    content = bytearray(save(teacher, path))
    assert content[:4] == b"PK\x03\x04"
    refused = 0
    for k in range(0, len(content), 23):
        content[k] ^= 4
        path.write_bytes(content)
        content[k] ^= 4
        student = net()
        message = outcome(student, path)
        refused += bool(message)
        assert repr(str(path)) in message if message else equal(student, teacher), k
    assert refused > len(content) / 23 / 3
    first = content.find(teacher[0].weight.detach().numpy().tobytes())
    content[first + 5] ^= 4
    path.write_bytes(content)
    assert "must be a complete and undamaged file" in outcome(net(), path)
    assert "data/0 doesn't have its checksum" in outcome(net(), path)


def test_a_zip_without_checksums_is_read(tmp_path: Path) -> None:
    path, teacher, student = tmp_path / "teacher.pt", net(), net()
    torch.serialization.set_crc32_options(False)
    try:
        content = save(teacher, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert outcome(student, path) == ""
    assert equal(student, teacher)
    path.write_bytes(content[: len(content) // 2])
    assert "it is cut off or damaged" in outcome(student, path)


def replaced_by(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "teacher.pt"
    if kind == "a pickled module":
        torch.save(net(), path)
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.script(net()), path)
    elif kind == "safetensors":
        save(net(), tmp_path / "t.safetensors")
        (tmp_path / "t.safetensors").rename(path)
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("kind", ["a pickled module", "TorchScript", "safetensors", "a pointer of Git LFS"])
def test_a_file_that_is_something_else(tmp_path: Path, kind: str) -> None:
    path = replaced_by(tmp_path, kind)
    assert outcome(net(), path).endswith(f"got {str(path)!r}: load it yourself and pass the dict")


def test_links_and_directories(tmp_path: Path) -> None:
    teacher, student, link = net(), net(), tmp_path / "link.pt"
    save(teacher, tmp_path / "hash")
    link.symlink_to("hash")
    warm_start(student, link)
    assert equal(student, teacher)
    (tmp_path / "hash").unlink()
    with pytest.raises(FileNotFoundError, match=r"teacher must be a file, but there is none at '.*link\.pt'"):
        warm_start(student, link)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(FileNotFoundError, match=r"teacher must be a file, but '.*folder\.pt' is a directory"):
        warm_start(student, tmp_path / "folder.pt")


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        raise error

    return function


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "teacher.pt"
    save(net(), path)
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        pass
    else:  # whoever runs this may read anything
        monkeypatch.setattr(Path, "open", raising(PermissionError(13, "Permission denied", str(path))))
    with pytest.raises(PermissionError, match=r"Permission denied: '.*teacher\.pt'"):
        warm_start(net(), path)


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), MemoryError(), RecursionError()], ids=repr)
def test_whatever_a_reader_raises_is_a_value_error_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(net(), tmp_path / "old.pth")
    monkeypatch.setattr(torch, "load", raising(error))
    with pytest.raises(ValueError, match=r"teacher must be a .* can be read .*, got '.*old\.pth'") as caught:
        warm_start(net(), tmp_path / "old.pth")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, dtype) for name in KINDS for dtype in (torch.float16, torch.bfloat16)), ("zip.pt", torch.float8_e4m3fn)],
)
def test_half_precision_files(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    teacher, student = net(), net()
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    save(teacher, tmp_path / name)
    warm_start(student, tmp_path / name)
    assert student[0].weight.dtype == torch.float32
    assert equal(student, teacher.float())


def test_an_entry_marked_as_a_directory_is_found(tmp_path: Path) -> None:
    """torch.load takes it for a directory and returns uninitialised memory."""
    path = tmp_path / "zip.pt"
    data = bytearray(save(net(), path))
    entry = data.find(b"PK\x01\x02")  # of the central directory
    while b"data/0" not in data[entry + 46 : entry + 46 + data[entry + 28]]:
        entry = data.find(b"PK\x01\x02", entry + 1)
    data[entry + 38] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"zip\.pt.*data/0 is marked as a directory"):
        warm_start(net(), path)
