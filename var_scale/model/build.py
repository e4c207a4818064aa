"""Build a VQVAE and a VAR from their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from var_scale.model.var import VAR
from var_scale.model.vqvae import VQVAE
from var_scale.scales import PATCH_NUMS_256, PatchNum


def default_drop_path(depth: int) -> float:
    """The official drop-path rate of the last block, 0.1 d / 24."""
    return 0.1 * depth / 24


def build_var(
    vae: VQVAE,
    *,
    depth: int = 16,
    width: int | None = None,
    heads: int | None = None,
    mlp_ratio: float = 4.0,
    num_classes: int = 1000,
    patch_nums: Sequence[PatchNum] | None = None,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    cond_drop_rate: float = 0.1,
    drop_path_rate: float | None = None,
    attention: str = "auto",
    kernels: str = "auto",
    init_adaln: float = 0.5,
    init_adaln_gamma: float = 1e-5,
    init_head: float = 0.02,
    init_std: float = -1.0,
    device: torch.device | str = "cpu",
) -> VAR:
    """An initialised VAR.

    The defaults are a width of 64 x depth, `depth` heads, a drop-path rate of 0.1 x depth / 24 in
    the last block, and the patch_nums of the tokenizer. The weights are drawn on the CPU whatever
    `device` is, so a seed gives the same model everywhere; on "meta" none are drawn.
    """
    meta = torch.device(device).type == "meta"
    with torch.device("meta" if meta else "cpu"):
        var = VAR(
            vae_local=vae,
            num_classes=num_classes,
            depth=depth,
            embed_dim=64 * depth if width is None else width,
            num_heads=depth if heads is None else heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=default_drop_path(depth) if drop_path_rate is None else drop_path_rate,
            shared_aln=shared_aln,
            cond_drop_rate=cond_drop_rate,
            attn_l2_norm=attn_l2_norm,
            patch_nums=vae.patch_nums if patch_nums is None else patch_nums,
            attention=attention,
            kernels=kernels,
        )
        var.init_weights(
            init_adaln=init_adaln,
            init_adaln_gamma=init_adaln_gamma,
            init_head=init_head,
            init_std=init_std,
        )
    return var if meta else var.to(device)


def build_vae(
    *,
    V: int = 4096,
    Cvae: int = 32,
    ch: int = 160,
    share_quant_resi: int = 4,
    quant_resi: float = 0.5,
    beta: float = 0.25,
    patch_nums: Sequence[PatchNum] = PATCH_NUMS_256,
    arch: str = "cnn",
    patch: int = 8,
    hidden: int = 128,
    test_mode: bool = True,
    device: torch.device | str = "cpu",
) -> VQVAE:
    """An initialised VQVAE, drawn on the CPU; on "meta" without memory for its weights."""
    meta = torch.device(device).type == "meta"
    with torch.device("meta" if meta else "cpu"):
        vae = VQVAE(
            vocab_size=V,
            z_channels=Cvae,
            ch=ch,
            beta=beta,
            quant_resi=quant_resi,
            share_quant_resi=share_quant_resi,
            v_patch_nums=patch_nums,
            test_mode=test_mode,
            arch=arch,
            patch=patch,
            hidden=hidden,
        )
    return vae if meta else vae.to(device)


def build_vae_var(
    device: torch.device | str = "cpu",
    patch_nums: Sequence[PatchNum] = PATCH_NUMS_256,
    V: int = 4096,
    Cvae: int = 32,
    ch: int = 160,
    share_quant_resi: int = 4,
    num_classes: int = 1000,
    depth: int = 16,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    flash_if_available: bool = True,
    fused_if_available: bool = True,
    init_adaln: float = 0.5,
    init_adaln_gamma: float = 1e-5,
    init_head: float = 0.02,
    init_std: float = -1,
) -> tuple[VQVAE, VAR]:
    """The official builder with its arguments in the official order.

    `flash_if_available=False` uses sdpa, `fused_if_available=False` no fused operators.

    Returns:
        The frozen VQVAE, and a VAR of width 64 x depth with `depth` heads.
    """
    vae = build_vae(
        V=V,
        Cvae=Cvae,
        ch=ch,
        share_quant_resi=share_quant_resi,
        patch_nums=patch_nums,
        device=device,
    )
    var = build_var(
        vae,
        depth=depth,
        num_classes=num_classes,
        shared_aln=shared_aln,
        attn_l2_norm=attn_l2_norm,
        attention="auto" if flash_if_available else "sdpa",
        kernels="auto" if fused_if_available else "off",
        init_adaln=init_adaln,
        init_adaln_gamma=init_adaln_gamma,
        init_head=init_head,
        init_std=init_std,
        device=device,
    )
    return vae, var
