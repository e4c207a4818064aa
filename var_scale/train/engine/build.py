"""Choose the engine by name."""

from __future__ import annotations

from var_scale.config.schema import EngineConfig, TrainConfig
from var_scale.train.engine.base import AveragedWeights, Engine
from var_scale.train.step import TrainStep


def build_engine(engine: EngineConfig, train: TrainConfig, module: TrainStep) -> Engine:
    """The engine around `module`, whose weights are already loaded and on their device."""
    module.var.recompute_activations(engine.recompute, engine.recompute_every)
    if engine.compile:
        for block in module.var.blocks:
            block.compile()
    built = _wrap(engine, train, module)
    if train.ema:
        built.average = AveragedWeights(built, train.ema)
    return built


def _wrap(engine: EngineConfig, train: TrainConfig, module: TrainStep) -> Engine:
    if engine.name == "single":
        from var_scale.train.engine.single import SingleEngine

        return SingleEngine(module, train)
    if engine.name == "ddp":
        from var_scale.train.engine.single import DDPEngine

        return DDPEngine(module, train)
    if engine.name == "fsdp":
        from var_scale.train.engine.fsdp import FSDPEngine

        return FSDPEngine(module, train, engine)
    from var_scale.train.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, train, engine.deepspeed)
