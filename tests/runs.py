"""Small runs for tests: random tokens in real shards, a tokenizer with random weights, a real launch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from var_scale.cluster.local import run_local
from var_scale.config.load import check, merge
from var_scale.config.schema import Config
from var_scale.data.shards import ShardSetWriter
from var_scale.files import sha256_file
from var_scale.model.load import new_tokenizer, save_tokenizer, tokenizer_file
from var_scale.run_folder import RunFolder
from var_scale.train.loop import create_run

TREE: dict[str, Any] = {
    "name": "small",
    "data": {"num_classes": 4},
    "tokenizer": {"arch": "patch", "patch": 4, "hidden": 16, "patch_nums": [1, 2, 3], "vocab_size": 32, "latent_channels": 8},
    "model": {"depth": 2, "width_per_depth": 8, "drop_path_rate": 0.2},
    "train": {"steps": 20, "batch_size": 8, "base_lr": 0.3, "precision": "fp32", "eval_batch": 16},
    "engine": {"name": "single"},
    "log": {"every": 1, "tensorboard": False},
}


def write_tokens(folder: Path, split: str, count: int, tokenizer_hash: str, patch_nums: list[int], vocab: int, seed: int) -> None:
    """Token shards whose tokens depend on the class, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    length = sum(p * p for p in patch_nums)
    tokens = {"dtype": "<u2", "views": 1, "length": length, "patch_nums": patch_nums, "vocab_size": vocab, "tokenizer_hash": tokenizer_hash}
    with ShardSetWriter(folder, "tokens", split, 4, 32, {"name": "test", "seed": seed}, tokens) as writer:
        for _ in range(count):
            label = int(rng.integers(4))
            row = (rng.integers(vocab // 4, size=(1, length)) + label * (vocab // 4)).astype(np.uint16)
            writer.add_tokens(row, label)
        writer.finish()


def small_config(root: Path, **changes: Any) -> Config:
    """A config whose tokenizer and token shards lie in `root`; `changes` are sections to merge."""
    base = check(TREE, "test")
    weights = tokenizer_file(root / "tokenizer")
    if not weights.exists():
        torch.manual_seed(0)
        save_tokenizer(new_tokenizer(base.tokenizer), weights)
        for split, count, seed in (("train", 100, 1), ("val", 37, 2)):
            write_tokens(root / split, split, count, sha256_file(weights), [1, 2, 3], 32, seed)
    files = {
        "data": {"tokens_train": str(root / "train"), "tokens_val": str(root / "val")},
        "tokenizer": {"weights": str(weights)},
    }
    return check(merge(merge(TREE, files), changes), "test")


def run(config: Config, folder: Path) -> tuple[int, RunFolder]:
    """Launch for real and wait."""
    created = create_run(config, folder)
    code = run_local(config, created, "test")
    return code, created


def losses(folder: RunFolder) -> list[float]:
    """Training loss of every step."""
    return [row["loss"] for row in folder.read_metrics() if row["kind"] == "train"]


def final(folder: RunFolder) -> dict[str, Any]:
    """The last evaluation."""
    return next(row for row in reversed(folder.read_metrics()) if row["kind"] == "eval" and row["final"])


def rewind(folder: RunFolder, step: int) -> None:
    """Leave the folder as if the run had been stopped at `step`, where it has a checkpoint."""
    for checkpoint in folder.checkpoints.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    assert (folder.checkpoints / f"step-{step:08d}").exists()
    folder.set_status("preempted", "rewound by a test", step=step)
