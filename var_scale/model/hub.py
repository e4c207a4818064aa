"""Downloads from and uploads to the Hugging Face hub.

The variables HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from var_scale.errors import UserError
from var_scale.files import full_disk

SCHEME = "hf://"
T = TypeVar("T")


def weights_file(text: str) -> Path:
    """The path of a weights file: `text` itself, or where the hub's cache holds it.

    A text of the form `hf://OWNER/NAME/FILE` is downloaded from the hub.

    Raises:
        UserError: code `model.hub-address`, `model.hub-package` or `model.hub-failed`.
    """
    if not text.startswith(SCHEME):
        return Path(text)
    owner, _, rest = text.removeprefix(SCHEME).partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise UserError(
            f"{text}: give hf://OWNER/NAME/FILE, such as "
            "hf://FoundationVision/var/vae_ch160v4096z32.pth",
            code="model.hub-address",
        )

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(f"{owner}/{name}", file, local_files_only=not _reachable())

    return Path(_ask(text, "download the file and give its path", download))


def repository(text: str) -> Path:
    """The folder in the hub's cache with the newest state of `hf://OWNER/NAME`.

    Only its JSON files, safetensors and README are downloaded.

    Raises:
        UserError: as `weights_file`.
    """
    name = _name(text)

    def download() -> str:
        from huggingface_hub import snapshot_download

        allowed = ["*.json", "*.safetensors", "README.md"]
        return snapshot_download(name, allow_patterns=allowed, local_files_only=not _reachable())

    return Path(_ask(text, "download the repository and give its folder", download))


def push(folder: Path, text: str, private: bool, message: str) -> str:
    """Upload the files of a folder into `hf://OWNER/NAME`, which is created if it does not exist.

    Returns the address of the commit.

    Raises:
        UserError: as `weights_file`.
    """
    name = _name(text)

    def upload() -> str:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url
        )

    return _ask(
        text,
        "check the connection, or log in with `hf auth login` or HF_TOKEN",
        upload,
        "could not be uploaded",
    )


def _name(text: str) -> str:
    """OWNER/NAME of hf://OWNER/NAME."""
    name = text.removeprefix(SCHEME)
    if not text.startswith(SCHEME) or name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{text}: give hf://OWNER/NAME", code="model.hub-address")
    return name


def _reachable() -> bool:
    """Whether the hub accepts a connection; behind a proxy it is assumed to. The hub's client
    itself would try for half a minute before it looks into its cache."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (address.hostname or "", address.port or (80 if address.scheme == "http" else 443)),
            timeout=10,
        ).close()
    except OSError:
        return False
    return True


def _ask(text: str, help: str, ask: Callable[[], T], failed: str = "could not be downloaded") -> T:
    """The result of `ask`, which calls the hub's client; its errors become one line."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f'{text}: this needs huggingface_hub; run `pip install "var-scale[hub]"`, or {help}',
            code="model.hub-package",
        ) from None
    try:
        return ask()
    except Exception as error:  # the client raises errors of several packages
        if full := full_disk(error, f"{text}: {constants.HF_HOME}"):
            raise full from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, LocalEntryNotFoundError):
            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
            reason = f"it is not in the hub's cache; {constants.ENDPOINT}: {offline}"
        raise UserError(f"{text}: {failed} ({reason}); {help}", code="model.hub-failed") from None
