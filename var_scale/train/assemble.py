"""From a config to a running engine: the only place where the parts of a run are put together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from var_scale.config.load import config_hash, load
from var_scale.config.schema import Config, EngineConfig, TrainConfig
from var_scale.data.loader import Ahead, Batch, TokenData
from var_scale.data.order import rank_slice
from var_scale.data.remote import located
from var_scale.errors import UserError
from var_scale.model.load import build_model, load_tokenizer, new_tokenizer
from var_scale.model.vqvae import VQVAE
from var_scale.run_folder import RunFolder
from var_scale.scales import length
from var_scale.train.checkpoint import Checkpoint, checkpoints, damaged_message
from var_scale.train.engine.base import AveragedWeights, Engine
from var_scale.train.fault import Faults
from var_scale.train.graphs import StepGraphs, why_no_graphs
from var_scale.train.inputs import Images, Tokens, open_data, open_images
from var_scale.train.schedule import Schedule
from var_scale.train.step import TrainStep
from var_scale.train.stepper import Batches, Stepper
from var_scale.train.world import World, choose_precision

VISIBLE_SECONDS = 120.0
"""How long a rank waits until it sees a checkpoint that rank 0 sees, on a slow shared disk."""


def build_module(config: Config, tokenizer: VQVAE, device: torch.device) -> TrainStep:
    """The module that engines wrap: VAR, freshly initialised from `train.seed`, with its loss."""
    torch.manual_seed(config.train.seed)
    var = build_model(config, tokenizer, device)
    precision = choose_precision(config.train.precision, device)
    return TrainStep(var, tokenizer.quantize, config.train, precision)


def build_engine(engine: EngineConfig, train: TrainConfig, module: TrainStep) -> Engine:
    """The engine around a module whose weights are already set and on their device."""
    module.var.recompute_activations(engine.recompute, engine.recompute_every)
    if engine.compile:
        for block in module.var.blocks:
            block.compile()
    built = _wrap(engine, train, module)
    if train.ema:
        built.average = AveragedWeights(built, train.ema)
    built.module.train()
    return built


def record_passes(engine: Engine, config: Config, module: TrainStep) -> None:
    """Let the engine record its passes as CUDA graphs where the config asks for it and nothing
    stands against it."""
    if config.engine.graphs:
        engine.no_graphs = why_no_graphs(config, engine.device, module.precision)
        if not engine.no_graphs:
            engine.graphs = StepGraphs(module, engine.scaled)


def _wrap(engine: EngineConfig, train: TrainConfig, module: TrainStep) -> Engine:
    """The engine of this name."""
    # Imported where they are used: DeepSpeed alone takes seconds.
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

    return DeepSpeedEngine(module, train, engine)


def set_matmul_precision(train: TrainConfig) -> None:
    """Allow or forbid TF32 in float32 products, for the whole process."""
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")


# ---------------------------------------------------------------- a run


@dataclass
class Parts:
    """What one rank needs to train a run."""

    folder: RunFolder
    config: Config
    world: World
    stepper: Stepper
    val: Tokens
    precision: str
    resume: Checkpoint | None
    """the checkpoint that was loaded; None at the start of a run"""

    @property
    def data_hash(self) -> str:
        """Identity of the training and validation tokens."""
        return f"{self.stepper.data.digest}:{self.val.digest}"

    def close(self) -> None:
        """Stop reading ahead."""
        if isinstance(self.stepper.batches, Ahead):
            self.stepper.batches.close()


def assemble(folder: RunFolder, world: World, beat: Callable[[], None] = lambda: None) -> Parts:
    """Open the data of a run, build its engine, and load its newest checkpoint. Every rank calls
    it.

    Args:
        beat: called whenever a part of this work is done, so that a watchdog sees progress.

    Raises:
        UserError: data, tokenizer or checkpoint are missing, damaged, or belong to another run.
    """
    config = load(str(folder.config))
    c = config.train
    set_matmul_precision(c)
    tokenizer, tokenizer_hash = load_tokenizer(config.tokenizer, world.device)
    data, val = open_data(config, tokenizer, tokenizer_hash, world, beat)
    resume = newest_agreed(folder, world)
    module = build_module(config, tokenizer, world.device)
    if resume:
        check_resume(resume, config, f"{data.digest}:{val.digest}", module.precision)
        verify_shared(resume, world)
        # Before the engine exists: a sharded engine takes its parts from the weights of the module.
        resume.load_into(module.var)
    engine = build_engine(config.engine, c, module.to(world.device))
    record_passes(engine, config, module)
    if resume:
        resume.load_state(engine)
    batches = Ahead(data.loader(c))
    faults = Faults.of(world.rank, folder.log / "faults.jsonl")
    schedule = Schedule.of(c, data.num_samples)
    stepper = Stepper(config, world, engine, data, batches, schedule, faults)
    return Parts(folder, config, world, stepper, val, module.precision, resume)


def newest_agreed(folder: RunFolder, world: World) -> Checkpoint | None:
    """The newest checkpoint, chosen by rank 0 for all ranks.

    On a shared disk another rank may not see it yet, or may still see an older one; ranks that
    loaded different steps would train nonsense without an error.
    """
    steps = [c.step for c in checkpoints(folder.checkpoints)] if world.main else []
    chosen = world.agree(max(steps, default=0))
    if not chosen:
        return None
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (found := [c for c in checkpoints(folder.checkpoints) if c.step == chosen]):
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder.checkpoints}: rank {world.rank} does not see step {chosen}, which rank 0 "
                "sees; check that the folder is on a disk that all nodes share",
                code="train.checkpoint-invisible",
            )
        time.sleep(0.5)
    return found[0]


def verify_shared(checkpoint: Checkpoint, world: World) -> None:
    """Compare the checksums of all files of a checkpoint; the ranks share the work.

    Raises:
        UserError: a file is damaged; the same error on every rank.
    """
    damaged = checkpoint.verify(world.rank, world.size)
    # Parts are counted from 1 here: the largest number names one damaged part on every rank, and 0
    # means that none is damaged.
    number = int(damaged.rpartition("-")[2].partition(".")[0]) + 1 if damaged else 0
    if worst := world.largest(number):
        file = checkpoint.folder / f"part-{worst - 1:05d}.safetensors"
        raise UserError(
            damaged_message(str(file), checkpoint.folder), code="train.checkpoint-damaged"
        )


def check_resume(resume: Checkpoint, config: Config, data_hash: str, precision: str) -> None:
    """Refuse a checkpoint of another run, of other data, or of another precision."""
    for what, key, now, code in (
        ("config", "config_hash", config_hash(config), "train.checkpoint-other-config"),
        ("data", "data_hash", data_hash, "train.checkpoint-other-data"),
    ):
        if resume.state[key] != now:
            raise UserError(
                f"{resume.folder}: was written with another {what}; use another run folder, or "
                f"remove {resume.folder.parent}",
                code=code,
            )
    if resume.state["precision"] != precision:
        raise UserError(
            f"{resume.folder}: was trained in {resume.state['precision']}, but this machine would "
            f"use {precision}; set train.precision={resume.state['precision']}",
            code="train.checkpoint-other-precision",
        )


# ---------------------------------------------------------------- without a run


class RandomTokens(Tokens):
    """Random tokens in place of token shards, for timings. Every rank draws its own."""

    name = "random tokens"

    def __init__(self, config: Config, world: World):
        self.config, self.world, self.num_samples = config, world, config.train_samples
        self.length = length(config.tokenizer.patch_nums)

    def batch(self, step: int, micro_index: int = 0) -> Batch:
        """A micro-batch, as a loader returns it."""
        c = self.config.train
        part = rank_slice(c.batch_size, self.world.size, self.world.rank, c.accumulate, micro_index)
        positions = step * c.batch_size + np.arange(c.batch_size)[part]
        rng = np.random.default_rng((step, micro_index, self.world.rank))
        size = (len(positions), self.length)
        tokens_BL = rng.integers(self.config.tokenizer.vocab_size, size=size)
        return Batch(tokens_BL, rng.integers(self.config.classes, size=len(positions)), positions)


def untrained(config: Config, world: World, random_data: bool = False) -> Stepper:
    """A stepper with fresh weights and a tokenizer of random weights, for timings.

    It reads what the config trains on. Without `data.tokens_train` or `data.online`, or with
    `random_data`, it reads random tokens.
    """
    c, data = config.train, config.data
    set_matmul_precision(c)
    with world.device:  # on a GPU the weights are drawn there, which takes seconds less
        vae = new_tokenizer(config.tokenizer).eval().requires_grad_(False).to(world.device)
        module = build_module(config, vae, world.device).to(world.device)
    engine = build_engine(config.engine, c, module)
    record_passes(engine, config, module)
    batches: Batches
    if random_data or not (data.online or data.tokens_train):
        tokens: Tokens = (random := RandomTokens(config, world))
        batches = random
    else:
        if data.online:
            images = open_images(config, data.images_train, world.size)
            precision = config.tokenizer.encode_precision
            tokens = Images(images, world, vae, "", data.flip, precision)
        else:
            place = located(str(data.tokens_train), data.cache, data.cache_gb)
            tokens = Tokens(TokenData(place), world)
        batches = Ahead(tokens.loader(c))
    return Stepper(config, world, engine, tokens, batches, Schedule.of(c, tokens.num_samples))
