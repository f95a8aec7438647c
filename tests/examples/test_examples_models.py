"""examples/models.py: every architecture by name, on [0, 1] images, and back from a checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.examples_path import imported

torchvision = pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def models():
    with imported("models") as modules:
        yield modules.models


def batch_norm(weights, name, x):
    return F.batch_norm(x, *(weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def shake(model):
    """Statistics and biases away from 0 and 1, so that a forgotten BatchNorm shows."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


# kuangliu's ResNet-18; its PreAct ResNet-18 (11,171,146) and a last BatchNorm; TRADES' WideResNet without the copy of
# the first stage that it makes and never calls.
@pytest.mark.parametrize(
    ("arch", "count"), [("resnet18", 11_173_962), ("preact-resnet18", 11_172_170), ("wrn-34-10", 46_160_474)]
)
def test_known_numbers_of_parameters(models, arch, count):
    model = models.build(arch, 10, size=32, channels=3)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("arch", "size", "channels"),
    [
        ("resnet18", 32, 3),
        ("resnet18", 28, 1),
        ("preact-resnet18", 32, 3),
        ("wrn-34-10", 16, 3),
        ("wrn-10-1", 50, 1),
        ("digits", 8, 1),
        ("digits-3", 8, 1),
        ("digits", 28, 1),
        ("torchvision:vit_b_16", 32, 3),
        ("torchvision:resnet50", 32, 3),
        ("torchvision:mobilenet_v2", 28, 1),
        ("torchvision:alexnet", 8, 1),
        ("torchvision:googlenet", 64, 3),
        ("timm:resnet10t", 32, 3),
        ("timm:vit_tiny_patch16_224", 32, 1),
        ("timm:vit_tiny_patch16_224", 28, 1),
        ("timm:convnext_atto", 32, 3),
    ],
)
def test_images_to_logits(models, arch, size, channels):
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    model = models.build(arch, 7, size=size, channels=channels)
    assert all(module.training for module in model.modules())
    logits = model(torch.rand(2, channels, size, size))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_resnet18_is_torchvisions_with_another_stem(models):
    ours = shake(models.build("resnet18", 10, size=32, channels=3)).eval()
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("arch", "stages", "blocks"), [("wrn-16-2", 3, 2), ("preact-resnet18", 4, 2)])
def test_preactivation_nets_written_out(models, arch, stages, blocks):
    model = shake(models.build(arch, 10, size=16, channels=3)).eval()
    weights = model.net.state_dict()
    x = torch.rand(2, 3, 16, 16)
    h = F.conv2d(x, weights["conv1.weight"], padding=1)
    for stage in range(stages):
        for block in range(blocks):
            name = f"stages.{stage}.{block}"
            stride = 2 if stage and not block else 1
            active = batch_norm(weights, f"{name}.bn1", h).relu()
            if f"{name}.shortcut.weight" in weights:
                h = F.conv2d(active, weights[f"{name}.shortcut.weight"], stride=stride)
            inner = F.conv2d(active, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = batch_norm(weights, f"{name}.bn2", inner).relu()
            h = h + F.conv2d(inner, weights[f"{name}.conv2.weight"], padding=1)
    pooled = F.adaptive_avg_pool2d(batch_norm(weights, "bn", h).relu(), 1).flatten(1)
    torch.testing.assert_close(model(x), pooled @ weights["linear.weight"].T + weights["linear.bias"])


def test_wide_resnets_start_as_in_trades(models):
    net = models.build("wrn-10-4", 10, size=32, channels=3).net
    weight = net.stages[2][0].conv1.weight  # 128 to 256 channels: fan-out, not fan-in
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert net.linear.bias.count_nonzero() == 0


def test_images_are_normalised_inside(models):
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    model = models.build("wrn-10-1", 10, size=8, channels=3, mean=mean, std=std).eval()
    x = torch.rand(2, 3, 8, 8)
    normalised = torch.stack([(x[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)
    torch.testing.assert_close(model(x), model.net(normalised))


def test_nothing_is_normalised_by_default(models):
    model = models.build("wrn-10-1", 10, size=8, channels=3).eval()
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model(x), model.net(x), rtol=0, atol=0)


def test_torchvision_models_see_one_channel_three_times(models):
    model = models.build("torchvision:squeezenet1_1", 10, size=32, channels=1).eval()
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(x), model.net(torch.cat([x, x, x], dim=1)), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "tokens"), [(32, 1 + 2 * 2), (40, 1 + 14 * 14)])
def test_a_vit_is_made_for_the_images_where_its_patches_tile_them(models, size, tokens):
    model = models.build("torchvision:vit_b_16", 10, size=size, channels=3)
    assert model.net.encoder.pos_embedding.shape[1] == tokens
    assert hasattr(model, "resize") == (size == 40)


@pytest.mark.parametrize(("size", "resized"), [(8, True), (32, False)])
def test_images_are_resized_only_where_the_model_demands_it(models, size, resized):
    model = models.build("torchvision:squeezenet1_1", 10, size=size, channels=3).eval()
    assert hasattr(model, "resize") == resized
    x = torch.rand(2, 3, size, size, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.count_nonzero() > 0


@pytest.mark.parametrize(
    ("arch", "size", "channels", "message"),
    [
        ("resnet19", 32, 3, r"arch must be one of resnet18, preact-resnet18, wrn-34-10, .*, got 'resnet19'"),
        ("torchvision:resnet19", 32, 3, r"must name one of alexnet, .*resnet18.*; got 'resnet19'"),
        ("torchvision:fasterrcnn_resnet50_fpn", 32, 3, "must name one of alexnet"),
        ("timm:resnet19", 32, 3, r"must name one of timm\.list_models\(\), got 'resnet19'"),
        ("torchvision:resnet18", 32, 4, "takes images of 1 or 3 channels, got 4"),
        ("wrn-11-1", 32, 3, "'wrn-11-1' must have a depth of 10, 16"),
        ("wrn-4-1", 32, 3, "'wrn-4-1' must have a depth of 10, 16"),
        ("wrn-10-0", 32, 3, "a width from 1"),
        ("digits", 32, 3, "takes images of 1 x 8 x 8 or 1 x 28 x 28, got 3 x 32 x 32"),
        ("digits-0", 8, 1, "arch must be one of .*digits-WIDTH.*, got 'digits-0'"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(models, arch, size, channels, message):
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message) as caught:
        models.build(arch, 10, size=size, channels=channels)
    assert "\n" not in str(caught.value)


def test_timm_that_is_not_installed_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="'timm:vit' comes with the package timm: pip install timm"):
        models.build("timm:vit", 10, size=32, channels=3)


def test_nothing_but_torch_is_needed_for_the_models_of_the_field(models, monkeypatch):
    for name in ("matplotlib", "sklearn", "torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    for arch, size, channels in (("digits", 8, 1), ("wrn-10-1", 32, 3), ("resnet18", 32, 3)):
        models.build(arch, 10, size=size, channels=channels)


def test_a_mean_of_another_number_of_channels_is_refused(models):
    with pytest.raises(ValueError, match="mean and std must have 1 or 1 values each, got 3 and 3"):
        models.build("wrn-10-1", 10, size=8, channels=1, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def content(models):
    """What a run writes, with other weights for the average than for the last step."""
    last, average = (shake(models.build("wrn-10-1", 5, size=8, channels=1)) for _ in range(2))
    return {
        "model": last.state_dict(),
        "ema": average.state_dict(),
        "arch": "wrn-10-1",
        "dataset": "digits",
        "classes": 5,
        "size": 8,
        "channels": 1,
        "mean": (0.3,),
        "std": (0.4,),
    }


@pytest.mark.parametrize(("ema", "entry"), [(True, "ema"), (False, "model")])
def test_a_checkpoint_gives_the_model_back(models, content, tmp_path, ema, entry):
    expected = models.build("wrn-10-1", 5, size=8, channels=1, mean=(0.3,), std=(0.4,)).eval()
    expected.load_state_dict(content[entry])
    torch.save(content, tmp_path / "a.pt")
    model = models.from_checkpoint(tmp_path / "a.pt", ema=ema)
    assert not any(module.training for module in model.modules())
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


def test_without_averaged_weights_the_last_ones_are_taken(models, content, tmp_path):
    torch.save({**content, "ema": None}, tmp_path / "a.pt")
    model = models.from_checkpoint(tmp_path / "a.pt")
    assert all(torch.equal(tensor, content["model"][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["text", "half a file", "bare weights"])
def test_a_file_of_another_kind_is_refused_in_one_line(models, content, tmp_path, what):
    path = tmp_path / "a.pt"
    torch.save(content["model"] if what == "bare weights" else content, path)
    if what == "half a file":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif what == "text":
        path.write_text("no weights here")
    with pytest.raises(ValueError, match=r"a\.pt .*checkpoint") as caught:
        models.from_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_named(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        models.from_checkpoint(tmp_path / "missing.pt")


def test_a_checkpoint_of_version_0_1_is_still_what_it_was(models):
    """best-0.1.0.pt: a digits-2 with a moving average, by train_clean.py of 0.1.0, which logged 85 %."""
    with imported("data") as modules:
        images = modules.data.load("digits", Path(), download=False, seed=0, validation=40).validation
    x, y = zip(*images, strict=True)
    model = models.from_checkpoint(Path(__file__).with_name("best-0.1.0.pt"))
    assert (model(torch.stack(x)).argmax(1) == torch.tensor(y)).double().mean().item() == pytest.approx(0.85)
