"""The classifier that counts samples which show their class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from var_scale.data.embedded import write_shapes
from var_scale.data.image_loader import ImageData
from var_scale.data.shapes import ShapesSettings
from var_scale.evaluate.classifier import Classifier, suits, train_classifier


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageData]:
    root = tmp_path_factory.mktemp("shapes")
    for split, count in (("train", 2048), ("val", 512)):
        write_shapes(root / split, split, count, ShapesSettings(size=24, num_classes=6))
    return {split: ImageData(root / split, None) for split in ("train", "val")}


@pytest.fixture(scope="module")
def judge(sets: dict[str, ImageData]) -> Classifier:
    return train_classifier(sets["train"], 6)


def test_it_knows_real_images(sets: dict[str, ImageData], judge: Classifier) -> None:
    """It finds the class of nearly all validation images, of images without content it guesses, and
    wrong labels count as wrong."""
    images, labels = sets["val"].gather(np.arange(512))
    assert judge.accuracy([(images, labels)]) > 0.9
    assert judge.accuracy([(images[:100], labels[:100]), (images[100:], labels[100:])]) > 0.9
    assert judge.accuracy([(images, (labels + 1) % 6)]) < 0.1
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    assert judge.accuracy([(noise, labels)]) < 0.5


def test_the_same_again(sets: dict[str, ImageData], judge: Classifier) -> None:
    """The network depends on the seed, and on no other random number of the process."""
    torch.manual_seed(9)
    again, other = (train_classifier(sets["train"], 6, seed) for seed in (0, 1))
    assert not judge.network[0].weight.equal(other.network[0].weight)
    assert all(
        a.equal(b)
        for a, b in zip(
            judge.network.state_dict().values(), again.network.state_dict().values(), strict=True
        )
    )


def test_large_images_are_left_to_others(tmp_path: Path) -> None:
    write_shapes(tmp_path, "val", 8, ShapesSettings(size=(24, 65)))
    assert not suits(ImageData(tmp_path, None))
