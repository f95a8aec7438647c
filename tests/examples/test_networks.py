"""networks.py builds what the names say, and reads every teacher that warm_start reads, or says why not."""

import sys

import networks
import pytest
import torch
from images import UserError
from torch import nn


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def save(path, model, **changes):
    """Write a best.pt as train.py does."""
    facts = {"arch": "digits", "dataset": "digits", "classes": 10, "norm": "linf", "eps": 0.2}
    torch.save({**facts, "model": model.state_dict(), **changes}, path)
    return path


@pytest.fixture
def digits():
    return networks.build("digits", "digits", 10)


@pytest.mark.parametrize(
    ("arch", "dataset", "millions"),
    [("resnet18", "cifar10", 11.174), ("wrn-28-4", "svhn", 5.844), ("wrn-10-1", "cifar100", 0.083)],
)
def test_sizes_are_the_published_ones(arch, dataset, millions):
    """ResNet-18 with the CIFAR stem has 11.17 M parameters. WRN-28-4 has 5.8 M with 10 classes."""
    classes = 100 if dataset == "cifar100" else 10
    model = networks.build(arch, dataset, classes)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, classes)


def test_wrn_34_10_has_the_published_46_million_parameters():
    with torch.device("meta"):
        model = networks.build("wrn-34-10", "cifar10", 10)
    assert parameters(model) / 1e6 == pytest.approx(46.16, abs=0.01)


@pytest.mark.parametrize(("dataset", "size"), [("digits", 8), ("mnist5k", 28)])
def test_small_networks_take_small_images(dataset, size):
    assert networks.build("digits", dataset, 10)(torch.rand(2, 1, size, size)).shape == (2, 10)
    assert networks.build("wrn-10-1", dataset, 10)(torch.rand(2, 1, size, size)).shape == (2, 10)


def test_pixels_are_normalised_inside(digits):
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(digits[0](x), (x - 0.305) / 0.376)
    assert not digits[0].state_dict()


@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:resnet18"])
def test_other_libraries_networks(arch):
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    model = networks.build(arch, "cifar10", 10)
    assert model.training
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arch", "dataset", "message"),
    [
        ("resnet19", "cifar10", "--arch must be one of resnet18, .*, got 'resnet19'"),
        ("digits", "cifar10", "digits for images of one channel"),
        ("wrn-11-1", "cifar10", "a depth of 10, 16, 22, 28, 34, ..., got wrn-11-1"),
        ("torchvision:nothing", "cifar10", "--arch torchvision:nothing cannot be built .*nothing"),
        ("torchvision:resnet18", "digits", "cannot be built for images of 1x8x8"),
        ("timm:resnet9000", "cifar10", "--arch timm:resnet9000 cannot be built"),
        ("timm:vit_tiny_patch16_224", "cifar10", "cannot be built for images of 3x32x32: .*224"),
    ],
)
def test_what_cannot_be_built_is_refused(arch, dataset, message):
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        networks.build(arch, dataset, 10)


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        networks.build("timm:resnet18", "cifar10", 10)


# Checkpoints


def same(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(value, theirs) for value, theirs in pairs)


def test_a_run_and_its_files_are_read(digits, tmp_path):
    save(tmp_path / "best.pt", digits)
    for path in (tmp_path, tmp_path / "best.pt", str(tmp_path)):
        model, saved = networks.from_checkpoint(path)
        assert same(model, digits)
        assert not model.training
        assert (saved["arch"], saved["norm"], saved["eps"]) == ("digits", "linf", 0.2)


def test_averaged_weights_come_first(digits, tmp_path):
    ema = torch.optim.swa_utils.AveragedModel(digits)
    ema.update_parameters(digits)
    other = networks.build("digits", "digits", 10)
    model, _ = networks.from_checkpoint(save(tmp_path / "last.pt", other, ema=ema.state_dict()))
    assert same(model, digits)


@pytest.mark.parametrize("kind", ["usual name", "safetensors", "timm"])
def test_with_arch_any_file_that_warm_start_reads_is_a_teacher(digits, tmp_path, kind):
    path, arch, net = tmp_path / "weights.pth.tar", "digits", digits[1]
    if kind == "usual name":
        torch.save({"state_dict": net.state_dict(), "arch": "resnet18", "epoch": 3}, path)
    elif kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        pytest.importorskip("safetensors.torch").save_file(net.state_dict(), path)
    else:
        arch, net = "timm:resnet10t", pytest.importorskip("timm").create_model("resnet10t", num_classes=10, in_chans=1)
        torch.save(net.state_dict(), path)
    model, saved = networks.from_checkpoint(path, arch, "digits", 10)
    assert same(model[1], net)
    assert saved == {"arch": arch, "dataset": "digits", "classes": 10}


OF_0_2 = {"model": {}, "arch": "digits", "dataset": "digits", "classes": 10, "size": 8}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (networks.build("digits", "digits", 10).state_dict(), (), "is not a checkpoint of this train"),
        (OF_0_2, (), "is not a checkpoint of this train"),
        (nn.Linear(2, 3).state_dict(), ("digits", "digits", 10), r"network digits: (?s:.*)0\.weight(?s:.*)bias"),
    ],
    ids=["weights without an arch", "a checkpoint of 0.2", "weights of another network"],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, arguments, message):
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(UserError, match=message):
        networks.from_checkpoint(tmp_path / "best.pt", *arguments)


def test_a_checkpoint_of_another_network_or_of_weights_that_are_not_finite_is_refused(digits, tmp_path):
    with pytest.raises(UserError, match="does not fit the network wrn-10-1"):
        networks.from_checkpoint(save(tmp_path / "best.pt", digits, arch="wrn-10-1"))
    digits[1][0].weight.data[0] = torch.nan
    with pytest.raises(UserError, match=r"weights that are not finite, first 1\.0\.weight"):
        networks.from_checkpoint(save(tmp_path / "best.pt", digits))


def flip(path):
    """Flip a bit in the middle of the largest tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def numpy_in_it(path):
    torch.save({"state_dict": {"weight": torch.ones(1)}, "best": pytest.importorskip("numpy").ones(3)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"is damaged, or .*the checksum of .* is wrong"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged, or"),
        (lambda path: path.write_bytes(b""), "is damaged, or"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is damaged, or"),
        (numpy_in_it, "or holds more than tensors and plain values, which torch.load refuses with weights_only=True"),
    ],
)
def test_a_damaged_file_is_refused(digits, tmp_path, damage, message):
    path = save(tmp_path / "best.pt", digits)
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        networks.from_checkpoint(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_the_system_cannot_read_is_named(digits, tmp_path, monkeypatch):
    """torch raises this for some files that are cut off."""
    path = save(tmp_path / "best.pt", digits)

    def load(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match=r"best\.pt is damaged, or .*Invalid argument"):
        networks.from_checkpoint(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        networks.from_checkpoint(tmp_path / "nothing")
