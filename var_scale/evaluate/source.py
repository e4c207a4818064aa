"""A trained model by any kind of name: run folder, model folder, hub repository, official
weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from var_scale.data.image_source import imagenet_folders
from var_scale.errors import UserError
from var_scale.files import canonical_hash, read_json, sha256_file
from var_scale.model.cpu import keep_freed_memory
from var_scale.model.hub import SCHEME, repository, weights_file
from var_scale.model.load import build_model, load_tokenizer
from var_scale.model.official import require_finite
from var_scale.model.pretrained import (
    VAE_FILE,
    VAR_FILE,
    is_pretrained,
    load_files,
    load_pretrained,
)
from var_scale.model.var import VAR
from var_scale.train.checkpoint import newest_checkpoint

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model that is ready to sample, and its identity."""

    var: VAR
    """in eval mode; its tokenizer is var.vae_proxy[0]"""
    classes: int
    class_names: list[str]
    """empty if they are unknown"""
    what: dict[str, Any] = field(default_factory=dict)
    """identity: path, step, checksum"""
    path: Path = Path()
    """its place on this machine"""
    told: dict[str, Any] = field(default_factory=dict)
    """"provenance" and "numbers" (results) that a model folder of ours records"""

    def label(self, number: int) -> str:
        """The name of a class for a picture."""
        if number < 0:
            return "no class"
        return (
            f"{number} {self.class_names[number]}"
            if number < len(self.class_names)
            else f"class {number}"
        )

    def find(self, texts: Sequence[str], option: str = "--classes") -> list[int]:
        """The class numbers of numbers or names; -1 means no class.

        Raises:
            UserError: a text is neither, fits several names, or names a class twice.
        """
        found = []
        for text in texts:
            if text.lstrip("-").isdigit():
                number = int(text)
                if not -1 <= number < self.classes:
                    raise UserError(
                        f"{option} {text}: this model has classes 0 to {self.classes - 1}",
                        code="evaluate.class",
                    )
                found.append(number)
                continue
            hits = [
                k
                for k, name in enumerate(self.class_names)
                if text.lower() in map(str.strip, name.lower().split(","))
            ]
            hits = hits or [
                k for k, name in enumerate(self.class_names) if text.lower() in name.lower()
            ]
            if len(hits) != 1:
                several = ", ".join(f"{k} {self.class_names[k]}" for k in hits[:4])
                raise UserError(
                    f"{option} {text}: "
                    + (f"fits {several}; give the number" if hits else "no class has this name"),
                    code="evaluate.class",
                )
            found.append(hits[0])
        if twice := [
            text for text, number in zip(texts, found, strict=True) if found.count(number) > 1
        ]:
            raise UserError(
                f"{option} {','.join(twice)}: name the same class, so the images would be equal",
                code="evaluate.class",
            )
        return found


def load_source(
    text: str,
    device: torch.device,
    *,
    step: int | None = None,
    vae: str | None = None,
    precision: str = "fp32",
    averaged: bool = False,
    sampling: bool = True,
) -> Source:
    """Load a model.

    Args:
        text: a run folder; a model folder or `hf://OWNER/NAME`; or official weights by path or
            `hf://OWNER/NAME/FILE`.
        step: checkpoint of a run folder; by default the newest.
        vae: tokenizer of official weights; on the hub by default vae_ch160v4096z32.pth of the same
            repository.
        precision: fp32, bf16 or fp16 for the weights of the transformer and, with `sampling`, of
            the decoder. The residual stream and the quantiser stay in float32.
        averaged: use the averaged weights of a run.
        sampling: prepare the decoder for sampling; otherwise the tokenizer stays as saved.

    Raises:
        UserError: there is no such model, or an option does not apply to it.
    """
    repo = text.startswith(SCHEME) and text.removeprefix(SCHEME).count("/") == 1
    path = repository(text) if repo else weights_file(text)
    if (path / "config.yaml").exists():
        if vae is not None:
            raise UserError(
                f"--vae {vae}: {text} is a run folder and has its tokenizer; leave --vae out",
                code="evaluate.option-unfit",
            )
        source = _of_run(path, device, step, averaged)
    elif step is not None or averaged:
        raise UserError(
            f"{text}: is not a run folder, so it has no checkpoints; leave --step and --averaged "
            "out",
            code="evaluate.option-unfit",
        )
    elif path.is_dir():
        if not is_pretrained(path):
            raise UserError(
                f"{text}: is neither a run folder (config.yaml) nor a model folder (config.json, "
                "model.safetensors)",
                code="evaluate.no-model",
            )
        if vae is not None and (path / VAE_FILE).exists():
            raise UserError(
                f"--vae {vae}: {text} contains its tokenizer; leave --vae out",
                code="evaluate.option-unfit",
            )
        var, _, config = load_pretrained(path, weights_file(vae) if vae else None, device)
        what = {"model": text, "sha256": sha256_file(path / VAR_FILE)}
        told = {key: config.get(key) or {} for key in ("provenance", "numbers")}
        source = Source(
            var, var.num_classes, list(config.get("class_names") or []), what, told=told
        )
    elif path.is_file():
        beside = (
            f"{text.rsplit('/', 1)[0]}/vae_ch160v4096z32.pth"
            if text.startswith(SCHEME) and vae is None
            else vae
        )
        var, _ = load_files(path, weights_file(beside) if beside else None, device=device)
        names = imagenet_names() if var.num_classes == 1000 else []
        source = Source(var, var.num_classes, names, {"model": text, "sha256": sha256_file(path)})
    else:
        raise UserError(
            f"{text}: does not exist; give a run folder, a model folder, official weights, or "
            "hf://OWNER/NAME",
            code="evaluate.no-model",
        )
    if precision not in PRECISIONS:
        raise UserError(
            f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}",
            code="evaluate.option-unfit",
        )
    if precision != "fp32":
        source.var.to(PRECISIONS[precision])
        fix = "leave --precision out"  # the weights of the file are finite
        require_finite(dict(source.var.named_parameters()), f"{text} in {precision}", fix)
    if sampling:
        source.var.vae_proxy[0].prepare_decoder(PRECISIONS[precision])
        if device.type == "cpu":
            keep_freed_memory()
    source.what["precision"] = precision
    return replace(source, path=path)


def _of_run(folder: Path, device: torch.device, step: int | None, averaged: bool) -> Source:
    """The model of a run folder, at its newest checkpoint or that of `step`."""
    config, checkpoint = newest_checkpoint(folder, step)
    vae, vae_hash = load_tokenizer(config.tokenizer, device)
    var = build_model(config, vae, device)
    if averaged and "ema" not in checkpoint.shapes:
        raise UserError(
            f"{folder}: has no averaged weights (train.ema); leave --averaged out",
            code="evaluate.option-unfit",
        )
    checkpoint.load_into(var, "ema" if averaged else "weight")
    path = folder / "run.json"  # an imported run has none until it is trained
    names = read_json(path, "description of a run").get("class_names") if path.exists() else None
    what = {
        "run": config.name,
        "step": checkpoint.step,
        "weights": canonical_hash(checkpoint.state["files"])[:16],
        "tokenizer": vae_hash,
        "averaged": averaged,
    }
    return Source(var.eval(), config.classes, list(names or []), what)


def imagenet_names() -> list[str]:
    """The names of ImageNet's thousand classes by number."""
    return [name for _, name in sorted(imagenet_folders().items())]


def choose_device(name: str | None) -> torch.device:
    """The device of this name; by default the first GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device (code `evaluate.device`).
    """
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        raise UserError(
            f"--device {name}: is not a device; use cpu, cuda or cuda:N", code="evaluate.device"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(
            f"--device {name}: this machine has {gpus} GPUs; use cpu, or the number of one of them",
            code="evaluate.device",
        )
    return device
