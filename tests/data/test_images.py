"""The embedded set, the transforms, and image shards to token shards."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import hashes
from PIL import Image

from var_scale.data.embedded import LeavesSettings, leaves_images, write_leaves
from var_scale.data.images import decode_image, open_image
from var_scale.data.loader import ImageData, TokenData
from var_scale.data.manifest import Manifest
from var_scale.data.shards import verify_folder
from var_scale.data.tokenize import Encode, TokenSet, tokenize_folder
from var_scale.data.transforms import eval_transform, resize_to_cover, to_minus1_1, train_transform, who_resizes
from var_scale.errors import UserError

SMALL = LeavesSettings(size=16, num_classes=4, species=32, leaves=6)


def test_an_image_depends_only_on_its_number() -> None:
    whole, labels = leaves_images(SMALL, "train", 0, 600)
    assert whole.dtype == np.uint8 and whole.shape == (600, 16, 16, 3)
    assert labels.tolist() == [index % 4 for index in range(600)]
    for start, count in ((0, 1), (255, 2), (300, 300), (511, 3)):
        part, part_labels = leaves_images(SMALL, "train", start, count)
        np.testing.assert_array_equal(part, whole[start:start + count])
        np.testing.assert_array_equal(part_labels, labels[start:start + count])


def test_splits_and_seeds_are_disjoint() -> None:
    sets = [leaves_images(SMALL, split, 0, 400)[0] for split in ("train", "val", "test")]
    sets.append(leaves_images(LeavesSettings(size=16, num_classes=4, species=32, leaves=6, seed=1), "train", 0, 400)[0])
    assert len({image.tobytes() for images in sets for image in images}) == 1600
    with pytest.raises(UserError, match="split 'valid'"):
        leaves_images(SMALL, "valid", 0, 1)


def test_classes_differ_and_images_vary() -> None:
    """A nearest-mean-colour-histogram rule, fitted on train, finds the class in val far above chance: the classes are conditional."""
    settings = LeavesSettings()

    def histogram(images: np.ndarray) -> np.ndarray:
        codes = (images // 64).astype(np.int64) @ np.array([16, 4, 1])
        return np.stack([np.bincount(code.ravel(), minlength=64) for code in codes]) / codes[0].size

    train, train_labels = leaves_images(settings, "train", 0, 1024)
    val, val_labels = leaves_images(settings, "val", 0, 256)
    means = np.stack([np.log(histogram(train[train_labels == label]).mean(0) + 1e-3) for label in range(10)])
    accuracy = ((histogram(val) @ means.T).argmax(1) == val_labels).mean()
    assert 0.3 < accuracy < 0.99
    assert train.std(0).mean() > 40 and (train.reshape(1024, -1).std(1) > 10).mean() > 0.99


def test_golden_pixels() -> None:
    """The set must not drift: coarse means, with room for one grey level between numpy builds."""
    images, _ = leaves_images(LeavesSettings(leaves=16), "train", 0, 256)
    np.testing.assert_allclose(images.mean((0, 1, 2)), GOLDEN_MEANS, atol=0.1)
    np.testing.assert_allclose(images[7, 3, ::8].astype(int), GOLDEN_PIXELS, atol=1)


GOLDEN_MEANS = [123.27, 125.903, 129.006]
GOLDEN_PIXELS = [[37, 32, 3], [181, 30, 99], [175, 250, 169], [252, 244, 133]]


def test_write_leaves_continues_and_does_not_depend_on_processes(tmp_path: Path) -> None:
    manifest = write_leaves(tmp_path / "a", "train", 1100, SMALL, samples_per_shard=300, processes=1)
    write_leaves(tmp_path / "b", "train", 1100, SMALL, samples_per_shard=300, processes=2)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert manifest.num_samples == 1100 and verify_folder(tmp_path / "a") == []
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    assert write_leaves(tmp_path / "a", "train", 1100, SMALL, 300) == manifest
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before
    images = ImageData(tmp_path / "a").images(np.arange(250, 350))
    np.testing.assert_array_equal(images, leaves_images(SMALL, "train", 250, 100)[0])
    with pytest.raises(UserError, match=r"source\.seed: 0 there, 1 here.*remove the folder or choose another"):
        write_leaves(tmp_path / "a", "train", 1100, LeavesSettings(16, 4, 32, 6, seed=1))


def test_write_leaves_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from var_scale.data import embedded

    write_leaves(tmp_path / "whole", "val", 700, SMALL, 150, processes=1)
    real = embedded._encoded
    monkeypatch.setattr(embedded, "_encoded", lambda job: (_ for _ in ()).throw(KeyboardInterrupt) if job[2] >= 512 else real(job))
    with pytest.raises(KeyboardInterrupt):
        write_leaves(tmp_path / "cut", "val", 700, SMALL, 150, processes=1)
    monkeypatch.setattr(embedded, "_encoded", real)
    write_leaves(tmp_path / "cut", "val", 700, SMALL, 150, processes=1)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def encode(images: np.ndarray) -> np.ndarray:
    """A stand-in tokenizer: 14 pixel values."""
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
    """Image shards to token shards with three scales."""
    return tokenize_folder(TokenSet(ImageData(images, size), out, identity, (1, 2, 3), vocab, **more), encode, batch)


def test_tokenize(tmp_path: Path) -> None:
    write_leaves(tmp_path / "images", "train", 300, SMALL, 128, processes=1)
    calls = []

    def counted(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        tokenize(tmp_path / "images", tmp_path / "cut", counted, samples_per_shard=100)
    calls.clear()
    manifest = tokenize(tmp_path / "images", tmp_path / "cut", lambda x: calls.append(len(x)) or encode(x), samples_per_shard=100)
    assert sum(calls) == 200, "the complete shard was not made again"
    tokenize(tmp_path / "images", tmp_path / "whole", encode, samples_per_shard=100)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    data = TokenData(tmp_path / "whole", "abc", (1, 2, 3))
    images, labels = leaves_images(SMALL, "train", 0, 300)
    tokens_BL, labels_B = data.gather(np.arange(300))
    np.testing.assert_array_equal(tokens_BL, encode(images))
    np.testing.assert_array_equal(labels_B, labels)

    def never(images: np.ndarray) -> np.ndarray:
        raise AssertionError("complete: nothing to encode")

    assert tokenize(tmp_path / "images", tmp_path / "whole", never, samples_per_shard=100) == manifest
    with pytest.raises(UserError, match="made by tokenizer abc, this run uses xyz"):
        tokenize(tmp_path / "images", tmp_path / "whole", never, "xyz")
    for vocab_size, wrong, message in ((70000, encode, "65536"), (256, lambda x: encode(x)[:, :3], "returned int64"),
                                       (9, encode, "outside 0..8")):
        with pytest.raises(UserError, match=message):
            tokenize(tmp_path / "images", tmp_path / "new", wrong, vocab=vocab_size)
        assert not (tmp_path / "new" / "manifest.json").exists()


def test_several_views_are_random_crops(tmp_path: Path) -> None:
    write_leaves(tmp_path / "images", "train", 40, SMALL, 128, processes=1)
    tokenize(tmp_path / "images", tmp_path / "out", encode, size=(12, 12), views=3, flip=True)
    data = TokenData(tmp_path / "out")
    views = [data.gather(np.arange(40), view)[0] for view in range(6)]
    assert data.views == 6 and (views[0] != views[2]).any() and (views[2] != views[4]).any()
    images = ImageData(tmp_path / "images", (12, 12)).random_crops(np.arange(40), 0, 1)
    np.testing.assert_array_equal(views[2], encode(images))
    np.testing.assert_array_equal(views[3], encode(images[:, :, ::-1]))


def test_parts_make_the_same_tokens(tmp_path: Path) -> None:
    """Several processes, each with its own shards, one of them killed and run again: the bytes of one process."""
    write_leaves(tmp_path / "images", "train", 100, SMALL, 128, processes=1)
    tokenize(tmp_path / "images", tmp_path / "one", encode, samples_per_shard=16)
    for part in (2, 0, 2, 1):
        tokens = TokenSet(ImageData(tmp_path / "images"), tmp_path / "three", "abc", (1, 2, 3), 256, 16)
        tokens.write(encode, 48, part, 3)
    assert tokens.done() == 100
    tokens.shards.finish()
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


needs_lanczos = pytest.mark.skipif(who_resizes("auto") != "torch", reason="PyTorch before 2.12 has no Lanczos")


@needs_lanczos
@pytest.mark.parametrize("size", [(50, 40), (40, 50), (300, 31), (36, 36), (33, 200)])
def test_transform_sizes(size: tuple[int, int]) -> None:
    for shape in (eval_transform(picture(*size), (32, 32)).shape, train_transform(picture(*size), (32, 32), 0, 1, 2).shape):
        assert shape == (32, 32, 3)


@needs_lanczos
@pytest.mark.parametrize("size", [(50, 40), (40, 50), (300, 31), (18, 36), (33, 200)])
def test_transforms_to_what_is_not_square(size: tuple[int, int]) -> None:
    """Resized until one side is 1.125 times what is wanted and the other no less, then cut."""
    for shape in (eval_transform(picture(*size), (16, 32)).shape, train_transform(picture(*size), (16, 32), 0, 1, 2).shape):
        assert shape == (16, 32, 3)
    height, width = resize_to_cover(picture(*size), (18, 36), "pillow").shape[:2]
    assert (height == 18 and width >= 36) or (height >= 18 and width == 36)


@needs_lanczos
def test_transform_is_the_official_one() -> None:
    """By Pillow bit for bit; by PyTorch at most two grey levels from it."""
    image = picture(90, 60)
    resized = Image.fromarray(image).resize((54, 36), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(eval_transform(image, (32, 32), "pillow"), np.asarray(resized)[2:34, 11:43])
    crops = {train_transform(image, (32, 32), 0, 0, sample, "pillow").tobytes() for sample in range(50)}
    windows = {np.ascontiguousarray(np.asarray(resized)[y:y + 32, x:x + 32]).tobytes() for y in range(5) for x in range(23)}
    assert crops <= windows and len(crops) > 20
    np.testing.assert_array_equal(train_transform(image, (32, 32), 0, 0, 7), train_transform(image, (32, 32), 0, 0, 7))


@needs_lanczos
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 480), (300, 290), (1000, 333), (120, 160)])
def test_the_fast_resize_is_near_the_exact_one(size: tuple[int, int]) -> None:
    """On what resizing finds hardest, noise: at most 2 grey levels, in few pixels."""
    image = picture(*size)
    exact, fast = (resize_to_cover(image, (288, 288), how).astype(int) for how in ("pillow", "torch"))
    difference = np.abs(exact - fast)
    assert exact.shape == fast.shape and difference.max() <= 2 and difference.mean() < 0.02


def test_decoding() -> None:
    """JPEGs, also grey and CMYK ones, come as Pillow decodes them; half a file is refused."""
    simplejpeg = pytest.importorskip("simplejpeg")
    smooth = Image.fromarray(picture(40, 30)).resize((200, 150), Image.Resampling.BICUBIC)
    for mode in ("RGB", "L", "CMYK"):
        stream = io.BytesIO()
        smooth.convert(mode).save(stream, "JPEG", quality=90)
        payload = stream.getvalue()
        assert simplejpeg.is_jpeg(payload)
        np.testing.assert_array_equal(decode_image(payload, "here"), np.asarray(open_image(payload, "here")))
        with pytest.raises(UserError, match="here is not a readable image"):
            decode_image(payload[: len(payload) // 2], "here")


def test_to_minus1_1() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    images[0, 0, 0] = (0, 128, 255)
    result = to_minus1_1(images)
    assert result.shape == (2, 3, 4, 5) and result.dtype == torch.float32 and result.is_contiguous()
    assert result[0, :, 0, 0].tolist() == [-1.0, pytest.approx(1 / 255, abs=1e-6), 1.0]
    torch.testing.assert_close(result[1, 2, 3, 4], torch.tensor(images[1, 3, 4, 2] / 127.5 - 1).float())
