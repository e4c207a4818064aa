"""The Hugging Face hub: files and whole repositories down, folders up. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from var_scale.errors import UserError

SCHEME = "hf://"
T = TypeVar("T")


def weights_file(text: str) -> Path:
    """A weights file by path, or `hf://OWNER/NAME/FILE` from the hub, kept in its cache.

    UserError: huggingface_hub is missing, the address is not of that form, or the file cannot be had.
    """
    if not text.startswith(SCHEME):
        return Path(text)
    owner, _, rest = text.removeprefix(SCHEME).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise UserError(f"{text}: give hf://OWNER/NAME/FILE, such as hf://FoundationVision/var/vae_ch160v4096z32.pth")

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(f"{owner}/{name}", file, local_files_only=not _reachable())

    return Path(_ask(text, "download the file and give its path", download))


def repository(text: str) -> Path:
    """The folder of `hf://OWNER/NAME`: its newest state, config.json and safetensors alone, kept in the hub's cache."""
    name = _name(text)

    def download() -> str:
        from huggingface_hub import snapshot_download

        allowed = ["*.json", "*.safetensors", "README.md"]
        return snapshot_download(name, allow_patterns=allowed, local_files_only=not _reachable())

    return Path(_ask(text, "download the repository and give its folder", download))


def push(folder: Path, text: str, private: bool, message: str) -> str:
    """Put the files of a folder into the repository `hf://OWNER/NAME`, made if it is not there; returns the commit's address."""
    name = _name(text)

    def upload() -> str:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)

    return _ask(text, "look at the connection, or log in with `hf auth login` or HF_TOKEN", upload, "the hub did not take it")


def _name(text: str) -> str:
    """OWNER/NAME of hf://OWNER/NAME."""
    name = text.removeprefix(SCHEME)
    if not text.startswith(SCHEME) or name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{text}: give hf://OWNER/NAME")
    return name


def _reachable() -> bool:
    """Whether the hub takes a connection; behind a proxy it is taken to. The client itself tries for half a minute before it looks into its
    cache."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=10).close()
    except OSError:
        return False
    return True


def _ask(text: str, help: str, ask: Callable[[], T], failed: str = "cannot be had") -> T:
    """What the hub's client gives, its errors as one line."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(f'{text}: needs huggingface_hub; `pip install "var-scale[hub]"`, or {help}') from None
    try:
        return ask()
    except Exception as error:  # its clients raise errors of several packages
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, LocalEntryNotFoundError):
            off = "is not asked, as HF_HUB_OFFLINE says" if constants.HF_HUB_OFFLINE else "cannot be reached"
            why = f"it is not in the hub's cache, and {constants.ENDPOINT} {off}"
        raise UserError(f"{text}: {failed} ({why}); {help}") from None
