"""Classifiers by name. All take images in [0, 1] and normalise them inside, so that an attack's eps is in pixels.

ResNet-18 with the CIFAR stem, PreAct ResNet-18 and WideResNets are those of the adversarial training literature;
`torchvision:NAME` is any classifier of torchvision, `timm:NAME` any of timm, where it is installed.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from runtime import load
from torch import Tensor, nn

ARCHITECTURES = (
    "resnet18, preact-resnet18, wrn-34-10, wrn-DEPTH-WIDTH, digits, digits-WIDTH, torchvision:NAME or timm:NAME"
)


def build(
    arch: str,
    classes: int,
    *,
    size: int,
    channels: int,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Module:
    """A fresh classifier, in train mode: images (N, channels, size, size) in [0, 1] to logits (N, classes).

    Args:
        arch: one of ARCHITECTURES. DEPTH is 6n + 4. "digits", of width 16 unless given, takes images of 1 x 8 x 8 and
            1 x 28 x 28 only.
        classes: number of logits.
        size: height and width of the images.
        channels: of the images. torchvision's and timm's models need 1 or 3; one is repeated to three.
        mean, std: of the pixels, a value a channel or one for all; the default normalises nothing, as TRADES.

    A ViT is made for `size` if its patches tile that. Images that are too small for an architecture, or not of its one
    size, are resized inside the model to 224 x 224, its `resize` module.

    Raises:
        ValueError: an unknown architecture, or one that does not take such images.
    """
    if len(mean) not in (1, channels) or len(std) not in (1, channels):
        raise ValueError(f"mean and std must have 1 or {channels} values each, got {len(mean)} and {len(std)}")
    before: list[tuple[str, nn.Module]] = [("normalize", Normalize(mean, std))]
    if arch == "resnet18":
        net: nn.Module = ResNet(channels, classes)
    elif arch == "preact-resnet18":
        net = PreActResNet(channels, classes, widths=(64, 64, 128, 256, 512), blocks=2)
    elif wrn := re.fullmatch(r"wrn-(\d+)-(\d+)", arch):
        net = wide_resnet(int(wrn[1]), int(wrn[2]), channels, classes)
    elif digits := re.fullmatch(r"digits(?:-([1-9]\d*))?", arch):
        if size not in (8, 28) or channels != 1:
            shape = f"{channels} x {size} x {size}"
            raise ValueError(f"arch 'digits' takes images of 1 x 8 x 8 or 1 x 28 x 28, got {shape}")
        net = DigitNet(int(digits[1] or 16), classes, size)
    elif arch.startswith(("torchvision:", "timm:")):
        if channels not in (1, 3):
            raise ValueError(f"arch {arch!r} takes images of 1 or 3 channels, got {channels}")
        from torchvision.transforms import v2  # no other architecture needs it

        library, name = arch.split(":", 1)
        net = (_from_timm if library == "timm" else _from_torchvision)(name, classes, size)
        before += [("rgb", v2.RGB())] if channels == 1 else []
        # A part of the model, so that attacks see the images as they came.
        before += [] if _takes(net, size) else [("resize", v2.Resize(224))]
    else:
        raise ValueError(f"arch must be one of {ARCHITECTURES}, got {arch!r}")
    return nn.Sequential(OrderedDict([*before, ("net", net)]))


def from_checkpoint(path: str | Path, *, ema: bool = True) -> nn.Module:
    """The trained classifier of a run's checkpoint, on the CPU and in eval mode.

    Args:
        path: a .pt file that train.py wrote, or version 0.1's train_clean.py or train_cktat.py.
        ema: take the averaged weights, where the run kept any, rather than the last step's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is something else than such a checkpoint.
    """
    state = load(Path(path))
    needed = ("model", "arch", "classes", "size", "channels", "mean", "std")
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {missing[0]!r}")
    shape = {key: state[key] for key in ("size", "channels", "mean", "std")}
    model = build(state["arch"], state["classes"], **shape)
    model.load_state_dict(state["ema"] if ema and state.get("ema") is not None else state["model"])
    return model.eval()


class Normalize(nn.Module):
    """(x - mean) / std, channel by channel. Not in the state_dict: a checkpoint names mean and std on their own."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, BatchNorm after each convolution (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class PreActBlock(nn.Module):
    """The same with BatchNorm and ReLU before each convolution (He et al. 2016); WideResNets are made of it too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + shortcut


def stages(block: type[nn.Module], widths: Sequence[int], blocks: int) -> nn.Sequential:
    """One stage from each width to the next; all but the first halve height and width."""
    return nn.Sequential(
        *(
            nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(blocks - 1)))
            for inputs, outputs, stride in zip(widths[:-1], widths[1:], (1, 2, 2, 2), strict=False)
        )
    )


class ResNet(nn.Module):
    """ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1, and no max pooling."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stages = stages(BasicBlock, (64, 64, 128, 256, 512), blocks=2)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.linear(h.mean((2, 3)))  # unlike adaptive pooling, deterministic on CUDA in the backward too


class PreActResNet(nn.Module):
    """Stem, stages of PreActBlocks, a last BatchNorm with ReLU, global average pooling.

    Args:
        widths: channels after the stem and after each stage, whose number is that of the widths less one.
        blocks: in each stage.
    """

    def __init__(self, channels: int, classes: int, *, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.stages = stages(PreActBlock, widths, blocks)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.stages(self.conv1(x))))
        return self.linear(h.mean((2, 3)))


def wide_resnet(depth: int, width: int, channels: int, classes: int) -> PreActResNet:
    """WRN-depth-width (Zagoruyko and Komodakis 2016), initialised as in TRADES' code and without dropout.

    TRADES' file also makes a second copy of the first stage that it never calls; it is left out here.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1 or width < 1:
        raise ValueError(f"arch 'wrn-{depth}-{width}' must have a depth of 10, 16, 22, 28, 34, ... and a width from 1")
    net = PreActResNet(channels, classes, widths=(16, 16 * width, 32 * width, 64 * width), blocks=blocks)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(net.linear.bias)
    return net


class DigitBlock(nn.Module):
    """BasicBlock without BatchNorm in its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.skip(x))


class DigitNet(nn.Sequential):
    """A ResNet with two blocks for digits of 8x8 pixels, or of MNIST's 28x28, which its stem halves first.

    Takes pixels in [0, 1]: its BatchNorms do the normalising.
    """

    def __init__(self, width: int = 16, classes: int = 10, size: int = 8) -> None:
        stride = 1 if size == 8 else 2
        side = size // (2 * stride)
        stem = nn.Sequential(nn.Conv2d(1, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = DigitBlock(width, width, stride=1), DigitBlock(width, 2 * width, stride=2)
        super().__init__(stem, *blocks, nn.Flatten(), nn.Linear(2 * width * side * side, classes))


def _from_torchvision(name: str, classes: int, size: int) -> nn.Module:
    """For three channels. A transformer is made for the images, where its patches tile them."""
    from torchvision import models

    if name not in (known := models.list_models(module=models)):
        raise ValueError(f"arch 'torchvision:NAME' must name one of {', '.join(known)}; got {name!r}")
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # else a tuple comes out in train mode
    if name.startswith("vit_") and size % int(name.rpartition("_")[2]) == 0:
        options["image_size"] = size
    return models.get_model(name, weights=None, num_classes=classes, **options)


def _from_timm(name: str, classes: int, size: int) -> nn.Module:
    """For three channels, and made for the images, where the model can be."""
    try:
        import timm  # only these architectures need it
    except ImportError:
        raise ValueError(f"arch 'timm:{name}' comes with the package timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"arch 'timm:NAME' must name one of timm.list_models(), got {name!r}")
    try:
        return timm.create_model(name, num_classes=classes, img_size=size)
    except (TypeError, AssertionError, ValueError):  # it has no such option, or none of such a size
        return timm.create_model(name, num_classes=classes)


def _takes(net: nn.Module, size: int) -> bool:
    """Whether a network runs on images of this size: no list of smallest sizes would stay true for long."""
    net.eval()
    try:
        with torch.no_grad():
            net(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError):
        return False
    finally:
        net.train()
    return True
