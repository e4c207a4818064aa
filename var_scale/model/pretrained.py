"""Models as folders: ours (VAR and VQVAE as safetensors, one config.json) and the official `VARHF` folders, which lack the VQVAE.

config.json: {"model_type": "var", "format": 1, "var": arguments of build_var, "vae": arguments of build_vae, "class_names", "provenance",
"numbers", "var_scale_version"}. Tensors that follow from the sizes (mask, scale numbers) are left out and made anew, so a round trip is
exact.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import var_scale
from var_scale.errors import UserError
from var_scale.files import atomic_file, read_json, write_json
from var_scale.model.build import build_vae, build_var
from var_scale.model.official import load_strict, load_vae, read_weights, vae_sizes, var_sizes
from var_scale.model.var import VAR
from var_scale.model.vqvae import VQVAE

FORMAT = 1
CONFIG, VAR_FILE, VAE_FILE = "config.json", "model.safetensors", "vae.safetensors"
DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
"""buffers that the sizes imply"""


def save_pretrained(
    folder: Path, var: VAR, vae: VQVAE, class_names: Sequence[str] | None = None, provenance: dict[str, Any] | None = None,
    numbers: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Write our form of a model; the tensors keep their official names and dtypes. `numbers`: of the model's study, for its card."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, module, left_out in ((VAE_FILE, vae, ()), (VAR_FILE, var, DERIVED)):
        state = {key: value for key, value in module.state_dict().items() if key.split(".")[-1] not in left_out}
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        with atomic_file(folder / name) as file:
            file.write(save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG, {
        "model_type": "var", "format": FORMAT, "var_scale_version": var_scale.__version__, "var": var_arguments(var),
        "vae": vae_arguments(vae), "class_names": list(class_names) if class_names else None, "provenance": provenance or {},
        "numbers": numbers or {},
    })  # fmt: skip


def var_arguments(var: VAR) -> dict[str, Any]:
    """What `build_var` needs to build this model again."""
    return {"depth": var.depth, "width": var.C, "heads": var.num_heads, "mlp_ratio": var.mlp_ratio, "num_classes": var.num_classes,
            "patch_nums": [list(p) if isinstance(p, tuple) else p for p in var.patch_nums], "shared_aln": var.shared_aln,
            "attn_l2_norm": var.attn_l2_norm, "cond_drop_rate": var.cond_drop_rate}  # fmt: skip


def vae_arguments(vae: VQVAE) -> dict[str, Any]:
    """What `build_vae` needs to build this tokenizer again."""
    sizes = vae_sizes(vae.state_dict())
    return {**sizes, "quant_resi": vae.quantize.quant_resi_ratio, "beta": vae.quantize.beta,
            "patch_nums": [list(p) if isinstance(p, tuple) else p for p in vae.patch_nums]}  # fmt: skip


def _grids(arguments: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples again."""
    return arguments | {"patch_nums": tuple(tuple(p) if isinstance(p, list) else p for p in arguments["patch_nums"])}


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a model, ours or the official project's."""
    return (folder / CONFIG).exists() and (folder / VAR_FILE).exists()


def load_pretrained(folder: Path | str, vae: Path | None = None, device: torch.device | str = "cpu") -> tuple[VAR, VQVAE, dict[str, Any]]:
    """The model of a folder, in eval mode, its tokenizer, and its config.json. `vae`, a file, is needed for official `VARHF` folders alone.

    UserError: no such folder, another format, tensors that do not fit, strictly; an official folder without `vae`.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "description of a model")
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: is not the description of a VAR model")
    if config.get("model_type") == "var" and "format" in config:
        return _load_ours(folder, config, device)
    if "embed_dim" in config and "vae_kwargs" in config:
        return _load_official(folder, config, vae, device)
    raise UserError(f"{folder / CONFIG}: is not the description of a VAR model; give a folder of `var-scale hub convert`, or of VARHF")


def _load_ours(folder: Path, config: dict[str, Any], device: torch.device | str) -> tuple[VAR, VQVAE, dict[str, Any]]:
    if config["format"] != FORMAT:
        raise UserError(f"{folder / CONFIG}: format {config['format']} is not known here; use a newer var-scale")
    try:
        vae = build_vae(**_grids(config["vae"]))
        var = build_var(vae, **_grids(config["var"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: is incomplete ({error}); convert the model again") from None
    load_strict(vae, read_weights(folder / VAE_FILE, "vae"), folder / VAE_FILE)
    load_strict(var, with_derived(read_weights(folder / VAR_FILE, "var"), var), folder / VAR_FILE)
    return var.to(device).eval(), vae.to(device).eval(), config


def with_derived(state: dict[str, Tensor], var: VAR) -> dict[str, Tensor]:
    """`state` with the buffers that follow from the sizes, where they are left out."""
    own = var.state_dict()
    return {name: own[name] for name in own if name.split(".")[-1] in DERIVED} | state


def _load_official(
    folder: Path, config: dict[str, Any], file: Path | None, device: torch.device | str
) -> tuple[VAR, VQVAE, dict[str, Any]]:
    """A folder that `VARHF.save_pretrained` wrote: constructor arguments and the transformer's tensors."""
    if file is None:
        raise UserError(f"{folder}: an official VARHF folder has no tokenizer in it; name it, such as --vae vae_ch160v4096z32.pth")
    state = read_weights(folder / VAR_FILE, "var")
    sizes = var_sizes(state, folder / VAR_FILE)
    sizes["patch_nums"] = tuple(config.get("patch_nums", sizes["patch_nums"]))
    vae = load_vae(file, sizes["patch_nums"])
    if (sizes.pop("V"), sizes.pop("Cvae")) != (vae.V, vae.Cvae):
        raise UserError(f"{folder}: was made for another tokenizer than {file} with V={vae.V}, Cvae={vae.Cvae}")
    var = build_var(vae, **sizes, cond_drop_rate=float(config.get("cond_drop_rate", 0.1)))
    load_strict(var, with_derived(state, var), folder / VAR_FILE)
    return var.to(device).eval(), vae.to(device).eval(), config


def save_official(folder: Path, var: VAR, vae: VQVAE) -> tuple[Path, Path]:
    """Bare state dicts as the official project publishes them: var_dN.pth and vae_chXvYzZ.pth."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = vae_sizes(vae.state_dict())
    names = (f"var_d{var.depth}.pth", f"vae_ch{sizes.get('ch', sizes.get('hidden'))}v{vae.V}z{vae.Cvae}.pth")
    for name, module in zip(names, (var, vae), strict=True):
        with atomic_file(folder / name) as file:
            torch.save({key: value.detach().cpu() for key, value in module.state_dict().items()}, file)
    return folder / names[0], folder / names[1]


def save_varhf(folder: Path, var: VAR, vae: VQVAE) -> None:
    """As the official `VARHF.save_pretrained` does; the tokenizer is not in it."""
    if any(isinstance(p, tuple) for p in var.patch_nums) or "ch" not in (sizes := vae_sizes(vae.state_dict())):
        raise UserError("the official form has square scales and the official tokenizer's network alone; keep this model in our form")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / VAR_FILE) as file:
        file.write(save({key: value.detach().cpu().contiguous() for key, value in var.state_dict().items()}, {"format": "pt"}))
    kwargs = {"vocab_size": vae.V, "z_channels": vae.Cvae, "ch": sizes["ch"], "test_mode": True,
              "share_quant_resi": sizes["share_quant_resi"], "v_patch_nums": list(vae.patch_nums)}  # fmt: skip
    config = {"vae_kwargs": kwargs, "num_classes": var.num_classes, "depth": var.depth, "embed_dim": var.C, "num_heads": var.num_heads,
              "mlp_ratio": var.mlp_ratio, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.1 * var.depth / 24,
              "norm_eps": 1e-6, "shared_aln": var.shared_aln, "cond_drop_rate": var.cond_drop_rate, "attn_l2_norm": var.attn_l2_norm,
              "patch_nums": list(var.patch_nums), "flash_if_available": True, "fused_if_available": True}  # fmt: skip
    with atomic_file(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2, sort_keys=True).encode())


def load_files(
    weights: Path, vae: Path | None, patch_nums: Sequence[Any] | None = None, device: torch.device | str = "cpu"
) -> tuple[VAR, VQVAE]:
    """A VAR and its tokenizer from official files: bare state dicts, or a training checkpoint, which holds both. Scales follow from the
    VAR's tensors unless `patch_nums` says them."""
    from var_scale.model.official import load_var

    state = read_weights(weights, "var")
    grids = tuple(patch_nums) if patch_nums else var_sizes(state, weights)["patch_nums"]
    if vae is None:
        try:
            tokens = read_weights(weights, "vae")
        except UserError:
            tokens = {}
        if "quantize.embedding.weight" not in tokens:
            raise UserError(f"{weights}: has no tokenizer in it; name it, such as --vae vae_ch160v4096z32.pth")
    tokenizer = load_vae(vae or weights, grids, device=device)
    return load_var(weights, tokenizer, device=device).eval(), tokenizer


