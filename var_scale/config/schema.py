"""Every key of every YAML file. A wrong key or value stops the program (see load.py)."""

from __future__ import annotations

from os.path import normpath

from pydantic import model_validator

from var_scale.config.cluster_section import ClusterConfig
from var_scale.config.data_section import DataConfig, ShapesConfig, TeacherConfig
from var_scale.config.fields import Section, setting
from var_scale.config.model_section import ModelConfig, TokenizerConfig, TokenizerTrainConfig
from var_scale.config.study_section import StudySpec
from var_scale.config.train_section import EngineConfig, LogConfig, TrainConfig

__all__ = [
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "LogConfig",
    "ModelConfig",
    "ShapesConfig",
    "StudySpec",
    "TeacherConfig",
    "TokenizerConfig",
    "TokenizerTrainConfig",
    "TrainConfig",
]


class Config(Section):
    """The whole configuration of a run or a study: one file names everything."""

    name: str = setting(
        "run",
        "name of the study or run, and of its folder in runs/",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig
    engine: EngineConfig = setting(EngineConfig(), "engine and processes", identity=False)
    cluster: ClusterConfig = setting(ClusterConfig(), "resources on SLURM", identity=False)
    log: LogConfig = setting(LogConfig(), "logging", identity=False)
    study: StudySpec | None = setting(None, "ladder, laws and report", identity=False)

    @model_validator(mode="after")
    def _check(self) -> Config:
        scales, train, embedded = len(self.tokenizer.patch_nums), self.train, self.data.embedded
        if isinstance(train.scale_weights, list) and len(train.scale_weights) != scales:
            raise ValueError(
                f"train.scale_weights: {len(train.scale_weights)} weights for the {scales} scales "
                "of tokenizer.patch_nums"
            )
        if train.progressive and train.progressive_start >= scales:
            raise ValueError(
                f"train.progressive_start: is {train.progressive_start}, but the tokenizer has "
                f"{scales} scales; give 0 to {scales - 1}"
            )
        for kind in ("images", "tokens"):
            train_at, val_at = (getattr(self.data, f"{kind}_{split}") for split in ("train", "val"))
            if train_at and val_at and normpath(train_at) == normpath(val_at):
                raise ValueError(
                    f"data.{kind}_val: {val_at} is the folder of the training data too; give "
                    "validation data that the models do not train on"
                )
        if embedded and self.data.num_classes not in (None, embedded.num_classes):
            raise ValueError(
                f"data.num_classes: is {self.data.num_classes}, but the embedded set has "
                f"{embedded.num_classes} classes; remove data.num_classes"
            )
        return self

    @property
    def classes(self) -> int:
        """Number of classes: of the embedded set where one is used, else of `data`."""
        embedded = self.data.embedded
        return embedded.num_classes if embedded else self.data.num_classes or 1000

    @property
    def train_samples(self) -> int:
        """Training samples per epoch, for plans."""
        data, embedded = self.data, self.data.embedded
        total = embedded.train_samples if embedded else data.train_samples or 1281167
        return max(1, int((data.fraction or 1) * total))
