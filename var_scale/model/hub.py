"""Weights from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from var_scale.errors import UserError

SCHEME = "hf://"


def weights_file(text: str) -> Path:
    """A weights file by path, or `hf://OWNER/NAME/FILE` from the hub, kept in its cache (HF_HOME); HF_ENDPOINT and HF_HUB_OFFLINE count.

    UserError: huggingface_hub is missing, the address is not of that form, or the file cannot be had.
    """
    if not text.startswith(SCHEME):
        return Path(text)
    owner, _, rest = text.removeprefix(SCHEME).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise UserError(f"{text}: give hf://OWNER/NAME/FILE, such as hf://FoundationVision/var/vae_ch160v4096z32.pth")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(f'{text}: needs huggingface_hub; `pip install "var-scale[hub]"`, or give a file') from None
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:  # its clients raise errors of several packages
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{text}: cannot be had ({why}); download the file and give its path") from None
