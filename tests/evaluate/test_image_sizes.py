"""Images that are too large, of several sizes, or of another size than the reference: named before
any work."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.raises import raises
from var_scale.data.image_loader import ImageData
from var_scale.data.image_sizes import image_size
from var_scale.data.images import decode_image
from var_scale.data.indexing import index_folder
from var_scale.data.shards import Sample, ShardSetWriter
from var_scale.data.verify import describe_folder
from var_scale.evaluate import score
from var_scale.evaluate.edit import image_mask, read_picture
from var_scale.evaluate.extract import Extractor, Features, read_reference
from var_scale.evaluate.read_images import open_set, read_images

CPU = torch.device("cpu")


def picture(height: int, width: int, form: str = "PNG") -> bytes:
    """An encoded image of noise."""
    stream = io.BytesIO()
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(stream, form)
    return stream.getvalue()


def write_images(folder: Path, sizes: list[tuple[int, int]], as_shards: bool = False) -> Path:
    """A folder of PNGs or of image shards."""
    if as_shards:
        with ShardSetWriter(folder, "image", "val", 1, 4, {"name": "test"}) as writer:
            for size in sizes:
                writer.add(Sample(picture(*size), 0, "png"))
            writer.finish()
        return folder
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number:03d}.png").write_bytes(picture(*size))
    return folder


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses images of more than 200 pixels, so that tests need no large ones."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)


OPENERS: dict[str, Callable[[Path], object]] = {
    "edit": lambda path: read_picture(path, (8, 8)),
    "mask": image_mask,
    "decode": lambda path: decode_image(path.read_bytes(), str(path)),
    "evaluate": lambda path: open_set(path.parent),
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.usefixtures("small_limit")
def test_a_picture_that_is_too_large(opener: str, form: str, tmp_path: Path) -> None:
    """The file, its size and the limit; also for JPEGs, whose fast decoder has no limit. Up to
    twice Pillow's number it is read without a warning."""
    path = tmp_path / ("picture.png" if form == "PNG" else "picture.jpg")
    path.write_bytes(picture(20, 30, form))
    with raises("data.image-too-large", path, "600", "200"):
        OPENERS[opener](path)
    path.write_bytes(picture(10, 20, form))
    OPENERS[opener](path)


def test_a_large_picture_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing, evaluating, training from images and describing name the sample."""
    folder = write_images(tmp_path / "s", [(8, 8), (20, 30)], as_shards=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    names = (folder / "val-000000.tar", "600", "200")
    for use in (
        lambda: next(read_images(folder)),
        lambda: ImageData(folder, (8, 8)).decode(1),
        lambda: describe_folder(folder),
        lambda: index_folder(folder),
    ):
        with raises("data.image-too-large", *names):
            use()


def test_size_by_the_header() -> None:
    """Height and width, also where the header is longer than what is read first."""
    for form in ("PNG", "JPEG"):
        assert image_size(lambda _, form=form: picture(9, 5, form), "x") == (9, 5)  # type: ignore[misc]
    whole = picture(9, 5)
    assert image_size(lambda count: whole if count < 0 else whole[:12], "x") == (9, 5)
    with raises("data.image-invalid", "x"):
        image_size(lambda _: b"nothing", "x")


@pytest.mark.parametrize("as_shards", [False, True])
def test_mixed_sizes_are_named_before_the_first_image(as_shards: bool, tmp_path: Path) -> None:
    """Although the odd image is in the last batch, and of its own size there."""
    sizes = [(8, 8)] * 5 + [(8, 12)]
    folder = write_images(tmp_path / "s", sizes, as_shards)
    odd = "sample 5" if as_shards else "005.png"
    with raises("data.image-sizes", odd, "12x8", "8x8"):
        next(read_images(folder, batch=5))
    assert open_set(write_images(tmp_path / "t", sizes[:5], as_shards))[0] == (8, 8)


class Counter:
    """An extractor that counts the images that it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images_B3HW: torch.Tensor) -> Features:
        self.seen += len(images_B3HW)
        return Features(images_B3HW.float().mean((2, 3)))


def test_another_size_than_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, our statistics and ADM's: no feature is computed. MAR's do not record the size."""
    network = Counter()
    extractor = Extractor("test", "FID", network)
    monkeypatch.setattr(score, "load_extractor", lambda *_: extractor)
    small = write_images(tmp_path / "small", [(8, 8)] * 6)
    large = write_images(tmp_path / "large", [(8, 12)] * 6)
    score.write_statistics(large, tmp_path / "ours.npz", "test", CPU)
    with np.load(tmp_path / "ours.npz") as file:
        moments = {"mu": file["mu"], "sigma": file["sigma"]}
    np.savez(tmp_path / "mar.npz", **moments)
    np.savez(tmp_path / "adm.npz", **moments, arr_0=np.zeros((3, 8, 12, 3), np.uint8))
    network.seen = 0
    for reference in (large, tmp_path / "ours.npz", tmp_path / "adm.npz"):
        with raises("evaluate.image-sizes", reference, "12x8", "8x8"):
            score.score_samples(small, reference, "test", CPU)
    assert network.seen == 0
    for reference in (large, tmp_path / "ours.npz", tmp_path / "adm.npz", tmp_path / "mar.npz"):
        assert score.score_samples(large, reference, "test", CPU)["FID"] == pytest.approx(
            0, abs=1e-3
        )
    assert read_reference(tmp_path / "ours.npz", extractor).count == 6


def test_another_size_than_the_extractor_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the tokenizer's: its network would fail inside, or measure something else."""
    network = Counter()
    monkeypatch.setattr(
        score, "load_extractor", lambda *_: Extractor("tok:x", "FD-tok", network, (8, 8))
    )
    small = write_images(tmp_path / "small", [(8, 8)] * 6)
    odd = write_images(tmp_path / "odd", [(7, 7)] * 6)
    for use in (
        lambda: score.score_samples(odd, small, "tok:x", CPU),
        lambda: score.score_samples(odd, odd, "tok:x", CPU),
        lambda: score.write_statistics(odd, tmp_path / "s.npz", "tok:x", CPU),
    ):
        with raises("evaluate.image-sizes", odd, "7x7", "8x8"):
            use()
    assert network.seen == 0 and not (tmp_path / "s.npz").exists()
