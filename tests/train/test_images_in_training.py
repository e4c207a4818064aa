"""Training on image shards that each step tokenises, and tokenising with several processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.ranks import Ranks
from tests.runs import ENGINES, final, launch_log, losses, rewind, run_here, small_config
from var_scale.config.schema import Config
from var_scale.data.embedded import ShapesSettings, write_shapes
from var_scale.data.image_loader import ImageData, ImageLoader
from var_scale.data.loader import TokenData
from var_scale.train.checkpoint import checkpoints
from var_scale.train.encode import tokenize

SHAPES = ShapesSettings(size=24, num_classes=4, looks=8)
"""The small tokenizer takes 12 pixels: images are resized to 14, and a crop of 12 is taken."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 100), ("val", 37)):
        write_shapes(root / split, split, count, SHAPES, 32, processes=1)
    return root


def online(images: Path, root: Path, **changes) -> Config:
    data = {
        "online": True,
        "images_train": str(images / "train"),
        "images_val": str(images / "val"),
    }
    return small_config(root, **{**changes, "data": data | changes.get("data", {})})


def test_the_same_run_on_two_ranks_and_after_a_stop(
    images: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Random crops and mirror images depend on the sample and the epoch, not on the rank that reads
    them."""
    recipe = {"steps": 30, "keep_steps": [11]}
    code, whole = run_here(
        online(images, tmp_path, train=recipe, data={"flip": True}), tmp_path / "whole"
    )
    assert code == 0, launch_log(whole)[-3000:]
    fsdp = ENGINES["fsdp"]
    code, two = ranks.run(
        online(images, tmp_path, train=recipe, engine=fsdp, data={"flip": True, "decoders": 3}),
        tmp_path / "two",
    )
    assert code == 0 and losses(two) == pytest.approx(losses(whole), rel=1e-5)
    assert (
        final(two)["loss_avg"] == pytest.approx(final(whole)["loss_avg"], rel=1e-5)
        and final(two)["samples"] == 37
    )
    before = checkpoints(whole.checkpoints)[-1].state["files"]
    rewind(whole, 11)
    code, again = run_here(
        online(images, tmp_path, train=recipe, data={"flip": True}), tmp_path / "whole"
    )
    assert code == 0 and checkpoints(again.checkpoints)[-1].state["files"] == before
    code, plain = run_here(online(images, tmp_path, train=recipe), tmp_path / "plain")
    assert code == 0 and losses(plain) != losses(whole)


def test_progressive_training_on_images(images: Path, tmp_path: Path) -> None:
    """A stage shortens the quantiser that also makes the tokens. Every batch and evaluation still
    gets all scales."""
    recipe = {"steps": 20, "progressive": 0.8, "progressive_start": 0, "evals": 4}
    code, folder = run_here(online(images, tmp_path, train=recipe), tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    assert len(final(folder)["loss_per_scale"]) == 3


def test_centre_crops_give_the_losses_of_their_tokens(images: Path, tmp_path: Path) -> None:
    """An untrained model scores the same on images as on the tokens made of them."""
    recipe = {"steps": 1, "base_lr": 1e-9}
    first = online(images, tmp_path, train=recipe)
    tokens = {
        "tokens_train": str(tmp_path / "t"),
        "tokens_val": str(tmp_path / "v"),
        "online": False,
    }
    second = online(images, tmp_path, train=recipe, data=tokens)
    for split in ("train", "val"):
        tokenize(second, split)
    scores = []
    for name, config in (("first", first), ("second", second)):
        code, folder = run_here(config, tmp_path / name)
        assert code == 0, launch_log(folder)[-3000:]
        scores.append(final(folder)["loss_per_scale"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def hashes(loaders: list[ImageLoader], step: int, accumulate: int) -> bytes:
    batches = [loader.batch(step, micro) for micro in range(accumulate) for loader in loaders]
    order = np.argsort(np.concatenate([batch.sample_positions_B for batch in batches]))
    return np.concatenate([batch.images_BHWC for batch in batches])[order].tobytes()


def test_pixels_depend_on_neither_world_nor_workers(images: Path) -> None:
    """World sizes 1 to 4, accumulation and decoding threads give the same global batches. Each
    epoch uses other crops."""
    data, threads = (
        ImageData(images / "train", (12, 12)),
        ImageData(images / "train", (12, 12), threads=3),
    )
    expected = [hashes([ImageLoader(data, 3, 24, flip=True)], step, 1) for step in range(7)]
    for world, accumulate, source in ((2, 1, data), (4, 3, threads), (1, 2, threads)):
        loaders = [
            ImageLoader(source, 3, 24, world, rank, accumulate, flip=True) for rank in range(world)
        ]
        assert [hashes(loaders, step, accumulate) for step in range(7)] == expected
    crops = [data.random_crops(np.arange(100), 3, epoch) for epoch in range(2)]
    assert (crops[0] != crops[1]).any(axis=(1, 2, 3)).mean() > 0.5


def test_tokens_of_several_processes_and_precisions(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes write what one writes. With bfloat16 the share of changed tokens is printed."""
    folders = [tmp_path / name for name in ("one", "two", "bf16")]
    for folder, processes, precision in zip(
        folders, (1, 2, 1), ("fp32", "fp32", "bf16"), strict=True
    ):
        data = {"tokens_train": str(folder), "views": 2, "flip": True, "samples_per_shard": 32}
        config = online(images, tmp_path, data=data, tokenizer={"encode_precision": precision})
        tokenize(config, "train", processes)
    one, two, half = (TokenData(folder) for folder in folders)
    assert one.manifest.shards == two.manifest.shards and one.views == 4
    printed = capsys.readouterr().out
    changed = np.mean(
        [
            one.gather(np.arange(100), view)[0] != half.gather(np.arange(100), view)[0]
            for view in range(4)
        ]
    )
    assert f"{changed:.2%}" in printed and "bf16" in printed and 0 < changed < 0.2


def test_the_bench_times_images(images: Path, tmp_path: Path) -> None:
    """`bench train` on images that the step tokenises: the result names what was timed. (The bench
    on token shards: tests/train/test_options.py.)"""
    from var_scale.bench.train import bench_train

    result = bench_train(online(images, tmp_path), steps=2, warmup=1, out=None, trace=None)
    assert result["data"] == "images, encoded in the step" and result["phases_ms"]["data"] > 0
