"""AdamW with the official parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# Official list: parameters whose name holds one of these do not decay, nor do vectors and biases.
# Note what is missing: class_emb, word_embed and head weights do decay.
NO_DECAY = (
    "cls_token",
    "start_token",
    "task_token",
    "cfg_uncond",
    "pos_embed",
    "pos_1LC",
    "pos_start",
    "start_pos",
    "lvl_embed",
    "gamma",
    "beta",
    "ada_gss",
    "moe_bias",
    "scale_mul",
)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to this parameter."""
    return (
        parameter.ndim != 1
        and not name.endswith("bias")
        and not any(part in name for part in NO_DECAY)
    )


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with two groups; `decays` marks the group that follows the weight-decay schedule.

    `set_rates` sets lr and weight_decay in every step.
    """
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if not parameter.requires_grad:
            raise ValueError(f"{name} is frozen; all parameters of VAR are trained")
        # ZeRO-3 leaves an empty tensor in place; ds_shape is the true shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        split[decays(name, torch.empty(shape, device="meta"))].append(parameter)
    groups = [{"params": split[decay], "decays": decay} for decay in (False, True)]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate, and the weight decay of the group that decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
