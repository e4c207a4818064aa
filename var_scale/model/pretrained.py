"""Models as folders: our form, and the official `VARHF` folders, which have no tokenizer.

Our form holds VAR and VQVAE as safetensors and one config.json: {"model_type": "var", "format": 1,
"var": arguments of build_var, "vae": arguments of build_vae, "class_names", "provenance",
"numbers", "var_scale_version"}. Tensors that follow from the sizes (mask, scale numbers) are left
out and computed when the model is loaded, so a round trip is exact.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import var_scale
from var_scale.errors import UserError
from var_scale.files import atomic_file, read_json, write_json, write_text
from var_scale.model.build import build_vae, build_var, default_drop_path
from var_scale.model.official import (
    load_strict,
    load_vae,
    read_checkpoint,
    read_weights,
    vae_of,
    vae_sizes,
    var_of,
    var_sizes,
    weights_of,
)
from var_scale.model.var import VAR
from var_scale.model.vqvae import VQVAE

FORMAT = 1
CONFIG, VAR_FILE, VAE_FILE = "config.json", "model.safetensors", "vae.safetensors"
DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
"""buffers that the sizes imply"""


def save_pretrained(
    folder: Path,
    var: VAR,
    vae: VQVAE,
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
    numbers: dict[str, str] | None = None,
) -> None:
    """Write our form of a model; the tensors keep their official names and dtypes. `numbers` are
    results of the model's study, for its card."""
    folder = Path(folder)
    write_weights(folder / VAE_FILE, vae)
    write_weights(folder / VAR_FILE, var, DERIVED)
    write_json(
        folder / CONFIG,
        {
            "model_type": "var",
            "format": FORMAT,
            "var_scale_version": var_scale.__version__,
            "var": var_arguments(var),
            "vae": vae_arguments(vae),
            "class_names": list(class_names) if class_names else None,
            "provenance": provenance or {},
            "numbers": numbers or {},
        },
    )


def write_weights(path: Path, module: nn.Module, left_out: Sequence[str] = ()) -> None:
    """Write the tensors of a module as safetensors, atomically, without buffers of the names
    `left_out`."""
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in module.state_dict().items()
        if name.split(".")[-1] not in left_out
    }
    with atomic_file(path) as file:
        file.write(save(tensors, {"format": "pt"}))


def var_arguments(var: VAR) -> dict[str, Any]:
    """The arguments with which `build_var` builds this model again."""
    return {
        "depth": var.depth,
        "width": var.C,
        "heads": var.num_heads,
        "mlp_ratio": var.mlp_ratio,
        "num_classes": var.num_classes,
        "patch_nums": [list(p) if isinstance(p, tuple) else p for p in var.patch_nums],
        "shared_aln": var.shared_aln,
        "attn_l2_norm": var.attn_l2_norm,
        "cond_drop_rate": var.cond_drop_rate,
    }


def vae_arguments(vae: VQVAE) -> dict[str, Any]:
    """The arguments with which `build_vae` builds this tokenizer again."""
    sizes = vae_sizes(vae.state_dict())
    return {
        **sizes,
        "quant_resi": vae.quantize.quant_resi_ratio,
        "beta": vae.quantize.beta,
        "patch_nums": [list(p) if isinstance(p, tuple) else p for p in vae.patch_nums],
    }


def _grids(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with tuples for the lists that JSON makes of them."""
    return arguments | {
        "patch_nums": tuple(tuple(p) if isinstance(p, list) else p for p in arguments["patch_nums"])
    }


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model, in our form or the official one."""
    return (folder / CONFIG).exists() and (folder / VAR_FILE).exists()


def load_pretrained(
    folder: Path | str, vae: Path | None = None, device: torch.device | str = "cpu"
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """The model of a folder in evaluation mode, its tokenizer, and the content of its config.json.

    `vae` is a weights file of the tokenizer; only official `VARHF` folders need it.

    Raises:
        UserError: code `model.pretrained` for a folder of another kind or version,
            `model.tokenizer-missing` or `model.tokenizer-differs` for an official folder, or one of
            `read_weights` and `load_strict`.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "description of a model")
    if not isinstance(config, dict):
        raise UserError(
            f"{folder / CONFIG}: this is not the description of a VAR model",
            code="model.pretrained",
        )
    if config.get("model_type") == "var" and "format" in config:
        return _load_ours(folder, config, device)
    if "embed_dim" in config and "vae_kwargs" in config:
        return _load_official(folder, config, vae, device)
    raise UserError(
        f"{folder / CONFIG}: this is not the description of a VAR model; give a folder that "
        "`var-scale hub convert` or VARHF wrote",
        code="model.pretrained",
    )


def _load_ours(
    folder: Path, config: dict[str, Any], device: torch.device | str
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """The model of a folder that `save_pretrained` wrote."""
    if config["format"] != FORMAT:
        raise UserError(
            f"{folder / CONFIG}: format {config['format']} is unknown; use a newer var-scale",
            code="model.pretrained",
        )
    try:
        vae = build_vae(**_grids(config["vae"]))
        var = build_var(vae, **_grids(config["var"]))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG}: the description is incomplete ({error}); convert the model again",
            code="model.pretrained",
        ) from None
    load_strict(vae, read_weights(folder / VAE_FILE, "vae"), folder / VAE_FILE)
    load_strict(var, with_derived(read_weights(folder / VAR_FILE, "var"), var), folder / VAR_FILE)
    return var.to(device).eval(), vae.to(device).eval(), config


def with_derived(state: dict[str, Tensor], var: VAR) -> dict[str, Tensor]:
    """`state` with the buffers that follow from the sizes, where it lacks them."""
    own = var.state_dict()
    return {name: own[name] for name in own if name.split(".")[-1] in DERIVED} | state


def _load_official(
    folder: Path, config: dict[str, Any], file: Path | None, device: torch.device | str
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """The model of a folder that `VARHF.save_pretrained` wrote, with the tokenizer of `file`."""
    if file is None:
        raise UserError(
            f"{folder}: an official VARHF folder has no tokenizer; give its weights, such as --vae "
            "vae_ch160v4096z32.pth",
            code="model.tokenizer-missing",
        )
    state = read_weights(folder / VAR_FILE, "var")
    sizes = var_sizes(state, folder / VAR_FILE)
    sizes["patch_nums"] = tuple(config.get("patch_nums", sizes["patch_nums"]))
    vae = load_vae(file, sizes["patch_nums"])
    if (sizes.pop("V"), sizes.pop("Cvae")) != (vae.V, vae.Cvae):
        raise UserError(
            f"{folder}: this model was made for another tokenizer than {file} with V={vae.V}, "
            f"Cvae={vae.Cvae}",
            code="model.tokenizer-differs",
        )
    var = build_var(vae, **sizes, cond_drop_rate=float(config.get("cond_drop_rate", 0.1)))
    load_strict(var, with_derived(state, var), folder / VAR_FILE)
    return var.to(device).eval(), vae.to(device).eval(), config


def save_official(folder: Path, var: VAR, vae: VQVAE) -> tuple[Path, Path]:
    """Write bare state dicts as the official project does: var_dN.pth and vae_chXvYzZ.pth. Returns
    the paths of both files."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = vae_sizes(vae.state_dict())
    names = (
        f"var_d{var.depth}.pth",
        f"vae_ch{sizes.get('ch', sizes.get('hidden'))}v{vae.V}z{vae.Cvae}.pth",
    )
    for name, module in zip(names, (var, vae), strict=True):
        with atomic_file(folder / name) as file:
            torch.save(
                {key: value.detach().cpu() for key, value in module.state_dict().items()}, file
            )
    return folder / names[0], folder / names[1]


def save_varhf(folder: Path, var: VAR, vae: VQVAE) -> None:
    """Write what the official `VARHF.save_pretrained` writes, which is without the tokenizer.

    Raises:
        UserError: code `model.official-form` for scales or tokenizers that it cannot hold.
    """
    if any(isinstance(p, tuple) for p in var.patch_nums) or "ch" not in (
        sizes := vae_sizes(vae.state_dict())
    ):
        raise UserError(
            "the official form only holds square scales and the official tokenizer's network; keep "
            "this model in our form",
            code="model.official-form",
        )
    write_weights(folder / VAR_FILE, var)
    kwargs = {
        "vocab_size": vae.V,
        "z_channels": vae.Cvae,
        "ch": sizes["ch"],
        "test_mode": True,
        "share_quant_resi": sizes["share_quant_resi"],
        "v_patch_nums": list(vae.patch_nums),
    }
    config = {
        "vae_kwargs": kwargs,
        "num_classes": var.num_classes,
        "depth": var.depth,
        "embed_dim": var.C,
        "num_heads": var.num_heads,
        "mlp_ratio": var.mlp_ratio,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": default_drop_path(var.depth),
        "norm_eps": 1e-6,
        "shared_aln": var.shared_aln,
        "cond_drop_rate": var.cond_drop_rate,
        "attn_l2_norm": var.attn_l2_norm,
        "patch_nums": list(var.patch_nums),
        "flash_if_available": True,
        "fused_if_available": True,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))


def load_files(
    weights: Path,
    vae: Path | None,
    patch_nums: Sequence[Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[VAR, VQVAE]:
    """A VAR and its tokenizer from official files.

    `weights` and `vae` are bare state dicts; a training checkpoint as `weights` holds both. The
    scales follow from the VAR's tensors unless `patch_nums` gives them.

    Raises:
        UserError: code `model.tokenizer-missing`, or one of `load_vae` and `load_var`.
    """
    content = read_checkpoint(weights)
    state = weights_of(content, weights, "var")
    grids = tuple(patch_nums) if patch_nums else var_sizes(state, weights)["patch_nums"]
    if vae is not None:
        tokens = read_weights(vae, "vae")
    else:
        try:
            tokens = weights_of(content, weights, "vae")
        except UserError:
            tokens = {}
        if "quantize.embedding.weight" not in tokens:
            raise UserError(
                f"{weights}: this file has no tokenizer; give its weights, such as --vae "
                "vae_ch160v4096z32.pth",
                code="model.tokenizer-missing",
            )
    tokenizer = vae_of(tokens, vae or weights, grids).to(device)
    return var_of(state, weights, tokenizer).to(device).eval(), tokenizer
