"""A trained model by any of its names: a run folder, a folder or hub repository of a model, official weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from var_scale.data.convert import imagenet_folders
from var_scale.errors import UserError
from var_scale.files import canonical_hash, read_json, sha256_file
from var_scale.machine import keep_freed_memory
from var_scale.model.hub import SCHEME, repository, weights_file
from var_scale.model.load import build_model, load_tokenizer, tokenizer_file
from var_scale.model.pretrained import VAE_FILE, VAR_FILE, is_pretrained, load_files, load_pretrained
from var_scale.model.var import VAR
from var_scale.train.loop import newest_checkpoint

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model ready to sample, and what it is."""

    var: VAR
    """in eval mode; its tokenizer is var.vae_proxy[0]"""
    classes: int
    class_names: list[str]
    """empty where they are not known"""
    what: dict[str, Any] = field(default_factory=dict)
    """identity: path, step, checksum"""
    path: Path = Path()
    """where it lies on this machine"""
    told: dict[str, Any] = field(default_factory=dict)
    """of a folder of ours its "provenance" and "numbers", what it was made from and its study's results"""

    def label(self, number: int) -> str:
        """A class for a picture."""
        if number < 0:
            return "no class"
        return f"{number} {self.class_names[number]}" if number < len(self.class_names) else f"class {number}"

    def find(self, texts: Sequence[str], option: str = "--classes") -> list[int]:
        """Class numbers of numbers or names; -1 means none. UserError for what is neither, or fits several names."""
        found = []
        for text in texts:
            if text.lstrip("-").isdigit():
                number = int(text)
                if not -1 <= number < self.classes:
                    raise UserError(f"{option} {text}: this model has classes 0 to {self.classes - 1}")
                found.append(number)
                continue
            hits = [k for k, name in enumerate(self.class_names) if text.lower() in map(str.strip, name.lower().split(","))]
            hits = hits or [k for k, name in enumerate(self.class_names) if text.lower() in name.lower()]
            if len(hits) != 1:
                several = ", ".join(f"{k} {self.class_names[k]}" for k in hits[:4])
                raise UserError(f"{option} {text}: " + (f"fits {several}; give the number" if hits else "no class has this name"))
            found.append(hits[0])
        if twice := [text for text, number in zip(texts, found, strict=True) if found.count(number) > 1]:
            raise UserError(f"{option} {','.join(twice)}: name one class more than once; the images would be the same")
        return found


def load_source(
    text: str, device: torch.device, *, step: int | None = None, vae: str | None = None, precision: str = "fp32", averaged: bool = False,
    sampling: bool = True,
) -> Source:  # fmt: skip
    """The model of a run folder (newest checkpoint, or that of `step`; `averaged` its averaged weights), of a folder or `hf://OWNER/NAME`
    of a model, or of official weights by path or `hf://OWNER/NAME/FILE`, for which `vae` names the tokenizer (in the same repository
    vae_ch160v4096z32.pth if none is given).

    `precision`: of the transformer's weights and, for `sampling`, of the decoder, fp32, bf16 or fp16; the residual stream and the quantiser
    stay in float32. Without `sampling` the tokenizer stays as it was saved.
    """
    repo = text.startswith(SCHEME) and text.removeprefix(SCHEME).count("/") == 1
    path = repository(text) if repo else weights_file(text)
    if (path / "config.yaml").exists():
        if vae is not None:
            raise UserError(f"--vae {vae}: {text} is a run folder and knows its tokenizer; leave --vae out")
        source = _of_run(path, device, step, averaged)
    elif step is not None or averaged:
        raise UserError(f"{text}: is no run folder, so it has no checkpoints to choose from; leave --step and --averaged out")
    elif path.is_dir():
        if not is_pretrained(path):
            raise UserError(f"{text}: is neither a run folder (config.yaml) nor a folder of a model (config.json, model.safetensors)")
        if vae is not None and (path / VAE_FILE).exists():
            raise UserError(f"--vae {vae}: {text} brings its tokenizer; leave --vae out")
        var, _, config = load_pretrained(path, weights_file(vae) if vae else None, device)
        what = {"model": text, "sha256": sha256_file(path / VAR_FILE)}
        told = {key: config.get(key) or {} for key in ("provenance", "numbers")}
        source = Source(var, var.num_classes, list(config.get("class_names") or []), what, told=told)
    elif path.is_file():
        beside = f"{text.rsplit('/', 1)[0]}/vae_ch160v4096z32.pth" if text.startswith(SCHEME) and vae is None else vae
        var, _ = load_files(path, weights_file(beside) if beside else None, device=device)
        names = imagenet_names() if var.num_classes == 1000 else []
        source = Source(var, var.num_classes, names, {"model": text, "sha256": sha256_file(path)})
    else:
        raise UserError(f"{text}: does not exist; give a run folder, a folder of a model, official weights, or hf://OWNER/NAME")
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")
    if precision != "fp32":
        source.var.to(PRECISIONS[precision])
    if sampling:
        source.var.vae_proxy[0].prepare_decoder(PRECISIONS[precision])
        if device.type == "cpu":
            keep_freed_memory()
    source.what["precision"] = precision
    return replace(source, path=path)


def _of_run(folder: Path, device: torch.device, step: int | None, averaged: bool) -> Source:
    config, checkpoint = newest_checkpoint(folder, step)
    tokenizer, beside = config.tokenizer, tokenizer_file(folder.resolve().parent / "tokenizer")
    if tokenizer.weights and not weights_file(tokenizer.weights).exists() and beside.exists():  # the study was moved or copied
        tokenizer = tokenizer.model_copy(update={"weights": str(beside)})
    vae, vae_hash = load_tokenizer(tokenizer, device)
    var = build_model(config, vae, device)
    if averaged and "ema" not in checkpoint.shapes:
        raise UserError(f"{folder}: keeps no averaged weights (train.ema); leave --averaged out")
    checkpoint.load_into(var, "ema" if averaged else "weight")
    path = folder / "run.json"  # an imported run has none before it is trained
    names = read_json(path, "description of a run").get("class_names") if path.exists() else None
    what = {"run": config.name, "step": checkpoint.step, "weights": canonical_hash(checkpoint.state["files"])[:16], "tokenizer": vae_hash,
            "averaged": averaged}  # fmt: skip
    return Source(var.eval(), config.classes, list(names or []), what)


def imagenet_names() -> list[str]:
    """ImageNet's thousand, by number."""
    return [name for _, name in sorted(imagenet_folders().items())]
