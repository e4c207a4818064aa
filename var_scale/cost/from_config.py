"""Shapes and costs of the model that a config describes."""

from __future__ import annotations

from var_scale.config.load import check, dump
from var_scale.config.schema import Config
from var_scale.cost.flops import count_flops
from var_scale.cost.shape import ModelShape


def shape_of(config: Config) -> ModelShape:
    """The shape of the model: blocks from `model`, grids from `tokenizer`, classes from `data`."""
    m, t = config.model, config.tokenizer
    return ModelShape(
        depth=m.depth,
        width=m.channels,
        heads=m.num_heads,
        mlp_hidden=round(m.channels * m.mlp_ratio),
        patch_nums=t.patch_nums,
        vocab_size=t.vocab_size,
        latent_channels=t.latent_channels,
        num_classes=config.classes,
        shared_aln=m.shared_aln,
        attn_l2_norm=m.attn_l2_norm,
    )


def with_flops(config: Config, flops: float) -> Config:
    """The config of a run with as many epochs as `flops` training FLOPs allow."""
    epochs = flops / (count_flops(shape_of(config)).training * config.train_samples)
    tree = dump(config)
    tree["train"] = {key: value for key, value in tree["train"].items() if key != "steps"} | {
        "epochs": epochs
    }
    return check(tree, f"{config.name}, {flops:g} FLOPs")
