"""Validation: the whole split, cross-entropy and error rate for every scale, in float32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import numpy as np
import torch

from var_scale.data.order import eval_slices, uniform
from var_scale.scales import cells
from var_scale.train.engine.base import Engine
from var_scale.train.inputs import Tokens
from var_scale.train.world import World


def evaluate(
    engine: Engine, data: Tokens, world: World, batch: int, go_on: Callable[[], bool] = lambda: True
) -> dict[str, float | int | list[float] | None] | None:
    """Loss in nats and error as a fraction: per scale, at the last scale, and over all tokens; the standard errors of the latter two from
    the choice of images; plus the number of samples.

    Rank r takes samples r, r + world, ...; all ranks make the same number of forward passes (FSDP and ZeRO-3 exchange
    parameters in each), a rank that has run out repeats a sample with weight 0. One exchange at the end. `go_on` is asked before each
    pass and says the same on all ranks; None when it said no.
    """
    step_module = engine.train_step_module()
    patch_nums = step_module.patch_nums
    bounds = list(accumulate(cells(patch_nums), initial=0))
    mine = eval_slices(data.num_samples, batch, world.size, world.rank)
    rounds = len(eval_slices(data.num_samples, batch, world.size, 0))  # rank 0 has the most samples
    var, drop_N = step_module.var, None
    if var.eval_label_drop:  # as the reference does, but by sample: the same labels at every evaluation and world size
        drop_N = torch.from_numpy(uniform(0, "evaluation", 0, data.num_samples) < var.cond_drop_rate)
    sums = torch.zeros(2, len(patch_nums), dtype=torch.float64, device=world.device)
    squares = torch.zeros(2, 2, dtype=torch.float64, device=world.device)  # of an image's mean: over (loss, error) and (all, last scale)
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
            for s, (start, end) in enumerate(pairwise(bounds)):
                sums[0, s] += weight * ce_BL[:, start:end].double().sum()
                sums[1, s] += weight * (~correct_BL[:, start:end]).double().sum()
            for k, value_BL in enumerate((ce_BL.double(), (~correct_BL).double())):
                squares[k, 0] += weight * (value_BL.mean(1) ** 2).sum()
                squares[k, 1] += weight * (value_BL[:, bounds[-2] :].mean(1) ** 2).sum()
    engine.module.train()
    world.reduce(sums)
    world.reduce(squares)
    counts = torch.tensor(cells(patch_nums), dtype=torch.float64) * data.num_samples
    sums = sums.cpu()
    loss_S, error_S = (sums / counts).tolist()
    loss, error = (sums.sum(dim=1) / counts.sum()).tolist()
    means = torch.tensor([[loss, loss_S[-1]], [error, error_S[-1]]], dtype=torch.float64)
    n = data.num_samples
    (loss_sem, last_sem), (error_sem, error_last_sem) = (
        ((squares.cpu() / n - means**2).clamp_min(0) / (n - 1)).sqrt().tolist() if n > 1 else [[None, None]] * 2
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
        "samples": n,
    }
