"""Validation loss and error of any model over a whole split, clean or as the reference measures it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from var_scale.config.schema import TrainConfig
from var_scale.data.loader import TokenData
from var_scale.errors import UserError
from var_scale.evaluate.source import Source
from var_scale.train.evaluate import evaluate
from var_scale.train.inputs import Tokens
from var_scale.train.step import TrainStep
from var_scale.train.world import World


def validation(source: Source, folder: Path, batch: int, label_dropout: bool = False) -> dict[str, Any]:
    """As runs record it: loss (nats) and error (fraction) of all tokens, the last scale and every scale, with standard errors.

    `folder`: token shards of the model's tokenizer. `label_dropout`: a tenth of the labels dropped, as the reference does."""
    var = source.var
    if var.head.weight.dtype != torch.float32:
        raise UserError("evaluate loss: is measured in float32; leave --precision out")
    device = var.lvl_1L.device
    world = World(0, 1, 0, device)
    data = TokenData(folder, source.what.get("tokenizer"), var.patch_nums)
    if data.vocab_size != var.V or data.num_classes > source.classes:
        raise UserError(f"{folder}: tokens of {data.vocab_size} codes and {data.num_classes} classes, the model has {var.V} and "
                        f"{source.classes}")  # fmt: skip
    step = TrainStep(var, var.vae_quant_proxy[0], TrainConfig(steps=1, batch_size=1), "fp32")
    engine = SimpleNamespace(module=step, train_step_module=lambda: step)
    var.eval_label_drop = label_dropout
    found = evaluate(engine, Tokens(data, world), world, batch)  # type: ignore[arg-type]
    step.eval()
    assert found is not None
    return found | {"label_dropout": label_dropout, **source.what}
