"""Checkpoints of the official trainer (ar-ckpt-*.pth), in both directions: weights, AdamW moments,
loss scale.

The file holds {epoch, iter, args, trainer: {config, var_wo_ddp, vae_local, var_opt: {optimizer,
scaler}}}. Its optimiser numbers the parameters group by group, those without weight decay first, in
the order of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_scale.config.load import config_hash
from var_scale.config.schema import Config
from var_scale.data.loader import TokenData
from var_scale.data.remote import located
from var_scale.errors import UserError
from var_scale.files import atomic_file, read_json
from var_scale.model.load import build_model, load_tokenizer
from var_scale.model.official import load_strict, read_checkpoint, weights_of
from var_scale.train.checkpoint import newest_checkpoint
from var_scale.train.create import create_run
from var_scale.train.engine.base import MOMENTS
from var_scale.train.engine.single import SingleEngine
from var_scale.train.optim import decays
from var_scale.train.save import CheckpointWriter
from var_scale.train.schedule import Schedule, steps_per_epoch
from var_scale.train.step import TrainStep
from var_scale.train.world import choose_precision

CPU = torch.device("cpu")


def numbered(var: nn.Module) -> list[str]:
    """Official parameter names in the order of the numbers of the official optimiser."""
    named = list(var.named_parameters())
    return [name for wanted in (False, True) for name, p in named if decays(name, p) == wanted]


def export_checkpoint(run_folder: Path, out: Path) -> int:
    """Write the newest checkpoint of a run in the format of the official trainer.

    Returns:
        the number of whole epochs that it records; the official trainer can only continue from a
        whole epoch.
    """
    config, checkpoint = newest_checkpoint(run_folder)
    checkpoint.check()
    tokenizer, _ = load_tokenizer(config.tokenizer, CPU)
    var = build_model(config, tokenizer, CPU)
    checkpoint.load_into(var)
    moments = {key: checkpoint.tensors(key) for key in MOMENTS}
    order = numbered(var)
    taken = float(checkpoint.step - checkpoint.state["skipped_steps"])
    state = {
        number: {"step": torch.tensor(taken), **{key: moments[key][name] for key in MOMENTS}}
        for number, name in enumerate(order)
    }
    without = sum(not decays(name, p) for name, p in var.named_parameters())
    numbers = [list(range(without)), list(range(without, len(order)))]
    recipe = {
        "lr": config.train.base_lr,
        "betas": tuple(config.train.adam_betas),
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": True,
    }
    groups = [
        {
            **recipe,
            "weight_decay": scale * config.train.weight_decay,
            "wd_sc": scale,
            "lr_sc": 1.0,
            "params": params,
        }
        for scale, params in zip((0.0, 1.0), numbers, strict=True)
    ]
    optimizer: dict[str, Any] = {"optimizer": {"state": state, "param_groups": groups}}
    if scale := checkpoint.state.get("loss_scale"):
        optimizer["scaler"] = {
            "scale": scale["scale"],
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 1000,
            "_growth_tracker": int(scale["good_steps"]),
        }
    per_epoch = steps_per_epoch(config.train, _train_samples(run_folder, config))
    trainer = {
        "config": {
            "patch_nums": tuple(config.tokenizer.patch_nums),
            "label_smooth": config.train.label_smoothing,
            "prog_it": 0,
            "last_prog_si": -1,
            "first_prog": True,
        },
        "var_wo_ddp": var.state_dict(),
        "vae_local": tokenizer.state_dict(),
        "var_opt": optimizer,
    }
    with atomic_file(out) as file:
        torch.save(
            {"epoch": checkpoint.step // per_epoch, "iter": 0, "trainer": trainer, "args": {}}, file
        )
    return checkpoint.step // per_epoch


def _train_samples(run_folder: Path, config: Config) -> int:
    """Training samples per epoch: as the run recorded them when it started, so that its data are
    not needed; an imported run that has not started has no record."""
    record = run_folder / "run.json"
    if record.exists():
        return int(read_json(record, "description of a run")["train_samples"])
    data = config.data
    return TokenData(located(str(data.tokens_train), data.cache, data.cache_gb)).num_samples


def import_checkpoint(path: Path, config: Config, folder: Path) -> int:
    """Create a run folder of `config` that continues an official training checkpoint.

    Returns:
        its step.

    Raises:
        UserError: the file is not a training checkpoint, or belongs to another model; or the folder
            already has checkpoints.
    """
    content = read_checkpoint(path)
    trainer = content.get("trainer") if isinstance(content, dict) else None
    if not isinstance(trainer, dict) or "var_opt" not in trainer:
        raise UserError(
            f"{path}: is not an official training checkpoint (no trainer.var_opt); bare weights "
            "cannot be continued",
            code="train.not-official",
        )
    tokenizer, tokenizer_hash = load_tokenizer(config.tokenizer, CPU)
    folders = str(config.data.tokens_train), str(config.data.tokens_val)
    train, val = (
        TokenData(
            located(folder, config.data.cache, config.data.cache_gb),
            tokenizer_hash,
            config.tokenizer.patch_nums,
        )
        for folder in folders
    )
    run = create_run(config, folder)
    if any(run.checkpoints.glob("step-*")):
        raise UserError(
            f"{folder}: already has checkpoints; give another --folder",
            code="train.run-has-checkpoints",
        )
    var = build_model(config, tokenizer, CPU)
    _set(var, weights_of(content, path, "var"), path)
    module = TrainStep(
        var, tokenizer.quantize, config.train, choose_precision(config.train.precision, CPU)
    )
    engine = SingleEngine(module, config.train)
    step = int(content["epoch"]) * steps_per_epoch(config.train, train.num_samples)
    total = Schedule.of(config.train, train.num_samples).total_steps
    if not 0 < step < total:
        raise UserError(
            f"{path}: {content['epoch']} epochs are step {step} of {total}, so nothing is left to "
            "train; set train.epochs",
            code="train.official-finished",
        )
    state = trainer["var_opt"]["optimizer"]["state"]
    names = numbered(var)
    if sorted(state) != list(range(len(names))):
        raise UserError(
            f"{path}: its optimiser has {len(state)} parameters, but the model of the config has "
            f"{len(names)}",
            code="train.official-other-model",
        )
    taken = int(state[0]["step"])
    engine.create_state(taken)
    # AdamW counts only the steps that were taken, not those that an overflow skipped.
    engine.skipped.fill_(step - taken)
    for number, name in enumerate(names):
        place = engine.optimizer.state[var.get_parameter(name)]
        for key in MOMENTS:
            if state[number][key].shape != place[key].shape:
                raise UserError(
                    f"{path}: the moments of {name} have the shape "
                    f"{tuple(state[number][key].shape)}, which belongs to another model",
                    code="train.official-other-model",
                )
            place[key].copy_(state[number][key])
    extra: dict[str, Any] = {}
    if scaler := trainer["var_opt"].get("scaler"):
        extra["loss_scale"] = {
            "scale": float(scaler["scale"]),
            "good_steps": float(scaler["_growth_tracker"]),
        }
    writer = CheckpointWriter(run.checkpoints, 0, 1, "imported", config.train.keep_checkpoints)
    writer.save(
        engine,
        {
            "step": step,
            "config_hash": config_hash(config),
            "data_hash": f"{train.digest}:{val.digest}",
            "seconds": 0.0,
            "skipped_samples": 0,
            "rollbacks": 0,
            "evaluation_pending": False,
            "precision": module.precision,
            "imported_from": str(path),
            **extra,
        },
    )
    writer.wait()
    run.set_status(
        "preempted",
        f"imported from {path}; training continues from here",
        cause="imported",
        step=step,
        total_steps=total,
    )
    return step


def _set(var: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Set all weights and buffers, strictly."""
    try:
        load_strict(var, weights, path)
    except UserError as error:
        raise UserError(
            f"the checkpoint does not fit the model of the config: {error}",
            code="train.official-other-model",
        ) from None
