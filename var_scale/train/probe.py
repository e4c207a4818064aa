"""Measured seconds of one training step on this machine, for the plan."""

from __future__ import annotations

import time

import torch

from var_scale.config.schema import Config
from var_scale.scales import length
from var_scale.train.engine.single import SingleEngine
from var_scale.train.untrained import untrained


def step_seconds(config: Config, processes: int, repeats: int = 3) -> float:
    """Median seconds of an optimiser step of one of `processes` equal ranks, without communication, on random tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.engine.threads)
    engine = SingleEngine(untrained(config, device)[0], config.train)
    micro = max(1, config.train.batch_size // config.train.accumulate // processes)
    tokens_BL = torch.randint(config.tokenizer.vocab_size, (micro, length(config.tokenizer.patch_nums)), device=device)
    label_B = torch.zeros(micro, dtype=torch.long, device=device)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        for micro_index in range(config.train.accumulate):
            engine.prepare(last=micro_index == config.train.accumulate - 1)
            loss, _, _ = engine.module(tokens_BL, label_B)
            engine.backward(loss)
        float(engine.step().grad_norm)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
