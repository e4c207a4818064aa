"""The order and the loader: every sample occurs once per epoch, the global batches are the same at
any world size, and resumption is exact."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.data.data_samples import TOKENS, image, write_images, write_tokens
from tests.raises import raises
from var_scale.data.image_loader import ImageData
from var_scale.data.loader import TokenData, TokenLoader
from var_scale.data.order import (
    epoch_permutation,
    eval_slices,
    global_batch_indices,
    rank_slice,
    uniform,
)
from var_scale.data.shards import ShardSetWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens")
    write_tokens(path, 50, 8)
    return path


def test_every_sample_exactly_once_an_epoch() -> None:
    for num_samples, batch in ((50, 8), (50, 64), (7, 3), (64, 16)):
        steps = -(-3 * num_samples // batch)
        parts = [global_batch_indices(num_samples, 5, step, batch) for step in range(steps)]
        indices, epochs = (
            np.concatenate(column)[: 3 * num_samples] for column in zip(*parts, strict=True)
        )
        for epoch in range(3):
            assert sorted(indices[epochs == epoch].tolist()) == list(range(num_samples))
            np.testing.assert_array_equal(
                indices[epochs == epoch], epoch_permutation(num_samples, 5, epoch)
            )


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [epoch_permutation(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_pinned() -> None:
    assert epoch_permutation(10, 0, 0).tolist() == PINNED_ORDER
    np.testing.assert_allclose(uniform(3, "label_drop", 7, 3), PINNED_UNIFORM, rtol=1e-12)


PINNED_ORDER = [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
PINNED_UNIFORM = [0.4536586561820086, 0.6620858112555618, 0.789521970292708]


def global_hash(data: TokenData, world: int, accumulate: int, steps: range) -> list[str]:
    """Hash of the global batches, assembled from the parts of the ranks by position in the
    stream."""
    result = []
    loaders = [TokenLoader(data, 3, 24, world, rank, accumulate) for rank in range(world)]
    for step in steps:
        batches = [loader.batch(step, micro) for micro in range(accumulate) for loader in loaders]
        positions = np.concatenate([batch.sample_positions_B for batch in batches])
        np.testing.assert_array_equal(np.sort(positions), np.arange(step * 24, step * 24 + 24))
        order = np.argsort(positions)
        content = [
            np.concatenate([batch.tokens_BL for batch in batches]),
            np.concatenate([batch.labels_B for batch in batches]),
        ]
        result.append(
            hashlib.sha256(b"".join(array[order].tobytes() for array in content)).hexdigest()
        )
    return result


def test_world_size_and_accumulation_do_not_change_the_batches(folder: Path) -> None:
    data = TokenData(folder)
    expected = global_hash(data, 1, 1, range(7))
    assert len(set(expected)) == 7
    for world in (1, 2, 4):
        for accumulate in (1, 2, 3):
            assert global_hash(data, world, accumulate, range(7)) == expected


def test_resume_at_odd_steps_with_another_world_size(folder: Path) -> None:
    expected = global_hash(TokenData(folder), 2, 1, range(9))
    for start in (1, 3, 7):
        assert global_hash(TokenData(folder), 4, 2, range(start, 9)) == expected[start:]


def test_gather_returns_what_was_written(folder: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, 50, 7)
    for data in (TokenData(folder), TokenData(tmp_path)):
        indices = np.random.default_rng(1).integers(0, 50, 64)
        views = np.random.default_rng(2).integers(0, 2, 64)
        tokens_BL, labels_B = data.gather(indices, views)
        np.testing.assert_array_equal(tokens_BL, tokens[indices, views])
        np.testing.assert_array_equal(labels_B, indices % 5)
        assert tokens_BL.dtype == labels_B.dtype == np.int64
    with pytest.raises(IndexError):
        data.gather(np.array([50]))


def test_both_views_are_shown_and_change_with_the_epoch(folder: Path) -> None:
    data = TokenData(folder)
    loader = TokenLoader(data, 0, 50)
    first, second = (loader.batch(step) for step in (0, 1))
    indices = [global_batch_indices(50, 0, step, 50)[0] for step in (0, 1)]
    shown = []
    for batch, index in zip((first, second), indices, strict=True):
        view = np.array(
            [
                int((batch.tokens_BL[i] == data.gather(index[i : i + 1], 1)[0][0]).all())
                for i in range(50)
            ]
        )
        assert 10 < view.sum() < 40
        shown.append(view[np.argsort(index)])
    assert (shown[0] != shown[1]).any()


def test_mismatches_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    TokenData(folder, "abc", (1, 2, 3))
    with raises("data.other-tokenizer", "abc", "def"):
        TokenData(folder, expect_tokenizer_hash="def")
    with raises("data.other-patch-nums", "patch_nums"):
        TokenData(folder, expect_patch_nums=(1, 2, 4))
    write_images(tmp_path)
    with raises("data.kind", "image"):
        TokenData(tmp_path)
    with raises("data.batch-divide"):
        TokenLoader(TokenData(folder), 0, 10, 4)
    assert TOKENS["tokenizer_hash"] == "abc"


def test_rank_slices_tile_the_batch() -> None:
    parts = [rank_slice(24, 3, rank, 2, micro) for micro in range(2) for rank in range(3)]
    assert [(part.start, part.stop) for part in parts] == [(4 * i, 4 * i + 4) for i in range(6)]


def test_uniform_streams_are_apart() -> None:
    draws = [
        uniform(seed, stream, step, 1000)
        for seed in (0, 1)
        for stream in ("a", "b")
        for step in (0, 1)
    ]
    correlation = np.corrcoef(draws) - np.eye(8)
    assert np.abs(correlation).max() < 0.12 and abs(np.mean(draws) - 0.5) < 0.01


def test_eval_slices_cover_exactly_once() -> None:
    for world in (1, 2, 4):
        parts = [part for rank in range(world) for part in eval_slices(50, 8, world, rank)]
        assert (
            sorted(np.concatenate(parts).tolist()) == list(range(50)) and max(map(len, parts)) <= 8
        )
    assert eval_slices(1, 8, 2, 1) == []


def test_images_are_decoded_exactly(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = ImageData(tmp_path)
    for _ in range(2):  # decoded, then from the cache
        np.testing.assert_array_equal(
            data.images(np.array([3, 19, 3])), np.stack([image(3), image(19), image(3)])
        )
    assert ImageData(tmp_path, size=(6, 6)).images(np.array([0, 1])).shape == (2, 6, 6, 3)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    from var_scale.data.embedded import png_bytes

    with ShardSetWriter(tmp_path, "image", "train", 1, 8, {}) as writer:
        writer.add_image(png_bytes(image(0)), 0)
        writer.add_image(b"not a picture", 0)
        writer.add_image(png_bytes(np.zeros((5, 5, 3), np.uint8)), 0)
        writer.finish()
    data = ImageData(tmp_path)
    with raises("data.image-invalid", "train-000000.tar: sample 1"):
        data.images(np.array([1]))
    with raises("data.image-sizes", "sample 2", "5x5"):
        data.images(np.array([2]))


def test_a_share_of_the_data(tmp_path: Path) -> None:
    """Only the chosen samples are read, each once per epoch; a larger share contains the smaller
    one; the whole set and a share keep their own streams."""
    from var_scale.train.inputs import chosen

    tokens = write_tokens(tmp_path)
    data = TokenData(tmp_path)
    half, most = chosen(len(tokens), 0.5), chosen(len(tokens), 0.75)
    assert (
        half is not None
        and most is not None
        and set(half) < set(most)
        and len(half) == 10
        and chosen(20, None) is None
    )
    loader = TokenLoader(data, 1, 5, subset=half)
    seen = np.concatenate([loader.places(step, 0)[0] for step in range(4)])
    assert sorted(seen) == sorted([*half, *half]) and sorted(seen[:10]) == sorted(half)
    batch = loader.batch(0)
    rows = {tuple(row) for row in batch.tokens_BL}
    assert rows <= {tuple(view) for index in half for view in tokens[index]}
