"""The tokenizer and the transformer of a config."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from var_scale.config.schema import Config, TokenizerConfig
from var_scale.errors import UserError
from var_scale.files import atomic_file, sha256_file
from var_scale.model.build import build_vae, build_var
from var_scale.model.hub import weights_file
from var_scale.model.official import load_strict, read_weights
from var_scale.model.var import VAR
from var_scale.model.vqvae import VQVAE


def new_tokenizer(config: TokenizerConfig) -> VQVAE:
    """A tokenizer with fresh, trainable weights."""
    return build_vae(
        V=config.vocab_size,
        Cvae=config.latent_channels,
        ch=config.ch,
        share_quant_resi=config.share_quant_resi,
        quant_resi=config.quant_resi,
        beta=config.beta,
        patch_nums=config.patch_nums,
        arch=config.arch,
        patch=config.patch,
        hidden=config.hidden,
        test_mode=False,
    )


def save_tokenizer(vae: VQVAE, path: Path) -> None:
    """Write the weights as safetensors, atomically."""
    with atomic_file(path) as file:
        file.write(save({k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}))


def load_tokenizer(config: TokenizerConfig, device: torch.device) -> tuple[VQVAE, str]:
    """The frozen tokenizer in evaluation mode, and the sha256 of its weights file.

    The hash identifies the tokenizer in the manifests of token shards.

    Raises:
        UserError: code `model.tokenizer-missing`, or one of `read_weights` and `load_strict`.
    """
    if not config.weights:
        raise UserError(
            "tokenizer.weights: this needs a trained tokenizer; give a .pth or .safetensors file, "
            "or run `var-scale tokenizer train`",
            code="model.tokenizer-missing",
        )
    path = weights_file(config.weights)
    state = read_weights(path, "vae")
    vae = new_tokenizer(config)
    load_strict(vae, state, path)
    vae.eval().requires_grad_(False)
    return vae.to(device), sha256_file(path)


def build_model(config: Config, vae: VQVAE, device: torch.device) -> VAR:
    """The transformer of `config`, with initial weights from torch's global generator."""
    m = config.model
    var = build_var(
        vae,
        depth=m.depth,
        width=m.channels,
        heads=m.num_heads,
        mlp_ratio=m.mlp_ratio,
        num_classes=config.classes,
        patch_nums=config.tokenizer.patch_nums,
        shared_aln=m.shared_aln,
        attn_l2_norm=m.attn_l2_norm,
        cond_drop_rate=m.cond_drop_rate,
        drop_path_rate=m.drop_path_rate,
        attention=m.attention,
        kernels=m.kernels,
        init_adaln=m.init_adaln,
        init_adaln_gamma=m.init_adaln_gamma,
        init_head=m.init_head,
        init_std=m.init_std,
        device=device,
    )
    var.eval_label_drop = config.train.eval_label_dropout
    return var
