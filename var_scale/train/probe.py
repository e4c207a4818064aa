"""Measured seconds of one training step on this machine, for the plan."""

from __future__ import annotations

import time

import torch

from var_scale.config.schema import Config
from var_scale.train.assemble import untrained
from var_scale.train.world import World


def step_seconds(config: Config, processes: int, repeats: int = 3) -> float:
    """Median seconds of an optimiser step, with all scales, of one of `processes` equal ranks.

    Random tokens, no communication between ranks.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.engine.threads)
    alone = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"name": "single"}),
            "train": config.train.model_copy(update={"progressive": 0.0}),
        }
    )
    stepper = untrained(alone, World(0, processes, device), random_data=True)
    times = []
    for step in range(1 + repeats):
        start = time.perf_counter()
        float(stepper.step(step).stats.grad_norm)  # reading the value waits for the device
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
