"""Tokenizers are trained: continued to the same bits, on several processes, with every loss, in
both architectures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.raises import raises
from tests.runs import launch_log, run_here, small_config
from var_scale.config.load import check, dump, merge, write_config
from var_scale.config.schema import Config
from var_scale.data.embedded import ShapesSettings, write_shapes
from var_scale.data.image_loader import ImageData
from var_scale.errors import Preempted, UserError
from var_scale.files import read_json, sha256_file
from var_scale.model.frechet import Moments, frechet
from var_scale.model.load import load_tokenizer
from var_scale.model.perceptual import LPIPS, STAGES, VGG16
from var_scale.run_folder import tokenizer_file
from var_scale.train import tokenizer
from var_scale.train.encode import tokenize
from var_scale.train.tokenizer import TokenizerTrainer, train_tokenizer
from var_scale.train.tokenizer_report import assess
from var_scale.train.world import World

HERE = World(0, 1, torch.device("cpu"))
SIZE = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 256), ("val", 64)):
        write_shapes(
            root / split,
            split,
            count,
            ShapesSettings(size=SIZE, num_classes=4, looks=8),
            64,
            processes=1,
        )
    return root


def config_of(images: Path, root: Path, **recipe: Any) -> Config:
    """A small patch tokenizer of 24 pixels. `recipe`: keys of tokenizer.train, and `arch` with keys
    of the tokenizer."""
    arch = recipe.pop(
        "arch",
        {"arch": "patch", "patch": 8, "hidden": 32, "patch_nums": [1, 2, 3], "vocab_size": 64},
    )
    train = {"steps": 60, "batch_size": 16, "warmup_steps": 5, **recipe}
    shapes = {
        "size": SIZE,
        "num_classes": 4,
        "looks": 8,
        "train_images": 256,
        "val_images": 64,
    }
    folders = {f"images_{split}": str(images / split) for split in ("train", "val")}
    data = {**folders, "shapes": shapes, "num_classes": 4, "samples_per_shard": 64}
    base = dump(small_config(root))
    base["tokenizer"] = {}
    return check(
        merge(base, {"tokenizer": {**arch, "latent_channels": 8, "train": train}, "data": data}),
        "test",
    )


def train(config: Config, images: Path, folder: Path) -> Path:
    return train_tokenizer(
        config, ImageData(images / "train"), ImageData(images / "val"), folder, HERE
    )


def test_stopped_and_continued_to_the_same_bits(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is interrupted twice, before the codebook starts and after the adversary has
    joined. The state of the averaged weights and of the adversary is continued too."""
    recipe = {"steps": 12, "batch_size": 8, "plain_fraction": 0.25, "flip": True}
    recipe |= {"adversarial": 0.1, "adversarial_start": 0.5}
    config = config_of(images, tmp_path, ema=0.9, **recipe)
    train(config, images, tmp_path / "whole")
    monkeypatch.setattr(tokenizer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tokenizer, "SAVE_SHARE", 1e9)
    plain = TokenizerTrainer.train_step
    for stop in (3, 9):

        def cut(self: TokenizerTrainer, stop: int = stop) -> dict:
            if self.step == stop:
                raise KeyboardInterrupt
            return plain(self)

        monkeypatch.setattr(TokenizerTrainer, "train_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config, images, tmp_path / "cut")
    monkeypatch.setattr(TokenizerTrainer, "train_step", plain)
    assert sha256_file(train(config, images, tmp_path / "cut")) == sha256_file(
        tokenizer_file(tmp_path / "whole")
    )
    report = read_json(tmp_path / "cut" / "tokenizer.json")
    assert len(report["psnr_by_scales"]) == 3 and report["psnr_by_scales"] == sorted(
        report["psnr_by_scales"]
    )
    assert (tmp_path / "cut" / "reconstructions.png").exists() and not (
        tmp_path / "cut" / "training.pt"
    ).exists()
    other = config_of(images, tmp_path, **recipe)
    assert sha256_file(train(other, images, tmp_path / "last")) != sha256_file(
        tokenizer_file(tmp_path / "whole")
    ), "averaged or not"


def test_a_stop_saves(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM during training: the state of that step is saved, Preempted is raised, and the signal
    handlers are restored. The continued training ends with the same bits. Shards that changed are
    refused."""
    config = config_of(images, tmp_path)
    train(config, images, tmp_path / "whole")
    plain, before = TokenizerTrainer.train_step, signal.getsignal(signal.SIGTERM)

    def cut(self: TokenizerTrainer) -> dict:
        if self.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    monkeypatch.setattr(TokenizerTrainer, "train_step", cut)
    with pytest.raises(Preempted):
        train(config, images, tmp_path / "cut")
    assert signal.getsignal(signal.SIGTERM) == before
    assert torch.load(tmp_path / "cut" / "training.pt", weights_only=True)["step"] == 21
    monkeypatch.setattr(TokenizerTrainer, "train_step", plain)
    assert sha256_file(train(config, images, tmp_path / "cut")) == sha256_file(
        tokenizer_file(tmp_path / "whole")
    )
    with raises("train.tokenizer-other"):
        train(config_of(images, tmp_path, lr=1e-3), images, tmp_path / "cut")
    shutil.copytree(images, tmp_path / "images")
    tar = next((tmp_path / "images" / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with raises("train.shard-changed", tar.name):
        train(config, tmp_path / "images", tmp_path / "other")


@pytest.mark.parametrize(
    ("patch", "grids"), [(7, [1, [1, 2], [2, 4]]), (3, [1, 3]), (2, [1]), (10, [1, 2, 3])]
)
def test_any_size_of_images(patch: int, grids: list, tmp_path: Path) -> None:
    """Images may have odd sides, or sides smaller than the pyramid of the loss."""
    h, w = (
        patch * side for side in (grids[-1] if isinstance(grids[-1], list) else [grids[-1]] * 2)
    )
    settings = ShapesSettings(size=(h, w), num_classes=4, looks=8)
    for split in ("train", "val"):
        write_shapes(tmp_path / "i" / split, split, 32, settings, 32, processes=1)
    arch = {"arch": "patch", "patch": patch, "hidden": 32, "patch_nums": grids, "vocab_size": 16}
    train(
        config_of(tmp_path / "i", tmp_path, arch=arch, steps=12, batch_size=8),
        tmp_path / "i",
        tmp_path / "out",
    )
    assert np.isfinite(read_json(tmp_path / "out" / "tokenizer.json")["psnr_db"])


def test_it_learns_and_uses_its_codes(images: Path, tmp_path: Path) -> None:
    """The reconstruction improves with each scale, is far better than the mean image, and uses most
    codes at the last scale."""
    train(config_of(images, tmp_path, steps=300, batch_size=32), images, tmp_path / "out")
    report = read_json(tmp_path / "out" / "tokenizer.json")
    val = ImageData(images / "val").images(np.arange(64)) / 255
    flat = -10 * np.log10(((val - val.mean((0, 1, 2))) ** 2).mean())
    assert report["psnr_db"] > flat + 2 and report["psnr_db"] > report["psnr_by_scales"][0] + 1
    assert report["perplexity_per_scale"][-1] > 30 and report["codes_used_per_scale"][-1] > 50
    rows = [
        line
        for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        if "perplexity" in line
    ]
    assert len(rows) == 6


@pytest.mark.slow
def test_two_processes_are_one(images: Path, tmp_path: Path) -> None:
    """The command runs with torchrun: each process takes half of the batch, and the tokenizer is as
    good as that of one process."""
    config = config_of(images, tmp_path, steps=120, batch_size=32, plain_fraction=0.5)
    write_config(config, tmp_path / "one.yaml")
    for name, processes in (("one", "1"), ("two", "2")):
        command = [
            "-m",
            "var_scale.cli",
            "tokenizer",
            "train",
            str(tmp_path / "one.yaml"),
            "--folder",
            str(tmp_path / name),
            "--processes",
            processes,
        ]
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False, env=os.environ
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("one", "two")
    )
    assert one["step"] == two["step"] == 50
    reports = [read_json(tmp_path / name / "tokenizer.json") for name in ("one", "two")]
    assert reports[1]["psnr_db"] == pytest.approx(reports[0]["psnr_db"], abs=0.5)


def random_vgg() -> dict[str, torch.Tensor]:
    """Like torchvision's file: convolutions of `features`, numbered among ReLUs and poolings."""
    state, place, inner = {}, 0, 3
    for stage in STAGES:
        for width in stage:
            state |= {
                f"features.{place}.weight": torch.randn(width, inner, 3, 3)
                * (9 * inner / 2) ** -0.5,
                f"features.{place}.bias": torch.zeros(width),
            }
            place, inner = place + 2, width
        place += 1
    return state


def test_frechet_distance() -> None:
    """Gaussians with known moments are compared with the matrix square root; batches give the same
    result as one call; equal sets have distance zero."""
    torch.manual_seed(1)
    a, b = (
        torch.randn(4000, 6, dtype=torch.float64) @ torch.randn(6, 6).double() + 100,
        torch.randn(3000, 6, dtype=torch.float64) + 99,
    )
    one, two, again = Moments(6), Moments(6), Moments(6)
    one.add(a)
    two.add(b)
    for part in a.split(333):
        again.add(part)
    product = np.cov(a.T.numpy()) @ np.cov(b.T.numpy())
    root = np.sqrt(np.linalg.eigvals(product).real).sum()
    expected = (
        float((a.mean(0) - b.mean(0)).square().sum())
        + np.trace(np.cov(a.T))
        + np.trace(np.cov(b.T))
        - 2 * root
    )
    assert frechet(one, two) == pytest.approx(expected, rel=1e-8) == frechet(again, two)
    assert frechet(one, again) == pytest.approx(0, abs=1e-6)


def test_perception(images: Path, tmp_path: Path) -> None:
    """LPIPS with weights given by path is zero for equal images and its defining sum for others.
    Training uses it. Files of another kind are refused."""
    torch.manual_seed(0)
    vgg, heads = tmp_path / "vgg16.pth", tmp_path / "lpips.pth"
    torch.save(random_vgg() | {"classifier.0.weight": torch.zeros(3)}, vgg)
    widths = (64, 128, 256, 512, 512)
    torch.save(
        {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(widths)},
        heads,
    )
    lpips = LPIPS(vgg, heads)
    one, two = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert float(lpips(one, one)) == 0 and float(lpips(one, two)) == pytest.approx(
        float(lpips(two, one)), rel=1e-5
    )
    maps = [lpips.vgg(x) for x in (one, two)]
    expected = sum(
        (
            (
                torch.nn.functional.normalize(a, dim=1) - torch.nn.functional.normalize(b, dim=1)
            ).square()
            * lpips.get_buffer(f"head{k}")
        )
        .sum(1)
        .mean()
        for k, (a, b) in enumerate(zip(*maps, strict=True))
    )
    assert float(lpips(one, two)) == pytest.approx(float(expected), rel=1e-4) and len(maps[0]) == 5
    files = {"perceptual": 0.5, "vgg_weights": str(vgg), "lpips_weights": str(heads)}
    trainer = TokenizerTrainer(
        config_of(images, tmp_path, **files), ImageData(images / "train"), tmp_path / "out", HERE
    )
    first = [float(trainer.train_step()["perceptual"]) for _ in range(4)]
    assert all(np.isfinite(first)) and first[0] > 0
    val = ImageData(images / "val")
    report = assess(trainer.vae.eval(), val, HERE.device, VGG16(vgg))
    assert report["rfd_vgg16"] > 0 and report["images"] == val.num_samples
    with pytest.raises(UserError, match="has no lin0"):
        LPIPS(vgg, vgg)
    with raises("train.lpips-weights", "vgg_weights"):
        TokenizerTrainer(
            config_of(images, tmp_path, perceptual=1.0),
            ImageData(images / "train"),
            tmp_path / "out",
            HERE,
        )


@pytest.mark.slow
def test_the_official_network_trained_here_works_everywhere(images: Path, tmp_path: Path) -> None:
    """The CNN is trained for a few steps; then its tokens are written and a run is trained on
    them."""
    arch = {"arch": "cnn", "ch": 32, "patch_nums": [1, 2], "vocab_size": 32}
    config = config_of(images, tmp_path, arch=arch, steps=8, batch_size=8, plain_fraction=0.25)
    config = check(merge(dump(config), {"data": {"shapes": None}}), "test")
    val, some = ImageData(images / "val", (32, 32)), ImageData(images / "train", (32, 32))
    weights = train_tokenizer(config, some, val, tmp_path / "cnn", HERE)
    tokens = {f"tokens_{split}": str(tmp_path / "tokens" / split) for split in ("train", "val")}
    config = check(
        merge(dump(config), {"tokenizer": {"weights": str(weights)}, "data": tokens}), "test"
    )
    vae, _ = load_tokenizer(config.tokenizer, torch.device("cpu"))
    assert vae.quantize.embedding.weight.shape == (32, 8)
    for split in ("train", "val"):
        assert tokenize(config, split).num_samples in (256, 64)
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-2000:]
