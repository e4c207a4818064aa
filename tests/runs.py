"""Small runs for tests: random tokens in real shards, a tokenizer with random weights, and three
ways to train.

`run_here` trains in the process of the test, which takes a tenth of the time of a launch. The
fixture `ranks` (tests/ranks.py) trains in processes that stay up for the whole session. `run`
launches, for tests whose subject is the launch itself.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from var_scale.config.load import check, merge
from var_scale.config.schema import Config
from var_scale.data.shards import ShardSetWriter, token_sample
from var_scale.files import sha256_file
from var_scale.jobs.local import run_local
from var_scale.model.load import new_tokenizer, save_tokenizer
from var_scale.run_folder import RunFolder, tokenizer_file
from var_scale.train.create import create_run
from var_scale.train.worker import train
from var_scale.train.world import World

TREE: dict[str, Any] = {
    "name": "small",
    "data": {"num_classes": 4},
    "tokenizer": {
        "arch": "patch",
        "patch": 4,
        "hidden": 16,
        "patch_nums": [1, 2, 3],
        "vocab_size": 32,
        "latent_channels": 8,
    },
    "model": {"depth": 2, "width_per_depth": 8, "drop_path_rate": 0.2},
    "train": {"steps": 20, "batch_size": 8, "base_lr": 0.3, "precision": "fp32", "eval_batch": 16},
    "engine": {"name": "single"},
    "log": {"every": 1, "tensorboard": False},
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp", "processes": 2},
    "fsdp": {"name": "fsdp", "processes": 2},
    **{
        f"zero{stage}": {
            "name": "deepspeed",
            "processes": 2,
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }
        for stage in range(4)
    },
}
"""The engines that train on several processes, each on two."""


def write_tokens(
    folder: Path,
    split: str,
    count: int,
    tokenizer_hash: str,
    patch_nums: list[int],
    vocab: int,
    seed: int,
) -> None:
    """Token shards whose tokens depend on the class, so that a model can learn something."""
    rng = np.random.default_rng(seed)
    length = sum(p * p for p in patch_nums)
    tokens = {
        "dtype": "<u2",
        "views": 1,
        "length": length,
        "patch_nums": patch_nums,
        "vocab_size": vocab,
        "tokenizer_hash": tokenizer_hash,
    }
    with ShardSetWriter(
        folder, "tokens", split, 4, 32, {"name": "test", "seed": seed}, tokens
    ) as writer:
        for _ in range(count):
            label = int(rng.integers(4))
            row = (rng.integers(vocab // 4, size=(1, length)) + label * (vocab // 4)).astype(
                np.uint16
            )
            writer.add(token_sample(row, label))
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
    """Launch the run's own processes and wait for them."""
    created = create_run(config, folder)
    code = run_local(config, created, "test")
    return code, created


def run_here(config: Config, folder: Path) -> tuple[int, RunFolder]:
    """Train a run of the single engine in this process. It leaves the files that a launch leaves,
    log/launch.log among them, and returns what `run` returns."""
    assert config.engine.name == "single", config.engine.name
    created = create_run(config, folder)
    prepare(created)
    with (
        process_as_before(),
        open(created.log / "launch.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = train(created, World(0, 1, torch.device("cpu")))
    return code, created


def prepare(folder: RunFolder) -> None:
    """Do what a launcher does before it starts the ranks."""
    folder.set_status("queued")
    (folder.path / "STOP").unlink(missing_ok=True)
    folder.log.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def process_as_before() -> Iterator[None]:
    """Restore what training changes for its whole process: signal handlers, random states, the
    precision of matrix products, and torch's `linear`, which ZeRO 3 replaces with its own."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    precision, linear = torch.get_float32_matmul_precision(), torch.nn.functional.linear
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        torch.nn.functional.linear = linear


def launch_log(folder: RunFolder) -> str:
    """The output of a run's processes, in any of the three ways to train."""
    return (folder.log / "launch.log").read_text(errors="replace")


def losses(folder: RunFolder) -> list[float]:
    """Training loss of every step."""
    return [row["loss"] for row in folder.read_metrics() if row["kind"] == "train"]


def final(folder: RunFolder) -> dict[str, Any]:
    """The last evaluation."""
    return next(
        row for row in reversed(folder.read_metrics()) if row["kind"] == "eval" and row["final"]
    )


def rewind(folder: RunFolder, step: int) -> None:
    """Leave the folder as if the run had been stopped at `step`, where it has a checkpoint."""
    for checkpoint in folder.checkpoints.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    assert (folder.checkpoints / f"step-{step:08d}").exists()
    folder.set_status("preempted", "rewound by a test", step=step)
