"""Networks by name. All take images in [0, 1] and normalise them inside, so that an attack's eps is in pixels."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from images import SETS, UserError, need
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from cktat_loss import warm_start

ARCHS = "resnet18, wrn-34-10 (or another DEPTH-WIDTH), digits, torchvision:NAME or timm:NAME"


def build(arch: str, dataset: str, classes: int) -> nn.Sequential:
    """Return a fresh network for a data set: (N, C, H, W) in [0, 1] to logits (N, classes)."""
    channels, size, mean, std = SETS[dataset]
    library, _, name = arch.partition(":")
    if arch == "resnet18":  # with the stem for small images: a 3x3 convolution of stride 1, no pooling
        net: nn.Module = torchvision.models.resnet18(num_classes=classes)
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.Identity()
    elif wrn := re.fullmatch(r"wrn-(\d+)-(\d+)", arch):
        net = WideResNet(int(wrn[1]), int(wrn[2]), classes, channels)
    elif arch == "digits" and channels == 1:
        net = digit_net(size)
    elif library in ("torchvision", "timm"):
        try:
            if library == "torchvision":
                net = torchvision.models.get_model(name, num_classes=classes)
            else:
                net = need("timm", "timm").create_model(name, num_classes=classes, in_chans=channels)
            with torch.no_grad():
                net.eval()(torch.zeros(1, channels, size, size))
        except (ValueError, RuntimeError, TypeError, AssertionError) as error:  # an unknown name, or other images
            raise UserError(f"--arch {arch} cannot be built for images of {channels}x{size}x{size}: {error}") from error
        net.train()
    else:
        raise UserError(f"--arch must be one of {ARCHS} (digits for images of one channel), got {arch!r}")
    return nn.Sequential(torchvision.transforms.v2.Normalize(mean, std), net)


def from_checkpoint(
    path: str | Path, arch: str | None = None, dataset: str = "", classes: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a run's folder or checkpoint, in eval mode, and the facts that train.py saved with it.

    If arch, dataset and classes are given as for build(), path may be any file of weights that warm_start() reads.
    """
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    content = path if path.suffix == ".safetensors" else read(path)
    saved = {"arch": arch, "dataset": dataset, "classes": classes}
    ours = isinstance(content, dict) and {"model", "norm", "eps", *saved} <= content.keys()
    if ours:
        # last.pt holds the weights of the last step and, as ema, averaged ones. best.pt holds the validated weights.
        saved, content = content, content.get("ema") or content["model"]
    elif not arch:
        hint = "name its network by train.py's --arch, or give evaluate.py a module:function"
        raise UserError(f"{path} is not a checkpoint of this train.py: {hint}")
    model = build(saved["arch"], saved["dataset"], saved["classes"])
    try:
        warm_start(model if ours else model[1], content)  # other files know nothing of our Normalize
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"{path} does not fit the network {saved['arch']}: {error}") from error
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(f"{path} has weights that are not finite, first {name}: look at the run that made it")
    return model.eval(), saved


def read(path: Path) -> Any:
    """Return the content of a .pt file. Verify its checksums first: torch.load ignores them."""
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        why = "is damaged, or holds more than tensors and plain values, which torch.load refuses with weights_only=True"
        raise UserError(f"{path} {why} ({type(error).__name__}: {error})".partition("\n")[0]) from error


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut around them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + (x if self.shortcut is None else self.shortcut(h))


class WideResNet(nn.Sequential):
    """WRN-depth-width (Zagoruyko and Komodakis 2016), initialised as in TRADES' code, without dropout."""

    def __init__(self, depth: int, width: int, classes: int, channels: int) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or width < 1:
            raise UserError(f"--arch wrn-DEPTH-WIDTH has a depth of 10, 16, 22, 28, 34, ..., got wrn-{depth}-{width}")
        layers, inputs = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)], 16
        for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            layers += [PreActBlock(inputs, outputs, stride)]
            layers += [PreActBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
            inputs = outputs
        head = nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
        super().__init__(*layers, *head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self[-1].bias)


def digit_net(size: int = 8, width: int = 16) -> nn.Sequential:
    """Return a small ResNet for 10 digits of 8 x 8 pixels, or of MNIST's 28 x 28, which its stem halves."""
    stride = 1 if size == 8 else 2
    side = size // (2 * stride)
    stem = nn.Conv2d(1, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    down = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
    blocks = BasicBlock(width, width), BasicBlock(width, 2 * width, stride=2, downsample=down)
    return nn.Sequential(*stem, *blocks, nn.Flatten(), nn.Linear(2 * width * side * side, 10))
