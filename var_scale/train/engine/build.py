"""Choose the engine by name."""

from __future__ import annotations

from var_scale.config.schema import EngineConfig, TrainConfig
from var_scale.train.engine.base import Engine
from var_scale.train.step import TrainStep


def build_engine(engine: EngineConfig, train: TrainConfig, module: TrainStep) -> Engine:
    """The engine around `module`, whose weights are already loaded and on their device."""
    common = (module, train.accumulate, train.clip, train.adam_betas)
    if engine.name == "single":
        from var_scale.train.engine.single import SingleEngine

        return SingleEngine(*common)
    if engine.name == "ddp":
        from var_scale.train.engine.single import DDPEngine

        return DDPEngine(*common)
    if engine.name == "fsdp":
        from var_scale.train.engine.fsdp import FSDPEngine

        return FSDPEngine(*common)
    from var_scale.train.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(*common, engine.deepspeed, train.batch_size)
