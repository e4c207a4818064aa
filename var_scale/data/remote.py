"""Shards behind a URL (http, and s3, gs and whatever else fsspec opens), kept whole in a cache on the node's own disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from var_scale.data.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest
from var_scale.errors import UserError
from var_scale.files import atomic_file, disk_errors, sha256_file
from var_scale.progress import say

TRIES, FIRST_WAIT = 5, 1.0  # seconds before the second try; each further wait is twice as long
SILENT_SECONDS = 60.0  # without a byte, after which a connection counts as lost
BLOCK = 1 << 22


def located(where: str, cache: str | None = None, limit: float = 500.0) -> Path | RemoteShards:
    """A folder of shards by path or URL, or one of indices alone whose tars are at a URL (`index_urls`). `cache` and `limit` (GB): of
    what a URL's shards are kept in."""
    index = None
    if "://" not in where:
        index = Path(where)
        url = load_manifest(index, check_files=False).url if (index / MANIFEST_NAME).exists() else None
        if not url:
            return index
        where = url
    root = Path(cache or os.environ.get("VAR_SCALE_CACHE") or Path.home() / ".cache" / "var-scale" / "shards")
    return RemoteShards(where.rstrip("/"), root, int(limit * 1e9), index)


def open_url(url: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """The bytes behind a URL. UserError for a protocol that cannot be opened here."""
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=SILENT_SECONDS)  # type: ignore[no-any-return]
    try:
        import fsspec

        return fsspec.open(url, "rb")  # type: ignore[no-any-return]
    except ImportError as error:  # fsspec names the package of the protocol
        raise UserError(f"{url}: {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}; give a folder, or a URL of a protocol that fsspec knows") from None


def tried(url: str, act: Callable[[], None]) -> None:
    """`act` several times, with growing waits. UserError if it never succeeds."""
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        try:
            act()
            return
        except UserError:
            raise  # a full disk is not mended by another try
        except Exception as error:  # clients of many protocols, each with its own
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            if attempt == TRIES:
                raise UserError(f"{url}: cannot be had after {TRIES} tries ({why}); mend it and run the same command again") from None
            say(f"warning: {url}: {why}; try {attempt + 1} of {TRIES} in {wait:.0f} s")
        time.sleep(wait)
        wait *= 2


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """A file of a URL to `path`, whole or not at all. UserError if it cannot be had, or never with the checksum."""

    def once() -> None:
        digest = hashlib.sha256()
        with open_url(url) as source, atomic_file(path) as target:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)
            if sha256 and digest.hexdigest() != sha256:
                raise OSError("it came with another checksum than the manifest says")

    tried(url, once)


class RemoteShards:
    """A folder of shards at a URL. Manifest and indices are fetched at once, or taken from the folder `index`, a shard when it is first
    asked for, by one process a node.

    UserError: no manifest there; more bytes than the cache may hold; `local`: a shard that cannot be had or never comes as it should.
    """

    def __init__(self, url: str, root: Path, limit: int, index: Path | None = None):
        self.url, self.root, self.limit = url, root, limit
        small = index.resolve().as_uri() if index else url  # where manifest and indices come from
        self.folder = root / hashlib.sha256(url.encode()).hexdigest()[:16]
        with self._locked("manifest"):
            fetch(f"{small}/{MANIFEST_NAME}", self.folder / MANIFEST_NAME)
            self.manifest: Manifest = load_manifest(self.folder, check_files=False)
            needed = sum(shard.bytes for shard in self.manifest.shards)
            if needed > limit:
                raise UserError(f"{url}: holds {needed / 1e9:.1f} GB, the cache {root} may hold {limit / 1e9:.1f}; raise data.cache_gb")
            for shard in self.manifest.shards:
                path = self.folder / shard.index
                if not path.exists() or sha256_file(path) != shard.index_sha256:
                    fetch(f"{small}/{shard.index}", path, shard.index_sha256)

    def local(self, shard: ShardInfo) -> Path:
        """The shard in the cache."""
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
        """Where a shard is kept: data made anew under the same names are other files."""
        return self.folder / f"{shard.sha256[:16]}-{shard.name}"

    def open(self, shard: ShardInfo) -> int:
        """A file descriptor of the shard; fetched again if another process made room of it just now."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.local(shard), os.O_RDONLY | os.O_CLOEXEC)

    def drop_damaged(self) -> None:
        """Remove shards of this node's cache whose bytes have changed since; they are fetched again. The node's ranks share the work."""
        part, parts = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for shard in self.manifest.shards[part::parts]:
            path = self._place(shard)
            if path.exists() and sha256_file(path) != shard.sha256:
                say(f"warning: {path}: damaged in the cache; it is fetched again")
                path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the shards of other data sets that were not opened for longest, until `size` more bytes fit."""
        with open(self.root / ".room.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = []
            for path in self.root.glob("*/*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    kept.append((path.stat().st_mtime, path.stat().st_size, path))
            total = sum(length for _, length, _ in kept)
            for _, length, path in sorted(entry for entry in kept if entry[2].parent != self.folder):
                if total + size <= self.limit:
                    return
                path.unlink(missing_ok=True)
                total -= length

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process of the node at a time."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
