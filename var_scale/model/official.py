"""Official weights as .pth or .safetensors: bare state dicts and training checkpoints."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from var_scale.errors import UserError
from var_scale.files import require_content
from var_scale.model.build import build_vae, build_var
from var_scale.model.var import VAR
from var_scale.model.vqvae import USAGE, VQVAE
from var_scale.scales import PatchNum, length

WRAPPERS = frozenset(
    (
        "_orig_mod",  # torch.compile
        "module",  # DDP, DeepSpeed
        "_fsdp_wrapped_module",  # FSDP
        "_forward_module",  # Lightning Fabric
        "_checkpoint_wrapped_module",  # activation checkpointing
    )
)
"""Names under which wrappers of a module keep it; no module of ours has such a name."""
State = dict[str, Tensor]


def read_weights(path: Path | str, part: str) -> State:
    """The state dict of `part` ("var" or "vae") in a file, on the CPU, without wrapper prefixes.

    The file holds a bare state dict, or is an official training checkpoint (trainer.var_wo_ddp,
    trainer.vae_local).

    Raises:
        UserError: as `read_checkpoint` and `weights_of`.
    """
    return weights_of(read_checkpoint(Path(path)), path, part)


def weights_of(content: Any, path: Path | str, part: str) -> State:
    """`read_weights` of the content of a file that is already read.

    Raises:
        UserError: code `model.weights-kind` for other content, `model.weights-mismatch` for two
            tensors whose names differ in prefixes only.
    """
    trainer = content.get("trainer") if isinstance(content, dict) else None
    if isinstance(trainer, dict):
        key = {"var": "var_wo_ddp", "vae": "vae_local"}[part]
        content = trainer.get(key)
        if content is None:
            raise UserError(
                f"{path}: this training checkpoint has no trainer.{key}", code="model.weights-kind"
            )
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(t, Tensor) for t in content.values())
    ):
        raise UserError(
            f"{path}: this is neither a state dict nor an official training checkpoint",
            code="model.weights-kind",
        )
    state = {strip(str(name)): tensor for name, tensor in content.items()}
    if len(state) < len(content):
        names = [strip(str(name)) for name in content]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{path}: several tensors are named {twice} beside the prefixes of wrappers such as "
            "module.; keep one of them",
            code="model.weights-mismatch",
        )
    return state


def read_checkpoint(path: Path) -> Any:
    """The content of a .pth or .safetensors file, on the CPU.

    Only plain tensors and numbers are unpickled: a pickle can run any code.

    Raises:
        UserError: code `model.weights-missing`, `file.lfs-pointer` or `model.weights-unreadable`.
    """
    require_content(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: this weights file does not exist", code="model.weights-missing"
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: this file is damaged, or holds more than plain weights, which is not loaded",
            code="model.weights-unreadable",
        ) from None
    except (
        RuntimeError,
        EOFError,
        SafetensorError,
        ValueError,
        KeyError,
        IndexError,
        OSError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: this weights file cannot be read ({reason})", code="model.weights-unreadable"
        ) from None


def strip(name: str) -> str:
    """A tensor's name without the prefixes of wrappers, which may be anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _tensor(state: State, name: str, path: Path | str) -> Tensor:
    if name not in state:
        raise UserError(
            f"{path}: the tensor {name} is missing; give weights of the requested kind",
            code="model.weights-kind",
        )
    return state[name]


def _count(state: State, pattern: str) -> int:
    """The number of different values that group 1 of `pattern` takes among the names."""
    return len({match.group(1) for name in state if (match := re.match(pattern, name))})


def var_sizes(state: State, path: Path | str = "state dict") -> dict[str, Any]:
    """The arguments of `build_var` that a VAR state dict implies, with V and Cvae. Without
    `attn_l2_norm` the number of heads is in no tensor; heads of 64 channels are assumed."""
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
    return {
        **sizes,
        "arch": "patch",
        "hidden": first.shape[0],
        "patch": round((first.shape[1] / 3) ** 0.5),
    }


def load_strict(module: nn.Module, state: State, path: Path | str) -> None:
    """Load `state` into `module`.

    Raises:
        UserError: code `model.weights-mismatch`, with the first difference of names and shapes; or
            `model.weights-nonfinite`.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape and n != USAGE]
    if missing or extra or wrong:
        kind = type(module).__name__
        if missing:
            what = f"lacks {len(missing)} tensors of this {kind}, the first is {missing[0]}"
        elif extra:
            what = f"has {len(extra)} tensors that this {kind} lacks, the first is {extra[0]}"
        else:
            name = min(wrong)
            found, wanted = tuple(state[name].shape), tuple(own[name].shape)
            what = f"has {name} of shape {found}, this {kind} has {wanted}"
        raise UserError(
            f"{path}: this file {what}; check depth, width, patch_nums, shared_aln, attn_l2_norm",
            code="model.weights-mismatch",
        )
    require_finite(state, path)
    module.load_state_dict(state)


def require_finite(
    state: Mapping[str, Tensor],
    path: Path | str,
    fix: str = "give weights from before the training diverged",
) -> None:
    """Refuse weights that a diverged training, a damaged file or a narrow type has left: every
    image or loss that they give would be meaningless.

    Raises:
        UserError: code `model.weights-nonfinite`, with the name of the first such tensor.
    """
    for name, tensor in state.items():
        masked = name.endswith("attn_bias_for_masking")  # minus infinity hides a token
        if not masked and tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            raise UserError(
                f"{path}: the tensor {name} has {int((~finite).sum()):,} NaN or infinite values of "
                f"{tensor.numel():,}; {fix}",
                code="model.weights-nonfinite",
            )


def load_vae(
    path: Path | str,
    patch_nums: Sequence[PatchNum],
    *,
    test_mode: bool = True,
    device: torch.device | str = "cpu",
    **sizes: Any,
) -> VQVAE:
    """A VQVAE with the weights of a file. Its sizes are read from the tensors; `sizes` are
    arguments of `build_vae` that override them.

    Raises:
        UserError: code `model.weights-mismatch` or one of `read_weights`.
    """
    sizes["test_mode"] = test_mode
    return vae_of(read_weights(path, "vae"), path, patch_nums, **sizes).to(device)


def vae_of(state: State, path: Path | str, patch_nums: Sequence[PatchNum], **sizes: Any) -> VQVAE:
    """`load_vae` with the state dict of a file that is already read."""
    vae = build_vae(
        **{"test_mode": True, **vae_sizes(state, path), "patch_nums": tuple(patch_nums), **sizes}
    )
    load_strict(vae, state, path)
    return vae


def load_var(
    path: Path | str, vae: VQVAE, *, device: torch.device | str = "cpu", **sizes: Any
) -> VAR:
    """A VAR with the weights of a file, for the tokenizer `vae`.

    Its sizes are read from the tensors; `sizes` are arguments of `build_var` that override them.

    Raises:
        UserError: code `model.tokenizer-differs`, `model.weights-mismatch` or one of
            `read_weights`.
    """
    return var_of(read_weights(path, "var"), path, vae, **sizes).to(device)


def var_of(state: State, path: Path | str, vae: VQVAE, **sizes: Any) -> VAR:
    """`load_var` with the state dict of a file that is already read."""
    implied = var_sizes(state, path)
    V, Cvae = implied.pop("V"), implied.pop("Cvae")
    if (V, Cvae) != (vae.V, vae.Cvae):
        raise UserError(
            f"{path}: these weights need a tokenizer with V={V}, Cvae={Cvae}; this one has "
            f"V={vae.V}, Cvae={vae.Cvae}",
            code="model.tokenizer-differs",
        )
    # The tensors hold the number of tokens per scale: grids that are not square do not show.
    if length(implied["patch_nums"]) != state["pos_1LC"].shape[1]:
        implied["patch_nums"] = vae.patch_nums
    var = build_var(vae, **{**implied, **sizes})
    load_strict(var, state, path)
    return var
