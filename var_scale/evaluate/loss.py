"""Validation loss and error rate of any model over a whole split."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from var_scale.config.schema import TrainConfig
from var_scale.data.loader import TokenData
from var_scale.data.remote import RemoteShards
from var_scale.errors import UserError
from var_scale.evaluate.source import Source
from var_scale.train.evaluate import evaluate
from var_scale.train.inputs import Tokens
from var_scale.train.step import TrainStep
from var_scale.train.world import World


def validation(
    source: Source, folder: Path | RemoteShards, batch: int, label_dropout: bool = False
) -> dict[str, Any]:
    """Measure what runs record: loss (nats per token) and error rate of all tokens, the last scale
    and every scale, with standard errors.

    Args:
        folder: token shards of the model's tokenizer.
        label_dropout: drop a tenth of the labels, as the reference does.

    Raises:
        UserError: the tokens belong to another model, or the weights are not float32.
    """
    var = source.var
    if var.head.weight.dtype != torch.float32:
        raise UserError(
            "evaluate loss: is measured in float32; leave --precision out",
            code="evaluate.options-conflict",
        )
    device = var.lvl_1L.device
    world = World(0, 1, device)
    data = TokenData(folder, source.what.get("tokenizer"), var.patch_nums)
    if data.vocab_size != var.V or data.num_classes > source.classes:
        raise UserError(
            f"{data.folder}: has tokens of {data.vocab_size} codes and {data.num_classes} classes, "
            f"but the model has {var.V} and {source.classes}",
            code="evaluate.other-tokens",
        )
    step = TrainStep(var, var.vae_quant_proxy[0], TrainConfig(steps=1, batch_size=1), "fp32")
    # The part of an engine that an evaluation uses.
    engine = SimpleNamespace(module=step, train_step_module=lambda: step)
    var.eval_label_drop = label_dropout
    found = evaluate(engine, Tokens(data, world), world, batch)  # type: ignore[arg-type]
    step.eval()  # `evaluate` leaves the module in training mode
    assert found is not None
    return found | {"label_dropout": label_dropout, **source.what}
