from __future__ import annotations

import pytest
import torch
from PIL import Image

from recipes.data.digits import open_digits
from recipes.data.errors import DataError
from recipes.data.image_folder import open_image_folder
from recipes.data.images import KeyedImages
from recipes.data.loader import evaluation_loader, train_loader
from recipes.data.pipelines import Augmentation, transforms

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
]
SMALL = Augmentation(flip=0.1, degrees=10, translate=0.1, zoom=(0.9, 1.1), shear=5)


@pytest.fixture
def folder(tmp_path):
    for number in range(24):
        path = tmp_path / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.radial_gradient("L").resize((40 + number, 30)).convert("RGB").save(path)
    return tmp_path


def batches(loader, epoch: int = 0, batch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.batch_sampler.set_position(epoch, batch)
    return list(loader)


def equal(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_batches_are_bit_identical_for_any_number_of_workers(kind, folder):
    images, _ = open_digits() if kind == "digits" else open_image_folder(folder, "stratified")
    transform, _ = transforms(images, 16, SMALL, channels=1 if kind == "digits" else 3)
    size = 250 if kind == "digits" else 4
    alone = train_loader(images, transform, batch_size=size, seed=7)
    epochs = [batches(alone, epoch) for epoch in range(2)]
    assert not equal(*epochs)
    for workers in (1, 2):
        loader = train_loader(images, transform, batch_size=size, seed=7, workers=workers)
        assert equal(batches(loader, 0), epochs[0])
        assert equal(batches(loader, 1, batch=2), epochs[1][2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_in_the_middle_leaves_nothing_behind(workers):
    images, _ = open_digits()
    transform, _ = transforms(images, 16, SMALL, channels=1)
    whole = batches(train_loader(images, transform, batch_size=100, seed=0))
    loader = train_loader(images, transform, batch_size=100, seed=0, workers=workers)
    running = iter(loader)
    for _ in range(3):
        next(running)
    assert equal(batches(loader, batch=3), whole[3:])


def test_ranks_get_the_samples_of_one_process():
    images, _ = open_digits()
    transform, _ = transforms(images, 16, SMALL, channels=1)
    alone = batches(train_loader(images, transform, batch_size=64, seed=0))
    ranks = [
        batches(train_loader(images, transform, batch_size=32, seed=0, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    for (whole, _), (even, _), (odd, _) in zip(alone, *ranks, strict=True):
        assert torch.equal(whole[0::2], even)
        assert torch.equal(whole[1::2], odd)


def test_evaluation_gives_every_image_once_in_order():
    _, held_out = open_digits()
    _, transform = transforms(held_out, 16, SMALL, channels=1)
    whole = torch.cat([images for images, _ in evaluation_loader(held_out, transform, batch_size=100)])
    labels = torch.cat(
        [labels for _, labels in evaluation_loader(held_out, transform, batch_size=7, workers=1)]
    )
    assert len(whole) == 359
    assert torch.equal(labels, torch.from_numpy(held_out.labels))
    ranks = [
        torch.cat(
            [
                images
                for images, _ in evaluation_loader(held_out, transform, batch_size=50, rank=r, world_size=3)
            ]
        )
        for r in range(3)
    ]
    assert all(torch.equal(whole[r::3], ranks[r]) for r in range(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_torchs_global_generator_alone(workers):
    images, _ = open_digits()
    transform, _ = transforms(images, 16, SMALL, channels=1)
    before = torch.get_rng_state()
    batches(train_loader(images, transform, batch_size=500, seed=0, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_line_that_names_it_also_from_a_worker(folder, workers):
    images, _ = open_image_folder(folder, "stratified")
    images.path(3).write_bytes(b"damaged")
    transform, _ = transforms(images, 16, SMALL)
    with pytest.raises(DataError) as caught:
        batches(train_loader(images, transform, batch_size=19, seed=0, workers=workers))
    assert str(caught.value).startswith(f"{images.path(3)}: the image cannot be read")
    assert "\n" not in str(caught.value)


def test_the_seed_reaches_the_augmentation_as_well_as_the_order():
    images, _ = open_digits()
    transform, _ = transforms(images, 16, SMALL, channels=1)
    loader = train_loader(images, transform, batch_size=8, seed=5)
    keys = next(iter(loader.batch_sampler))
    assert torch.equal(next(iter(loader))[0], KeyedImages(images, transform, seed=5).__getitems__(keys)[0])
