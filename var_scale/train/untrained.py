"""A model of a config before any training, with a tokenizer of random weights: for timings."""

from __future__ import annotations

import torch

from var_scale.config.schema import Config
from var_scale.model.load import build_model, new_tokenizer
from var_scale.model.vqvae import VQVAE
from var_scale.train.step import TrainStep
from var_scale.train.world import choose_precision


def untrained(config: Config, device: torch.device) -> tuple[TrainStep, VQVAE]:
    """The training step of `config` on `device`, in its precision, and the tokenizer."""
    tokenizer = new_tokenizer(config.tokenizer).eval().requires_grad_(False).to(device)
    precision = choose_precision(config.train.precision, device)
    return TrainStep(build_model(config, tokenizer, device), tokenizer.quantize, config.train, precision).to(device), tokenizer
