"""Validation: the whole split, cross-entropy and error rate for every scale, in float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from var_scale.data.order import eval_slices, uniform
from var_scale.scales import cells
from var_scale.train.engine.base import Engine
from var_scale.train.inputs import Tokens
from var_scale.train.world import World

BLOCKS = 64
"""Parts of the validation images whose average losses are recorded: image n is in part n modulo
BLOCKS. Two runs are compared on the same images by the differences of their parts."""


def evaluate(
    engine: Engine, data: Tokens, world: World, batch: int, go_on: Callable[[], bool] = lambda: True
) -> dict[str, float | int | list[float] | None] | None:
    """Loss in nats and error rate: per scale, of the last scale, and over all tokens; the standard
    errors of the latter two from the choice of images; the average loss of each of BLOCKS parts of
    the images; and the number of samples.

    Rank r evaluates samples r, r + world, ... All ranks make the same number of forward passes
    (FSDP and ZeRO 3 exchange parameters in each), so a rank without samples repeats one with weight
    0. One exchange at the end.

    Args:
        go_on: called before each pass; returns the same on all ranks.

    Returns:
        the values by name, or None if `go_on` returned false.
    """
    step_module = engine.train_step_module()
    patch_nums = step_module.patch_nums
    mine = eval_slices(data.num_samples, batch, world.size, world.rank)
    rounds = len(eval_slices(data.num_samples, batch, world.size, 0))  # rank 0 has the most samples
    var, drop_N = step_module.var, None
    if var.eval_label_drop:
        # As the reference does, but keyed by sample: the same labels at every evaluation and world
        # size.
        drop_N = torch.from_numpy(
            uniform(0, "evaluation", 0, data.num_samples) < var.cond_drop_rate
        )
    sums = torch.zeros(2, len(patch_nums), dtype=torch.float64, device=world.device)
    # Squares of the mean of each image: (loss, error) x (all scales, last scale).
    squares = torch.zeros(2, 2, dtype=torch.float64, device=world.device)
    parts = min(BLOCKS, data.num_samples)
    blocks = torch.zeros(parts, dtype=torch.float64, device=world.device)
    engine.module.eval()
    with torch.no_grad():
        for i in range(rounds):
            if not go_on():
                engine.module.train()
                return None
            weight, index = (1.0, mine[i]) if i < len(mine) else (0.0, np.zeros(1, dtype=np.int64))
            tokens_BL, label_B = data.gather(index)
            dropped = world.put(drop_N[torch.from_numpy(index)]) if drop_N is not None else None
            _, ce_BL, correct_BL = engine.module(tokens_BL, label_B, dropped)
            for s, (start, end) in enumerate(var.begin_ends):
                sums[0, s] += weight * ce_BL[:, start:end].double().sum()
                sums[1, s] += weight * (~correct_BL[:, start:end]).double().sum()
            for k, value_BL in enumerate((ce_BL.double(), (~correct_BL).double())):
                squares[k, 0] += weight * (value_BL.mean(1) ** 2).sum()
                squares[k, 1] += weight * (value_BL[:, var.begin_ends[-1][0] :].mean(1) ** 2).sum()
            block_B = world.put(torch.from_numpy(index % parts))
            blocks.index_add_(0, block_B, weight * ce_BL.double().mean(1))
    engine.module.train()
    world.reduce(sums)
    world.reduce(squares)
    world.reduce(blocks)
    sizes = np.bincount(np.arange(data.num_samples) % parts, minlength=parts)
    counts = torch.tensor(cells(patch_nums), dtype=torch.float64) * data.num_samples
    sums = sums.cpu()
    loss_S, error_S = (sums / counts).tolist()
    loss, error = (sums.sum(dim=1) / counts.sum()).tolist()
    means = torch.tensor([[loss, loss_S[-1]], [error, error_S[-1]]], dtype=torch.float64)
    n = data.num_samples
    # The standard error of a mean over n images, from the unbiased variance between images.
    (loss_sem, last_sem), (error_sem, error_last_sem) = (
        ((squares.cpu() / n - means**2).clamp_min(0) / (n - 1)).sqrt().tolist()
        if n > 1
        else [[None, None]] * 2
    )
    return {
        "loss_avg": loss,
        "loss_last": loss_S[-1],
        "err_avg": error,
        "err_last": error_S[-1],
        "loss_per_scale": loss_S,
        "err_per_scale": error_S,
        "loss_avg_sem": loss_sem,
        "loss_last_sem": last_sem,
        "err_avg_sem": error_sem,
        "err_last_sem": error_last_sem,
        "loss_avg_blocks": (blocks.cpu().numpy() / sizes).tolist(),
        "samples": n,
    }
