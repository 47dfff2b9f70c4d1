"""Batches of images: timm's transforms with seeds, independent of the workers."""

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from datamodules.image.data import ImageData
from datamodules.image.sources import CIFAR10, Digits, ImageFolder
from datamodules.image.transform import ImageTransform


class Dots(Digits):
    """A few digits, which are quick to iterate over."""

    def splits(self):
        splits = super().splits()
        few = splits.train.subset(range(24))
        return type(splits)(splits.class_names, few, few, few)


def image_data(source=None, batch_size=8, **arguments):
    data = ImageData(source or Dots(), batch_size=batch_size, **arguments)
    data.prepare_data()
    data.setup()
    return data


def train_batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def by_index(batches):
    return {
        int(i): image
        for batch in batches
        for i, image in zip(batch["index"], batch["images"], strict=True)
    }


def same(batches, others):
    return len(batches) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(batches, others, strict=True)
    )


def test_the_default_needs_nothing():
    data = ImageData()
    data.prepare_data()
    data.setup()
    assert data.num_classes == len(data.class_names) == 10
    assert data.image_size == (8, 8)
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (64, 1, 8, 8)
    assert batch["images"].dtype == torch.float32
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64
    labels = [data.splits.train.labels[index] for index in batch["index"].tolist()]
    assert [(label,) for label in batch["labels"].tolist()] == labels
    images = torch.cat([batch["images"] for batch in data.val_dataloader()])
    assert images.mean().abs() < 0.03
    assert images.std() == pytest.approx(1.0, abs=0.03)


def test_classes_are_known_after_setup():
    with pytest.raises(RuntimeError, match=r"after setup\(\)"):
        _ = ImageData().class_names


def test_evaluation_shows_the_digits_as_they_are():
    data = image_data()
    batches = list(data.val_dataloader())
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(24))
    images = torch.cat([b["images"] for b in batches]) * 0.376 + 0.305
    pixels = torch.from_numpy(data.splits.val.pixels)[:, None] / 255
    torch.testing.assert_close(images, pixels)
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert same(batches, list(loader))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("image_size", "shape"), [(32, (32, 32)), ((16, 12), (16, 12))])
def test_sizes_and_channels(channels, image_size, shape):
    data = image_data(image_size=image_size, channels=channels)
    for batch in (train_batches(data)[0], next(iter(data.val_dataloader()))):
        assert batch["images"].shape == (8, channels, *shape)
        assert torch.equal(batch["images"][:, 0], batch["images"][:, -1])


def test_digits_are_never_mirrored():
    data = image_data()
    assert not any(
        isinstance(step, transforms.RandomHorizontalFlip)
        for step in data.transforms[True].transforms
    )
    for index, image in by_index(train_batches(data)).items():
        original = data.dataset(data.splits.train, training=False)[index]["images"]
        distance = (image - original).square().mean()
        assert distance < (image.flip(-1) - original).square().mean()


def test_augmentation_differs_by_epoch_and_stays_by_seed():
    strong = ImageTransform(
        hflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5", re_prob=0.5
    )
    data, again, other = (
        image_data(transform=strong, image_size=32, channels=3, seed=seed) for seed in (1, 1, 2)
    )
    first, second = (by_index(train_batches(data, epoch)) for epoch in (0, 1))
    assert all(not torch.equal(first[index], second[index]) for index in first)
    assert same(train_batches(data), train_batches(again))
    assert not same(train_batches(data), train_batches(other))


def test_workers_change_nothing():
    strong = ImageTransform(auto_augment="rand-m9-mstd0.5", re_prob=0.5, re_mode="pixel")
    alone, helped = (
        image_data(transform=strong, channels=3, image_size=16, num_workers=n) for n in (0, 2)
    )
    loader = helped.train_dataloader()
    for epoch in (0, 1):  # the workers persist
        loader.sampler.set_epoch(epoch)
        assert same(train_batches(alone, epoch), list(loader))


def test_loading_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    data = image_data(transform=ImageTransform(auto_augment="rand-m9-mstd0.5"), channels=3)
    _ = data.dataset(data.splits.train, training=True)[0]
    assert (torch.rand(1), np.random.rand()) == expected


def test_no_augmentation_shows_the_evaluation_images():
    data = image_data(transform=ImageTransform(no_aug=True))
    images = by_index(train_batches(data))
    evaluated = by_index(list(data.val_dataloader()))
    assert all(torch.equal(images[index], evaluated[index]) for index in images)


def steps(transform):
    return {type(step).__name__: step for step in transform.transforms}


def test_imagenet_gets_what_timm_would_choose():
    data = ImageData(ImageFolder("train", "val"))
    evaluation, training = steps(data.transforms[False]), steps(data.transforms[True])
    assert data.image_size == (224, 224)
    assert evaluation["Resize"].size == 256  # 224 / 0.875
    assert evaluation["Resize"].interpolation == transforms.InterpolationMode.BICUBIC
    for chosen in (evaluation, training):
        torch.testing.assert_close(chosen["Normalize"].mean, torch.tensor(IMAGENET_DEFAULT_MEAN))
        torch.testing.assert_close(chosen["Normalize"].std, torch.tensor(IMAGENET_DEFAULT_STD))
    assert training["RandomResizedCropAndInterpolation"].scale == (0.08, 1.0)
    assert training["RandomHorizontalFlip"].p == 0.5
    assert training["ColorJitter"].brightness == (0.6, 1.4)


def test_cifar_is_shown_whole_with_its_own_statistics():
    evaluation = steps(ImageData(CIFAR10("root")).transforms[False])
    assert evaluation["Resize"].size == 32
    torch.testing.assert_close(evaluation["Normalize"].mean, torch.tensor([0.4914, 0.4822, 0.4465]))


def test_what_is_asked_for_wins_over_the_source():
    transform = ImageTransform(
        mean=(0.5,),
        std=(0.25,),
        crop_pct=0.5,
        interpolation="bilinear",
        hflip=1.0,
        scale=(0.5, 0.6),
    )
    data = ImageData(Digits(), channels=3, transform=transform)
    evaluation, training = steps(data.transforms[False]), steps(data.transforms[True])
    assert evaluation["Normalize"].mean.tolist() == [0.5] * 3
    assert evaluation["Normalize"].std.tolist() == [0.25] * 3
    assert evaluation["Resize"].size == 16
    assert evaluation["Resize"].interpolation == transforms.InterpolationMode.BILINEAR
    assert training["RandomHorizontalFlip"].p == 1.0
    assert training["RandomResizedCropAndInterpolation"].scale == (0.5, 0.6)
    assert training["RandomResizedCropAndInterpolation"].ratio == (0.9, 1.1), "the source's"


def test_gray_images_of_a_color_source_use_the_mean_of_its_statistics():
    chosen = steps(ImageData(CIFAR10("root"), channels=1).transforms[False])["Normalize"]
    assert chosen.mean.tolist() == pytest.approx([(0.4914 + 0.4822 + 0.4465) / 3])


def test_random_interpolation_is_for_training():
    data = ImageData(Digits(), transform=ImageTransform(interpolation="random"))
    assert (
        steps(data.transforms[False])["Resize"].interpolation
        == transforms.InterpolationMode.BICUBIC
    )


def write_tree(folder, broken=False):
    for split in ("train", "val"):
        for name, mode in (("cat", "RGB"), ("dog", "L")):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new(mode, (40, 30), 60 * number).save(folder / split / name / f"{number}.png")
    if broken:
        (folder / "train" / "cat" / "2.png").write_text("no image")
    return ImageFolder(str(folder / "train"), str(folder / "val"))


def test_a_folder_becomes_batches_of_one_size(tmp_path):
    data = image_data(write_tree(tmp_path), batch_size=4, image_size=24)
    assert data.class_names == ["cat", "dog"]
    batches = train_batches(data)
    assert [batch["images"].shape for batch in batches] == [(4, 3, 24, 24)] * 2
    assert sorted(torch.cat([batch["labels"] for batch in batches]).tolist()) == [0] * 4 + [1] * 4


def test_an_unreadable_image_is_named_by_the_loader(tmp_path):
    data = image_data(write_tree(tmp_path, broken=True), batch_size=4, num_workers=1)
    with pytest.raises(ValueError, match=r"image 2 \(.*2.png\) cannot be decoded"):
        train_batches(data)


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="24 training samples do not fill one batch"):
        image_data(batch_size=25).train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 2}, "channels must be one of 1, 3, got 2"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        (
            {"transform": ImageTransform(mean=(0.1, 0.2, 0.3)), "channels": 2},
            "channels must be one of 1, 3, got 2",
        ),
        (
            {"transform": ImageTransform(mean=(0.1, 0.2))},
            "mean has 2 numbers, but images have 1 channels",
        ),
        (
            {"transform": ImageTransform(auto_augment="rend-m9"), "channels": 3},
            "auto_augment 'rend-m9' is not a timm policy",
        ),
        (
            {"transform": ImageTransform(auto_augment="augmix-m5")},
            "auto_augment 'augmix-m5' needs color images: set --data.channels 3",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageData(Digits(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interpolation": "bicubik"}, "interpolation must be .*'bicubik'; did you mean 'bicubic'"),
        ({"crop_mode": "middle"}, "crop_mode must be one of 'center', .*got 'middle'"),
        ({"hflip": 1.5}, r"hflip must be a probability in \[0, 1\], got 1.5"),
        ({"crop_pct": 0.0}, "crop_pct must be above 0, got 0.0"),
        ({"scale": (1.0, 0.5)}, r"scale must be two increasing numbers above 0, got \(1.0, 0.5\)"),
        ({"color_jitter": (0.1, 0.2)}, r"color_jitter must be .*got \(0.1, 0.2\)"),
    ],
)
def test_bad_transforms_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**arguments)


def test_a_recipe_says_it_in_yaml(tmp_path):
    write_tree(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    recipe = f"""
    class_path: datamodules.ImageData
    init_args:
      source:
        class_path: datamodules.image.ImageFolder
        init_args: {{train: {tmp_path}/train, val: {tmp_path}/val}}
      image_size: 24
      transform: {{auto_augment: rand-m9-mstd0.5, re_prob: 0.25, scale: [0.5, 1.0]}}
      batch_size: 4
    """
    data = parser.instantiate(parser.parse_args([f"--data={recipe}"])).data
    data.setup()
    assert data.class_names == ["cat", "dog"]
    assert "RandomErasing" in steps(data.transforms[True])
    assert steps(data.transforms[True])["RandomResizedCropAndInterpolation"].scale == (0.5, 1.0)
    assert train_batches(data)[0]["images"].shape == (4, 3, 24, 24)
