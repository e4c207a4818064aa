"""Shards at URLs (http, s3, gs and every other scheme of fsspec), cached on the disk of the
node."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from var_scale.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest
from var_scale.errors import UserError
from var_scale.files import atomic_file, sha256_file
from var_scale.launchers import place_on_node
from var_scale.locks import lock
from var_scale.progress import say

TRIES, FIRST_WAIT = 5, 1.0
"""Attempts, and seconds before the second; each further pause is twice as long."""
SILENT_SECONDS = 60.0
"""Seconds without a byte after which a connection counts as lost."""
BLOCK = 1 << 22


def located(where: str, cache: str | None = None, limit: float = 500.0) -> Path | RemoteShards:
    """A folder of shards by path or URL, or a folder of indices whose tars are at a URL
    (`index_urls`).

    Args:
        cache: folder for downloaded shards; default VAR_SCALE_CACHE, or ~/.cache/var-scale/shards.
        limit: size of the cache in GB.
    """
    index = None
    if "://" not in where:
        index = Path(where)
        url = (
            load_manifest(index, check_files=False).url
            if (index / MANIFEST_NAME).exists()
            else None
        )
        if not url:
            return index
        where = url
    default = os.environ.get("VAR_SCALE_CACHE") or "~/.cache/var-scale/shards"
    root = Path(os.path.expanduser(cache or default))
    return RemoteShards(where.rstrip("/"), root, int(limit * 1e9), index)


def open_url(url: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """The bytes at a URL.

    Raises:
        UserError: the scheme is not supported, or its package is not installed.
    """
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=SILENT_SECONDS)  # type: ignore[no-any-return]
    try:
        import fsspec

        return fsspec.open(url, "rb")  # type: ignore[no-any-return]
    except ImportError as error:  # fsspec names the missing package
        raise UserError(f"{url}: {error}", code="data.url-scheme") from None
    except ValueError as error:
        raise UserError(
            f"{url}: {error}; give a folder, or a URL with a scheme that fsspec supports",
            code="data.url-scheme",
        ) from None


def tried(url: str, act: Callable[[], None]) -> None:
    """Call `act` up to TRIES times, with growing pauses.

    Raises:
        UserError: it never succeeds.
    """
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        try:
            act()
            return
        except UserError:
            raise  # another attempt does not help against a full disk
        except Exception as error:  # each protocol has errors of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if attempt == TRIES:
                raise UserError(
                    f"{url}: could not be downloaded in {TRIES} attempts ({reason}); fix this and "
                    "run the same command again",
                    code="data.download-failed",
                ) from None
            say(f"warning: {url}: {reason}; attempt {attempt + 1} of {TRIES} in {wait:.0f} s")
        time.sleep(wait)
        wait *= 2


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Download a file to `path`, completely or not at all.

    Raises:
        UserError: it cannot be downloaded, or never has the checksum.
    """

    def once() -> None:
        digest = hashlib.sha256()
        with open_url(url) as source, atomic_file(path) as target:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)
            if sha256 and digest.hexdigest() != sha256:
                raise OSError("its checksum differs from the manifest")

    tried(url, once)


class RemoteShards:
    """A folder of shards at a URL.

    Manifest and indices are downloaded at once, or copied from the folder `index`. A shard is
    downloaded when it is first needed, by one process per node.

    Raises:
        UserError: there is no manifest; the shards exceed the limit of the cache; or, in `local`, a
            shard cannot be downloaded.
    """

    def __init__(self, url: str, root: Path, limit: int, index: Path | None = None):
        self.url, self.root, self.limit = url, root, limit
        small = index.resolve().as_uri() if index else url  # source of manifest and indices
        self.folder = root / hashlib.sha256(url.encode()).hexdigest()[:16]
        with self._locked("manifest"):
            fetch(f"{small}/{MANIFEST_NAME}", self.folder / MANIFEST_NAME)
            self.manifest: Manifest = load_manifest(self.folder, check_files=False)
            needed = sum(shard.bytes for shard in self.manifest.shards)
            if needed > limit:
                raise UserError(
                    f"{url}: holds {needed / 1e9:.1f} GB, but the cache {root} may hold only "
                    f"{limit / 1e9:.1f}; raise data.cache_gb",
                    code="data.cache-size",
                )
            for shard in self.manifest.shards:
                path = self.folder / shard.index
                if not path.exists() or sha256_file(path) != shard.index_sha256:
                    fetch(f"{small}/{shard.index}", path, shard.index_sha256)

    def local(self, shard: ShardInfo) -> Path:
        """The file of a shard in the cache, downloaded if necessary."""
        path = self._place(shard)
        if not path.exists():
            with self._locked(shard.name):
                if not path.exists():
                    self._make_room(shard.bytes)
                    fetch(f"{self.url}/{shard.name}", path, shard.sha256)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return path

    def _place(self, shard: ShardInfo) -> Path:
        """The place of a shard in the cache; its name depends on its content."""
        return self.folder / f"{shard.sha256[:16]}-{shard.name}"

    def open(self, shard: ShardInfo) -> int:
        """A file descriptor of a shard; downloaded again if another process has just evicted it."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.local(shard), os.O_RDONLY | os.O_CLOEXEC)

    def drop_damaged(self) -> None:
        """Remove cached shards that have changed; they are downloaded again. The ranks of the node
        share the work."""
        part, parts = place_on_node()
        for shard in self.manifest.shards[part::parts]:
            path = self._place(shard)
            if path.exists() and sha256_file(path) != shard.sha256:
                say(f"warning: {path}: is damaged in the cache and will be downloaded again")
                path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Evict the least recently used shards of other data sets until `size` more bytes fit."""
        with lock(self.root / ".room.lock", math.inf):
            kept = []
            for path in self.root.glob("*/*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    kept.append((path.stat().st_mtime, path.stat().st_size, path))
            total = sum(length for _, length, _ in kept)
            for _, length, path in sorted(
                entry for entry in kept if entry[2].parent != self.folder
            ):
                if total + size <= self.limit:
                    return
                path.unlink(missing_ok=True)
                total -= length

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process of the node at a time."""
        with lock(self.folder / f".{name}.lock", math.inf):
            yield
