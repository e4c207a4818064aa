"""The embedded image set, the transforms, and the conversion of image shards to token shards."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.data.data_samples import hashes
from tests.raises import raises
from var_scale.cli import main
from var_scale.data.convert import shard_images
from var_scale.data.embedded import shapes_images, write_shapes
from var_scale.data.image_loader import ImageData
from var_scale.data.images import ORIENTATION, decode_image, open_image
from var_scale.data.indexing import index_folder
from var_scale.data.loader import TokenData
from var_scale.data.manifest import Manifest
from var_scale.data.shapes import KINDS, ShapesSettings
from var_scale.data.tokenize import Encode, TokenSet, tokenize_folder
from var_scale.data.transforms import (
    eval_transform,
    pil_loader,
    resize_to_cover,
    to_minus1_1,
    train_transform,
    who_resizes,
)
from var_scale.data.verify import verify_folder
from var_scale.evaluate.edit import read_picture
from var_scale.evaluate.read_images import read_images

SMALL = ShapesSettings(size=16, num_classes=4, looks=8)


def test_an_image_depends_only_on_its_number() -> None:
    whole, labels = shapes_images(SMALL, "train", 0, 600)
    assert whole.dtype == np.uint8 and whole.shape == (600, 16, 16, 3)
    assert labels.tolist() == [index % 4 for index in range(600)]
    for start, count in ((0, 1), (255, 2), (300, 300), (511, 3)):
        part, part_labels = shapes_images(SMALL, "train", start, count)
        np.testing.assert_array_equal(part, whole[start : start + count])
        np.testing.assert_array_equal(part_labels, labels[start : start + count])


def test_splits_and_seeds_are_disjoint() -> None:
    sets = [shapes_images(SMALL, split, 0, 400)[0] for split in ("train", "val", "test")]
    sets.append(
        shapes_images(ShapesSettings(size=16, num_classes=4, looks=8, seed=1), "train", 0, 400)[0]
    )
    assert len({image.tobytes() for images in sets for image in images}) == 1600
    with raises("data.split-name", "'valid'"):
        shapes_images(SMALL, "valid", 0, 1)


def test_kinds_differ() -> None:
    """The nearest mean silhouette, fitted on train, finds the class in val far more often than by
    chance, and colours alone do not: what a class is named after is its form."""
    settings = ShapesSettings()

    def silhouette(images: np.ndarray) -> np.ndarray:
        """1 where a pixel is nearer to the colour of the middle than to that of the corner."""
        pixels = images.reshape(len(images), -1, 3).astype(np.float64)
        corner, middle = pixels[:, :1], pixels[:, [16 * 32 + 16]]
        near = ((pixels - middle) ** 2).sum(-1) < ((pixels - corner) ** 2).sum(-1)
        return near.astype(np.float64)

    def accuracy(features) -> float:  # type: ignore[no-untyped-def]
        means = np.stack([features(train[train_labels == label]).mean(0) for label in range(10)])
        distance = ((features(val)[:, None] - means) ** 2).sum(-1)
        return float((distance.argmin(1) == val_labels).mean())

    train, train_labels = shapes_images(settings, "train", 0, 2048)
    val, val_labels = shapes_images(settings, "val", 0, 512)
    assert accuracy(silhouette) > 0.6
    assert accuracy(lambda images: images.mean((1, 2))) < 0.35
    assert train.std(0).mean() > 40 and (train.reshape(2048, -1).std(1) > 10).all()


def test_pictures_of_any_proportions() -> None:
    """Shapes stay round in wide pictures, and textures fill them."""
    images, labels = shapes_images(ShapesSettings(size=(16, 40)), "val", 0, 512)
    assert images.shape == (512, 16, 40, 3)
    (stripes,) = (images[labels == KINDS.index(name)] for name in ["stripes"])
    assert (stripes[:, :, :4].std((1, 2)).max(-1) > 5).all()  # also at the left edge
    discs = images[labels == KINDS.index("disc")].astype(int)
    marked = abs(discs - discs[:, :1, :1]).sum(-1) > 90  # unlike the corner
    wide, high = marked.any(1).sum(1), marked.any(2).sum(1)
    assert np.median(abs(wide - high)) <= 1 and high.min() > 6


def test_frequent_and_rare_looks() -> None:
    """Each class has its own most frequent pair of colours, in the share of the Zipf law."""
    images, labels = shapes_images(ShapesSettings(looks=8), "train", 0, 10240)
    corners = images[labels == 2][:, 0, 0].astype(int)  # backgrounds of squares
    frequent = corners[(abs(corners[:, None] - corners) < 45).all(-1).sum(1).argmax()]
    share = (abs(corners - frequent) < 45).all(-1).mean()
    expected = 1 / (1 / np.arange(1, 9)).sum()
    assert abs(share - expected) < 0.08


def test_more_classes_than_kinds() -> None:
    with raises("data.shapes-settings", "11", "10"):
        shapes_images(ShapesSettings(num_classes=11), "train", 0, 1)


def test_golden_pixels() -> None:
    """The set must not change: coarse means are compared, with a tolerance of one grey level
    between numpy builds."""
    images, _ = shapes_images(ShapesSettings(), "train", 0, 256)
    np.testing.assert_allclose(images.mean((0, 1, 2)), GOLDEN_MEANS, atol=0.1)
    np.testing.assert_allclose(images[7, 3, ::8].astype(int), GOLDEN_PIXELS, atol=1)


GOLDEN_MEANS = [135.805, 137.529, 120.254]
GOLDEN_PIXELS = [[184, 153, 51], [136, 72, 49], [205, 189, 52], [132, 66, 49]]


def test_write_shapes_continues_and_does_not_depend_on_processes(tmp_path: Path) -> None:
    manifest = write_shapes(
        tmp_path / "a", "train", 1100, SMALL, samples_per_shard=300, processes=1
    )
    write_shapes(tmp_path / "b", "train", 1100, SMALL, samples_per_shard=300, processes=2)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert manifest.num_samples == 1100 and verify_folder(tmp_path / "a") == []
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    assert write_shapes(tmp_path / "a", "train", 1100, SMALL, 300) == manifest
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before
    images = ImageData(tmp_path / "a").images(np.arange(250, 350))
    np.testing.assert_array_equal(images, shapes_images(SMALL, "train", 250, 100)[0])
    with raises("data.other-settings", "source.seed"):
        write_shapes(tmp_path / "a", "train", 1100, ShapesSettings(16, 4, 8, seed=1))


def test_write_shapes_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from var_scale.data import embedded

    write_shapes(tmp_path / "whole", "val", 700, SMALL, 150, processes=1)
    real = embedded._encoded
    monkeypatch.setattr(
        embedded,
        "_encoded",
        lambda job: (_ for _ in ()).throw(KeyboardInterrupt) if job[2] >= 512 else real(job),
    )
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "cut", "val", 700, SMALL, 150, processes=1)
    monkeypatch.setattr(embedded, "_encoded", real)
    write_shapes(tmp_path / "cut", "val", 700, SMALL, 150, processes=1)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def encode(images: np.ndarray) -> np.ndarray:
    """A tokenizer for tests: 14 pixel values."""
    return images.reshape(len(images), -1)[:, :14].astype(np.int64)


def tokenize(
    images: Path,
    out: Path,
    encode: Encode,
    identity: str = "abc",
    vocab: int = 256,
    batch: int = 48,
    size: tuple[int, int] | None = None,
    **more: Any,
) -> Manifest:
    """Convert image shards to token shards with three scales."""
    return tokenize_folder(
        TokenSet(ImageData(images, size), out, identity, (1, 2, 3), vocab, **more), encode, batch
    )


def test_tokenize(tmp_path: Path) -> None:
    write_shapes(tmp_path / "images", "train", 300, SMALL, 128, processes=1)
    calls = []

    def counted(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        tokenize(tmp_path / "images", tmp_path / "cut", counted, samples_per_shard=100)
    calls.clear()
    manifest = tokenize(
        tmp_path / "images",
        tmp_path / "cut",
        lambda x: calls.append(len(x)) or encode(x),
        samples_per_shard=100,
    )
    assert sum(calls) == 200, "the complete shard was not made again"
    tokenize(tmp_path / "images", tmp_path / "whole", encode, samples_per_shard=100)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    data = TokenData(tmp_path / "whole", "abc", (1, 2, 3))
    images, labels = shapes_images(SMALL, "train", 0, 300)
    tokens_BL, labels_B = data.gather(np.arange(300))
    np.testing.assert_array_equal(tokens_BL, encode(images))
    np.testing.assert_array_equal(labels_B, labels)

    def never(images: np.ndarray) -> np.ndarray:
        raise AssertionError("complete: nothing to encode")

    assert (
        tokenize(tmp_path / "images", tmp_path / "whole", never, samples_per_shard=100) == manifest
    )
    with raises("data.other-tokenizer", "abc", "xyz"):
        tokenize(tmp_path / "images", tmp_path / "whole", never, "xyz")
    for vocab_size, wrong, code, name in (
        (70000, encode, "data.vocabulary", "65536"),
        (256, lambda x: encode(x)[:, :3], "data.tokenizer-output", "int64"),
        (9, encode, "data.tokenizer-output", "0 to 8"),
    ):
        with raises(code, name):
            tokenize(tmp_path / "images", tmp_path / "new", wrong, vocab=vocab_size)
        assert not (tmp_path / "new" / "manifest.json").exists()


def test_several_views_are_random_crops(tmp_path: Path) -> None:
    write_shapes(tmp_path / "images", "train", 40, SMALL, 128, processes=1)
    tokenize(tmp_path / "images", tmp_path / "out", encode, size=(12, 12), views=3, flip=True)
    data = TokenData(tmp_path / "out")
    views = [data.gather(np.arange(40), view)[0] for view in range(6)]
    assert data.views == 6 and (views[0] != views[2]).any() and (views[2] != views[4]).any()
    images = ImageData(tmp_path / "images", (12, 12)).random_crops(np.arange(40), 0, 1)
    np.testing.assert_array_equal(views[2], encode(images))
    np.testing.assert_array_equal(views[3], encode(images[:, :, ::-1]))


def test_parts_make_the_same_tokens(tmp_path: Path) -> None:
    """Several processes, each with its own shards, one of which is killed and run again, write the
    bytes of one process."""
    write_shapes(tmp_path / "images", "train", 100, SMALL, 128, processes=1)
    tokenize(tmp_path / "images", tmp_path / "one", encode, samples_per_shard=16)
    for part in (2, 0, 2, 1):
        tokens = TokenSet(
            ImageData(tmp_path / "images"), tmp_path / "three", "abc", (1, 2, 3), 256, 16
        )
        tokens.write(encode, 48, part, 3)
    assert tokens.done() == 100
    tokens.shards.finish()
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


needs_lanczos = pytest.mark.skipif(
    who_resizes("auto") != "torch", reason="PyTorch before 2.12 has no Lanczos"
)


@needs_lanczos
@pytest.mark.parametrize("size", [(50, 40), (40, 50), (300, 31), (36, 36), (33, 200)])
def test_transform_sizes(size: tuple[int, int]) -> None:
    for shape in (
        eval_transform(picture(*size), (32, 32)).shape,
        train_transform(picture(*size), (32, 32), 0, 1, 2).shape,
    ):
        assert shape == (32, 32, 3)


@needs_lanczos
@pytest.mark.parametrize("size", [(50, 40), (40, 50), (300, 31), (18, 36), (33, 200)])
def test_transforms_to_what_is_not_square(size: tuple[int, int]) -> None:
    """Images are resized until one side is 1.125 times the requested size and the other is no less,
    and then cropped."""
    for shape in (
        eval_transform(picture(*size), (16, 32)).shape,
        train_transform(picture(*size), (16, 32), 0, 1, 2).shape,
    ):
        assert shape == (16, 32, 3)
    height, width = resize_to_cover(picture(*size), (18, 36), "pillow").shape[:2]
    assert (height == 18 and width >= 36) or (height >= 18 and width == 36)


@needs_lanczos
def test_transform_is_the_official_one() -> None:
    """With Pillow the transform is the official one bit for bit; with PyTorch it differs by at most
    two grey levels."""
    image = picture(90, 60)
    resized = Image.fromarray(image).resize((54, 36), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(
        eval_transform(image, (32, 32), "pillow"), np.asarray(resized)[2:34, 11:43]
    )
    crops = {
        train_transform(image, (32, 32), 0, 0, sample, "pillow").tobytes() for sample in range(50)
    }
    windows = {
        np.ascontiguousarray(np.asarray(resized)[y : y + 32, x : x + 32]).tobytes()
        for y in range(5)
        for x in range(23)
    }
    assert crops <= windows and len(crops) > 20
    np.testing.assert_array_equal(
        train_transform(image, (32, 32), 0, 0, 7), train_transform(image, (32, 32), 0, 0, 7)
    )


@needs_lanczos
@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (640, 480), (300, 290), (1000, 333), (120, 160)]
)
def test_the_fast_resize_is_near_the_exact_one(size: tuple[int, int]) -> None:
    """On noise, which is the hardest input for resizing, the fast resize differs by at most 2 grey
    levels, in few pixels."""
    image = picture(*size)
    exact, fast = (
        resize_to_cover(image, (288, 288), how).astype(int) for how in ("pillow", "torch")
    )
    difference = np.abs(exact - fast)
    assert exact.shape == fast.shape and difference.max() <= 2 and difference.mean() < 0.02


def test_decoding() -> None:
    """JPEGs, including grey and CMYK ones, are decoded as Pillow decodes them; half a file is
    refused."""
    simplejpeg = pytest.importorskip("simplejpeg")
    smooth = Image.fromarray(picture(40, 30)).resize((200, 150), Image.Resampling.BICUBIC)
    for mode in ("RGB", "L", "CMYK"):
        stream = io.BytesIO()
        smooth.convert(mode).save(stream, "JPEG", quality=90)
        payload = stream.getvalue()
        assert simplejpeg.is_jpeg(payload)
        np.testing.assert_array_equal(
            decode_image(payload, "here"), np.asarray(open_image(payload, "here"))
        )
        with raises("data.image-invalid", "here"):
            decode_image(payload[: len(payload) // 2], "here")


def test_to_minus1_1() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    images[0, 0, 0] = (0, 128, 255)
    result = to_minus1_1(images)
    assert result.shape == (2, 3, 4, 5) and result.dtype == torch.float32 and result.is_contiguous()
    assert result[0, :, 0, 0].tolist() == [-1.0, pytest.approx(1 / 255, abs=1e-6), 1.0]
    torch.testing.assert_close(
        result[1, 2, 3, 4], torch.tensor(images[1, 3, 4, 2] / 127.5 - 1).float()
    )


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
GREY = np.round(RAMP * 255)
"""`RAMP` in 8 bits, to be met within half a grey level."""


def file_of(pixels: np.ndarray, form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("dtype", "form", "mode"),
    [
        ("<u2", "PNG", "I;16"),
        ("<u2", "TIFF", "I;16"),
        (">u2", "TIFF", "I;16B"),
        ("<i4", "TIFF", "I"),
        ("<u2", "PPM", "I"),
        ("<f4", "TIFF", "F"),
    ],
)
def test_more_than_8_bits(dtype: str, form: str, mode: str, tmp_path: Path) -> None:
    """Grey images of 16 bits are scaled by their range and floating-point ones from 0 to 1, in
    every place that reads images."""
    pixels = RAMP.astype(dtype) if "f" in dtype else np.round(RAMP * 65535).astype(dtype)
    payload = file_of(pixels, form)
    assert Image.open(io.BytesIO(payload)).mode == mode
    (tmp_path / "in" / "a").mkdir(parents=True)
    path = tmp_path / "in" / "a" / f"1.{form.lower()}"
    path.write_bytes(payload)
    shard_images(tmp_path / "in", tmp_path / "out")
    for image in (
        decode_image(payload, "here"),
        ImageData(tmp_path / "out").images(np.array([0]))[0],
        next(read_images(tmp_path / "in"))[0],
        np.asarray(pil_loader(str(path))),
        read_picture(path, (8, 8)),
    ):
        assert image.shape == (8, 8, 3)
        np.testing.assert_allclose(image, np.repeat(GREY[..., None], 3, 2), atol=1)


@pytest.mark.parametrize(
    "pixels",
    [
        (RAMP * 255).astype("<f4"),
        (RAMP - 0.5).astype("<f4"),
        np.full((8, 8), np.nan, "<f4"),
        (RAMP * 2**20).astype("<i4"),
        (RAMP * 200).astype("<i4"),
        (-RAMP * 200).astype("<i4"),
    ],
)
def test_numbers_of_unknown_range(pixels: np.ndarray, tmp_path: Path) -> None:
    """Other numbers are refused with the name of the file: they have no obvious range."""
    payload = file_of(pixels, "TIFF")
    with raises("data.image-range", "here"):
        decode_image(payload, "here")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.tif").write_bytes(payload)
    with raises("data.too-many-broken", "1.tif has "):
        shard_images(tmp_path / "in", tmp_path / "out", processes=1)


def test_photos_of_phones_keep_their_bytes(tmp_path: Path) -> None:
    """A JPEG with further views (MPO) is a JPEG."""
    stream = io.BytesIO()
    views = [Image.fromarray(picture(16, 16)), Image.fromarray(picture(8, 8))]
    views[0].save(stream, "MPO", save_all=True, append_images=views[1:])
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.jpg").write_bytes(stream.getvalue())
    shard_images(tmp_path / "in", tmp_path / "out")
    tar = (tmp_path / "out" / "train-000000.tar").read_bytes()
    assert stream.getvalue() in tar and b"000000000.jpg" in tar
    assert ImageData(tmp_path / "out").shape == (16, 16, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(
    orientation: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An orientation is counted and ignored, as in the official code, or applied once."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    (tmp_path / "in" / "a").mkdir(parents=True)
    path = tmp_path / "in" / "a" / "1.png"
    Image.fromarray(picture(16, 8)).save(path, exif=exif)
    shard_images(tmp_path / "in", tmp_path / "stored", processes=1)
    index_folder(tmp_path / "stored")
    told = capsys.readouterr().out
    assert told.count("ignored the EXIF orientation of 1 image,") == (2 if orientation > 1 else 0)
    (image,) = ImageData(tmp_path / "stored").images(np.array([0]))
    np.testing.assert_array_equal(image, picture(16, 8))
    for source, out in (("in", "upright"), ("upright", "again")):
        main(["data", "shard", str(tmp_path / source), str(tmp_path / out), "--apply-exif"])
        (image,) = ImageData(tmp_path / out).images(np.array([0]))
        with Image.open(path) as stored:
            np.testing.assert_array_equal(image, np.asarray(ImageOps.exif_transpose(stored)))
