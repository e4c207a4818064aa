"""The embedded study in miniature, for tests."""

from __future__ import annotations

from pathlib import Path

from var_scale.config.load import load
from var_scale.study.study import Study

MINI = [
    "study/tiny",
    "name=mini",
    "engine=single",
    "data.shapes.train_images=512",
    "data.shapes.val_images=128",
    "data.samples_per_shard=128",
    "tokenizer.patch=8",
    "tokenizer.patch_nums=[1,2,3,4]",
    "tokenizer.train.steps=40",
    "tokenizer.train.batch_size=16",
    "tokenizer.vocab_size=32",
    "tokenizer.hidden=32",
    "tokenizer.latent_channels=8",
    "model.width_per_depth=12",
    "train.steps=24",
    "train.warmup_epochs=0.05",
    "train.eval_batch=512",
    "train.batch_size=16",
    "train.evals=2",
    "train.precision=fp32",
    "train.checkpoint_seconds=0.5",
    "log.every=2",
    "log.tensorboard=false",
    "study.depths=[1,2,3,4,5]",
    "study.depth_seeds=null",
    "study.overrides=null",
    "study.parallel=1",
    "study.rates=null",
    "study.quality_samples=0",
    "study.cfg=1.5",
    "study.top_p=0",
    "study.samples_per_class=2",
    "study.sample_classes=3",
]


def mini(runs: Path, *overrides: str) -> Study:
    """The study RUNS/mini."""
    return Study(load(MINI[0], [*MINI[1:], *overrides]), runs)
