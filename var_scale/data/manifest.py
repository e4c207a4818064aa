"""manifest.json: what a folder of shards holds. It is written last, so a folder with it is
complete."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from var_scale.errors import UserError
from var_scale.files import (
    LFS_POINTER,
    canonical_hash,
    is_lfs_pointer,
    read_json,
    require_exists,
    write_json,
)

FORMAT = "var-scale-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
CHANGED = "the sha256 differs from the manifest; restore the file, or delete it and write it again"
KINDS = ("image", "tokens")
TOKEN_FIELDS = ("dtype", "views", "length", "patch_nums", "vocab_size", "tokenizer_hash")


@dataclass(frozen=True)
class ShardInfo:
    """One tar and its index: file names, samples, bytes of the tar, sha256 of both."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> ShardInfo:
        """From a progress record, which may have more fields."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Manifest:
    """A complete folder of shards.

    `source` records where the samples come from. `tokens` is None for images, otherwise
    {dtype, views, length, patch_nums, vocab_size, tokenizer_hash}.
    """

    kind: str
    split: str
    num_classes: int
    source: dict[str, Any]
    tokens: dict[str, Any] | None
    shards: tuple[ShardInfo, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def url(self) -> str | None:
        """Where the tars are, if the folder holds only their indices."""
        return self.source.get("url")

    @property
    def class_names(self) -> list[str] | None:
        """Names by class number, of the images or of those that the tokens encode; None if
        unknown."""
        source = self.source.get("images") if self.kind == "tokens" else self.source
        names = source.get("class_names") if isinstance(source, dict) else None
        return list(names) if names else None

    @property
    def digest(self) -> str:
        """The data hash: sha256 of the canonical JSON of all other entries."""
        return canonical_hash(self._body())

    def _body(self) -> dict[str, Any]:
        """The content of manifest.json without its digest."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "split": self.split,
            "num_samples": self.num_samples,
            "num_classes": self.num_classes,
            "source": self.source,
            "tokens": self.tokens,
            "shards": [asdict(shard) for shard in self.shards],
        }

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        write_json(Path(folder) / MANIFEST_NAME, {**self._body(), "digest": self.digest})


def load_manifest(folder: Path, check_files: bool = True) -> Manifest:
    """Read and check `folder`/manifest.json; with `check_files` also the sizes of all files.

    Raises:
        UserError: no manifest, another format or version, missing or altered fields, a shard that
            is missing or has another size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.exists():
        require_exists(folder)
        if below := sorted(str(found.parent) for found in folder.glob(f"*/{MANIFEST_NAME}")):
            raise UserError(
                f"{folder}: no {MANIFEST_NAME} here, but in {', '.join(below)}; give one of these",
                code="data.no-manifest",
            )
        raise UserError(
            f"{folder}: no {MANIFEST_NAME} here; finish writing the shards, or run `var-scale data "
            f"index {folder}` on tars",
            code="data.no-manifest",
        )
    raw = read_json(path, "manifest")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(
            f'{path}: is not a manifest of var-scale shards (format "{FORMAT}"); index the folder '
            "again",
            code="data.manifest-invalid",
        )
    if raw.get("version") != VERSION:
        raise UserError(
            f"{path}: has version {raw.get('version')}, but this program reads version {VERSION}; "
            "index the folder again",
            code="data.manifest-invalid",
        )
    manifest = _parse(path, raw)
    if raw.get("digest") != manifest.digest or raw.get("num_samples") != manifest.num_samples:
        raise UserError(
            f"{path}: was altered, its digest does not fit its contents; index the folder again",
            code="data.manifest-invalid",
        )
    if check_files:
        for shard in manifest.shards:
            for path, problem in lost_files(folder, manifest, shard).items():
                raise UserError(f"{path}: {problem}", code="data.shard-missing")
    return manifest


def _parse(path: Path, raw: dict[str, Any]) -> Manifest:
    """The manifest of a parsed manifest.json, checked."""
    try:
        shards = tuple(ShardInfo(**shard) for shard in raw["shards"])
        rest = {field.name: raw[field.name] for field in fields(Manifest) if field.name != "shards"}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: a field is missing or unknown ({error}); index the folder again",
            code="data.manifest-invalid",
        ) from None
    if rest["kind"] not in KINDS:
        raise UserError(
            f"{path}: kind {rest['kind']!r} is not one of {', '.join(KINDS)}; index the folder "
            "again",
            code="data.manifest-invalid",
        )
    if rest["kind"] == "tokens" and sorted(rest["tokens"] or ()) != sorted(TOKEN_FIELDS):
        raise UserError(
            f"{path}: a manifest of tokens needs the fields {', '.join(TOKEN_FIELDS)} in `tokens`; "
            "index the folder again",
            code="data.manifest-invalid",
        )
    return Manifest(shards=shards, **rest)


def lost_files(folder: Path, manifest: Manifest, shard: ShardInfo) -> dict[Path, str]:
    """What is wrong with the tar and the index of a shard, where one is missing or has another size
    than in the manifest."""
    files = [] if manifest.url else [(shard.name, shard.bytes)]
    lost = {}
    for name, size in (*files, (shard.index, shard.samples * 16)):
        path = Path(folder) / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            what = f"has {found} bytes on disk, but {size} in the manifest"
            if found is None:
                what = "is in the manifest but missing on disk"
            pointer = is_lfs_pointer(path)
            lost[path] = LFS_POINTER if pointer else f"{what}; restore it or write the data again"
    return lost
