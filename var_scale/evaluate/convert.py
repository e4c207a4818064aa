"""Models written as folders, and folders sent to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from var_scale.errors import UserError
from var_scale.evaluate.card import numbers_of, write_card
from var_scale.evaluate.source import Source
from var_scale.files import require_exists
from var_scale.model.hub import SCHEME, push
from var_scale.model.pretrained import (
    is_pretrained,
    load_pretrained,
    save_official,
    save_pretrained,
    save_varhf,
)


def require_empty(folder: Path) -> None:
    """Refuse a folder that holds files.

    Raises:
        UserError: code `evaluate.folder-not-empty`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: is not empty; choose another folder", code="evaluate.folder-not-empty"
        )


def convert(source: Source, out: Path, form: str, name: str | None) -> list[str]:
    """Write a model as a folder; returns lines that describe what was written. After an error
    nothing stays in the folder, so that the same command can be run again.

    Args:
        form: ours, official or varhf.
        name: title of the model card, by default the name of the folder.

    Raises:
        UserError: as `require_empty` and the writer of the form.
    """
    require_empty(out)
    try:
        return _write(source, out, form, name)
    except BaseException:
        for path in out.glob("*"):
            path.unlink()
        raise


def _write(source: Source, out: Path, form: str, name: str | None) -> list[str]:
    """`convert` into an empty folder."""
    var, vae = source.var, source.var.vae_proxy[0]
    if form == "official":
        lines = [f"{path}: written" for path in save_official(out, var, vae)]
        if vae.arch != "cnn" or 64 * var.depth != var.C:
            lines.append(
                "only var-scale can read these files: the official code does not have this "
                "tokenizer or width"
            )
        return lines
    if form == "varhf":
        save_varhf(out, var, vae)
        return [f"{out}: written; this format does not contain the tokenizer"]
    numbers = source.told.get("numbers", {})
    if (source.path / "run.json").exists():
        numbers = numbers_of(source.path)
    # A folder that was converted from a run keeps the run as its provenance.
    provenance = source.told.get("provenance") or source.what
    what = provenance | {"precision": source.what["precision"]}
    save_pretrained(out, var, vae, source.class_names, what, numbers)
    write_card(out, name or out.resolve().name, var, what, numbers)
    return [f"{out}: written"]


def require_hub_address(model: str) -> None:
    """Refuse a model that is not on the hub.

    Raises:
        UserError: code `evaluate.hub-address`.
    """
    if not model.startswith(SCHEME):
        raise UserError(
            f"{model}: is not an address on the hub; give hf://OWNER/NAME or hf://OWNER/NAME/FILE",
            code="evaluate.hub-address",
        )


def push_folder(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload a model folder, after checking that it loads; returns a line with its address.

    Raises:
        UserError: the folder holds no model (code `evaluate.not-a-model`).
    """
    if not is_pretrained(folder):
        require_exists(folder)
        raise UserError(
            f"{folder}: is not a model folder; create one with `var-scale hub convert`",
            code="evaluate.not-a-model",
        )
    load_pretrained(folder)
    return push(folder, repository, private, message)
