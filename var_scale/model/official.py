"""Read official weights: bare VAR and VQVAE state dicts and training checkpoints, as .pth or .safetensors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from var_scale.errors import UserError
from var_scale.model.build import build_vae, build_var
from var_scale.model.var import VAR
from var_scale.model.vqvae import USAGE, VQVAE
from var_scale.scales import PatchNum, length

PREFIXES = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")
State = dict[str, Tensor]


def read_weights(path: Path | str, part: str) -> State:
    """The state dict of `part` ("var" or "vae") in a file, on the CPU, without the prefixes of wrappers.

    Takes a bare state dict and the official training checkpoint (trainer.var_wo_ddp, trainer.vae_local). Only tensors are unpickled.
    """
    path = Path(path)
    content = read_checkpoint(path)
    trainer = content.get("trainer") if isinstance(content, dict) else None
    if isinstance(trainer, dict):
        key = {"var": "var_wo_ddp", "vae": "vae_local"}[part]
        content = trainer.get(key)
        if content is None:
            raise UserError(f"{path}: this training checkpoint has no trainer.{key}")
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: this is neither a state dict nor an official training checkpoint")
    return {strip(name): tensor for name, tensor in content.items()}


def read_checkpoint(path: Path) -> Any:
    """The content of a .pth or .safetensors file, on the CPU; nothing but plain tensors and numbers is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: this weights file does not exist") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: this file holds more than weights, or is damaged; only plain weights are loaded") from None
    except (RuntimeError, EOFError, SafetensorError, ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{path}: this weights file cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})") from None


def strip(name: str) -> str:
    """Remove wrapper prefixes, wherever in the name they stand."""
    for prefix in PREFIXES:
        name = re.sub(rf"(^|\.){re.escape(prefix)}", r"\1", name)
    return name


def _tensor(state: State, name: str, path: Path | str) -> Tensor:
    if name not in state:
        raise UserError(f"{path}: the tensor {name} is missing; these are not weights of the kind asked for")
    return state[name]


def _count(state: State, pattern: str) -> int:
    """How many different values group 1 of `pattern` takes among the names."""
    return len({match.group(1) for name in state if (match := re.match(pattern, name))})


def var_sizes(state: State, path: Path | str = "state dict") -> dict[str, Any]:
    """The arguments of `build_var` that a VAR state dict implies, with V and Cvae. Heads are 64 wide where it does not say."""
    width = _tensor(state, "pos_1LC", path).shape[2]
    levels_S = torch.bincount(_tensor(state, "lvl_1L", path).flatten().cpu())
    scale_mul = state.get("blocks.0.attn.scale_mul_1H11")
    return {
        "depth": _count(state, r"blocks\.(\d+)\."),
        "width": width,
        "heads": scale_mul.shape[1] if scale_mul is not None else max(width // 64, 1),
        "mlp_ratio": _tensor(state, "blocks.0.ffn.fc1.weight", path).shape[0] / width,
        "num_classes": _tensor(state, "class_emb.weight", path).shape[0] - 1,
        "patch_nums": tuple(round(count**0.5) for count in levels_S.tolist()),
        "shared_aln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": scale_mul is not None,
        "V": _tensor(state, "head.weight", path).shape[0],
        "Cvae": _tensor(state, "word_embed.weight", path).shape[1],
    }


def vae_sizes(state: State, path: Path | str = "state dict") -> dict[str, Any]:
    """The arguments of `build_vae` that a VQVAE state dict implies, except patch_nums."""
    V, Cvae = _tensor(state, "quantize.embedding.weight", path).shape
    sizes: dict[str, Any] = {"V": V, "Cvae": Cvae}
    shared = _count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    if shared:
        sizes["share_quant_resi"] = shared
    else:
        sizes["share_quant_resi"] = 1 if "quantize.quant_resi.qresi.weight" in state else 0
    if not any(name.startswith("quantize.quant_resi.") for name in state):
        sizes["quant_resi"] = 0.0
    if "encoder.conv_in.weight" in state:
        return {**sizes, "arch": "cnn", "ch": state["encoder.conv_in.weight"].shape[0]}
    first = _tensor(state, "encoder.1.weight", path)
    return {**sizes, "arch": "patch", "hidden": first.shape[0], "patch": round((first.shape[1] / 3) ** 0.5)}


def load_strict(module: nn.Module, state: State, path: Path | str) -> None:
    """Load `state` into `module`; one line with the first difference if they do not match."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape and n != USAGE]
    if missing or extra or wrong:
        kind = type(module).__name__
        if missing:
            what = f"lacks {len(missing)} tensors of this {kind}, the first is {missing[0]}"
        elif extra:
            what = f"has {len(extra)} tensors that this {kind} has not, the first is {extra[0]}"
        else:
            name = min(wrong)
            what = f"has {name} of shape {tuple(state[name].shape)}, this {kind} has {tuple(own[name].shape)}"
        raise UserError(f"{path}: this file {what}; check depth, width, patch_nums, shared_aln and attn_l2_norm")
    module.load_state_dict(state)


def load_vae(
    path: Path | str, patch_nums: Sequence[PatchNum], *, test_mode: bool = True, device: torch.device | str = "cpu", **sizes: Any
) -> VQVAE:
    """A VQVAE with the weights of a file. Its sizes are read from the tensors; `sizes` overrides those of `build_vae`."""
    state = read_weights(path, "vae")
    vae = build_vae(**{**vae_sizes(state, path), "patch_nums": tuple(patch_nums), "test_mode": test_mode, **sizes})
    load_strict(vae, state, path)
    return vae.to(device)


def load_var(path: Path | str, vae: VQVAE, *, device: torch.device | str = "cpu", **sizes: Any) -> VAR:
    """A VAR with the weights of a file, for the tokenizer `vae`. `sizes` overrides those read from the tensors (see `build_var`)."""
    state = read_weights(path, "var")
    implied = var_sizes(state, path)
    V, Cvae = implied.pop("V"), implied.pop("Cvae")
    if (V, Cvae) != (vae.V, vae.Cvae):
        raise UserError(f"{path}: made for a tokenizer with V={V}, Cvae={Cvae}; this one has V={vae.V}, Cvae={vae.Cvae}")
    if length(implied["patch_nums"]) != state["pos_1LC"].shape[1]:  # grids that are not square do not show in the tensors
        implied["patch_nums"] = vae.patch_nums
    var = build_var(vae, **{**implied, **sizes})
    load_strict(var, state, path)
    return var.to(device)
